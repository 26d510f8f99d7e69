//! Attaching and detaching: all or nothing, again and again, interrupted at
//! any moment, and with every kind of wrong argument.
//!
//! Not here: a kernel without BTF, because the running one has it.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use interceptor_common::pod::LAYOUT;
use interceptor_tests::{
    bpf::{self, Id, Kind},
    cgroup::Cgroup,
    cli::{Cli, run_json, set_layout},
    command::{run, wait_until},
    faults,
    inside::Inside,
    pod::{Host, POD_V4, Pod},
    world::{APP, EVERYWHERE, Way, World, assert_direct, assert_served, objects},
};
use serde_json::Value;

const PASSTHROUGH_V6: &str = "::6/128";

fn has_passthrough(pod: &Pod) -> Result<bool> {
    let addresses = pod.netns().ip("-6 addr show dev lo")?;
    Ok(addresses.contains(PASSTHROUGH_V6))
}

/// The route of the proxy's IPv6 addresses.
fn has_proxy_route(pod: &Pod) -> Result<bool> {
    let routes = pod.netns().ip("-6 route show table local")?;
    Ok(routes.contains("100::f01:0/112"))
}

/// Nothing of the pod is there any more, but for the route that live connections
/// need.
fn assert_nothing_left(cli: &Cli, pod: &Pod, objects: &[Id]) -> Result<()> {
    let directories = cli.directories()?;
    ensure!(directories.is_empty(), "pins stay behind: {directories:?}");
    ensure!(!has_passthrough(pod)?, "::6 stays behind on lo");
    bpf::wait_until_gone(objects)
}

#[test]
fn detaching_leaves_nothing_and_live_connections_go_on() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.assert_left_alone()?;
    ensure!(world.cli.attach(&world.pod)? == "newly");
    ensure!(has_passthrough(&world.pod)?);
    let objects = objects(&world.cli, world.name())?;
    let mut live = world.assert_intercepted()?;
    for conversation in &mut live {
        conversation.echo()?;
    }

    world.cli.detach(world.name())?;
    assert_nothing_left(&world.cli, &world.pod, &objects)?;
    for conversation in &mut live {
        conversation.echo().context("after detaching")?;
    }
    world.assert_left_alone()?;
    ensure!(has_proxy_route(&world.pod)?, "the live ones need it");

    ensure!(world.cli.attach(&world.pod)? == "newly");
    for conversation in &mut live {
        conversation.echo().context("after attaching again")?;
    }
    drop(world.assert_intercepted()?);
    drop(live);
    wait_until("the proxy's route goes", Duration::from_secs(20), || {
        world.cli.detach(world.name())?;
        let gone = !has_proxy_route(&world.pod)?;
        world.cli.attach(&world.pod)?;
        Ok(gone.then_some(()))
    })
}

#[test]
fn only_the_pods_own_programs_use_its_maps() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    cli.attach(&pod)?;
    let ours = objects(&cli, pod.name())?;
    // The iterator that looked for listeners is freed soon after.
    wait_until(
        "no other program uses the pod's maps",
        Duration::from_secs(20),
        || {
            let strangers = bpf::list(Kind::Program)?
                .into_iter()
                .filter(|program| !ours.contains(program))
                .filter(|program| {
                    // One that is gone by now uses nothing.
                    bpf::maps_of(program.1)
                        .unwrap_or_default()
                        .iter()
                        .any(|map| ours.contains(map))
                })
                .count();
            Ok((strangers == 0).then_some(()))
        },
    )
}

/// The routing rules, the routes of TPROXY's table and the kernel's settings that
/// TPROXY needs.
fn tproxys_part(pod: &Pod) -> Result<Vec<String>> {
    let netns = pod.netns();
    let mut part = vec![netns.ip("-4 rule show")?, netns.ip("-6 rule show")?];
    let all = [
        netns.ip("-4 route show table all")?,
        netns.ip("-6 route show table all")?,
    ];
    part.extend(
        all.iter()
            .flat_map(|routes| routes.lines())
            .filter(|route| route.contains("table 133") || route.contains("table 134"))
            .map(str::to_owned),
    );
    for name in [
        "ipv4/tcp_fwmark_accept",
        "ipv4/fwmark_reflect",
        "ipv6/fwmark_reflect",
    ] {
        part.push(netns.enter(|| Ok(fs::read_to_string(format!("/proc/sys/net/{name}"))?))?);
    }
    Ok(part)
}

#[test]
fn what_tproxy_needs_comes_and_goes() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let before = tproxys_part(&pod)?;
    let attach = |mode: &str| run(cli.attach_command(&pod)?.arg(mode)).map(drop);
    let set = |mode: &str| run(cli.command()?.args(["set", pod.name(), mode])).map(drop);
    attach("--mode=TPROXY")?;
    let with = tproxys_part(&pod)?;
    ensure!(
        with.iter()
            .filter(|text| text.contains("fwmark 0x539 lookup 133"))
            .count()
            == 2,
        "{with:?}"
    );
    ensure!(
        with.iter()
            .filter(|text| text.contains("local default dev lo table 133"))
            .count()
            == 2,
        "{with:?}"
    );
    ensure!(with[with.len() - 3..] == ["1\n"; 3], "{with:?}");
    set("--mode=REDIRECT")?;
    ensure!(tproxys_part(&pod)? == before, "REDIRECT has it");
    set("--mode=TPROXY")?;
    ensure!(tproxys_part(&pod)? == with, "TPROXY hasn't it");
    // What was lost meanwhile comes back.
    pod.netns().ip("rule del fwmark 1337 lookup 133")?;
    attach("--mode=TPROXY")?;
    ensure!(
        tproxys_part(&pod)? == with,
        "attached again, and without it"
    );
    cli.detach(pod.name())?;
    ensure!(tproxys_part(&pod)? == before, "it stays behind");

    attach("--mode=REDIRECT")?;
    set("--mode=TPROXY")?;
    ensure!(tproxys_part(&pod)? == with, "TPROXY hasn't it");
    cli.detach(pod.name())?;
    ensure!(tproxys_part(&pod)? == before, "it stays behind");
    Ok(())
}

#[test]
fn what_tproxy_needs_stays_if_it_was_there_before() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let netns = pod.netns();
    for family in ["-4", "-6"] {
        netns.ip(&format!("{family} rule add fwmark 1337 lookup 133"))?;
        netns.ip(&format!(
            "{family} route add local default dev lo table 133"
        ))?;
    }
    netns.sysctl("ipv4/tcp_fwmark_accept", "1")?;
    netns.sysctl("ipv4/fwmark_reflect", "1")?;
    netns.sysctl("ipv6/fwmark_reflect", "1")?;
    let before = tproxys_part(&pod)?;
    run(cli.attach_command(&pod)?.arg("--mode=TPROXY"))?;
    ensure!(tproxys_part(&pod)? == before, "attaching changed it");
    cli.detach(pod.name())?;
    ensure!(tproxys_part(&pod)? == before, "detaching changed it");
    Ok(())
}

#[test]
fn an_address_that_was_there_before_stays() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    pod.netns().ip("-6 addr add ::6/128 dev lo")?;
    cli.attach(&pod)?;
    cli.detach(pod.name())?;
    ensure!(has_passthrough(&pod)?, "::6 was taken away");
    Ok(())
}

#[test]
fn a_route_that_was_there_before_stays() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    pod.netns()
        .ip("-6 route add local 100::f01:0/112 dev lo table local")?;
    cli.attach(&pod)?;
    cli.detach(pod.name())?;
    ensure!(has_proxy_route(&pod)?, "it was taken away");
    Ok(())
}

#[test]
fn attaching_again_changes_nothing_but_the_routes() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.cli.attach(&world.pod)?;
    let mut live = world.assert_intercepted()?;
    let before = objects(&world.cli, world.name())?;
    let listeners = world.cli.status(world.name())?["listeners"].clone();

    // An address of the pod's own that the programs don't know yet.
    let added = SocketAddr::new(Ipv4Addr::new(10, 78, 0, 2).into(), 8080);
    world
        .pod
        .netns()
        .ip(&format!("addr add {}/24 dev eth0", added.ip()))?;
    ensure!(world.cli.attach(&world.pod)? == "already");

    assert_direct("APP", &world.app, added).context("`-o lo … RETURN`")?;
    ensure!(objects(&world.cli, world.name())? == before);
    ensure!(world.cli.status(world.name())?["listeners"] == listeners);
    for conversation in &mut live {
        conversation.echo()?;
    }
    world.assert_intercepted()?;

    // And away again.
    world
        .pod
        .netns()
        .ip(&format!("addr del {}/24 dev eth0", added.ip()))?;
    ensure!(world.cli.attach(&world.pod)? == "already");
    assert_served(Way::Out, &world.app, added)?;
    Ok(())
}

#[test]
fn attaching_in_another_way_is_refused() -> Result<()> {
    let (pod, other, cli) = (Pod::new()?, Pod::new()?, Cli::new()?);
    cli.attach(&pod)?;
    let (objects, status) = (objects(&cli, pod.name())?, cli.status(pod.name())?);
    let with = |arguments: &[&str]| -> Result<Command> {
        let mut command = cli.attach_command(&pod)?;
        command.args(arguments);
        Ok(command)
    };
    let mut other_cgroup = cli.command()?;
    other_cgroup
        .args(["attach", "--pod", pod.name(), "--cgroup"])
        .arg(other.cgroup().path())
        .arg("--netns")
        .arg(pod.netns().path());
    let mut other_netns = cli.command()?;
    other_netns
        .args(["attach", "--pod", pod.name(), "--cgroup"])
        .arg(pod.cgroup().path())
        .arg("--netns")
        .arg(other.netns().path());
    for (mut command, what) in [
        (with(&["--proxy-uid", "1338"])?, "settings"),
        (with(&["--proxy-gid", "1"])?, "settings"),
        (with(&["--outbound-port", "16001"])?, "settings"),
        (with(&["--inbound-port", "16006"])?, "settings"),
        (with(&["--exclude-inbound-ports", ""])?, "settings"),
        (with(&["--log-level", "debug"])?, "log level"),
        (other_cgroup, "cgroup"),
        (other_netns, "network namespace"),
    ] {
        assert_refused(
            &mut command,
            &[
                &format!("attached already with another {what}"),
                &format!("interceptor detach --pod {}", pod.name()),
            ],
        )?;
    }
    ensure!(objects == self::objects(&cli, pod.name())?);
    ensure!(status == cli.status(pod.name())?);
    ensure!(!has_passthrough(&other)?, "::6 stays on the other pod's lo");
    Ok(())
}

/// When to kill.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// After this part of the time that attaching takes, in percent.
    Percent(u32),
    /// So long after it began to pin.
    Pinning(Duration),
}

#[test]
fn killed_at_any_moment_it_leaves_nothing_half() -> Result<()> {
    let moments = (0..20)
        .map(|time| Moment::Percent(5 * time))
        .chain((0..20).map(|time| Moment::Pinning(Duration::from_micros(300) * time)))
        .cycle()
        .take(120);
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    let staging = world.cli.pins().join(format!("{}+attaching", world.name()));
    let mut takes = Duration::ZERO;
    let (mut killed, mut half) = (0, 0);
    for moment in moments {
        let mut attaching = world
            .cli
            .attach_command(&world.pod)?
            .stdout(Stdio::null())
            .spawn()?;
        match moment {
            Moment::Percent(part) => thread::sleep(takes * part / 100),
            Moment::Pinning(after) => {
                while !staging.exists() && attaching.try_wait()?.is_none() {
                    thread::yield_now();
                }
                thread::sleep(after);
            }
        }
        attaching.kill()?;
        if !attaching.wait()?.success() {
            killed += 1;
        }
        let left = world.cli.directories()?;
        let took = takes;
        let context = || format!("killed at {moment:?} of {took:?}, left {left:?}");
        if left.iter().any(|name| name.contains('+')) {
            half += 1;
        } else if !left.is_empty() {
            // What is there under the pod's own name is whole.
            world.cli.status(world.name()).with_context(context)?;
        }
        let start = Instant::now();
        world.cli.attach(&world.pod).with_context(context)?;
        if left.is_empty() {
            takes = start.elapsed();
        }
        ensure!(world.cli.directories()? == [world.name()], "{}", context());
        world.assert_intercepted().with_context(context)?;
        let objects = objects(&world.cli, world.name())?;
        world.cli.detach(world.name()).with_context(context)?;
        assert_nothing_left(&world.cli, &world.pod, &objects).with_context(context)?;
        world.assert_left_alone().with_context(context)?;
        if killed >= 30 && half >= 5 {
            return Ok(());
        }
    }
    // Else too little was tried.
    bail!("killed only {killed} times, {half} times while it pinned")
}

#[test]
fn what_one_that_was_killed_left_is_cleaned_up() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    for half in ["attaching", "detaching"] {
        for next in ["attach", "detach"] {
            cli.attach(&pod)?;
            let objects = objects(&cli, pod.name())?;
            fs::rename(
                cli.pins().join(pod.name()),
                cli.pins().join(format!("{}+{half}", pod.name())),
            )?;
            if next == "attach" {
                ensure!(cli.attach(&pod)? == "newly");
                cli.detach(pod.name())?;
            } else {
                // There was no whole one.
                assert_refused(
                    cli.command()?.args(["detach", "--pod", pod.name()]),
                    &["no pod"],
                )?;
            }
            assert_nothing_left(&cli, &pod, &objects).context(half)?;
        }
    }
    Ok(())
}

#[test]
fn two_at_once_make_one_attachment() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    for _ in 0..5 {
        let start = || -> Result<_> {
            Ok(world
                .cli
                .attach_command(&world.pod)?
                .stdout(Stdio::piped())
                .spawn()?)
        };
        let both = [start()?, start()?];
        let mut answers = Vec::new();
        for one in both {
            let output = one.wait_with_output()?;
            ensure!(output.status.success(), "{output:?}");
            let answer: Value = serde_json::from_slice(&output.stdout)?;
            answers.push(answer["attached"].as_str().unwrap_or_default().to_owned());
        }
        answers.sort();
        ensure!(answers == ["already", "newly"], "{answers:?}");
        world.assert_intercepted()?;
        let objects = objects(&world.cli, world.name())?;
        world.cli.detach(world.name())?;
        assert_nothing_left(&world.cli, &world.pod, &objects)?;
    }
    Ok(())
}

#[test]
fn attaching_while_detaching_ends_whole_or_not_at_all() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    for _ in 0..5 {
        world.cli.attach(&world.pod)?;
        let mut attaching = world
            .cli
            .attach_command(&world.pod)?
            .stdout(Stdio::null())
            .spawn()?;
        world.cli.detach(world.name())?;
        ensure!(attaching.wait()?.success());
        if world.cli.directories()?.is_empty() {
            world.assert_left_alone()?;
        } else {
            world.assert_intercepted()?;
            let objects = objects(&world.cli, world.name())?;
            world.cli.detach(world.name())?;
            assert_nothing_left(&world.cli, &world.pod, &objects)?;
        }
    }
    Ok(())
}

#[test]
fn fifty_times_in_a_row_nothing_grows() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    let mut all = Vec::new();
    let mut sizes = Vec::new();
    for _ in 0..50 {
        cli.attach(&pod)?;
        let objects = objects(&cli, pod.name())?;
        sizes.push(objects.len());
        all.extend(objects);
        cli.detach(pod.name())?;
    }
    sizes.dedup();
    ensure!(sizes.len() == 1, "the number of objects varies: {sizes:?}");
    assert_nothing_left(&cli, &pod, &all)
}

#[test]
fn a_pod_that_is_gone_can_be_detached() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    cli.attach(&pod)?;
    let (name, objects) = (pod.name().to_owned(), objects(&cli, pod.name())?);
    drop(pod);
    let status = cli.status(&name)?;
    ensure!(status["cgroup"].is_null(), "{status}");
    cli.detach(&name)?;
    ensure!(cli.directories()?.is_empty());
    bpf::wait_until_gone(&objects)
}

/// The command fails with one line on standard error, of which these are
/// parts, and prints nothing else.
fn assert_refused(command: &mut Command, parts: &[&str]) -> Result<()> {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output()?;
    let stderr = String::from_utf8(stderr)?;
    ensure!(!status.success(), "{command:?} succeeded");
    ensure!(status.code() == Some(1), "{command:?}: {status}\n{stderr}");
    ensure!(stdout.is_empty(), "{command:?} printed {stdout:?}");
    ensure!(
        stderr.starts_with("error: ") && stderr.lines().count() == 1 && stderr.ends_with('\n'),
        "not one line that says `error: …`: {stderr}"
    );
    for part in parts {
        ensure!(stderr.contains(part), "no `{part}` in: {stderr}");
    }
    Ok(())
}

/// The command fails before it starts: clap's usage error, with these parts.
fn assert_misused(command: &mut Command, parts: &[&str]) -> Result<()> {
    let output = command.output()?;
    let stderr = String::from_utf8(output.stderr)?;
    ensure!(
        output.status.code() == Some(2),
        "{command:?}: {}\n{stderr}",
        output.status
    );
    ensure!(stderr.starts_with("error: "), "{stderr}");
    for part in parts {
        ensure!(stderr.contains(part), "no `{part}` in: {stderr}");
    }
    Ok(())
}

/// A pod, and attach commands with one argument wrong.
struct Wrong {
    cli: Cli,
    pod: Pod,
}

impl Wrong {
    fn new() -> Result<Self> {
        Ok(Self {
            cli: Cli::new()?,
            pod: Pod::new()?,
        })
    }

    /// Attaches with another cgroup, or netns, or both.
    fn on(&self, cgroup: Option<&Path>, netns: Option<&str>) -> Result<Command> {
        let path = self.pod.netns().path();
        let mut command = self.cli.command()?;
        command
            .args(["attach", "--pod", self.pod.name(), "--cgroup"])
            .arg(cgroup.unwrap_or(self.pod.cgroup().path()))
            .arg("--netns")
            .arg(netns.map_or(path.as_path(), Path::new));
        Ok(command)
    }

    fn with(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.cli.attach_command(&self.pod)?;
        command.args(arguments);
        Ok(command)
    }

    /// Nothing was made, and a right command works.
    fn assert_unharmed(&self) -> Result<()> {
        ensure!(!self.cli.pins().exists(), "{:?}", self.cli.directories()?);
        ensure!(!has_passthrough(&self.pod)? && !has_proxy_route(&self.pod)?);
        ensure!(self.cli.attach(&self.pod)? == "newly");
        Ok(())
    }
}

#[test]
fn a_wrong_cgroup_is_refused() -> Result<()> {
    let wrong = Wrong::new()?;
    let mount = Cgroup::mount()?;
    let on = |path: &Path| wrong.on(Some(path), None);
    assert_refused(
        &mut on(&mount.join("no-such-cgroup"))?,
        &[
            "no-such-cgroup",
            "no such directory",
            &mount.display().to_string(),
        ],
    )?;
    assert_refused(
        &mut on(Path::new("/proc"))?,
        &["/proc is not a cgroup v2 directory"],
    )?;
    assert_refused(
        &mut on(&wrong.pod.cgroup().path().join("cgroup.procs"))?,
        &["cgroup.procs", "it is a file"],
    )?;
    assert_refused(
        &mut on(Path::new("/etc/passwd"))?,
        &["/etc/passwd is not a cgroup v2 directory"],
    )?;
    let v1 = Path::new("/sys/fs/cgroup/cpu");
    // Only where both versions are mounted.
    if v1.is_dir() && !mount.ends_with("/sys/fs/cgroup") {
        assert_refused(
            &mut on(v1)?,
            &["cgroup v1", &format!("below {}", mount.display())],
        )?;
    }
    assert_refused(&mut on(&mount)?, &["the root cgroup", "--allow-host"])?;
    assert_refused(&mut on(&mount.join("."))?, &["the root cgroup"])?;
    wrong.assert_unharmed()
}

#[test]
fn a_wrong_network_namespace_is_refused() -> Result<()> {
    let wrong = Wrong::new()?;
    let on = |netns: &str| wrong.on(None, Some(netns));
    assert_refused(
        &mut on("/run/netns/no-such-netns")?,
        &[
            "/run/netns/no-such-netns is no network namespace",
            "No such file",
        ],
    )?;
    for path in ["/etc/passwd", "/proc", "/proc/self/ns/mnt", ""] {
        assert_refused(
            &mut on(path)?,
            &[
                &format!("{path} is no network namespace"),
                "/run/netns/NAME",
            ],
        )
        .with_context(|| format!("`{path}`"))?;
    }
    let mut child = Command::new("true").spawn()?;
    let pid = child.id().to_string();
    child.wait()?;
    assert_refused(&mut on(&pid)?, &[&pid, "PID of one of the pod's processes"])?;
    assert_refused(&mut on("99999999999999999999")?, &["no network namespace"])?;
    let mut hosts = vec!["/proc/self/ns/net"];
    // In some containers root may not look at process 1.
    if fs::metadata("/proc/1/ns/net").is_ok() {
        hosts.extend(["/proc/1/ns/net", "1"]);
    }
    for host in hosts {
        assert_refused(
            &mut on(host)?,
            &["the machine's own network namespace", "--allow-host"],
        )?;
    }
    wrong.assert_unharmed()
}

#[test]
fn a_process_id_stands_for_its_network_namespace() -> Result<()> {
    let wrong = Wrong::new()?;
    let process = Inside::start(&wrong.pod, Host::Pod, APP)?;
    // The process is in the namespace when its program runs, at the latest
    // when it answers.
    process.tcp((POD_V4, 0).into())?;
    run(&mut wrong.on(None, Some(&process.pid().to_string()))?)?;
    ensure!(wrong.cli.attach(&wrong.pod)? == "already");
    Ok(())
}

#[test]
fn a_wrong_name_is_refused() -> Result<()> {
    let wrong = Wrong::new()?;
    let long = "x".repeat(129);
    for name in [
        "a/b",
        "",
        ".",
        "..",
        "a.b",
        "a b",
        "a+attaching",
        "é",
        &long,
    ] {
        for subcommand in ["attach", "detach", "status", "chains"] {
            let mut command = wrong.cli.command()?;
            command.args([subcommand, "--pod", name]);
            if subcommand == "attach" {
                command
                    .arg("--cgroup")
                    .arg(wrong.pod.cgroup().path())
                    .arg("--netns")
                    .arg(wrong.pod.netns().path());
            }
            assert_misused(&mut command, &["--pod", "1 to 128 letters, digits"])
                .with_context(|| format!("{subcommand} `{name}`"))?;
        }
    }
    wrong.assert_unharmed()
}

#[test]
fn wrong_settings_are_refused() -> Result<()> {
    let wrong = Wrong::new()?;
    for (arguments, parts) in [
        (
            ["--proxy-uid", "1,2,3,4,5,6,7,8,9"],
            ["proxy-uid", "at most 8"],
        ),
        (
            ["--proxy-gid", "1,2,3,4,5,6,7,8,9"],
            ["proxy-gid", "at most 8"],
        ),
        (["--proxy-uid", "4294967295"], ["proxy-uid", "4294967295"]),
        (["--proxy-gid", "4294967295"], ["proxy-gid", "4294967295"]),
        (["--outbound-port", "15006"], ["inbound-port", "15006"]),
        (["--inbound-port", "15001"], ["inbound-port", "15001"]),
    ] {
        let [option, value] = arguments;
        assert_refused(&mut wrong.with(&[&format!("{option}={value}")])?, &parts)?;
    }
    let many: Vec<String> = (1..=65).map(|port| port.to_string()).collect();
    assert_refused(
        &mut wrong.with(&[&format!("--exclude-inbound-ports={}", many.join(","))])?,
        &["exclude-inbound-ports", "at most 64"],
    )?;
    for (value, part) in [
        ("22,ssh", "`ssh`"),
        ("65536", "`65536`"),
        ("-1", "`-1`"),
        ("9-8", "`9-8`"),
    ] {
        assert_misused(
            &mut wrong.with(&[&format!("--exclude-inbound-ports={value}")])?,
            &["--exclude-inbound-ports", part, "is no port"],
        )?;
    }
    for (option, value) in [
        ("--outbound-port", "0"),
        ("--outbound-port", "65536"),
        ("--inbound-port", "0"),
        ("--inbound-port", "x"),
        ("--proxy-uid", "root"),
        ("--proxy-uid", "4294967296"),
        ("--log-level", "loud"),
        ("--netns-file", "x"),
    ] {
        assert_misused(&mut wrong.with(&[&format!("{option}={value}")])?, &[option])?;
    }
    wrong.assert_unharmed()
}

/// A kernel that is too old, or was built otherwise, as far as one can be had:
/// without its types.
#[test]
fn a_kernel_without_types_is_refused() -> Result<()> {
    let wrong = Wrong::new()?;
    let hidden = |command: &Command| {
        let mut unshare = Command::new("unshare");
        unshare
            .args(["-m", "sh", "-c"])
            .arg("mount -t tmpfs none /sys/kernel/btf && exec \"$@\"")
            .arg("sh")
            .arg(command.get_program())
            .args(command.get_args());
        unshare
    };
    let missing = ["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF"];
    assert_refused(
        &mut hidden(&wrong.cli.attach_command(&wrong.pod)?),
        &missing,
    )?;
    wrong.assert_unharmed()?;
    let mut check = wrong.cli.command()?;
    check.args(["check", "-o", "json"]);
    let output = hidden(&check).output().context("run the check")?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let checks: Value = serde_json::from_slice(&output.stdout)?;
    let of = |name: &str| {
        let mut checks = checks.as_array().into_iter().flatten();
        checks.find(|check| check["name"] == name).cloned()
    };
    let btf = of("BTF").context("no check of BTF")?;
    ensure!(btf["outcome"] == "fail", "{btf}");
    ensure!(
        btf["fix"]
            .as_str()
            .is_some_and(|fix| fix.contains(missing[1])),
        "{btf}"
    );
    // With nothing hidden it passes.
    let checks = run_json(&mut check)?;
    ensure!(
        checks
            .as_array()
            .into_iter()
            .flatten()
            .all(|check| check["outcome"] != "fail"),
        "{checks}"
    );
    Ok(())
}

#[test]
fn without_root_it_says_so() -> Result<()> {
    let wrong = Wrong::new()?;
    // Not everyone can read the directory in which it was built.
    let directory = tempfile::tempdir()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let copy = directory.path().join("interceptor");
    fs::copy(wrong.cli.command()?.get_program(), &copy)?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(&copy)
            .arg("--pins")
            .arg(wrong.cli.pins())
            .args(arguments)
            .current_dir("/");
        command
    };
    let (cgroup, netns) = (wrong.pod.cgroup().path(), wrong.pod.netns().path());
    assert_refused(
        as_nobody(&["attach", "--pod", wrong.pod.name(), "--cgroup"])
            .arg(cgroup)
            .arg("--netns")
            .arg(netns),
        &["needs root", "sudo"],
    )?;
    wrong.assert_unharmed()?;
    for subcommand in ["detach", "status", "chains"] {
        assert_refused(
            &mut as_nobody(&[subcommand, "--pod", wrong.pod.name()]),
            &["needs root", "sudo"],
        )
        .context(subcommand)?;
    }
    assert_refused(&mut as_nobody(&["status"]), &["needs root", "sudo"])?;
    Ok(())
}

#[test]
fn pins_elsewhere_than_on_bpffs_are_refused() -> Result<()> {
    let wrong = Wrong::new()?;
    let directory = tempfile::tempdir()?;
    for pins in [directory.path().to_owned(), directory.path().join("new")] {
        assert_refused(
            wrong.with(&[])?.arg("--pins").arg(&pins),
            &[&pins.display().to_string(), "mount -t bpf"],
        )?;
    }
    ensure!(fs::read_dir(directory.path())?.next().is_none());
    wrong.assert_unharmed()
}

#[test]
fn a_pod_that_is_not_attached_is_unknown() -> Result<()> {
    let cli = Cli::new()?;
    for subcommand in ["detach", "status", "chains"] {
        assert_refused(
            cli.command()?.args([subcommand, "--pod", "stranger"]),
            &["stranger", "interceptor status"],
        )
        .context(subcommand)?;
    }
    ensure!(run_json(cli.command()?.args(["status", "-o", "json"]))? == Value::Array(vec![]));
    ensure!(!cli.pins().exists());
    Ok(())
}

#[test]
fn damaged_pins_are_noticed_and_can_be_detached() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    for pin in ["links/connect4", "maps/ROUTES", "maps/ATTACHMENT"] {
        cli.attach(&pod)?;
        let objects = objects(&cli, pod.name())?;
        fs::remove_file(cli.pins().join(pod.name()).join(pin))?;
        for mut command in [cli.attach_command(&pod)?, {
            let mut status = cli.command()?;
            status.args(["status", "--pod", pod.name()]);
            status
        }] {
            assert_refused(&mut command, &[pin, "interceptor detach"]).context(pin)?;
        }
        cli.detach(pod.name())?;
        ensure!(cli.directories()?.is_empty());
        bpf::wait_until_gone(&objects)?;
        // Whether ::6 was added is written in the map that is gone.
        let _ = pod.netns().ip("-6 addr del ::6/128 dev lo");
    }
    Ok(())
}

#[test]
fn pins_of_another_layout_are_refused_and_can_be_detached() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    for (layout, words, fix) in [
        (LAYOUT + 1, "a newer version", "run that version again"),
        (LAYOUT - 1, "an older version", "attach it again"),
    ] {
        cli.attach(&pod)?;
        let objects = objects(&cli, pod.name())?;
        set_layout(&cli, pod.name(), layout)?;
        let both = format!("its layout is {layout}, this one's {LAYOUT}");
        let mut commands = vec![cli.attach_command(&pod)?];
        for arguments in [
            ["status", "--pod", pod.name()],
            ["chains", "--pod", pod.name()],
            ["connections", "--pod", pod.name()],
            ["set", pod.name(), "--exclude-outbound-ports=1"],
        ] {
            let mut command = cli.command()?;
            command.args(arguments);
            commands.push(command);
        }
        for command in &mut commands {
            assert_refused(command, &[pod.name(), words, &both, fix])?;
        }
        cli.detach(pod.name())?;
        assert_nothing_left(&cli, &pod, &objects)?;
        ensure!(!has_proxy_route(&pod)?);
    }
    Ok(())
}

/// Every kind of step is made to fail: each call that is unlike the one before it.
/// (Of those that are alike, such as the writes of a list, the first.)
#[test]
fn whichever_step_of_attaching_fails_nothing_is_left_and_the_next_try_works() -> Result<()> {
    let wrong = Wrong::new()?;
    let attach = || wrong.with(&["--exclude-outbound-cidrs", "10.1.0.0/16"]);
    let whole = faults::run(&mut attach()?, None)?;
    ensure!(whole.status.success(), "{}", whole.stderr);
    wrong.cli.detach(wrong.pod.name())?;
    let steps = (0..whole.calls.len())
        .filter(|step| *step == 0 || whole.calls[*step] != whole.calls[step - 1]);
    let (mut failed, mut tried) = (0, 0);
    for step in steps {
        let run = faults::run(&mut attach()?, Some(step))?;
        let call = run.calls.get(step);
        let what = || format!("step {step}, {call:?}: {}", run.stderr);
        tried += 1;
        if run.status.success() {
            // It does without, as on a kernel that lacks something.
            wrong.cli.status(wrong.pod.name()).with_context(what)?;
            wrong.cli.detach(wrong.pod.name()).with_context(what)?;
        } else {
            failed += 1;
            let words = call.context("it has made fewer calls")?.words();
            ensure!(run.status.code() == Some(1), "{}", what());
            ensure!(
                run.stderr.starts_with("error: ") && run.stderr.contains(&words),
                "no `{words}` in {}",
                what()
            );
        }
        ensure!(!wrong.cli.pins().exists(), "pins are left: {}", what());
        ensure!(
            !has_passthrough(&wrong.pod)? && !has_proxy_route(&wrong.pod)?,
            "the namespace was changed: {}",
            what()
        );
    }
    ensure!(failed >= 20, "only {failed} of {tried} failed");
    wrong.assert_unharmed()
}

#[test]
fn json_has_the_documented_fields() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    let (cli, name) = (&world.cli, world.name());
    let fields = |value: &Value| -> Vec<String> {
        value
            .as_object()
            .into_iter()
            .flat_map(|object| object.keys().cloned())
            .collect()
    };
    let attached = run_json(&mut cli.attach_command(&world.pod)?)?;
    ensure!(
        fields(&attached) == ["attached", "pins", "pod"],
        "{attached}"
    );
    ensure!(attached["pins"] == cli.pins().join(name).display().to_string());
    world.assert_intercepted()?;

    let status = cli.status(name)?;
    ensure!(
        fields(&status)
            == [
                "cgroup",
                "cgroup_id",
                "events",
                "handshakes",
                "links",
                "listeners",
                "log_level",
                "netns_inode",
                "numbered_destinations",
                "pins",
                "pod",
                "refusal",
                "routes",
                "settings",
                "until_proxy_listens"
            ],
        "{status}"
    );
    ensure!(status["cgroup"] == world.pod.cgroup().path().display().to_string());
    ensure!(status["listeners"] == serde_json::json!({"outbound": 2, "inbound": 2, "dns": 0}));
    ensure!(fields(&status["links"][0]) == ["link_id", "program", "program_id"]);
    ensure!(fields(&status["events"][0]) == ["count", "event"]);

    let chains = run_json(cli.command()?.args(["chains", "-o", "json", "--pod", name]))?;
    for (chain, (name, from)) in chains
        .as_array()
        .context("no chains")?
        .iter()
        .zip([("ISTIO_OUTPUT", "OUTPUT"), ("ISTIO_INBOUND", "PREROUTING")])
    {
        ensure!(
            fields(chain) == ["chain", "family", "from", "rules"],
            "{chain}"
        );
        ensure!(chain["chain"] == name && chain["from"] == from, "{chain}");
        let rules = chain["rules"].as_array().context("no rules")?;
        ensure!(fields(&rules[0]) == ["hits", "number", "target", "text"]);
        let last = rules.last().context("no rule")?;
        // assert_intercepted's connections, two each way.
        ensure!(last["hits"] == 2, "{chain}");
    }
    ensure!(chains.as_array().map(Vec::len) == Some(2));

    let detached = run_json(cli.command()?.args(["detach", "-o", "json", "--pod", name]))?;
    ensure!(fields(&detached) == ["pod"] && detached["pod"] == name);
    Ok(())
}
