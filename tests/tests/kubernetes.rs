//! The node's daemon and the Kubernetes API, over HTTP and TLS. The server is the
//! harness' own: the real one is in no package that could be installed.

use std::{
    fs,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use interceptor_tests::{
    bpf,
    cli::Cli,
    command::{unique_name, wait_until},
    daemon::{Daemon, LIMIT},
    inside::Inside,
    kubernetes::{ApiServer, Failure, injected_pod},
    pod::{Credentials, Host, Pod},
    world::{APP, EVERYWHERE, PORT, Way, World, assert_direct, assert_served, objects},
};
use interceptor_userspace::api::{Answer, CniAttachment, CniPod, PodState, PodStatus, Request};
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::{Value, json};

const NODE: &str = "node-a.example";

/// Long enough for what should not happen to happen.
const MOMENT: Duration = Duration::from_millis(700);

fn settings(server: &ApiServer) -> String {
    format!(
        "kubernetes = true\nnode-name = '{NODE}'\nkubeconfig = '{}'",
        server.kubeconfig().display()
    )
}

fn uid() -> String {
    unique_name("0e1d2c3b-4a59-6877")
}

/// The name under which a pod of the namespace `default` is known.
fn known_as(name: &str, uid: &str) -> String {
    format!("default_{name}_{uid}")
}

fn pod(name: &str, uid: &str) -> Value {
    injected_pod(NODE, "default", name, uid)
}

fn annotate(pod: &mut Value, name: &str, value: &str) {
    pod["metadata"]["annotations"][name] = value.into();
}

fn cni(pod: &Pod, name: &str, uid: &str) -> CniPod {
    CniPod {
        attachment: CniAttachment {
            container_id: format!("c{uid}"),
            interface: "eth0".to_owned(),
        },
        netns: pod.netns().path(),
        namespace: Some("default".to_owned()),
        name: Some(name.to_owned()),
        uid: Some(uid.to_owned()),
        annotations: None,
        args: String::new(),
    }
}

/// Waits until the daemon says this of why a pod isn't attached.
fn wait_until_said(daemon: &Daemon, name: &str, said: &str) -> Result<PodStatus> {
    wait_until(&format!("{name}: {said}"), LIMIT, || {
        Ok(daemon.pod(name)?.filter(|pod| {
            pod.because
                .as_ref()
                .is_some_and(|because| because.contains(said))
        }))
    })
    .with_context(|| format!("{:?}\n{}", daemon.pods(), daemon.log()))
}

/// Waits until a counter of failures isn't 0.
fn wait_until_counted(daemon: &Daemon, operation: &str, cause: &str) -> Result<()> {
    repeat_until_counted(daemon, operation, cause, || ())
}

/// Cuts all watches until the failure of a later one is counted: one that the server is
/// just letting in isn't cut.
fn cut_until_counted(server: &ApiServer, daemon: &Daemon, cause: &str) -> Result<()> {
    repeat_until_counted(daemon, "watch", cause, || server.cut())
}

fn repeat_until_counted(
    daemon: &Daemon,
    operation: &str,
    cause: &str,
    work: impl Fn(),
) -> Result<()> {
    let line = format!("interceptor_failures_total{{operation=\"{operation}\",cause=\"{cause}\"}}");
    wait_until(&line, LIMIT, || {
        work();
        let (_, metrics) = daemon.http("/metrics")?;
        Ok(metrics.contains(&line).then_some(()))
    })
    .with_context(|| {
        daemon
            .http("/metrics")
            .map_or_else(|error| error.to_string(), |(_, text)| text)
    })
    .with_context(|| daemon.log())
}

#[test]
fn pods_that_were_there_are_attached_as_their_annotations_say() -> Result<()> {
    let uid = uid();
    let (server, world) = (ApiServer::start()?, World::of(Pod::of_kubernetes(&uid)?)?);
    let [to, _] = Way::Out.destinations();
    let mut object = pod("web", &uid);
    annotate(
        &mut object,
        "traffic.sidecar.istio.io/excludeOutboundPorts",
        &PORT.to_string(),
    );
    server.put(object.clone());
    // One of another node's, though its cgroup is here.
    let other = (self::uid(), "elsewhere");
    let other_pod = Pod::of_kubernetes(&other.0)?;
    let _other_app = Inside::start(&other_pod, Host::Pod, APP)?;
    server.put(injected_pod("node-b", "default", other.1, &other.0));

    let daemon = Daemon::start(&world.cli, &settings(&server))?;
    let name = known_as("web", &uid);
    let status = daemon.wait_for(&name, PodState::Attached)?;
    ensure!(status.source == "kubernetes", "{status:?}");
    ensure!(
        status.cgroup.as_deref() == Some(world.pod.cgroup().path()),
        "{status:?}"
    );
    ensure!(daemon.pods()?.len() == 1, "{:?}", daemon.pods()?);
    let sources = daemon.status()?.sources;
    ensure!(
        sources.iter().any(|source| source.contains(NODE)),
        "{sources:?}"
    );
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    assert_direct("PEER", &world.app, to)?;
    let [inbound, _] = Way::In.destinations();
    assert_served(Way::In, &world.peer, inbound)?;

    // This node's and nothing else is ever asked for.
    let requests = server.requests();
    ensure!(
        requests.len() >= 2
            && requests
                .iter()
                .all(|asked| asked.contains(&format!("fieldSelector=spec.nodeName%3D{NODE}"))),
        "{requests:?}"
    );

    // What changes later is not looked at, as by the mesh's own.
    annotate(
        &mut object,
        "traffic.sidecar.istio.io/excludeOutboundPorts",
        "1",
    );
    server.put(object.clone());
    annotate(&mut object, "sidecar.istio.io/inject", "false");
    server.put(object);
    thread::sleep(MOMENT);
    assert_direct("PEER", &world.app, to)?;
    daemon.wait_for(&name, PodState::Attached)?;
    Ok(())
}

#[test]
fn one_that_starts_later_is_attached_and_one_that_has_ended_detached() -> Result<()> {
    let uid = uid();
    let (mut server, cli) = (ApiServer::start()?, Cli::new()?);
    // The tree is watched for the API's pods alone, though it is given, too.
    let daemon = Daemon::start(
        &cli,
        &format!("{}\ncgroups = ['kubepods']", settings(&server)),
    )?;
    let name = known_as("web", &uid);
    server.put(pod("web", &uid));
    wait_until_said(&daemon, &name, "no cgroup yet")?;
    let pod = Pod::of_kubernetes(&uid)?;
    wait_until_said(&daemon, &name, "no process")?;
    let app = Inside::start(&pod, Host::Pod, APP)?;
    daemon.wait_for(&name, PodState::Attached)?;
    ensure!(daemon.pods()?.len() == 1, "{:?}", daemon.pods()?);
    let all = objects(&cli, &name)?;

    // Deleted by force: its processes still run, and must not pass the proxy.
    server.delete("default", "web");
    thread::sleep(MOMENT);
    daemon.wait_for(&name, PodState::Attached)?;
    ensure!(objects(&cli, &name)? == all);
    drop(app);
    daemon.wait_until_gone(&name)?;
    bpf::wait_until_gone(&all)?;

    // The same while the daemon isn't there, and one that has completed.
    for (number, end) in ["deleted", "Succeeded", "Failed"].into_iter().enumerate() {
        let app = Inside::start(&pod, Host::Pod, APP)?;
        let mut object = self::pod(&format!("job-{number}"), &uid);
        server.put(object.clone());
        let name = known_as(&format!("job-{number}"), &uid);
        daemon.wait_for(&name, PodState::Attached)?;
        server.stop();
        if end == "deleted" {
            server.delete("default", "job-0");
        } else {
            object["status"]["phase"] = end.into();
            server.put(object);
        }
        server.resume()?;
        drop(app);
        daemon.wait_until_gone(&name)?;
    }
    Ok(())
}

#[test]
fn who_is_left_alone_is_told_why() -> Result<()> {
    let (server, cli) = (ApiServer::start()?, Cli::new()?);
    let change = |pointer: &str, value: Value| (pointer.to_owned(), value);
    let annotations = "/metadata/annotations";
    let cases = [
        (
            "host",
            change("/spec/hostNetwork", json!(true)),
            "machine's own network",
        ),
        (
            "plain",
            change(annotations, json!({})),
            "sidecar.istio.io/status is missing",
        ),
        (
            "bare",
            change("/spec/containers", json!([{"name": "app"}])),
            "no container is named",
        ),
        (
            "label",
            change("/metadata/labels/sidecar.istio.io~1inject", json!("false")),
            "its label sidecar.istio.io/inject is false",
        ),
        (
            "annotation",
            change(
                &format!("{annotations}/sidecar.istio.io~1inject"),
                json!("false"),
            ),
            "its annotation sidecar.istio.io/inject is false",
        ),
        (
            "init",
            change("/spec/initContainers/0/name", json!("istio-init")),
            "redirects already",
        ),
        (
            "gateway",
            change("/spec/containers/1/args/1", json!("router")),
            "its proxy is a router",
        ),
        (
            "off",
            change(
                "/spec/containers/1/env/0",
                json!({"name": "DISABLE_ENVOY", "value": "true"}),
            ),
            "DISABLE_ENVOY",
        ),
        (
            "ambient",
            change(
                &format!("{annotations}/ambient.istio.io~1redirection"),
                json!("enabled"),
            ),
            "ambient mode",
        ),
        (
            "unreadable",
            change(
                &format!("{annotations}/traffic.sidecar.istio.io~1excludeOutboundPorts"),
                json!("eighty"),
            ),
            "eighty",
        ),
        (
            "waiting",
            change("/status/phase", json!("Pending")),
            "no cgroup yet",
        ),
    ];
    // The one whose annotation can't be read is found out when it would be attached.
    let unreadable_uid = uid();
    let unreadable = Pod::of_kubernetes(&unreadable_uid)?;
    let _app = Inside::start(&unreadable, Host::Pod, APP)?;
    let mut expected = Vec::new();
    for (name, (pointer, value), said) in &cases {
        let uid = if *name == "unreadable" {
            unreadable_uid.clone()
        } else {
            uid()
        };
        let mut object = pod(name, &uid);
        let (parent, key) = pointer.rsplit_once('/').context("no pointer")?;
        let key = key.replace("~1", "/");
        let place = object.pointer_mut(parent).context("no such place")?;
        match key.parse::<usize>() {
            Ok(index) => place[index] = value.clone(),
            Err(_) => place[key.as_str()] = value.clone(),
        }
        server.put(object);
        expected.push((known_as(name, &uid), *said));
    }
    let system = uid();
    server.put(injected_pod(NODE, "kube-system", "system", &system));
    expected.push((
        format!("kube-system_system_{system}"),
        "kube-system is excluded",
    ));
    // Those that have ended aren't spoken of.
    let mut ended = pod("ended", &uid());
    ended["status"]["phase"] = "Succeeded".into();
    server.put(ended);

    let daemon = Daemon::start(&cli, &settings(&server))?;
    for (name, said) in &expected {
        let status = wait_until_said(&daemon, name, said)?;
        let state = if *said == "eighty" {
            PodState::Failed
        } else {
            PodState::LeftAlone
        };
        ensure!(
            status.state == state && status.source == "kubernetes",
            "{status:?}"
        );
    }
    ensure!(
        daemon.pods()?.len() == expected.len(),
        "{:?}",
        daemon.pods()?
    );

    // At CNI's ADD the same is said.
    let netns = Pod::new()?;
    for (name, said) in &expected {
        let mut parts = name.split('_');
        let namespace = parts.next().context("no namespace")?;
        let (pod_name, uid) = (
            parts.next().context("no name")?,
            parts.next().context("no uid")?,
        );
        let request = CniPod {
            namespace: Some(namespace.to_owned()),
            ..cni(&netns, pod_name, uid)
        };
        let answer = daemon.ask(&Request::CniAdd(request.clone()))?;
        match &answer {
            Answer::LeftAlone { because } => ensure!(because.contains(said), "{name}: {because}"),
            // It has no cgroup here, or its annotation can't be.
            Answer::Refused { error, .. } => {
                ensure!(
                    error.contains("no cgroup yet") || error.contains(said),
                    "{name}: {error}"
                );
                ensure!(
                    ["eighty", "no cgroup yet"].contains(said),
                    "{name}: {error}"
                );
            }
            other => bail!("{name}: {other:?}"),
        }
        ensure!(daemon.ask(&Request::CniDel(request.attachment))? == Answer::Done);
    }
    Ok(())
}

#[test]
fn at_add_the_api_is_asked_for_what_the_runtime_does_not_say() -> Result<()> {
    let uid = uid();
    let (server, world) = (ApiServer::start()?, World::of(Pod::of_kubernetes(&uid)?)?);
    let daemon = Daemon::start(&world.cli, &settings(&server))?;
    let [to, _] = Way::Out.destinations();
    let mut object = injected_pod("node-b", "default", "web", &uid);
    annotate(
        &mut object,
        "traffic.sidecar.istio.io/excludeOutboundPorts",
        &PORT.to_string(),
    );
    // The watch never tells of it, as if ADD were faster.
    server.put(object);
    let request = cni(&world.pod, "web", &uid);
    let answer = daemon.ask(&Request::CniAdd(request.clone()))?;
    let Answer::Attached { pod: name } = &answer else {
        bail!("{answer:?}\n{}", daemon.log());
    };
    ensure!(server.asked("/api/v1/namespaces/default/pods/web") == 1);
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    assert_direct("PEER", &world.app, to)?;
    ensure!(daemon.ask(&Request::CniCheck(request.clone()))? == answer);
    ensure!(daemon.wait_for(name, PodState::Attached)?.source == "cni");

    // What it doesn't know, or knows as another.
    for (name, other_uid, said) in [
        ("none", &*uid, "404 NotFound"),
        ("web", "another", "it has been replaced"),
        ("../web", "another", "is no name"),
    ] {
        let answer = daemon.ask(&Request::CniAdd(cni(&world.pod, name, other_uid)))?;
        ensure!(
            matches!(&answer, Answer::Refused { error, again: true } if error.contains(said)),
            "{answer:?}"
        );
    }
    // Nobody is asked about pods of excluded namespaces, none of Kubernetes', and
    // those of which the runtime says enough.
    let before = server.asked("/namespaces/");
    for request in [
        CniPod {
            namespace: Some("kube-system".to_owned()),
            ..request.clone()
        },
        CniPod {
            namespace: None,
            name: None,
            ..request.clone()
        },
        CniPod {
            annotations: Some([].into()),
            ..request.clone()
        },
    ] {
        let answer = daemon.ask(&Request::CniAdd(request))?;
        ensure!(matches!(answer, Answer::LeftAlone { .. }), "{answer:?}");
    }
    ensure!(server.asked("/namespaces/") == before);
    Ok(())
}

#[test]
fn a_pod_that_both_tell_of_is_attached_once() -> Result<()> {
    let uid = uid();
    let (server, world) = (ApiServer::start()?, World::of(Pod::of_kubernetes(&uid)?)?);
    let daemon = Daemon::start(&world.cli, &settings(&server))?;
    server.put(pod("web", &uid));
    let name = known_as("web", &uid);
    daemon.wait_for(&name, PodState::Attached)?;
    let request = cni(&world.pod, "web", &uid);
    let answer = daemon.ask(&Request::CniAdd(request.clone()))?;
    let Answer::Attached { pod: by_cni } = answer else {
        bail!("{answer:?}\n{}", daemon.log());
    };
    // It was in what was listed already.
    ensure!(server.asked("/namespaces/") == 0);
    let one = || -> Result<()> {
        let pods = daemon.pods()?;
        ensure!(
            pods.len() == 1 && pods[0].pod == by_cni && pods[0].source == "cni",
            "{pods:?}"
        );
        Ok(())
    };
    one()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.assert_intercepted()?;
    let mut changed = pod("web", &uid);
    annotate(&mut changed, "sidecar.istio.io/inject", "true");
    server.put(changed);
    server.put(pod("other", &self::uid()));
    wait_until("the other is told of", LIMIT, || {
        Ok((daemon.pods()?.len() == 2).then_some(()))
    })?;
    server.delete("default", "other");
    wait_until("the other is gone", LIMIT, || {
        Ok((daemon.pods()?.len() == 1).then_some(()))
    })?;
    one()
}

#[test]
fn without_the_api_add_is_refused_with_the_reason() -> Result<()> {
    let uid = uid();
    let (mut server, world) = (ApiServer::start()?, World::of(Pod::of_kubernetes(&uid)?)?);
    server.stop();
    let mut daemon = Daemon::prepare(&world.cli, &settings(&server))?;
    daemon.restart_until(&world.cli, |_| true)?;
    let request = cni(&world.pod, "web", &uid);
    let refused = |daemon: &Daemon, said: &str| -> Result<()> {
        let start = Instant::now();
        let answer = daemon.ask(&Request::CniAdd(request.clone()))?;
        ensure!(
            matches!(&answer, Answer::Refused { error, again: true }
                if error.contains(said) && error.contains("default/web")),
            "{answer:?}"
        );
        ensure!(
            start.elapsed() < Duration::from_secs(10),
            "{:?}",
            start.elapsed()
        );
        ensure!(daemon.pods()?.is_empty(), "{:?}", daemon.pods()?);
        Ok(())
    };
    refused(&daemon, "Connection refused")?;
    wait_until_counted(&daemon, "list", "ECONNREFUSED")?;
    // It isn't ready, but alive, and what the runtime says suffices.
    ensure!(daemon.http("/readyz")?.0 == 503 && daemon.http("/healthz")?.0 == 200);
    ensure!(daemon.ask(&Request::CniStatus)? == Answer::Done);
    let told = CniPod {
        annotations: Some([("sidecar.istio.io/status".to_owned(), "{}".to_owned())].into()),
        ..request.clone()
    };
    let answer = daemon.ask(&Request::CniAdd(told))?;
    ensure!(matches!(answer, Answer::Attached { .. }), "{answer:?}");
    ensure!(daemon.ask(&Request::CniDel(request.attachment.clone()))? == Answer::Done);

    server.fail(Some(Failure::Refuse(403)));
    server.resume()?;
    refused(&daemon, "403 Forbidden: as the test has it")?;
    server.fail(Some(Failure::Silence));
    refused(&daemon, "timed out")?;
    server.fail(Some(Failure::Say("<html>".to_owned())));
    refused(&daemon, "can't be read")?;
    ensure!(daemon.http("/readyz")?.0 == 503);
    wait_until_counted(&daemon, "get", "Forbidden")?;
    wait_until_counted(&daemon, "get", "ETIMEDOUT")?;

    // Let pass, it is attached when the API says what it is.
    daemon.stop()?;
    let config = fs::read_to_string(daemon.config())?;
    fs::write(daemon.config(), format!("on-failure = 'pass'\n{config}"))?;
    server.fail(Some(Failure::Refuse(500)));
    daemon.restart_until(&world.cli, |_| true)?;
    let answer = daemon.ask(&Request::CniAdd(request))?;
    ensure!(
        matches!(&answer, Answer::LeftAlone { because } if because.contains("500 InternalError")),
        "{answer:?}"
    );
    let [failed] = &daemon.pods()?[..] else {
        bail!("{:?}", daemon.pods()?)
    };
    ensure!(failed.state == PodState::Failed, "{failed:?}");
    server.put(pod("web", &uid));
    server.fail(None);
    daemon.wait_for(&failed.pod, PodState::Attached)?;
    ensure!(daemon.pods()?.len() == 1, "{:?}", daemon.pods()?);
    wait_until("it is ready", LIMIT, || {
        Ok((daemon.http("/readyz")?.0 == 200).then_some(()))
    })
}

#[test]
fn whatever_becomes_of_the_watch_nothing_is_lost() -> Result<()> {
    let uid = uid();
    let (mut server, world) = (ApiServer::start()?, World::of(Pod::of_kubernetes(&uid)?)?);
    server.put(pod("web", &uid));
    let mut daemon = Daemon::start(&world.cli, &settings(&server))?;
    let name = known_as("web", &uid);
    daemon.wait_for(&name, PodState::Attached)?;
    let attached = objects(&world.cli, &name)?;
    let whole = |daemon: &Daemon| -> Result<()> {
        daemon.wait_for(&name, PodState::Attached)?;
        ensure!(
            objects(&world.cli, &name)? == attached,
            "it was attached anew"
        );
        Ok(())
    };
    let appears = |daemon: &Daemon, server: &ApiServer, pod_name: &str| -> Result<()> {
        let uid = self::uid();
        server.put(pod(pod_name, &uid));
        wait_until_said(daemon, &known_as(pod_name, &uid), "no cgroup").map(drop)
    };
    // It is told how far it has got, though nothing happens on this node.
    server.put(injected_pod("node-b", "default", "elsewhere", &self::uid()));
    thread::sleep(MOMENT);
    let lists = |server: &ApiServer| {
        let all = server.requests();
        all.iter()
            .filter(|asked| asked.contains("pods?") && !asked.contains("watch=true"))
            .count()
    };
    ensure!(lists(&server) == 1, "{:?}", server.requests());

    // Cut off: it goes on from where it was, and lists nothing anew.
    server.cut();
    appears(&daemon, &server, "after-cut")?;
    ensure!(lists(&server) == 1, "{:?}", server.requests());
    let watches = server.requests();
    let versions: Vec<&str> = watches
        .iter()
        .filter_map(|asked| {
            asked
                .split_once("resourceVersion=")
                .map(|(_, version)| version)
        })
        .collect();
    ensure!(
        versions.len() >= 2 && versions[0] != versions[1],
        "{versions:?}"
    );

    // Gone, and back, with changes meanwhile.
    server.stop();
    thread::sleep(MOMENT);
    server.delete("default", "after-cut");
    server.resume()?;
    appears(&daemon, &server, "after-stop")?;
    wait_until("what was deleted is gone", LIMIT, || {
        let pods = daemon.pods()?;
        Ok((!pods.iter().any(|pod| pod.pod.contains("after-cut"))).then_some(()))
    })?;
    ensure!(lists(&server) == 1, "{:?}", server.requests());
    wait_until_counted(&daemon, "watch", "ECONNREFUSED")?;

    // Gone for so long that nobody knows what happened.
    server.stop();
    server.delete("default", "after-stop");
    server.compact();
    server.resume()?;
    appears(&daemon, &server, "after-410")?;
    wait_until("what was deleted is gone", LIMIT, || {
        let pods = daemon.pods()?;
        Ok((!pods.iter().any(|pod| pod.pod.contains("after-stop"))).then_some(()))
    })?;
    ensure!(lists(&server) == 2, "{:?}", server.requests());
    wait_until_counted(&daemon, "watch", "Expired")?;

    // Another token: the file is read anew.
    server.want_token("second");
    cut_until_counted(&server, &daemon, "Unauthorized")?;
    server.write_token("second")?;
    appears(&daemon, &server, "after-token")?;

    // Refused for a while.
    server.fail(Some(Failure::Refuse(500)));
    cut_until_counted(&server, &daemon, "InternalError")?;
    server.fail(None);
    appears(&daemon, &server, "after-500")?;
    whole(&daemon)?;

    // Killed, and meanwhile no server: all stays, and is found again.
    server.stop();
    daemon.kill()?;
    daemon.restart_until(&world.cli, |status| !status.ready)?;
    whole(&daemon)?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.assert_intercepted()?;
    server.resume()?;
    appears(&daemon, &server, "after-kill")?;
    whole(&daemon)
}

#[test]
fn whatever_the_api_says_it_goes_on() -> Result<()> {
    let uid = uid();
    let (server, world) = (ApiServer::start()?, World::of(Pod::of_kubernetes(&uid)?)?);
    server.put(pod("web", &uid));
    let daemon = Daemon::start(&world.cli, &settings(&server))?;
    let name = known_as("web", &uid);
    daemon.wait_for(&name, PodState::Attached)?;
    let attached = objects(&world.cli, &name)?;

    // Objects of any kind, in the place of parts of a pod; some without a name.
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "\\PC{0,40}".prop_map(Value::from),
        Just(json!([null, {}, {"name": 1}])),
        Just(json!({"a": 1})),
    ];
    let parts = prop::sample::select(vec![
        "/metadata",
        "/metadata/uid",
        "/metadata/annotations",
        "/metadata/annotations/sidecar.istio.io~1status",
        "/metadata/labels",
        "/spec",
        "/spec/hostNetwork",
        "/spec/containers",
        "/spec/containers/1/args",
        "/spec/containers/1/env",
        "/status",
        "/status/phase",
    ]);
    let mut runner = TestRunner::new(proptest::test_runner::Config::with_cases(120));
    let number = std::cell::Cell::new(0);
    runner.run(&prop::collection::vec((parts, leaf), 1..3), |changes| {
        number.set(number.get() + 1);
        let mut object = pod(&format!("odd-{}", number.get()), &self::uid());
        object["spec"]["hostNetwork"] = true.into();
        for (part, value) in changes {
            if let Some(place) = object.pointer_mut(part) {
                *place = value;
            }
        }
        server.put(object);
        Ok(())
    })?;
    for said in [
        "",
        "null",
        "{}",
        "<html></html>",
        "{\"type\":\"ADDED\"}",
        "{\"type\":\"ADDED\",\"object\":[]}",
        "{\"type\":\"DELETED\",\"object\":{}}",
        "{\"type\":\"BOOKMARK\",\"object\":{}}",
        "{\"type\":\"ERROR\",\"object\":{\"code\":500}}",
        "{\"object\":{},\"type\":\"MODIFIED\"}",
        "{\"type\":\"ADDED\",\"object\":{\"metadata\":{\"uid\":\"../..\",\"name\":\"a\",\"namespace\":\"b\"}}}",
    ] {
        thread::sleep(MOMENT);
        server.say(said);
    }
    wait_until_counted(&daemon, "watch", "malformed")?;
    // A list with such objects is a list still.
    server.compact();
    server.cut();
    let good = self::uid();
    server.put(pod("good", &good));
    wait_until_said(&daemon, &known_as("good", &good), "no cgroup")?;
    wait_until_counted(&daemon, "list", "malformed")?;
    // And one that is none at all is asked for again.
    for said in ["", "[]", "{\"metadata\":{},\"items\":[]}", "{\"items\":"] {
        server.fail(Some(Failure::Say(said.to_owned())));
        server.compact();
        server.cut();
        thread::sleep(MOMENT);
    }
    server.fail(None);
    let last = self::uid();
    server.put(pod("last", &last));
    wait_until_said(&daemon, &known_as("last", &last), "no cgroup")?;

    ensure!(objects(&world.cli, &name)? == attached);
    let directories = world.cli.directories()?;
    ensure!(
        directories
            .iter()
            .all(|directory| *directory == name || directory == "+daemon"),
        "{directories:?}"
    );
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.assert_intercepted().map(drop)
}

#[test]
fn what_is_missing_is_named() -> Result<()> {
    let cli = Cli::new()?;
    let server = ApiServer::start()?;
    let directory = tempfile::tempdir()?;
    let exec = directory.path().join("exec");
    let text = fs::read_to_string(server.kubeconfig())?;
    let mut config: Value = serde_json::from_str(&text)?;
    config["users"][0]["user"] = json!({"exec": {
        "apiVersion": "client.authentication.k8s.io/v1", "command": "true",
        "interactiveMode": "Never",
    }});
    fs::write(&exec, config.to_string())?;
    let no_token = directory.path().join("no-token");
    config["users"][0]["user"] = json!({"tokenFile": "/nonexistent/token"});
    fs::write(&no_token, config.to_string())?;
    let kubeconfig = |path: &std::path::Path| {
        format!(
            "kubernetes = true\nnode-name = 'n'\nkubeconfig = '{}'",
            path.display()
        )
    };
    for (settings, said) in [
        (
            format!(
                "kubernetes = true\nkubeconfig = '{}'",
                server.kubeconfig().display()
            ),
            "NODE_NAME",
        ),
        (
            "kubernetes = true\nnode-name = 'a b'".to_owned(),
            "`a b` is no node's name",
        ),
        (
            "kubernetes = true\nnode-name = 'n'".to_owned(),
            "service account",
        ),
        ("kubeconfig = '/k'".to_owned(), "--kubernetes"),
        (kubeconfig("/nonexistent".as_ref()), "/nonexistent"),
        (kubeconfig(&exec), "may not start"),
        (kubeconfig(&no_token), "/nonexistent/token"),
    ] {
        let daemon = Daemon::prepare(&cli, &settings)?;
        let output = daemon
            .command(&cli)?
            .env_remove("NODE_NAME")
            .env_remove("KUBERNETES_SERVICE_HOST")
            .stdin(Stdio::null())
            .output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(1) && error.contains(said),
            "{settings}: {error}"
        );
    }
    // Somebody else's certificate is no server.
    let other = ApiServer::start()?;
    let authority = |server: &ApiServer| server.kubeconfig().with_file_name("ca.crt");
    fs::copy(authority(&other), authority(&server))?;
    let mut daemon = Daemon::prepare(&cli, &settings(&server))?;
    daemon.restart_until(&cli, |_| true)?;
    wait_until("it is told", LIMIT, || {
        Ok(daemon
            .log()
            .contains("invalid peer certificate")
            .then_some(()))
    })
    .with_context(|| daemon.log())?;
    ensure!(server.requests().is_empty());
    Ok(())
}

#[test]
fn many_pods_take_little_memory() -> Result<()> {
    const PODS: usize = 250;
    let (server, cli) = (ApiServer::start()?, Cli::new()?);
    let mut daemon = Daemon::start(&cli, &settings(&server))?;
    let pid = daemon.pid()?;
    let memory = || -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(number.context("no VmRSS")?.parse()?)
    };
    let before = memory()?;
    // Each with the annotations that tools leave.
    let text = "x".repeat(20_000);
    for number in 0..PODS {
        let mut object = pod(&format!("web-{number}"), &uid());
        annotate(
            &mut object,
            "kubectl.kubernetes.io/last-applied-configuration",
            &text,
        );
        server.put(object);
    }
    let all = || Ok((daemon.pods()?.len() == PODS).then_some(()));
    wait_until("all are known", LIMIT, all)?;
    let watched = memory()?;
    server.compact();
    server.cut();
    let lists = || {
        let all = server.requests();
        all.iter()
            .filter(|asked| asked.contains("pods?") && !asked.contains("watch=true"))
            .count()
    };
    wait_until("all are listed", LIMIT, || Ok((lists() > 1).then_some(())))?;
    let last = uid();
    server.put(pod("last", &last));
    wait_until_said(&daemon, &known_as("last", &last), "no cgroup")?;
    let listed = memory()?;
    // Of the 5 MB of text nothing is kept, but what an allocator does.
    ensure!(
        watched < before + 6144 && listed < before + 12288,
        "{before} KiB, {watched} after all were watched, {listed} after they were listed"
    );
    Ok(())
}

/// Whose process it is doesn't matter; that there is one does.
#[test]
fn a_sandbox_that_is_made_anew_is_attached_anew() -> Result<()> {
    let uid = uid();
    let (server, cli) = (ApiServer::start()?, Cli::new()?);
    let daemon = Daemon::start(&cli, &settings(&server))?;
    server.put(pod("web", &uid));
    let name = known_as("web", &uid);
    let mut inodes = Vec::new();
    for _ in 0..2 {
        let pod = Pod::of_kubernetes(&uid)?;
        let app = Inside::start(&pod, Host::Pod, Credentials::PROXY)?;
        let status = daemon.wait_for(&name, PodState::Attached)?;
        inodes.push(status.netns_inode);
        drop((app, pod));
        wait_until_said(&daemon, &name, "no ")?;
    }
    ensure!(inodes.iter().all(Option::is_some), "{inodes:?}");
    Ok(())
}
