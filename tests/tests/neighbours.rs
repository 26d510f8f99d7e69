//! What is beside the pod: other pods, processes that are only half in it, and
//! other people's kernel programs. Nobody gets in anybody's way.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use interceptor_tests::{
    agent::{Agent, Listen},
    bpf,
    cgroup::Cgroup,
    cli::run_json,
    command::run,
    foreign::{Counter, Hook, Sharing, Steering},
    inside::{Inside, Server},
    pod::{Credentials, Host, PEER_V4, POD_V4, Pod},
    world::{
        APP, EVERYWHERE, EXCLUDED_PORT, INBOUND, PORT, Way, World, assert_direct, assert_refused,
        assert_served, objects, start_server,
    },
};
use socket2::Socket;

fn move_to(cgroup: &Path, process: &Inside) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), process.pid().to_string())
        .with_context(|| format!("move a process to {}", cgroup.display()))
}

#[test]
fn a_pod_with_other_settings_keeps_to_them() -> Result<()> {
    const OTHER: Credentials = Credentials {
        uid: 2000,
        gid: 2000,
    };
    let (world, other) = (World::new()?, World::new()?);
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.cli.attach(&world.pod)?;
    run_json(other.cli.attach_command(&other.pod)?.args([
        "--proxy-uid=2000",
        "--proxy-gid=2000",
        "--outbound-port=16001",
        "--inbound-port=16006",
        "--exclude-inbound-ports=8080",
    ]))?;
    let other_proxy = Inside::start(&other.pod, Host::Pod, OTHER)?;
    let _other_proxy: Vec<Server> = EVERYWHERE
        .into_iter()
        .flat_map(|address| [(Way::Out, address, 16001), (Way::In, address, 16006)])
        .map(|(way, address, port)| {
            Ok(start_server(
                way,
                other_proxy.listen((address, port).into())?,
            ))
        })
        .collect::<Result<_>>()?;

    let (excluded, usual): (SocketAddr, SocketAddr) =
        ((POD_V4, EXCLUDED_PORT).into(), (POD_V4, PORT).into());
    let peer = (PEER_V4, PORT).into();
    world.assert_intercepted()?;
    assert_direct("APP", &world.peer, excluded)?;
    assert_direct("PEER", &world.proxy, peer)?;

    assert_served(Way::Out, &other.app, peer)?;
    // 1337 is nobody special there.
    assert_served(Way::Out, &other.proxy, peer)?;
    assert_direct("PEER", &other_proxy, peer)?;
    assert_direct("APP", &other.peer, usual)?;
    assert_served(Way::In, &other.peer, excluded)?;

    other.cli.detach(other.name())?;
    other.assert_left_alone()?;
    world.assert_intercepted()?;
    Ok(())
}

#[test]
fn the_kernels_own_answer_is_not_the_proxys_address() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.cli.attach(&world.pod)?;
    // Somebody's rule for something else has conntrack follow every connection.
    for iptables in ["iptables", "ip6tables"] {
        let rule = "-t nat -A OUTPUT -p udp --dport 9 -j REDIRECT --to-ports 10";
        world
            .pod
            .netns()
            .enter(|| run(Command::new(iptables).args(rule.split(' '))))?;
    }
    world.assert_intercepted()?;
    Ok(())
}

#[test]
fn an_address_of_the_proxys_that_is_dialled_is_its_own_destination() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.cli.attach(&world.pod)?;
    for to in Way::Out.destinations() {
        let redirected = assert_served(Way::Out, &world.app, to)?;
        // It has the number of `to`.
        let address = redirected.served.getsockname;
        ensure!(world.cli.status(world.name())?["numbered_destinations"] != 0);
        let dialled = assert_served(Way::Out, &world.app, address)?;
        // What the proxy connects to in its own pod goes to its inbound port.
        let by_proxy = assert_served(Way::In, &world.proxy, address)?;
        for (conversation, meant) in [(&redirected, to), (&dialled, address), (&by_proxy, address)]
        {
            let peer = conversation.socket().peer_addr()?.as_socket();
            ensure!(peer == Some(meant), "{peer:?} instead of {meant}");
        }
        let listed = run_json(world.cli.command()?.args(["connections", "-o", "json"]))?;
        let listed = listed.as_array().context("no list")?;
        for (meant, sockets) in [(to, 2), (address, 4)] {
            let count = listed
                .iter()
                .filter(|connection| connection["original_destination"] == meant.to_string())
                .count();
            ensure!(count == sockets, "{meant}: {listed:#?}");
        }
    }
    Ok(())
}

/// A connection that a socket of `server`'s accepts, and what is seen of it.
fn look_at_connection(server: &Inside, client: &Inside, to: SocketAddr) -> Result<Vec<String>> {
    let listener = server.listen(to)?;
    let socket = client.tcp(to)?;
    socket.connect(&to.into())?;
    let (accepted, _) = listener.accept()?;
    let text = |result: io::Result<socket2::SockAddr>| match result {
        Ok(address) => format!("{:?}", address.as_socket()),
        Err(error) => error.to_string(),
    };
    Ok(vec![
        text(socket.peer_addr()),
        text(accepted.local_addr()),
        text(accepted.original_dst_v4()),
        text(accepted.original_dst_v6()),
        text(socket.original_dst_v4()),
    ])
}

#[test]
fn the_pods_processes_in_another_network_namespace_are_left_alone() -> Result<()> {
    let (world, elsewhere) = (World::new()?, Pod::new()?);
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.cli.attach(&world.pod)?;
    let peer = Agent::start(&elsewhere, Host::Peer)?;
    let to = SocketAddr::new(PEER_V4, PORT);
    peer.listen(Listen::new("ELSEWHERE", [to]))?;
    let stranger = Inside::start(&elsewhere, Host::Pod, APP)?;
    let here = SocketAddr::new(POD_V4, INBOUND);
    let before = look_at_connection(&stranger, &stranger, here)?;

    move_to(world.pod.cgroup().path(), &stranger)?;
    let conversation = assert_direct("ELSEWHERE", &stranger, to)?;
    ensure!(conversation.socket().peer_addr()?.as_socket() == Some(to));
    ensure!(conversation.served.original_dst.is_err());
    let after = look_at_connection(&stranger, &stranger, here)?;
    ensure!(before == after, "{before:?} became {after:?}");
    let chains =
        run_json(
            world
                .cli
                .command()?
                .args(["chains", "-o", "json", "--pod", world.name()]),
        )?;
    for chain in chains.as_array().context("no chains")? {
        for rule in chain["rules"].as_array().context("no rules")? {
            ensure!(rule["hits"] == 0, "{chain}");
        }
    }
    world.assert_intercepted()?;
    Ok(())
}

#[test]
fn a_process_outside_the_pods_cgroup_is_intercepted_on_the_way_in_only() -> Result<()> {
    let world = World::new()?;
    world.cli.attach(&world.pod)?;
    let outside = Cgroup::new("interceptor-outside")?;
    let stranger = Inside::start(&world.pod, Host::Pod, APP)?;
    stranger.tcp((POD_V4, 0).into())?;
    move_to(outside.path(), &stranger)?;

    // On the way out, the hooks are on the cgroup.
    assert_direct("PEER", &stranger, (PEER_V4, PORT).into())?;

    // On the way in, they are on the network namespace.
    let theirs = SocketAddr::new(POD_V4, 9000);
    let _server = Server::start("STRANGER", stranger.listen(theirs)?);
    assert_refused(&world.peer, theirs)?;
    {
        let _proxy = world.start_proxy(&EVERYWHERE)?;
        assert_served(Way::In, &world.peer, theirs)?;
        // Within the pod's network namespace the chains leave it alone.
        assert_direct("STRANGER", &world.app, theirs)?;
    }

    // A proxy there is none: it would not learn any original destination.
    let _false_proxy = Server::start(
        "FALSE PROXY",
        stranger.listen((Ipv4Addr::UNSPECIFIED, INBOUND).into())?,
    );
    assert_refused(&world.peer, theirs)?;
    let none = serde_json::json!({"outbound": 0, "inbound": 0, "dns": 0});
    ensure!(world.cli.status(world.name())?["listeners"] == none);
    Ok(())
}

#[test]
fn the_containers_cgroups_below_the_pods_belong_to_it() -> Result<()> {
    let world = World::new()?;
    world.cli.attach(&world.pod)?;
    let pod = world.pod.cgroup().path();
    for (container, process) in [("app", &world.app), ("proxy/worker", &world.proxy)] {
        let container = pod.join(container);
        fs::create_dir_all(&container)?;
        move_to(&container, process)?;
    }
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.assert_intercepted()?;
    Ok(())
}

/// A world whose pod's cgroup is one below [`Pod::cgroup`], which is its
/// parent.
fn with_parent() -> Result<(World, Command)> {
    let world = World::new()?;
    let cgroup = world.pod.cgroup().path().join("pod");
    fs::create_dir(&cgroup)?;
    for process in [&world.app, &world.proxy] {
        process.tcp((POD_V4, 0).into())?;
        move_to(&cgroup, process)?;
    }
    let mut attach = world.cli.command()?;
    attach
        .args(["attach", "--pod", world.name(), "--cgroup"])
        .arg(cgroup)
        .arg("--netns")
        .arg(world.pod.netns().path());
    Ok((world, attach))
}

/// Puts a counting program on every hook of the cgroup.
fn count_on(cgroup: &Path) -> Result<Vec<Counter>> {
    Hook::ALL
        .into_iter()
        .map(|hook| Counter::attach("neighbour", hook, File::open(cgroup)?, Sharing::Multi))
        .collect()
}

/// A connection calls every one of these programs.
fn assert_called(
    counters: &[Counter],
    client: &Inside,
    connect: impl FnOnce() -> Result<Socket>,
) -> Result<()> {
    let before: Vec<u64> = counters.iter().map(Counter::calls).collect::<Result<_>>()?;
    let socket = connect()?;
    socket.peer_addr()?;
    // An option that nobody answers otherwise.
    socket.tcp_nodelay()?;
    for ((counter, before), hook) in counters.iter().zip(before).zip(Hook::ALL) {
        let after = counter.calls()?;
        ensure!(
            after > before,
            "{hook:?} is not called any more (process {})",
            client.pid()
        );
    }
    Ok(())
}

#[test]
fn programs_on_the_parent_cgroup_are_called_as_ever() -> Result<()> {
    let (world, mut attach) = with_parent()?;
    let counters = count_on(world.pod.cgroup().path())?;
    let to = SocketAddr::new(PEER_V4, PORT);
    let direct = || -> Result<Socket> {
        Ok(assert_direct("PEER", &world.app, to)?
            .socket()
            .try_clone()?)
    };
    let served = || -> Result<Socket> {
        Ok(assert_served(Way::Out, &world.app, to)?
            .socket()
            .try_clone()?)
    };
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    assert_called(&counters, &world.app, direct).context("before")?;
    run(&mut attach)?;
    assert_called(&counters, &world.app, served).context("while attached")?;
    world.assert_intercepted()?;
    world.cli.detach(world.name())?;
    assert_called(&counters, &world.app, direct).context("after")
}

#[test]
fn programs_can_be_added_to_the_pods_cgroup_and_below() -> Result<()> {
    let (world, mut attach) = with_parent()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    run(&mut attach)?;
    let to = SocketAddr::new(PEER_V4, PORT);
    let served = || -> Result<Socket> {
        Ok(assert_served(Way::Out, &world.app, to)?
            .socket()
            .try_clone()?)
    };
    let cgroup = world.pod.cgroup().path().join("pod");
    let beside = count_on(&cgroup).context("on the pod's cgroup")?;
    assert_called(&beside, &world.app, served)?;

    // One that excludes others excludes them below itself only.
    let container = cgroup.join("container");
    fs::create_dir(&container)?;
    move_to(&container, &world.app)?;
    let exclusive = Counter::attach(
        "selfish",
        Hook::Connect4,
        File::open(&container)?,
        Sharing::Exclusive,
    )?;
    assert_called(&beside, &world.app, served)?;
    ensure!(exclusive.calls()? > 0);
    world.assert_intercepted()?;

    world.cli.detach(world.name())?;
    assert_called(&beside, &world.app, || {
        Ok(assert_direct("PEER", &world.app, to)?
            .socket()
            .try_clone()?)
    })
}

#[test]
fn an_exclusive_program_is_named_and_nothing_is_left() -> Result<()> {
    let (world, mut attach) = with_parent()?;
    let parent = world.pod.cgroup().path();
    for cgroup in [parent.to_owned(), parent.join("pod")] {
        for hook in Hook::ALL {
            let counter =
                Counter::attach("bouncer", hook, File::open(&cgroup)?, Sharing::Exclusive)?;
            let output = attach.output()?;
            let stderr = String::from_utf8(output.stderr)?;
            ensure!(!output.status.success(), "{hook:?}: attached");
            let place = format!("on {})", cgroup.display());
            ensure!(
                stderr.lines().count() == 1
                    && stderr.contains("`bouncer` (program ")
                    && stderr.contains(&place)
                    && stderr.contains("BPF_F_ALLOW_MULTI"),
                "{hook:?} on {}: {stderr}",
                cgroup.display()
            );
            ensure!(!world.cli.pins().exists(), "{:?}", world.cli.directories()?);
            let addresses = world.pod.netns().ip("-6 addr show dev lo")?;
            ensure!(!addresses.contains("::6/128"), "{addresses}");
            world.assert_left_alone()?;
            drop(counter);
        }
    }
    run(&mut attach)?;
    let objects = objects(&world.cli, world.name())?;
    world.cli.detach(world.name())?;
    bpf::wait_until_gone(&objects)
}

/// Where the foreign program's listener is bound.
const STEERED_TO: u16 = 7000;
/// The port that it takes connections from; nobody listens there.
const STEERED: u16 = 9999;

/// Steers a port to a listener of the pod's application.
fn steer(world: &World, port: u16) -> Result<(Steering, Server)> {
    let listener = world
        .app
        .listen((Ipv4Addr::UNSPECIFIED, STEERED_TO + port % 1000).into())?;
    let steering = Steering::attach(world.pod.netns().open()?, port, &listener)?;
    Ok((steering, Server::start("STEERED", listener)))
}

/// What a foreign sk_lookup program may and may not do, whichever was first.
fn check_steering(world: &World) -> Result<()> {
    let steered = SocketAddr::new(POD_V4, STEERED);
    let excluded = SocketAddr::new(POD_V4, EXCLUDED_PORT);
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    assert_direct("STEERED", &world.app, steered).context("from inside")?;
    assert_direct("STEERED", &world.peer, excluded).context("an excluded port")?;
    for _ in 0..4 {
        assert_served(Way::In, &world.peer, steered).context("from outside")?;
        world.assert_intercepted()?;
    }
    Ok(())
}

#[test]
fn a_foreign_lookup_that_was_there_first_keeps_what_is_its_own() -> Result<()> {
    let world = World::new()?;
    let _steered = [steer(&world, STEERED)?, steer(&world, EXCLUDED_PORT)?];
    assert_direct("STEERED", &world.peer, (POD_V4, STEERED).into())?;
    world.cli.attach(&world.pod)?;
    check_steering(&world)?;
    world.cli.detach(world.name())?;
    assert_direct("STEERED", &world.peer, (POD_V4, STEERED).into())?;
    Ok(())
}

#[test]
fn a_foreign_lookup_that_comes_later_keeps_what_is_its_own() -> Result<()> {
    let world = World::new()?;
    world.cli.attach(&world.pod)?;
    let _steered = [steer(&world, STEERED)?, steer(&world, EXCLUDED_PORT)?];
    check_steering(&world)?;
    world.cli.detach(world.name())?;
    assert_direct("STEERED", &world.peer, (POD_V4, STEERED).into())?;
    Ok(())
}

#[test]
fn a_foreign_lookup_gets_its_own_port_while_no_proxy_listens() -> Result<()> {
    let steered = SocketAddr::new(POD_V4, STEERED);
    for attached_first in [true, false] {
        let world = World::new()?;
        if attached_first {
            world.cli.attach(&world.pod)?;
        }
        let _steered = steer(&world, STEERED)?;
        if !attached_first {
            world.cli.attach(&world.pod)?;
        }
        // Not what one would wish: to the kernel (linux/filter.h,
        // BPF_PROG_SK_LOOKUP_RUN_ARRAY) any program's choice of a socket
        // counts for more than another's refusal, in either order.
        assert_direct("STEERED", &world.peer, steered)?;
        ensure!(world.cli.event(world.name(), "no proxy listened")? == 1);
        // All other ports are refused.
        for to in Way::In.destinations() {
            assert_refused(&world.peer, to)?;
        }
        let _proxy = world.start_proxy(&EVERYWHERE)?;
        assert_served(Way::In, &world.peer, steered)?;
    }
    Ok(())
}
