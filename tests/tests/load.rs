//! Very many connections: every one reaches the proxy, which learns exactly
//! where it was meant to go.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use interceptor_tests::{
    cli::Cli,
    command::{run, wait_until},
    flood::{Clients, Connect, Serve, Server, Tally},
    pod::{Credentials, Host, POD_V4, Pod},
    world::{APP, INBOUND, OUTBOUND},
};

const ADDRESS_OF_NOBODY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

fn everywhere(port: u16) -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, port).into()
}

/// Connections of the pod to 250 x 40 destinations, none of which exists.
fn outbound(connections: usize) -> Connect {
    Connect {
        connections,
        threads: 4,
        address: ADDRESS_OF_NOBODY.into(),
        addresses: 250,
        port: 1000,
        ports: 40,
        timeout: Duration::from_secs(20),
        keep: false,
    }
}

fn start_proxy(pod: &Pod, acceptors: usize) -> Result<Server> {
    let serve = Serve {
        addresses: vec![everywhere(OUTBOUND), everywhere(INBOUND)],
        acceptors,
        backlog: 4096,
        wait: false,
    };
    Server::start(pod, Host::Pod, Credentials::PROXY, serve)
}

fn assert_all_right(tally: &Tally, connections: usize) -> Result<()> {
    ensure!(
        *tally
            == Tally {
                right: connections,
                ..Tally::default()
            },
        "{tally:?}"
    );
    Ok(())
}

/// No handshake is remembered any more. Nothing out of the ordinary happened.
fn assert_clean(cli: &Cli, pod: &Pod) -> Result<()> {
    assert_no_handshakes(cli, pod, Duration::from_secs(5))?;
    let status = cli.status(pod.name())?;
    for event in status["events"].as_array().context("no events")? {
        ensure!(event["count"] == 0, "{event}");
    }
    Ok(())
}

fn assert_no_handshakes(cli: &Cli, pod: &Pod, limit: Duration) -> Result<()> {
    wait_until("no handshake is left", limit, || {
        let status = cli.status(pod.name())?;
        let left = status["handshakes"].as_u64().context("no handshakes")?;
        Ok((left == 0).then_some(()))
    })
}

fn flood_outbound(syncookies: &str) -> Result<()> {
    const CONNECTIONS: usize = 100_000;
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    pod.netns().sysctl("ipv4/tcp_syncookies", syncookies)?;
    cli.attach(&pod)?;
    let _proxy = start_proxy(&pod, 3)?;
    let tally = Clients::start(&pod, Host::Pod, APP, outbound(CONNECTIONS))?.tally()?;
    assert_all_right(&tally, CONNECTIONS)?;
    assert_clean(&cli, &pod)?;
    if syncookies == "2" {
        let counters = pod
            .netns()
            .enter(|| run(Command::new("nstat").args(["-asz", "TcpExtSyncookiesRecv"])))?;
        let valid = counters.split_whitespace().nth(2).context("no counter")?;
        // More if a full accept queue made one come twice; fewer because the
        // kernel sends none to a port pair that is still in TIME_WAIT.
        ensure!(
            valid.parse::<usize>()? >= CONNECTIONS / 10 * 9,
            "{counters}"
        );
    }
    Ok(())
}

#[test]
fn a_hundred_thousand_connections_keep_their_destinations() -> Result<()> {
    flood_outbound("1")
}

#[test]
fn a_hundred_thousand_connections_with_syn_cookies_too() -> Result<()> {
    flood_outbound("2")
}

#[test]
fn connections_outnumber_the_ports_that_they_come_from() -> Result<()> {
    const CONNECTIONS: usize = 800;
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    cli.attach(&pod)?;
    pod.netns()
        .sysctl("ipv4/ip_local_port_range", "20000 20099")?;
    for (nobody, any) in [
        (IpAddr::from(ADDRESS_OF_NOBODY), everywhere(OUTBOUND)),
        (
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
            (Ipv6Addr::UNSPECIFIED, OUTBOUND).into(),
        ),
    ] {
        let serve = Serve {
            addresses: vec![any],
            acceptors: 1,
            backlog: 4096,
            wait: false,
        };
        let _proxy = Server::start(&pod, Host::Pod, Credentials::PROXY, serve)?;
        let connect = Connect {
            address: nobody,
            keep: true,
            ..outbound(CONNECTIONS)
        };
        let tally = Clients::start(&pod, Host::Pod, APP, connect)?.tally()?;
        assert_all_right(&tally, CONNECTIONS).with_context(|| nobody.to_string())?;
    }
    assert_clean(&cli, &pod)
}

#[test]
fn twenty_thousand_connections_arrive_at_their_ports() -> Result<()> {
    const CONNECTIONS: usize = 20_000;
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    cli.attach(&pod)?;
    let _proxy = start_proxy(&pod, 3)?;
    let connect = Connect {
        address: POD_V4,
        addresses: 1,
        // No port of these is excluded.
        port: 1000,
        ports: 10_000,
        ..outbound(CONNECTIONS)
    };
    let tally = Clients::start(&pod, Host::Peer, APP, connect)?.tally()?;
    assert_all_right(&tally, CONNECTIONS)?;
    assert_clean(&cli, &pod)
}

#[test]
fn a_full_accept_queue_loses_no_destination() -> Result<()> {
    let (pod, cli) = (Pod::new()?, Cli::new()?);
    cli.attach(&pod)?;
    let serve = Serve {
        addresses: vec![everywhere(OUTBOUND)],
        acceptors: 1,
        backlog: 1,
        wait: true,
    };
    let mut proxy = Server::start(&pod, Host::Pod, Credentials::PROXY, serve)?;
    // Nobody accepts: each of these gives up, and its port may be used again.
    let hasty = Connect {
        threads: 16,
        timeout: Duration::from_millis(50),
        ..outbound(400)
    };
    let hasty = Clients::start(&pod, Host::Pod, APP, hasty)?.tally()?;
    ensure!(
        (hasty.right, hasty.wrong) == (0, 0),
        "served by a proxy that doesn't accept: {hasty:?}"
    );
    // These are patient, and it accepts at last.
    let patient = Connect {
        threads: 16,
        ..outbound(200)
    };
    let patient = Clients::start(&pod, Host::Pod, APP, patient)?;
    thread::sleep(Duration::from_millis(500));
    proxy.accept()?;
    let patient = patient.tally()?;
    ensure!(patient.wrong == 0, "{patient:?}");
    ensure!(patient.right >= 150, "{patient:?}");
    // What gave up while the queue was full is told by the kernel's timers.
    assert_no_handshakes(&cli, &pod, Duration::from_secs(40))
}
