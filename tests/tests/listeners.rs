//! Which connections a proxy gets by how, where and when it listens; and that
//! none gets past it when it doesn't.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use interceptor_tests::{
    cgroup::Cgroup,
    command::{run, wait_until},
    inside::{Conversation, Inside, Server, listen},
    pod::{Credentials, Host, POD_V4, POD_V6, Pod},
    world::{
        EVERYWHERE, OUTBOUND, Way, World, assert_refused, assert_served, check_served, start_server,
    },
};
use socket2::{Domain, Protocol, Socket, Type};

/// Whether the proxy serves connections out and in, in IPv4 and in IPv6; those
/// that it doesn't serve are refused.
#[derive(Clone, Copy, Debug)]
struct Serves {
    out: [bool; 2],
    into: [bool; 2],
}

impl Serves {
    const ALL: Self = Self {
        out: [true; 2],
        into: [true; 2],
    };
    const NONE: Self = Self {
        out: [false; 2],
        into: [false; 2],
    };

    fn check(self, world: &World) -> Result<()> {
        for (way, served) in [(Way::Out, self.out), (Way::In, self.into)] {
            for (to, served) in way.destinations().into_iter().zip(served) {
                let client = world.client(way);
                if served {
                    assert_served(way, client, to)?.echo()?;
                } else {
                    assert_refused(client, to)?;
                }
            }
        }
        Ok(())
    }
}

/// The proxy listens before the pod is attached, and in another pod after it.
fn check_both_orders(serves: Serves, start: impl Fn(&World) -> Result<Vec<Server>>) -> Result<()> {
    let world = World::new()?;
    let servers = start(&world)?;
    world.cli.attach(&world.pod)?;
    serves.check(&world).context("it listened before")?;

    drop(servers);
    Serves::NONE.check(&world).context("it is gone")?;

    let _servers = start(&world)?;
    serves.check(&world).context("it listens after")
}

#[test]
fn a_proxy_on_every_address_is_served_all() -> Result<()> {
    check_both_orders(Serves::ALL, |world| world.start_proxy(&EVERYWHERE))
}

#[test]
fn a_dual_stack_proxy_is_served_all() -> Result<()> {
    check_both_orders(Serves::ALL, |world| {
        let address = |way: Way| SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), way.proxy_port());
        Way::BOTH
            .into_iter()
            .map(|way| {
                let socket = world.proxy.tcp(address(way))?;
                socket.set_only_v6(false)?;
                socket.set_reuse_address(true)?;
                socket.bind(&address(way).into())?;
                socket.listen(128)?;
                Ok(start_server(way, socket))
            })
            .collect()
    })
}

#[test]
fn a_proxy_on_localhost_is_served_what_the_pod_sends() -> Result<()> {
    let serves = Serves {
        out: [true; 2],
        ..Serves::NONE
    };
    check_both_orders(serves, |world| {
        world.start_proxy(&[Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()])
    })
}

#[test]
fn a_proxy_on_the_pods_address_is_served_what_arrives() -> Result<()> {
    let serves = Serves {
        out: [false; 2],
        into: [true; 2],
    };
    check_both_orders(serves, |world| world.start_proxy(&[POD_V4, POD_V6]))
}

#[test]
fn a_proxy_without_ipv6_is_served_ipv4() -> Result<()> {
    let serves = Serves {
        out: [true, false],
        into: [true, false],
    };
    check_both_orders(serves, |world| world.start_proxy(&EVERYWHERE[..1]))
}

#[test]
fn a_proxy_with_one_port_is_served_one_way() -> Result<()> {
    for way in Way::BOTH {
        let serves = match way {
            Way::Out => Serves {
                out: [true; 2],
                ..Serves::NONE
            },
            Way::In => Serves {
                into: [true; 2],
                ..Serves::NONE
            },
        };
        check_both_orders(serves, |world| {
            EVERYWHERE
                .into_iter()
                .map(|address| {
                    let address = SocketAddr::new(address, way.proxy_port());
                    Ok(start_server(way, world.proxy.listen(address)?))
                })
                .collect()
        })?;
    }
    Ok(())
}

#[test]
fn without_a_proxy_all_is_refused_and_counted() -> Result<()> {
    const WORDS: &str = "no proxy listened";
    let world = World::new()?;
    world.cli.attach(&world.pod)?;
    Serves::NONE.check(&world)?;
    let refused = world.cli.event(world.name(), WORDS)?;
    ensure!(refused == 2, "{refused} inbound connections refused");
    let status = world.cli.status(world.name())?;
    ensure!(status["handshakes"] == 0, "{status}");
    Ok(())
}

/// Served both ways until all of them are closed, and never past the proxy.
fn close_one_by_one(order: &[usize]) -> Result<()> {
    let world = World::new()?;
    // Half of them before the attachment, half after.
    let address = |way: Way| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), way.proxy_port());
    let open = || -> Result<Vec<Server>> {
        Way::BOTH
            .into_iter()
            .map(|way| Ok(start_server(way, world.proxy.listen(address(way))?)))
            .collect()
    };
    let mut listeners = Vec::new();
    for index in 0..order.len() {
        if index == order.len() / 2 {
            world.cli.attach(&world.pod)?;
        }
        listeners.push(Some(open()?));
    }
    for (closed, index) in order.iter().enumerate() {
        for way in Way::BOTH {
            for _ in 0..12 {
                assert_served(way, world.client(way), way.destinations()[0])
                    .with_context(|| format!("{closed} closed of {order:?}"))?;
            }
        }
        listeners[*index] = None;
    }
    Serves::NONE.check(&world)
}

#[test]
fn shared_listeners_serve_until_the_last_closes() -> Result<()> {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]] {
        close_one_by_one(&order)?;
    }
    Ok(())
}

#[test]
fn more_listeners_than_slots_still_serve() -> Result<()> {
    const LISTENERS: usize = 130;
    const WORDS: &str = "all slots were taken";
    let world = World::new()?;
    world.cli.attach(&world.pod)?;
    let listeners: Vec<(Way, Server)> = (0..LISTENERS)
        .flat_map(|_| Way::BOTH)
        .map(|way| {
            let address = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), way.proxy_port());
            Ok((way, start_server(way, world.proxy.listen(address)?)))
        })
        .collect::<Result<_>>()?;
    ensure!(world.cli.event(world.name(), WORDS)? == 4);
    let registered = serde_json::json!({"outbound": 128, "inbound": 128, "dns": 0});
    ensure!(world.cli.status(world.name())?["listeners"] == registered);
    let serves = Serves {
        out: [true, false],
        into: [true, false],
    };
    for _ in 0..20 {
        serves.check(&world)?;
    }
    // A slot is free again when its listener has closed.
    drop(listeners);
    Serves::NONE.check(&world)?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    Serves::ALL.check(&world)
}

#[test]
fn a_multipath_listener_is_no_proxy_and_status_says_so() -> Result<()> {
    const WORDS: &str = "MPTCP";
    let world = World::new()?;
    let open = || -> Result<Vec<Socket>> {
        Way::BOTH
            .into_iter()
            .map(|way| {
                let address = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), way.proxy_port());
                let socket = world
                    .proxy
                    .socket(Domain::IPV4, Type::STREAM, Protocol::MPTCP)
                    .context("this kernel lacks MPTCP (CONFIG_MPTCP, net.mptcp.enabled=1)")?;
                listen(socket, address)
            })
            .collect()
    };
    world.cli.attach(&world.pod)?;
    let listeners = open()?;
    let unsuitable = world.cli.event(world.name(), WORDS)?;
    ensure!(unsuitable == 2, "{unsuitable} listeners not registered");
    let destinations = Way::In.destinations();
    assert_refused(world.client(Way::In), destinations[0])?;
    ensure!(world.cli.event(world.name(), "no proxy listened")? == 1);
    drop(listeners);
    Ok(())
}

#[test]
fn a_listener_in_another_network_namespace_is_not_the_proxys() -> Result<()> {
    let (world, elsewhere) = (World::new()?, Pod::new()?);
    world.cli.attach(&world.pod)?;
    // In the pod's cgroup, but not in its network namespace.
    let stranger = Inside::start(&elsewhere, Host::Pod, Credentials::PROXY)?;
    stranger.tcp((POD_V4, 0).into())?;
    move_to(world.pod.cgroup(), &stranger)?;
    let _listeners: Vec<Server> = EVERYWHERE
        .into_iter()
        .flat_map(|address| Way::BOTH.map(|way| (way, address)))
        .map(|(way, address)| {
            let address = SocketAddr::new(address, way.proxy_port());
            Ok(start_server(way, stranger.listen(address)?))
        })
        .collect::<Result<_>>()?;
    let none = serde_json::json!({"outbound": 0, "inbound": 0, "dns": 0});
    ensure!(world.cli.status(world.name())?["listeners"] == none);
    Serves::NONE.check(&world)
}

fn move_to(cgroup: &Cgroup, process: &Inside) -> Result<()> {
    std::fs::write(
        cgroup.path().join("cgroup.procs"),
        process.pid().to_string(),
    )
    .context("move a process to a cgroup")
}

/// How a connection may end while the proxy comes and goes.
fn check_during_restart(
    way: Way,
    to: SocketAddr,
    result: io::Result<Conversation>,
) -> Result<bool> {
    match result {
        Ok(conversation) => check_served(way, &conversation, to).map(|()| true),
        // Refused, or reset in the queue of a listener that closed.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::UnexpectedEof
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error).with_context(|| format!("{way:?} to {to}")),
    }
}

#[test]
fn restarted_under_load_nothing_gets_past_the_proxy() -> Result<()> {
    const RESTARTS: usize = 60;
    let world = World::new()?;
    world.cli.attach(&world.pod)?;
    let (done, served, refused) = (
        AtomicBool::new(false),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    );
    let connect = |way: Way| -> Result<()> {
        while !done.load(Ordering::Relaxed) {
            for to in way.destinations() {
                let result = world.client(way).connect(to)?;
                let counter = if check_during_restart(way, to, result)? {
                    &served
                } else {
                    &refused
                };
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let connecting: Vec<_> = [Way::Out, Way::In, Way::Out, Way::In]
            .into_iter()
            .map(|way| scope.spawn(move || connect(way)))
            .collect();
        let restart = || -> Result<()> {
            for time in 0..RESTARTS {
                let proxy = world.start_proxy(&EVERYWHERE)?;
                thread::sleep(Duration::from_millis(20));
                drop(proxy);
                if time % 2 == 0 {
                    thread::sleep(Duration::from_millis(10));
                }
            }
            Ok(())
        };
        let result = restart();
        done.store(true, Ordering::Relaxed);
        for thread in connecting {
            thread.join().ok().context("a client panicked")??;
        }
        result
    })?;
    let (served, refused) = (served.into_inner(), refused.into_inner());
    ensure!(
        served > RESTARTS && refused > RESTARTS,
        "{served} served, {refused} refused: no load, or no restart"
    );
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    Serves::ALL.check(&world)?;
    let status = world.cli.status(world.name())?;
    ensure!(status["handshakes"] == 0, "{status}");
    Ok(())
}

/// Whether a TCP socket of the pod is in this state.
fn in_state(world: &World, state: &str) -> Result<bool> {
    let sockets = world
        .pod
        .netns()
        .enter(|| run(Command::new("ss").args(["-tanH", "state", state])))?;
    Ok(!sockets.trim().is_empty())
}

#[test]
fn a_proxy_that_closes_last_is_acknowledged() -> Result<()> {
    let world = World::new()?;
    world.cli.attach(&world.pod)?;
    let addresses = Way::Out.destinations().into_iter().zip(EVERYWHERE);
    for ((to, address), bind) in addresses.flat_map(|a| [(a, false), (a, true)]) {
        let listener = world.proxy.listen((address, OUTBOUND).into())?;
        let client = world.app.tcp(to)?;
        if bind {
            let source = if to.is_ipv4() { POD_V4 } else { POD_V6 };
            client.bind(&SocketAddr::new(source, 0).into())?;
        }
        client.connect(&to.into())?;
        let (accepted, _) = listener.accept()?;
        drop(client);
        let wait = |what: &str, state: &str, wanted: bool| {
            wait_until(what, Duration::from_secs(2), || {
                Ok((in_state(&world, state)? == wanted).then_some(()))
            })
            .with_context(|| format!("connection to {to}, bound: {bind}"))
        };
        // From then on the client's side has no socket: what the kernel says
        // for it must find its way.
        wait(
            "the proxy acknowledges the client's FIN",
            "fin-wait-2",
            true,
        )?;
        drop(accepted);
        wait(
            "the client's side takes the proxy's FIN",
            "fin-wait-2",
            false,
        )?;
        wait("the client acknowledges the proxy's FIN", "last-ack", false)?;
    }
    Ok(())
}
