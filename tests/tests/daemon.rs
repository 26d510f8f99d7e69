//! The node's daemon: pods from their first packet to their last, through crashes.
//!
//! With the harness' own pods. Real pods of podman, with the CNI chain, are
//! another suite's.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use interceptor_common::pod::LAYOUT;
use interceptor_tests::{
    bpf::{self, Id},
    cgroup::Cgroup,
    cli::{Cli, run_json, set_layout},
    command::{run, unique_name, wait_until},
    daemon::{Daemon, LIMIT, cni},
    flood::{Clients, Connect, Serve, Server},
    foreign::{Counter, Hook, Sharing, replace_program},
    inside::{Conversation, Inside},
    interception::interceptor,
    intruder::{self, ATTEMPTS, Target, open_ways},
    netns::Netns,
    pod::{Credentials, Host, PEER_V4, Pod},
    world::{
        APP, EVERYWHERE, EXCLUDED_PORT, INBOUND, OUTBOUND, PORT, Way, World, assert_direct,
        assert_refused, assert_served, objects, start_server,
    },
};
use interceptor_userspace::{
    api::{Answer, CniPod, MAX_MESSAGE, PodState, Request, to_line},
    daemon::CAPABILITIES,
};
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::Value;
use socket2::{Domain, Protocol, Type};

/// All directories below the root of pins but the daemon's own.
fn directories(cli: &Cli) -> Result<Vec<String>> {
    Ok(cli
        .directories()?
        .into_iter()
        .filter(|name| name != "+daemon")
        .collect())
}

fn assert_nothing_left(cli: &Cli, pod: &Pod, objects: &[Id]) -> Result<()> {
    let directories = directories(cli)?;
    ensure!(directories.is_empty(), "pins stay behind: {directories:?}");
    let addresses = pod.netns().ip("-6 addr show dev lo")?;
    ensure!(!addresses.contains("::6/128"), "::6 stays behind on lo");
    bpf::wait_until_gone(objects)
}

#[test]
fn a_pod_file_attaches_a_pod_and_its_end_detaches_it() -> Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start(&world.cli, "")?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.assert_left_alone()?;

    daemon.write_pod(&world.pod)?;
    let pod = daemon.wait_for(world.name(), PodState::Attached)?;
    ensure!(pod.source == "directory", "{pod:?}");
    ensure!(pod.cgroup.as_deref() == Some(world.pod.cgroup().path()));
    let objects = objects(&world.cli, world.name())?;
    let mut live = world.assert_intercepted()?;

    daemon.remove_file(world.name())?;
    daemon.wait_until_gone(world.name())?;
    assert_nothing_left(&world.cli, &world.pod, &objects)?;
    world.assert_left_alone()?;
    for conversation in &mut live {
        conversation.echo()?;
    }
    Ok(())
}

#[test]
fn a_changed_file_changes_the_pod_and_a_broken_one_does_not() -> Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start(&world.cli, "")?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    let objects_before = objects(&world.cli, world.name())?;
    let [to, _] = Way::Out.destinations();
    assert_served(Way::Out, &world.app, to)?;

    let path = daemon
        .pods_directory()
        .join(format!("{}.toml", world.name()));
    let text = fs::read_to_string(&path)?;
    daemon.write_file(
        world.name(),
        &format!(
            "{text}[annotations]\n'traffic.sidecar.istio.io/excludeOutboundPorts' = '{}'\n",
            to.port()
        ),
    )?;
    wait_until("the port is left alone", LIMIT, || {
        Ok(assert_direct("PEER", &world.app, to).ok())
    })?;
    ensure!(objects(&world.cli, world.name())? == objects_before);

    for broken in [
        "cgroup = ",
        "",
        "[annotations]\n'traffic.sidecar.istio.io/x' = 'y'",
    ] {
        daemon.write_file(world.name(), &format!("{text}{broken}\nnonsense = 1\n"))?;
        wait_until("the error is told", LIMIT, || {
            let pod = daemon.pod(world.name())?.context("forgotten")?;
            Ok(pod.because.map(|_| ()))
        })?;
        ensure!(
            daemon.wait_for(world.name(), PodState::Attached).is_ok(),
            "{broken}"
        );
        assert_direct("PEER", &world.app, to)?;
    }
    Ok(())
}

#[test]
fn a_cgroup_that_matches_a_pattern_is_a_pod() -> Result<()> {
    let world = World::new()?;
    let settings = format!("select = 'all'\ncgroups = ['/{}']", world.name());
    let daemon = Daemon::start(&world.cli, &settings)?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    let pod = wait_until("the pod is attached", LIMIT, || {
        Ok(daemon
            .pods()?
            .into_iter()
            .find(|pod| pod.state == PodState::Attached))
    })
    .with_context(|| daemon.log())?;
    ensure!(
        pod.source == "cgroups" && pod.pod.starts_with(world.name()),
        "{pod:?}"
    );
    world.assert_intercepted()?;
    Ok(())
}

#[test]
fn one_that_appears_later_is_attached_when_it_has_processes_and_detached_when_it_is_gone()
-> Result<()> {
    let (parent, cli) = (Cgroup::new(&unique_name("interceptor-pods"))?, Cli::new()?);
    let parent_name = parent.path().file_name().context("no name")?;
    let parent_name = parent_name.to_string_lossy().into_owned();
    let settings = format!("select = 'all'\ncgroups = ['/{parent_name}/*']");
    let daemon = Daemon::start(&cli, &settings)?;
    let world = World::of(Pod::below(&parent_name)?)?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    let attached = || -> Result<_> {
        Ok(daemon
            .pods()?
            .into_iter()
            .find(|pod| pod.state == PodState::Attached))
    };
    let pod = wait_until("the pod is attached", LIMIT, attached).with_context(|| daemon.log())?;
    let objects = objects(&cli, &pod.pod)?;
    world.assert_intercepted()?;
    drop((_proxy, world));
    daemon.wait_until_gone(&pod.pod)?;
    ensure!(directories(&cli)?.is_empty());
    bpf::wait_until_gone(&objects)
}

#[test]
fn pods_that_are_not_for_it_are_left_alone_and_it_says_why() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let settings = format!("cgroups = ['/{}']", pod.name());
    let mut daemon = Daemon::start(&cli, &settings)?;
    daemon.write_file(
        "host",
        &format!(
            "cgroup = '{}'\nnetns = '/proc/self/ns/net'\n",
            pod.cgroup().path().display()
        ),
    )?;
    let why = |name: &str| -> Result<String> {
        let status = daemon.wait_for(name, PodState::LeftAlone)?;
        status.because.context("no reason")
    };
    ensure!(why("host")?.contains("machine's own network"));
    let of_cgroup = || -> Result<String> {
        let pods = daemon.pods()?;
        let pod = pods.iter().find(|pod| pod.source == "cgroups");
        Ok(pod.and_then(|pod| pod.because.clone()).unwrap_or_default())
    };
    ensure!(of_cgroup()?.contains("no process"), "{}", of_cgroup()?);
    // No process of the proxy's uid runs in it.
    let _app = Inside::start(&pod, Host::Pod, APP)?;
    wait_until("it is told that it has no proxy", LIMIT, || {
        Ok(of_cgroup()?.contains("no proxy").then_some(()))
    })?;
    let _proxy = Inside::start(&pod, Host::Pod, Credentials::PROXY)?;
    wait_until("it has one", LIMIT, || {
        let pods = daemon.pods()?;
        Ok(pods
            .iter()
            .any(|pod| pod.state == PodState::Attached)
            .then_some(()))
    })
    .with_context(|| daemon.log())?;

    let other = Pod::new()?;
    let mut asked = Vec::new();
    for (request, because) in [
        (
            CniPod {
                namespace: Some("kube-system".to_owned()),
                ..cni("a", &other)
            },
            "kube-system",
        ),
        (cni("a", &other), "annotations aren't known"),
        (
            CniPod {
                annotations: Some([].into()),
                ..cni("a", &other)
            },
            "no proxy",
        ),
        (
            CniPod {
                annotations: Some([("sidecar.istio.io/status".to_owned(), "{}".to_owned())].into()),
                netns: "/proc/self/ns/net".into(),
                ..cni("a", &other)
            },
            "machine's own network",
        ),
    ] {
        let answer = daemon.ask(&Request::CniAdd(request.clone()))?;
        let Answer::LeftAlone { because: said } = &answer else {
            bail!("{request:?}: {answer:?}");
        };
        ensure!(said.contains(because), "{said}");
        ensure!(daemon.ask(&Request::CniCheck(request.clone()))? == answer);
        asked.push((request, answer));
    }
    ensure!(daemon.ask(&Request::CniDel(cni("a", &other).attachment))? == Answer::Done);
    ensure!(daemon.pod("default_web_a")?.is_none());
    // The next daemon doesn't know them, and comes to the same end.
    daemon.stop()?;
    daemon.restart(&cli)?;
    for (request, answer) in asked {
        ensure!(daemon.ask(&Request::CniCheck(request))? == answer);
    }
    let request = CniPod {
        annotations: Some([("sidecar.istio.io/status".to_owned(), "{}".to_owned())].into()),
        ..cni("a", &other)
    };
    let answer = daemon.ask(&Request::CniCheck(request))?;
    ensure!(
        matches!(&answer, Answer::Refused { error, .. } if error.contains("no ADD")),
        "{answer:?}"
    );
    Ok(())
}

/// A parent for pods' cgroups, and its name below the tree.
fn parent() -> Result<(Cgroup, String)> {
    let name = unique_name("interceptor-parent");
    Ok((Cgroup::new(&name)?, name))
}

#[test]
fn cni_add_returns_when_the_pod_is_intercepted_though_its_cgroup_is_not_there_yet() -> Result<()> {
    const CONNECTIONS: usize = 20_000;
    let (parent, parent_name) = parent()?;
    let world = World::of(Pod::below(&parent_name)?)?;
    let settings = format!("select = 'all'\ncgroup-parent = '/{parent_name}'");
    let daemon = Daemon::start(&world.cli, &settings)?;
    let request = cni("0123456789abcdef", &world.pod);
    let answer = daemon.ask(&Request::CniAdd(request.clone()))?;
    let Answer::Attached { pod } = answer else {
        bail!("{answer:?}\n{}", daemon.log());
    };
    // On the cgroup in which the pod's own will be made.
    let status = daemon.wait_for(&pod, PodState::Attached)?;
    ensure!(
        status.cgroup.as_deref() == Some(parent.path()),
        "{status:?}"
    );
    ensure!(
        daemon.ask(&Request::CniAdd(request.clone()))? == Answer::Attached { pod: pod.clone() }
    );
    ensure!(
        daemon.ask(&Request::CniCheck(request.clone()))? == Answer::Attached { pod: pod.clone() }
    );

    let serve = Serve {
        addresses: [OUTBOUND, INBOUND]
            .map(|port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
            .to_vec(),
        acceptors: 2,
        backlog: 4096,
        wait: false,
    };
    let proxy = Server::start(&world.pod, Host::Pod, Credentials::PROXY, serve)?;
    let clients = Clients::start(&world.pod, Host::Pod, APP, outbound(CONNECTIONS))?;
    // The runtime makes the container's cgroup, while connections are made.
    thread::sleep(Duration::from_millis(200));
    let container = world.pod.cgroup().path().join("libpod-0123456789abcdef");
    fs::create_dir(&container)?;
    wait_until("it is moved to its own cgroup", LIMIT, || {
        let status = daemon.pod(&pod)?.context("gone")?;
        Ok((status.cgroup.as_deref() == Some(world.pod.cgroup().path())).then_some(()))
    })
    .with_context(|| daemon.log())?;
    let tally = clients.tally()?;
    ensure!(
        (tally.right, tally.wrong, tally.failed) == (CONNECTIONS, 0, 0),
        "{tally:?}"
    );
    drop(proxy);
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.assert_intercepted()?;
    ensure!(
        daemon.ask(&Request::CniCheck(request.clone()))? == Answer::Attached { pod: pod.clone() }
    );

    let objects = objects(&world.cli, &pod)?;
    // Another interface of the same container is no reason to detach it.
    let mut second = request.attachment.clone();
    second.interface = "net1".to_owned();
    ensure!(daemon.ask(&Request::CniDel(second))? == Answer::Done);
    world.assert_intercepted()?;
    ensure!(daemon.ask(&Request::CniDel(request.attachment.clone()))? == Answer::Done);
    assert_nothing_left(&world.cli, &world.pod, &objects)?;
    ensure!(daemon.ask(&Request::CniDel(request.attachment))? == Answer::Done);
    Ok(())
}

#[test]
fn gc_detaches_what_is_not_valid_and_a_pod_that_can_not_be_attached_is_refused() -> Result<()> {
    let (_parent, parent_name) = parent()?;
    let (pods, cli) = ([Pod::new()?, Pod::new()?], Cli::new()?);
    let settings = format!("select = 'all'\ncgroup-parent = '/{parent_name}'");
    let mut daemon = Daemon::start(&cli, &settings)?;
    for (id, pod) in ["first", "second"].iter().zip(&pods) {
        let answer = daemon.ask(&Request::CniAdd(cni(id, pod)))?;
        ensure!(matches!(answer, Answer::Attached { .. }), "{answer:?}");
    }
    ensure!(daemon.ask(&Request::CniStatus)? == Answer::Done);
    let valid = vec![cni("second", &pods[1]).attachment];
    // Also after a crash.
    daemon.kill()?;
    daemon.restart(&cli)?;
    ensure!(daemon.ask(&Request::CniGc { valid })? == Answer::Done);
    ensure!(
        directories(&cli)? == ["default_web_second"],
        "{:?}",
        directories(&cli)?
    );

    let gone = CniPod {
        netns: "/run/netns/no-such-pod".into(),
        ..cni("third", &pods[0])
    };
    let answer = daemon.ask(&Request::CniAdd(gone.clone()))?;
    ensure!(
        matches!(&answer, Answer::Refused { error, .. } if error.contains("no-such-pod")),
        "{answer:?}"
    );
    ensure!(directories(&cli)?.len() == 1);
    let answer = daemon.ask(&Request::CniAdd(cni("../x", &pods[0])))?;
    ensure!(matches!(answer, Answer::Refused { .. }), "{answer:?}");

    daemon.stop()?;
    let config = fs::read_to_string(daemon.config())?;
    fs::write(daemon.config(), format!("on-failure = 'pass'\n{config}"))?;
    daemon.restart(&cli)?;
    let answer = daemon.ask(&Request::CniAdd(gone))?;
    ensure!(
        matches!(&answer, Answer::LeftAlone { because } if because.contains("no-such-pod")),
        "{answer:?}"
    );
    Ok(())
}

/// Each way and in both families.
fn everywhere() -> impl Iterator<Item = (Way, SocketAddr)> {
    Way::BOTH
        .into_iter()
        .flat_map(|way| way.destinations().map(|to| (way, to)))
}

#[test]
fn connections_are_held_until_the_proxy_listens() -> Result<()> {
    let world = World::new()?;
    let mut daemon = Daemon::start(&world.cli, "until-proxy-listens = 'hold'\n")?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    let policy = || -> Result<_> {
        let status = world.cli.status(world.name())?;
        ensure!(status["listeners"]["outbound"] == status["listeners"]["inbound"]);
        Ok(status["until_proxy_listens"].clone())
    };
    ensure!(policy()? == "hold");

    let served = |way, to| -> Result<_> { assert_served(way, world.client(way), to) };
    let proxy = thread::scope(|scope| {
        let clients: Vec<_> = everywhere()
            .map(|(way, to)| scope.spawn(move || served(way, to)))
            .collect();
        // All their SYNs have been dropped by then.
        thread::sleep(Duration::from_millis(500));
        ensure!(clients.iter().all(|client| !client.is_finished()));
        let proxy = world.start_proxy(&EVERYWHERE)?;
        for client in clients {
            client.join().expect("a client panicked")?;
        }
        Ok(proxy)
    })?;
    wait_until("the daemon lets go", LIMIT, || {
        Ok((policy()? == "refuse").then_some(()))
    })?;
    let live = world.assert_intercepted()?;
    drop((live, proxy));
    // Not when the proxy is gone, nor by a daemon that didn't attach the pod.
    for (way, to) in everywhere() {
        assert_refused(world.client(way), to)?;
    }
    daemon.kill()?;
    daemon.restart(&world.cli)?;
    ensure!(policy()? == "refuse");
    assert_refused(&world.app, Way::Out.destinations()[0])
}

#[test]
fn connections_are_held_no_longer_than_the_limit_or_than_the_daemon_lives() -> Result<()> {
    let world = World::new()?;
    let mut daemon = Daemon::start(&world.cli, "until-proxy-listens = 'hold'\nhold-limit = 2\n")?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    // The first SYNs are dropped; those after the limit are refused.
    let refused = |way, to| -> Result<()> {
        let start = Instant::now();
        match world.client(way).connect(to)? {
            Ok(conversation) => bail!("{:?}", conversation.served),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error.into()),
        }
        ensure!(
            start.elapsed() > Duration::from_millis(900),
            "{way:?} to {to} wasn't held"
        );
        Ok(())
    };
    thread::scope(|scope| {
        let clients: Vec<_> = everywhere()
            .map(|(way, to)| scope.spawn(move || refused(way, to)))
            .collect();
        clients
            .into_iter()
            .try_for_each(|client| client.join().expect("a client panicked"))
    })?;
    for (way, to) in everywhere() {
        assert_refused(world.client(way), to)?;
    }

    daemon.remove_file(world.name())?;
    daemon.wait_until_gone(world.name())?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    ensure!(world.cli.status(world.name())?["until_proxy_listens"] == "hold");
    daemon.kill()?;
    for (way, to) in everywhere() {
        assert_refused(world.client(way), to)?;
    }
    Ok(())
}

#[test]
fn connections_pass_until_the_proxy_has_begun_to_listen() -> Result<()> {
    let world = World::new()?;
    let mut daemon = Daemon::start(&world.cli, "until-proxy-listens = 'pass'\n")?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    world.assert_left_alone()?;
    let passed = || -> Result<u64> {
        let status = world.cli.status(world.name())?;
        let events = status["events"].as_array().context("no events")?;
        let event = events.iter().find(|event| {
            event["event"]
                .as_str()
                .is_some_and(|text| text.contains("past the proxy"))
        });
        event
            .and_then(|event| event["count"].as_u64())
            .context("no such event")
    };
    ensure!(passed()? == 4, "{}", passed()?);
    // Also by a daemon that takes the pod over.
    daemon.kill()?;
    daemon.restart(&world.cli)?;
    world.assert_left_alone()?;
    ensure!(passed()? == 8, "{}", passed()?);

    // Port by port.
    let listener = world
        .proxy
        .listen((Ipv4Addr::UNSPECIFIED, OUTBOUND).into())?;
    let [v4, _] = Way::Out.destinations();
    let server = start_server(Way::Out, listener);
    assert_served(Way::Out, &world.app, v4)?;
    assert_direct("APP", &world.peer, Way::In.destinations()[0])?;
    drop(server);
    assert_refused(&world.app, v4)?;

    let proxy = world.start_proxy(&EVERYWHERE)?;
    let live = world.assert_intercepted()?;
    drop((live, proxy));
    for (way, to) in everywhere() {
        assert_refused(world.client(way), to)?;
    }

    // One that listens already when the pod is attached.
    daemon.remove_file(world.name())?;
    daemon.wait_until_gone(world.name())?;
    let proxy = world.start_proxy(&EVERYWHERE)?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    let live = world.assert_intercepted()?;
    drop((live, proxy));
    assert_refused(&world.app, v4)
}

#[test]
fn dns_over_udp_passes_until_the_proxy_has_begun_to_listen() -> Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start(
        &world.cli,
        "until-proxy-listens = 'pass'\n[settings]\ndns = 'all'\n",
    )?;
    let udp = |inside: &Inside, address: SocketAddr| -> Result<_> {
        let socket = inside.socket(Domain::IPV4, Type::DGRAM, Protocol::UDP)?;
        socket.set_read_timeout(Some(LIMIT))?;
        socket.bind(&address.into())?;
        Ok(UdpSocket::from(socket))
    };
    let to = SocketAddr::new(PEER_V4, 53);
    let server = udp(&world.peer, to)?;
    let proxy = udp(&world.proxy, (Ipv4Addr::LOCALHOST, 15053).into())?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;

    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let ask = |connected: bool| -> Result<()> {
        let client = udp(&world.app, any)?;
        if connected {
            client.connect(to)?;
            client.send(b"?")?;
        } else {
            client.send_to(b"?", to)?;
        }
        Ok(())
    };
    let heard = |by: &UdpSocket| by.recv(&mut [0; 8]).context("no request came");
    for connected in [true, false] {
        ask(connected)?;
        heard(&server)?;
    }
    // It isn't seen to listen for UDP.
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    for connected in [true, false] {
        ask(connected)?;
        heard(&proxy)?;
    }
    Ok(())
}

#[test]
fn the_sixty_fifth_pod_without_a_cgroup_gets_the_place_of_one_that_moves() -> Result<()> {
    /// The most programs of a kind that the kernel takes on a cgroup.
    const PLACES: usize = 64;
    let (parent, parent_name) = parent()?;
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let settings = format!("select = 'all'\ncgroup-parent = '/{parent_name}'");
    let daemon = Daemon::start(&cli, &settings)?;
    let namespaces = (0..=PLACES)
        .map(|_| Netns::new(&unique_name("interceptor-pod")))
        .collect::<Result<Vec<_>>>()?;
    let pods: Vec<CniPod> = namespaces
        .iter()
        .enumerate()
        .map(|(number, netns)| CniPod {
            netns: netns.path(),
            ..cni(&format!("c0ffee{number:02}"), &pod)
        })
        .collect();
    let add = |pod: &CniPod| daemon.ask(&Request::CniAdd(pod.clone()));
    for pod in &pods[..PLACES] {
        let answer = add(pod)?;
        ensure!(matches!(answer, Answer::Attached { .. }), "{answer:?}");
    }
    for _ in 0..2 {
        let answer = add(&pods[PLACES])?;
        let Answer::Refused { error, again: true } = &answer else {
            bail!("{answer:?}");
        };
        for words in ["the most that the kernel takes", "try again", &parent_name] {
            ensure!(error.contains(words), "{error}");
        }
        ensure!(
            directories(&cli)?.len() == PLACES,
            "something is left of it"
        );
    }
    let intact = objects(&cli, "default_web_c0ffee01")?;

    let own = parent.path().join("first");
    fs::create_dir_all(own.join("libpod-c0ffee00"))?;
    wait_until("the first is moved", LIMIT, || {
        let status = daemon.pod("default_web_c0ffee00")?.context("gone")?;
        Ok((status.cgroup.as_deref() == Some(&*own)).then_some(()))
    })
    .with_context(|| daemon.log())?;
    let answer = add(&pods[PLACES])?;
    ensure!(matches!(answer, Answer::Attached { .. }), "{answer:?}");
    ensure!(objects(&cli, "default_web_c0ffee01")? == intact);
    for pod in pods {
        ensure!(daemon.ask(&Request::CniDel(pod.attachment))? == Answer::Done);
    }
    ensure!(directories(&cli)?.is_empty());
    Ok(())
}

fn outbound(connections: usize) -> Connect {
    Connect {
        connections,
        threads: 2,
        address: Ipv4Addr::new(203, 0, 113, 1).into(),
        addresses: 250,
        port: 1000,
        ports: 40,
        timeout: LIMIT,
        keep: false,
    }
}

#[test]
fn killed_under_load_no_connection_is_misdirected() -> Result<()> {
    const CONNECTIONS: usize = 60_000;
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let mut daemon = Daemon::start(&cli, "")?;
    daemon.write_pod(&pod)?;
    daemon.wait_for(pod.name(), PodState::Attached)?;
    let before = objects(&cli, pod.name())?;
    let serve = Serve {
        addresses: vec![(Ipv4Addr::UNSPECIFIED, OUTBOUND).into()],
        acceptors: 2,
        backlog: 4096,
        wait: false,
    };
    let _proxy = Server::start(&pod, Host::Pod, Credentials::PROXY, serve)?;
    let clients = Clients::start(&pod, Host::Pod, APP, outbound(CONNECTIONS))?;
    // While it starts, adopts and follows, at other moments each time.
    for round in 0..12 {
        daemon.kill()?;
        if round % 3 == 0 {
            daemon.restart(&cli)?;
            pod.netns().ip("addr add 10.99.0.1/32 dev lo")?;
            pod.netns().ip("addr del 10.99.0.1/32 dev lo")?;
        } else {
            daemon.restart_soon(&cli)?;
        }
        thread::sleep(Duration::from_millis(17 * round));
    }
    daemon.kill()?;
    daemon.restart(&cli)?;
    let tally = clients.tally()?;
    ensure!(
        (tally.right, tally.wrong, tally.failed) == (CONNECTIONS, 0, 0),
        "{tally:?}"
    );
    ensure!(objects(&cli, pod.name())? == before, "it was not adopted");
    Ok(())
}

#[test]
fn killed_while_it_attaches_or_detaches_it_leaves_nothing_half() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    let mut daemon = Daemon::start(&world.cli, "")?;
    let mut half = 0;
    for round in 0..30_u32 {
        let wanted = round % 2 == 0;
        if wanted {
            daemon.write_pod(&world.pod)?;
        } else {
            daemon.remove_file(world.name())?;
        }
        // Changes are gathered for 20 ms; attaching takes longer than detaching.
        let spread = if wanted { 7 } else { 1 };
        thread::sleep(Duration::from_millis(18) + Duration::from_millis(spread) * (round / 2));
        daemon.kill()?;
        half += u32::from(
            directories(&world.cli)?
                .iter()
                .any(|name| name.contains('+')),
        );
        daemon.restart(&world.cli)?;
        let context = || format!("round {round}\n{}", daemon.log());
        if wanted {
            daemon.wait_for(world.name(), PodState::Attached)?;
            ensure!(directories(&world.cli)? == [world.name()], "{}", context());
            world.assert_intercepted().with_context(context)?;
        } else {
            daemon.wait_until_gone(world.name())?;
            ensure!(directories(&world.cli)?.is_empty(), "{}", context());
            world.assert_left_alone().with_context(context)?;
        }
    }
    // Else none of the moments was one of those that are meant.
    ensure!(half > 0, "never killed half way");
    Ok(())
}

#[test]
fn what_fails_leaves_nothing_and_succeeds_when_the_cause_is_gone() -> Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start(&world.cli, "")?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    let because = |daemon: &Daemon| -> Result<String> {
        let pod = daemon.wait_for(world.name(), PodState::Failed)?;
        pod.because.context("no reason")
    };
    let path = world.pod.cgroup().path().display();
    let netns = world.pod.netns().path();

    // A cgroup that isn't there.
    daemon.write_file(
        world.name(),
        &format!("cgroup = '{path}/none'\nnetns = '{}'\n", netns.display()),
    )?;
    let why = because(&daemon)?;
    ensure!(why.contains("no such directory"), "{why}");
    ensure!(directories(&world.cli)?.is_empty());
    fs::create_dir(world.pod.cgroup().path().join("none"))?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    daemon.remove_file(world.name())?;
    daemon.wait_until_gone(world.name())?;

    // A network namespace that isn't there.
    daemon.write_file(
        world.name(),
        &format!("cgroup = '{path}'\nnetns = '{}-none'\n", netns.display()),
    )?;
    let why = because(&daemon)?;
    ensure!(why.contains("is no network namespace"), "{why}");

    // A process that is in another cgroup.
    let file = format!("cgroup = '{path}/none'\nnetns = {}\n", world.app.pid());
    daemon.write_file(world.name(), &file)?;
    wait_until("the other process is told", LIMIT, || {
        Ok(because(&daemon)?.contains("is no process").then_some(()))
    })?;

    // Somebody who admits no other program.
    let foreign = Counter::attach(
        "exclusive",
        Hook::Connect4,
        fs::File::open(world.pod.cgroup().path())?,
        Sharing::Exclusive,
    )?;
    daemon.write_pod(&world.pod)?;
    wait_until("who is in the way is told", LIMIT, || {
        Ok(because(&daemon)?.contains("admits no other").then_some(()))
    })?;
    ensure!(directories(&world.cli)?.is_empty());
    world.assert_left_alone()?;
    drop(foreign);
    daemon.wait_for(world.name(), PodState::Attached)?;
    world.assert_intercepted()?;
    Ok(())
}

#[test]
fn when_pins_can_not_be_written_any_more_it_says_so_and_goes_on_when_they_can() -> Result<()> {
    let world = World::new()?;
    let mut daemon = Daemon::start_apart(&world.cli, "")?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    let pid = daemon.pid()?;
    let remount = |how: &str| {
        run(Command::new("nsenter").args([
            "--mount",
            "--target",
            &pid.to_string(),
            "mount",
            "-o",
            &format!("remount,bind,{how}"),
            "/sys/fs/bpf",
        ]))
    };
    remount("ro")?;
    let other = Pod::new()?;
    daemon.write_pod(&other)?;
    let failed = daemon.wait_for(other.name(), PodState::Failed)?;
    let because = failed.because.context("no reason")?;
    ensure!(
        because.contains(other.name()) && because.contains("Read-only file system"),
        "{because}"
    );
    ensure!(directories(&world.cli)? == [world.name()]);
    ensure!(!other.netns().ip("-6 addr show dev lo")?.contains("::6/128"));
    // One that can't be detached stays whole.
    daemon.remove_file(world.name())?;
    wait_until("it is told", LIMIT, || {
        Ok(daemon.log().contains("not detached").then_some(()))
    })
    .with_context(|| daemon.log())?;
    world.assert_intercepted()?;

    remount("rw")?;
    daemon.wait_for(other.name(), PodState::Attached)?;
    daemon.remove_file(other.name())?;
    daemon.wait_until_gone(other.name())?;
    daemon.wait_until_gone(world.name())?;
    ensure!(directories(&world.cli)?.is_empty());
    world.assert_left_alone()
}

#[test]
fn a_pod_of_another_layout_is_left_as_it_is_and_said_to_be() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.cli.attach(&world.pod)?;
    for (layout, words) in [
        (LAYOUT + 1, "a newer version of Interceptor"),
        (LAYOUT - 1, "an older version of Interceptor"),
    ] {
        set_layout(&world.cli, world.name(), layout)?;
        let mut daemon = Daemon::start(&world.cli, "")?;
        let pod = daemon.wait_for(world.name(), PodState::Failed)?;
        let because = pod.because.context("no reason")?;
        for part in [
            words,
            &format!("its layout is {layout}, this one's {LAYOUT}"),
        ] {
            ensure!(because.contains(part), "no `{part}` in: {because}");
        }
        world.assert_intercepted()?;
        daemon.stop()?;
    }
    set_layout(&world.cli, world.name(), LAYOUT)?;
    let daemon = Daemon::start(&world.cli, "")?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    Ok(())
}

#[test]
fn other_programs_than_its_own_are_replaced_when_it_takes_a_pod_over() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    let mut daemon = Daemon::start(&world.cli, "")?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    let mut live = world.assert_intercepted()?;
    daemon.stop()?;
    // In the place of an older version: a program that lets all pass.
    let [to, _] = Way::Out.destinations();
    let link = world.cli.pins().join(world.name()).join("links/connect4");
    replace_program(&link, Hook::Connect4)?;
    assert_direct("PEER", &world.app, to)?;
    let links = |status: &Value| status["links"].to_string();
    let old = links(&world.cli.status(world.name())?);

    daemon.restart(&world.cli)?;
    assert_served(Way::Out, &world.app, to)?;
    let new = links(&world.cli.status(world.name())?);
    ensure!(old != new, "{new}");
    let (_, metrics) = daemon.http("/metrics")?;
    ensure!(
        metrics.contains("interceptor_pods_upgraded_total 1\n"),
        "{metrics}"
    );
    for conversation in &mut live {
        conversation.echo()?;
    }
    // Its own are left as they are.
    daemon.stop()?;
    daemon.restart(&world.cli)?;
    ensure!(links(&world.cli.status(world.name())?) == new);
    Ok(())
}

#[test]
fn without_bpffs_it_does_not_start() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let output = interceptor()?
        .arg("--pins")
        .arg(directory.path().join("pins"))
        .args(["daemon", "--metrics", "127.0.0.1:0", "--socket"])
        .arg(directory.path().join("socket"))
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && error.contains("not on a BPF file system"),
        "{error}"
    );
    Ok(())
}

#[test]
fn there_is_one_daemon() -> Result<()> {
    let cli = Cli::new()?;
    let mut daemon = Daemon::start(&cli, "")?;
    let output = daemon.command(&cli)?.output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let pid = daemon.pid()?;
    ensure!(
        output.status.code() == Some(1) && error.contains(&format!("process {pid})")),
        "{error}"
    );
    // The first one is none the worse for it.
    ensure!(daemon.status()?.pid == u32::try_from(pid)?);
    daemon.stop()?;
    ensure!(!cli.pins().exists(), "the lock stays behind");
    ensure!(!daemon.socket().exists(), "the socket stays behind");
    daemon.restart(&cli)
}

#[test]
fn what_was_attached_by_hand_is_followed_and_left_to_the_hand() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.cli.attach(&world.pod)?;
    let mut daemon = Daemon::start(&world.cli, "")?;
    let pod = daemon.wait_for(world.name(), PodState::Attached)?;
    ensure!(pod.source == "command", "{pod:?}");

    // An address of the pod's own: connections to it aren't captured.
    let added = SocketAddr::new(Ipv4Addr::new(10, 78, 0, 2).into(), 8080);
    world
        .pod
        .netns()
        .ip(&format!("addr add {}/24 dev eth0", added.ip()))?;
    wait_until("the new address is followed", LIMIT, || {
        Ok(assert_direct("APP", &world.app, added).ok())
    })?;
    daemon.stop()?;
    world.assert_intercepted()?;
    daemon.restart(&world.cli)?;
    world.cli.detach(world.name())?;
    world.assert_left_alone()
}

#[test]
fn a_pod_that_ends_without_a_word_is_detached() -> Result<()> {
    let cli = Cli::new()?;
    let daemon = Daemon::start(&cli, "")?;
    let pod = Pod::new()?;
    let name = pod.name().to_owned();
    daemon.write_pod(&pod)?;
    daemon.wait_for(&name, PodState::Attached)?;
    let objects = objects(&cli, &name)?;
    drop(pod);
    // Nothing that the daemon holds keeps the namespace alive.
    daemon.wait_for(&name, PodState::Failed)?;
    ensure!(directories(&cli)?.is_empty());
    bpf::wait_until_gone(&objects)
}

#[test]
fn what_it_says_with_metrics_is_what_happened() -> Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start(&world.cli, "")?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    let metrics = || -> Result<String> {
        let (status, text) = daemon.http("/metrics")?;
        ensure!(status == 200, "{status}: {text}");
        Ok(text)
    };
    let value = |text: &str, parts: &[&str]| -> Result<f64> {
        text.lines()
            .find(|line| !line.starts_with('#') && parts.iter().all(|part| line.contains(part)))
            .and_then(|line| line.rsplit(' ').next()?.parse().ok())
            .with_context(|| format!("no {parts:?} in\n{text}"))
    };
    let rule = [
        "interceptor_verdicts_total",
        world.name(),
        "chain=\"ISTIO_OUTPUT\"",
        "rule=\"9\"",
    ];
    let before = value(&metrics()?, &rule)?;
    let [to, _] = Way::Out.destinations();
    assert_served(Way::Out, &world.app, to)?;
    let text = metrics()?;
    ensure!(value(&text, &rule)? == before + 1.0);
    ensure!(value(&text, &["interceptor_attach_seconds_count"])? == 1.0);
    ensure!(value(&text, &["interceptor_pods{", "attached"])? == 1.0);
    ensure!(value(&text, &["interceptor_listeners{", "outbound"])? == 2.0);
    ensure!(text.contains("interceptor_build_info{version="));
    ensure!(text.ends_with("# EOF\n"));
    ensure!(daemon.http("/healthz")?.0 == 200);
    ensure!(daemon.http("/readyz")?.0 == 200);
    ensure!(daemon.http("/other")?.0 == 404);
    Ok(())
}

#[test]
fn pods_are_shown_with_and_without_a_daemon() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let mut daemon = Daemon::start(&cli, "")?;
    daemon.write_pod(&pod)?;
    daemon.wait_for(pod.name(), PodState::Attached)?;
    let pods = || {
        run_json(
            cli.command()?
                .args(["pods", "-o", "json", "--socket"])
                .arg(daemon.socket()),
        )
    };
    let with = pods()?;
    ensure!(
        with[0]["pod"] == pod.name() && with[0]["source"] == "directory",
        "{with}"
    );
    let text = run(cli
        .command()?
        .arg("pods")
        .arg("--socket")
        .arg(daemon.socket()))?;
    ensure!(text.contains(pod.name()), "{text}");
    daemon.stop()?;
    let without = run_json(
        cli.command()?
            .args(["pods", "-o", "json", "--socket"])
            .arg(daemon.socket()),
    )?;
    ensure!(
        without[0]["pod"] == pod.name() && without[0]["state"] == "attached",
        "{without}"
    );
    Ok(())
}

/// What `interceptor connections` prints, each connection as its direction, side,
/// original destination, chain and rule.
fn connections(cli: &Cli, socket: &Path, pod: &str) -> Result<Vec<Value>> {
    let mut command = cli.command()?;
    command
        .args(["connections", "-o", "json", "--pod", pod, "--socket"])
        .arg(socket);
    let connections = run_json(&mut command)?;
    Ok(connections.as_array().context("no list")?.clone())
}

#[test]
fn live_connections_are_shown_with_and_without_a_daemon() -> Result<()> {
    let world = World::new()?;
    let mut daemon = Daemon::start(&world.cli, "")?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    daemon.write_pod(&world.pod)?;
    daemon.wait_for(world.name(), PodState::Attached)?;
    let socket = daemon.socket();
    let known = || connections(&world.cli, &socket, world.name());

    // Neither of what isn't redirected.
    let (to, from) = (Way::Out.destinations(), Way::In.destinations());
    let excluded = SocketAddr::new(from[0].ip(), EXCLUDED_PORT);
    let direct = [
        assert_direct("PEER", &world.proxy, to[0])?,
        assert_direct("APP", &world.peer, excluded)?,
    ];
    ensure!(known()?.is_empty(), "{:?}", known()?);

    let live = world.assert_intercepted()?;
    let client = |conversation: &Conversation| -> Result<String> {
        let address = conversation.socket().local_addr()?.as_socket();
        Ok(address.context("no address")?.to_string())
    };
    let mut expected = Vec::new();
    for (way, to, conversation) in [
        (Way::Out, to[0], &live[0]),
        (Way::Out, to[1], &live[1]),
        (Way::In, from[0], &live[2]),
        (Way::In, from[1], &live[3]),
    ] {
        let client = client(conversation)?;
        let row = |side: &str, chain: Option<&str>, number: Option<u32>| {
            serde_json::json!([
                match way {
                    Way::Out => "outbound",
                    Way::In => "inbound",
                },
                side,
                client,
                to.to_string(),
                "ESTAB",
                chain,
                number,
            ])
        };
        match way {
            Way::Out => {
                expected.push(row("client", Some("ISTIO_OUTPUT"), Some(9)));
                expected.push(row("proxy", None, None));
            }
            Way::In => expected.push(row("proxy", Some("ISTIO_INBOUND"), Some(4))),
        }
    }
    let rows = |connections: &[Value]| -> Vec<Value> {
        let mut rows: Vec<Value> = connections
            .iter()
            .map(|connection| {
                serde_json::json!([
                    connection["direction"],
                    connection["side"],
                    connection["client"],
                    connection["original_destination"],
                    connection["state"],
                    connection["rule"]["chain"],
                    connection["rule"]["number"],
                ])
            })
            .collect();
        rows.sort_by_key(ToString::to_string);
        rows
    };
    expected.sort_by_key(ToString::to_string);
    let with = known()?;
    ensure!(rows(&with) == expected, "{with:#?}\n{expected:#?}");
    for connection in &with {
        let outbound = connection["direction"] == "outbound";
        let proxy: SocketAddr = connection["proxy"].as_str().context("no proxy")?.parse()?;
        if outbound {
            ensure!(proxy.port() == OUTBOUND, "{connection}");
        } else {
            ensure!(connection["proxy"] == connection["original_destination"]);
        }
        if connection["side"] == "client" {
            ensure!(connection["uid"] == APP.uid && connection["gid"] == APP.gid);
        }
    }
    let text = run(world
        .cli
        .command()?
        .args(["connections", "--socket"])
        .arg(&socket))?;
    ensure!(text.lines().count() == 1 + expected.len(), "{text}");
    // With other pins than the daemon's, the pins are asked.
    let other = Cli::new()?;
    let error = connections(&other, &socket, world.name()).unwrap_err();
    ensure!(format!("{error:#}").contains("no pod"), "{error:#}");

    // The rule is the one that decides now.
    run(world.cli.command()?.args([
        "set",
        world.name(),
        "--exclude-outbound-ports",
        &PORT.to_string(),
    ]))?;
    let changed = known()?;
    ensure!(changed.len() == expected.len());
    ensure!(
        changed
            .iter()
            .all(|connection| connection["direction"] == "inbound" || connection["rule"].is_null()),
        "{changed:#?}"
    );

    daemon.stop()?;
    ensure!(rows(&known()?) == rows(&changed));
    drop(live);
    wait_until("no connection is left", LIMIT, || {
        Ok(known()?.is_empty().then_some(()))
    })?;
    let text = run(world.cli.command()?.arg("connections"))?;
    ensure!(text.contains("no connection"), "{text}");
    drop(direct);
    Ok(())
}

#[test]
fn very_many_connections_are_shown_and_the_daemon_does_not_grow() -> Result<()> {
    const CONNECTIONS: usize = 15_000;
    // Those are made while they are looked at, and closed when all are made. So many
    // don't fit into one message.
    const SHOWN: usize = 6_000;
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let mut daemon = Daemon::start(&cli, "")?;
    daemon.write_pod(&pod)?;
    daemon.wait_for(pod.name(), PodState::Attached)?;
    let _proxy = Server::start(
        &pod,
        Host::Pod,
        Credentials::PROXY,
        Serve {
            addresses: vec![(Ipv4Addr::UNSPECIFIED, OUTBOUND).into()],
            acceptors: 2,
            backlog: 4096,
            wait: false,
        },
    )?;
    let clients = Clients::start(
        &pod,
        Host::Pod,
        APP,
        Connect {
            keep: true,
            timeout: Duration::from_secs(60),
            ..outbound(CONNECTIONS)
        },
    )?;
    let pid = daemon.pid()?;
    // The first time it reads the kernel's types, once for all.
    let mut most = connections(&cli, &daemon.socket(), pod.name())?.len();
    let before = resident_kib(pid)?;
    wait_until("many are shown", LIMIT, || {
        let known = connections(&cli, &daemon.socket(), pod.name())?;
        most = most.max(known.len());
        let grown = resident_kib(pid)?.saturating_sub(before);
        ensure!(grown < 8192, "{grown} KiB more");
        Ok((most >= SHOWN).then_some(()))
    })
    .with_context(|| format!("{most} of them"))?;
    drop(clients);
    Ok(())
}

#[test]
fn it_has_the_capabilities_that_it_says_and_no_others() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    // Listeners of another user's process, which are older than the attachment.
    let serve = Serve {
        addresses: vec![(Ipv4Addr::UNSPECIFIED, OUTBOUND).into()],
        acceptors: 1,
        backlog: 16,
        wait: true,
    };
    let _proxy = Server::start(&pod, Host::Pod, Credentials::PROXY, serve)?;
    let mut daemon = Daemon::start(&cli, "")?;
    daemon.write_pod(&pod)?;
    daemon.wait_for(pod.name(), PodState::Attached)?;
    ensure!(cli.status(pod.name())?["listeners"]["outbound"] == 1);

    let expected = CAPABILITIES
        .iter()
        .fold(0, |mask, (capability, _)| mask | capability.bitmask());
    let pid = daemon.pid()?;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find(|line| line.starts_with(name));
            let value = line.and_then(|line| line.split_whitespace().nth(1));
            Ok(u64::from_str_radix(value.context("no such field")?, 16)?)
        };
        for set in ["CapEff:", "CapPrm:"] {
            ensure!(field(set)? == expected, "{status}");
        }
        for set in ["CapInh:", "CapAmb:"] {
            ensure!(field(set)? == 0, "{status}");
        }
        ensure!(
            field("NoNewPrivs:")? == 1 && field("Seccomp:")? == 2,
            "{status}"
        );
    }
    Ok(())
}

#[test]
fn with_one_capability_less_it_says_which() -> Result<()> {
    let cli = Cli::new()?;
    let mut daemon = Daemon::start(&cli, "")?;
    daemon.stop()?;
    let name = |capability: &str| {
        let short = capability.trim_start_matches("CAP_").to_lowercase();
        format!("+{short}")
    };
    for (missing, _) in CAPABILITIES {
        let rest: Vec<String> = CAPABILITIES
            .iter()
            .filter(|(capability, _)| *capability != missing)
            .map(|(capability, _)| name(&capability.to_string()))
            .collect();
        let inner = daemon.command(&cli)?;
        let output = Command::new("setpriv")
            .arg(format!("--bounding-set=-all,{}", rest.join(",")))
            .arg(inner.get_program())
            .args(inner.get_args())
            .output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(1) && error.contains(&missing.to_string()),
            "without {missing}: {error}"
        );
    }
    // With all of them the node's check is content, as in the daemon's container.
    let all = CAPABILITIES.map(|(capability, _)| name(&capability.to_string()));
    let check = run(Command::new("setpriv")
        .arg(format!("--bounding-set=-all,{}", all.join(",")))
        .arg(interceptor()?.get_program())
        .arg("check"))?;
    ensure!(check.contains("pass  capabilities"), "{check}");
    Ok(())
}

#[test]
fn cleaning_up_shows_all_and_then_removes_it() -> Result<()> {
    let (pods, cli) = ([Pod::new()?, Pod::new()?, Pod::new()?], Cli::new()?);
    let mut daemon = Daemon::start(&cli, "")?;
    let mut all = Vec::new();
    for pod in &pods {
        daemon.write_pod(pod)?;
        daemon.wait_for(pod.name(), PodState::Attached)?;
        all.extend(objects(&cli, pod.name())?);
    }
    let cleanup = |more: &[&str]| -> Result<_> {
        let mut command = cli.command()?;
        Ok(command
            .args(["cleanup", "-o", "json"])
            .args(more)
            .output()?)
    };
    let output = cleanup(&["--remove"])?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success() && error.contains("stop it first"),
        "while a daemon runs: {error}"
    );
    daemon.kill()?;
    // One whole, one damaged, one half.
    let root = cli.pins();
    fs::remove_file(root.join(pods[1].name()).join("links/connect4"))?;
    fs::rename(
        root.join(pods[2].name()),
        root.join(format!("{}+attaching", pods[2].name())),
    )?;
    let states = |output: &std::process::Output| -> Result<Vec<String>> {
        let answer: Value = serde_json::from_slice(&output.stdout)?;
        let found = answer["found"].as_array().context("no list")?;
        let mut states: Vec<_> = found.iter().map(|one| one["state"].to_string()).collect();
        states.sort();
        Ok(states)
    };
    let shown = cleanup(&[])?;
    let seen = states(&shown)?;
    ensure!(
        seen.len() == 3 && seen[0] == "\"attached\"" && seen[1] == "\"half\"",
        "{seen:?}"
    );
    ensure!(seen[2].contains("connect4"), "{seen:?}");
    ensure!(directories(&cli)?.len() == 3, "it was only to be shown");
    let removed = cleanup(&["--remove"])?;
    ensure!(
        removed.status.success() && states(&removed)? == seen,
        "{removed:?}"
    );
    ensure!(!root.exists(), "the root stays behind");
    bpf::wait_until_gone(&all)?;
    ensure!(states(&cleanup(&[])?)?.is_empty());
    Ok(())
}

#[test]
fn nobody_else_may_ask() -> Result<()> {
    let cli = Cli::new()?;
    let daemon = Daemon::start(&cli, "")?;
    let mode =
        |path: &Path| -> Result<u32> { Ok(fs::metadata(path)?.permissions().mode() & 0o777) };
    let socket = daemon.socket();
    ensure!(mode(&socket)? == 0o600);
    ensure!(mode(socket.parent().context("no directory")?)? == 0o700);
    let pod = Pod::new()?;
    let ask = || -> Result<String> {
        let mut command = pod.command(Host::Pod, APP, interceptor()?.get_program())?;
        let output = command.arg("pods").arg("--socket").arg(&socket).output()?;
        ensure!(
            !output.status.success() && output.stdout.is_empty(),
            "{output:?}"
        );
        Ok(String::from_utf8(output.stderr)?)
    };
    let error = ask()?;
    ensure!(error.contains("Permission denied"), "{error}");
    // Even where somebody has opened the way: the credentials are looked at.
    for path in socket.ancestors().take(3) {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
    }
    let error = ask()?;
    ensure!(!error.contains("Permission denied"), "{error}");
    ensure!(daemon.log().contains("not allowed to ask"));
    Ok(())
}

/// Runs an intruder by this command; the ways that are open to it.
fn intrude(mut command: Command, target: &Target) -> Result<Vec<String>> {
    open_ways(&run(command.arg(target.argument()?))?)
}

#[test]
fn an_unprivileged_user_reaches_nothing_of_it() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let mut daemon = Daemon::start(&cli, "")?;
    daemon.write_pod(&pod)?;
    daemon.wait_for(pod.name(), PodState::Attached)?;
    let before = objects(&cli, pod.name())?;
    let target = Target::new(&cli, &mut daemon, pod.name())?;

    // Where everyone may read it. The directory of the daemon under test is opened, so
    // that only its own modes are in the way.
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755));
    let directory = tempfile::tempdir()?;
    open(directory.path())?;
    let program = directory.path().join("intruder");
    fs::copy(intruder::program()?, &program)?;
    open(&program)?;
    open(daemon.config().parent().context("no directory")?)?;
    let nobody = |before: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        command.args(before).arg(&program).current_dir("/");
        command
    };
    // Every process of the machine may read the metrics, and no more.
    ensure!(intrude(nobody(&[]), &target)? == ["read the metrics"]);
    // Already among the pins: no directory above them is in the way.
    let mut among = target.clone();
    among.pins = ".".into();
    let mut command = nobody(&[]);
    command.current_dir(cli.pins());
    ensure!(intrude(command, &among)? == ["read the metrics"]);
    // Root in a user namespace of its own, and in a network namespace.
    let root = ["unshare", "-U", "-r", "-n", "-m"];
    let open_ways = intrude(nobody(&root), &target)?;
    ensure!(open_ways.is_empty(), "{open_ways:?}");

    ensure!(objects(&cli, pod.name())? == before);
    ensure!(directories(&cli)? == [pod.name()]);
    // All that was tried is possible to one who may: root.
    let ways = intrude(Command::new(&program), &target)?;
    ensure!(ways.len() == ATTEMPTS, "only {ways:?}");
    Ok(())
}

#[test]
fn damaged_requests_and_crowds_cost_nothing() -> Result<()> {
    const CROWD: usize = 400;
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let mut daemon = Daemon::start(&cli, "select = 'all'")?;
    daemon.write_pod(&pod)?;
    daemon.wait_for(pod.name(), PodState::Attached)?;
    let before = objects(&cli, pod.name())?;
    let pid = daemon.pid()?;
    let descriptors = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count()) };
    let baseline = descriptors()?;
    let connect = || connect_to(&daemon);

    // Every request, with some bytes of it replaced.
    let gone = CniPod {
        netns: "/run/netns/no-such-pod".into(),
        annotations: Some([("sidecar.istio.io/status".to_owned(), "{}".to_owned())].into()),
        uid: Some("0d5b8c6e-1111-2222-3333-444455556666".to_owned()),
        ..cni("c0ffee", &pod)
    };
    let requests = [
        Request::CniAdd(gone.clone()),
        Request::CniCheck(gone.clone()),
        Request::CniDel(gone.attachment.clone()),
        Request::CniGc {
            valid: vec![gone.attachment],
        },
        Request::CniStatus,
        Request::Status,
        Request::Pods,
    ];
    let lines = requests.map(|request| to_line(&request).unwrap_or_default());
    let damaged = (
        prop::sample::select(lines.to_vec()),
        any::<prop::sample::Index>(),
        0_usize..9,
        prop::collection::vec(any::<u8>(), 0..9),
    )
        .prop_map(|(mut line, position, length, patch)| {
            let start = position.index(line.len());
            let end = line.len().min(start + length);
            line.splice(start..end, patch);
            line
        });
    let mut runner = TestRunner::new(proptest::test_runner::Config::with_cases(400));
    runner.run(&damaged, |line| {
        all_answers_are(&daemon, &line, |answer| {
            !matches!(answer, Answer::Attached { .. })
        })
    })?;

    // More at once than it talks with, each with half a line, who go.
    let half = &lines[0][..lines[0].len() / 2];
    let crowd = || -> Result<Vec<UnixStream>> {
        let mut crowd = Vec::new();
        for _ in 0..CROWD {
            let mut stream = connect()?;
            stream.write_all(half)?;
            crowd.push(stream);
        }
        Ok(crowd)
    };
    drop(crowd()?);
    ensure!(daemon.pods()?.len() == 1);
    // And who stay: others wait until the silent ones' time is up, and are answered.
    let silent = crowd()?;
    ensure!(daemon.pods()?.len() == 1);
    drop(silent);
    // One who is slow, but speaks.
    let mut slow = connect()?;
    for byte in to_line(&Request::Pods)? {
        slow.write_all(&[byte])?;
        thread::sleep(Duration::from_millis(20));
    }
    slow.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    slow.read_to_string(&mut answer)?;
    ensure!(answer.contains(pod.name()), "{answer}");

    drop(slow);
    wait_until("its descriptors are closed", LIMIT, || {
        Ok((descriptors()? <= baseline).then_some(()))
    })
    .with_context(|| format!("{baseline} before, {:?} after", descriptors()))?;
    ensure!(objects(&cli, pod.name())? == before);
    ensure!(directories(&cli)? == [pod.name()]);
    Ok(())
}

#[test]
fn whatever_is_said_to_it_it_goes_on() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let daemon = Daemon::start(&cli, "select = 'all'")?;
    daemon.write_pod(&pod)?;
    daemon.wait_for(pod.name(), PodState::Attached)?;
    let before = objects(&cli, pod.name())?;

    let said = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        "\\PC{0,200}".prop_map(String::into_bytes),
        // Requests of the right form, with anything in them.
        (
            "cni_add|cni_del|cni_check|cni_gc|pods|view|chains|connections",
            "\\PC{0,80}",
            "\\PC{0,80}",
            "\\PC{0,80}"
        )
            .prop_map(|(request, id, interface, netns)| {
                serde_json::json!({
                    "request": request,
                    "container_id": id,
                    "interface": interface,
                    "netns": netns,
                    "pod": interface,
                    "uid": netns,
                    "annotations": { interface: id },
                    "valid": [{ "container_id": "x", "interface": "y" }],
                })
                .to_string()
                .into_bytes()
            }),
    ];
    let mut runner = TestRunner::new(proptest::test_runner::Config::with_cases(300));
    runner.run(&said, |mut bytes| {
        bytes.push(b'\n');
        all_answers_are(&daemon, &bytes, |answer| {
            matches!(
                answer,
                Answer::Refused { .. } | Answer::Done | Answer::Pods { .. } | Answer::NoView { .. }
            )
        })
    })?;

    // Too much of it.
    let mut stream = connect_to(&daemon)?;
    let _ = stream.write_all(&vec![b' '; 2 * MAX_MESSAGE]);
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    ensure!(answer.is_empty() || answer.contains("refused"), "{answer}");

    // Pod files of any kind.
    let mut runner = TestRunner::new(proptest::test_runner::Config::with_cases(60));
    runner.run(&("[a-z]{1,8}", "\\PC{0,200}"), |(name, text)| {
        let written = daemon.write_file(&name, &text).is_ok();
        prop_assert!(written);
        Ok(())
    })?;
    thread::sleep(Duration::from_millis(100));
    for pod in daemon.pods()? {
        ensure!(
            (pod.state == PodState::Attached)
                == (pod.source == "directory" && pod.because.is_none()),
            "{pod:?}"
        );
    }
    ensure!(objects(&cli, pod.name())? == before);
    ensure!(directories(&cli)? == [pod.name()]);
    Ok(())
}

fn connect_to(daemon: &Daemon) -> Result<UnixStream> {
    let stream = UnixStream::connect(daemon.socket())?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// Says `bytes` to the daemon; what it answers, if anything, is `fine`.
fn all_answers_are(
    daemon: &Daemon,
    bytes: &[u8],
    fine: impl Fn(&Answer) -> bool,
) -> Result<(), TestCaseError> {
    let answered = || -> Result<String> {
        let mut stream = connect_to(daemon)?;
        stream.write_all(bytes)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answers = answered().map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
    for line in answers.lines() {
        let answer: Result<Answer, _> = serde_json::from_str(line);
        prop_assert!(answer.is_ok_and(|answer| fine(&answer)), "{}", line);
    }
    Ok(())
}

fn resident_kib(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let line = line.context("no VmRSS")?;
    Ok(line
        .split_whitespace()
        .nth(1)
        .context("no number")?
        .parse()?)
}

#[test]
fn after_many_pods_it_is_as_it_was_before() -> Result<()> {
    const PODS: usize = 8;
    let cli = Cli::new()?;
    let mut daemon = Daemon::start(&cli, "")?;
    let pid = daemon.pid()?;
    let descriptors = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count()) };
    let mut after_first = None;
    for _ in 0..4 {
        let pods = (0..PODS).map(|_| Pod::new()).collect::<Result<Vec<_>>>()?;
        for pod in &pods {
            daemon.write_pod(pod)?;
        }
        let mut all = Vec::new();
        for pod in &pods {
            daemon.wait_for(pod.name(), PodState::Attached)?;
            all.extend(objects(&cli, pod.name())?);
        }
        for pod in &pods {
            daemon.remove_file(pod.name())?;
        }
        for pod in &pods {
            daemon.wait_until_gone(pod.name())?;
        }
        ensure!(directories(&cli)?.is_empty());
        bpf::wait_until_gone(&all)?;
        let now = (descriptors()?, resident_kib(pid)?);
        let (descriptors, memory) = *after_first.get_or_insert(now);
        ensure!(
            now.0 <= descriptors,
            "{descriptors} descriptors became {}",
            now.0
        );
        // An allocator keeps some; a leak would be of each pod.
        ensure!(now.1 < memory + 8192, "{memory} KiB became {} KiB", now.1);
    }
    Ok(())
}

#[test]
fn idle_it_does_nothing() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let mut daemon = Daemon::start(&cli, "")?;
    daemon.write_pod(&pod)?;
    daemon.wait_for(pod.name(), PodState::Attached)?;
    let pid = daemon.pid()?;
    let ticks = || -> Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, rest) = stat.rsplit_once(')').context("no stat")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
    };
    let (before, start) = (ticks()?, Instant::now());
    thread::sleep(Duration::from_secs(3));
    let used = ticks()? - before;
    // A tick is 10 ms: less than a hundredth of the time.
    ensure!(used <= 3, "{used} ticks in {:?}", start.elapsed());
    Ok(())
}
