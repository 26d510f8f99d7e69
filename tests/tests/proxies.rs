//! Real proxies in every mode that they support: each connection goes the same way
//! under the mesh's own chains, live, and under Interceptor.
//!
//! REDIRECT is in the suites `reference` and `cases`. What a proxy can't do, and why,
//! says [`Features`].

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use interceptor_tests::{
    agent::{
        Agent, Connect, Listen, Means, Outcome,
        calls::{Operation, Value},
    },
    cases::{Bed, Family, Observed, Row, assert_same, exactly, table},
    cli::Cli,
    command::run,
    iptables::{self, Flavour},
    mesh::{Dns, Mesh, Mode},
    pod::{Credentials, Host, PEER_V4, PEER_V6, Pod},
    proxies::{Features, Kind, Proxy},
};

const APP: Credentials = Credentials {
    uid: 2000,
    gid: 2000,
};

/// By what a pod is intercepted.
#[derive(Clone, Copy, Debug)]
enum By {
    Iptables,
    Interceptor,
}

/// Intercepts the pod's connections; the answer keeps Interceptor attached.
fn intercept(by: By, pod: &Pod, mesh: &Mesh) -> Result<Option<Cli>> {
    match by {
        By::Iptables => {
            iptables::prepare(pod)?;
            iptables::replace(pod, Flavour::Legacy, mesh)?;
            Ok(None)
        }
        By::Interceptor => {
            let cli = Cli::new()?;
            run(cli.attach_command(pod)?.args(mesh.flags()))?;
            Ok(Some(cli))
        }
    }
}

/// The cases of the tables that are wanted and that the proxy can do, and how they
/// went.
fn observe(
    by: By,
    mesh: &Mesh,
    kind: Kind,
    features: Features,
    wanted: impl Fn(&Row) -> bool,
) -> Result<Vec<Row>> {
    let bed = Bed::new()?;
    let _attached = intercept(by, bed.pod(), mesh)?;
    let proxy = Proxy::start_with(bed.pod(), kind, features)?;
    let mut rows = Vec::new();
    for family in Family::ALL {
        let mut cases = table(family)?;
        cases.retain(&wanted);
        if !kind.families().contains(&family) {
            // By TPROXY nothing has to be asked about what arrives.
            cases.retain(|row| features.transparent && row.case.from == Host::Peer);
        }
        rows.extend(bed.observe_all(&cases, Some(&proxy))?);
    }
    Ok(rows)
}

/// Both ways are the same; returns the rows.
fn compare(mesh: &Mesh, kind: Kind, features: Features) -> Result<Vec<Row>> {
    let chains =
        observe(By::Iptables, mesh, kind, features, |_| true).context("under the chains")?;
    let ours =
        observe(By::Interceptor, mesh, kind, features, |_| true).context("under Interceptor")?;
    assert_same(&chains, &ours, exactly)?;
    Ok(ours)
}

/// What became of the peer's connection to the application.
fn arrived(rows: &[Row], destination: &str) -> Result<Observed> {
    let to: SocketAddr = destination.parse()?;
    rows.iter()
        .find(|row| row.case.from == Host::Peer && row.case.to == to)
        .map(|row| row.observed.clone())
        .with_context(|| format!("no row of {destination}"))
}

fn tproxy() -> Mesh {
    Mesh {
        mode: Mode::Tproxy,
        ..Mesh::injected()
    }
}

const TRANSPARENT: Features = Features {
    transparent: true,
    clients_address: false,
    dual_stack: false,
    dns: false,
};

/// The proxy took what arrived, and passed it on from where the mesh's does.
fn assert_passed_on(rows: &[Row], [from_v4, from_v6]: [&str; 2]) -> Result<()> {
    for (destination, from) in [("10.77.0.2:8080", from_v4), ("[fd00:77::2]:8080", from_v6)] {
        let observed = arrived(rows, destination)?;
        ensure!(
            observed.served_by == "PROXY:15006 -> APP" && observed.server_getpeername == from,
            "{destination}: {observed:?}"
        );
    }
    Ok(())
}

const PASSTHROUGH: [&str; 2] = ["127.0.0.6:*", "[::6]:*"];

#[test]
fn envoy_by_tproxy() -> Result<()> {
    let rows = compare(&tproxy(), Kind::Envoy, TRANSPARENT)?;
    assert_passed_on(&rows, PASSTHROUGH)
}

#[test]
fn haproxy_by_tproxy() -> Result<()> {
    let rows = compare(&tproxy(), Kind::Haproxy, TRANSPARENT)?;
    assert_passed_on(&rows, PASSTHROUGH)
}

/// It has no listener with `IP_TRANSPARENT`, without which nothing reaches it under
/// the chains. Interceptor needs none.
#[test]
fn the_embedded_proxy_by_tproxy() -> Result<()> {
    let mesh = tproxy();
    let features = Features::default();
    let wanted = |row: &Row| row.case.from == Host::Peer && row.case.to.port() == 8080;
    let chains = observe(By::Iptables, &mesh, Kind::Embedded, features, wanted)?;
    let ours = observe(By::Interceptor, &mesh, Kind::Embedded, features, wanted)?;
    for destination in ["10.77.0.2:8080", "[fd00:77::2]:8080"] {
        let observed = arrived(&chains, destination)?;
        ensure!(!observed.served_by.starts_with("PROXY"), "{observed:?}");
    }
    assert_passed_on(&ours, PASSTHROUGH)
}

/// The application sees the client's own address.
#[test]
fn envoy_by_tproxy_from_its_clients_address() -> Result<()> {
    let features = Features {
        clients_address: true,
        ..TRANSPARENT
    };
    let rows = compare(&tproxy(), Kind::Envoy, features)?;
    assert_passed_on(&rows, ["10.77.0.1:*", "[fd00:77::1]:*"])
}

#[test]
fn envoy_on_dual_stack_listeners() -> Result<()> {
    let features = Features {
        dual_stack: true,
        ..Features::default()
    };
    let rows = compare(&Mesh::injected(), Kind::Envoy, features)?;
    assert_passed_on(&rows, PASSTHROUGH)
}

/// A question of DNS for the IPv4 address of `mesh.test` (RFC 1035, section 4.1).
const QUESTION: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x04mesh\x04test\0\0\x01\0\x01";
/// The address that the proxy knows for it.
const ADDRESS: [u8; 4] = [10, 9, 8, 7];

/// How TCP and UDP to a server of DNS go: what the peer, which the proxy passes TCP
/// on to, saw of the first, and from where the second was answered.
fn dns(by: By, kind: Kind) -> Result<Vec<String>> {
    let pod = Pod::new()?;
    let mesh = Mesh {
        dns: Dns::All,
        ..Mesh::injected()
    };
    let _attached = intercept(by, &pod, &mesh)?;
    let features = Features {
        dns: true,
        ..Features::default()
    };
    let proxy = Proxy::start_with(&pod, kind, features)?;
    let (app, peer) = (
        Agent::start(&pod, Host::Pod)?,
        Agent::start(&pod, Host::Peer)?,
    );
    let servers = [PEER_V4, PEER_V6].map(|address| SocketAddr::new(address, 53));
    peer.listen(Listen::new("PEER", servers))?;
    let mut seen = Vec::new();
    for server in servers {
        let family = if server.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        };
        if kind.families().contains(&family) {
            let position = proxy.log_position();
            let outcome = app.connect(Connect::new(APP, server))?;
            let Outcome::Connected { getsockname, .. } = &outcome else {
                anyhow::bail!("{outcome:?}");
            };
            let logged = proxy.logged(*getsockname, position)?;
            ensure!(
                (logged.port, logged.original_dst) == (15053, server),
                "{logged:?}"
            );
            let observed = Observed {
                // With a port that the proxy's connection got.
                server_getpeername: String::new(),
                ..Observed::from(&outcome)
            };
            seen.push(format!("{server} {observed:?}"));
        }
        if kind != Kind::Envoy {
            continue;
        }
        for means in [Means::Datagram, Means::ConnectedDatagram] {
            let domain = if server.is_ipv4() {
                libc::AF_INET
            } else {
                libc::AF_INET6
            };
            let socket = app
                .open(APP, domain, libc::SOCK_DGRAM, libc::IPPROTO_UDP)?
                .map_err(anyhow::Error::msg)?;
            let connected = means == Means::ConnectedDatagram;
            if connected {
                socket.must(Operation::Connect(server))?;
            }
            socket.must(Operation::Send {
                bytes: QUESTION.to_vec(),
                to: (!connected).then_some(server),
                flags: 0,
            })?;
            let Value::Received { bytes, from } = socket.must(Operation::Receive)? else {
                anyhow::bail!("no answer");
            };
            ensure!(
                bytes.starts_with(&QUESTION[..2]) && bytes.ends_with(&ADDRESS),
                "{bytes:x?}"
            );
            seen.push(format!("{server} {means:?} answered by {from:?}"));
        }
    }
    Ok(seen)
}

fn compare_dns(kind: Kind, different: usize) -> Result<()> {
    let [chains, ours] = [dns(By::Iptables, kind)?, dns(By::Interceptor, kind)?];
    ensure!(chains == ours, "{chains:#?}\n{ours:#?}");
    let ways: BTreeSet<&String> = ours.iter().collect();
    ensure!(ways.len() == different, "{ours:#?}");
    Ok(())
}

#[test]
fn envoy_and_dns() -> Result<()> {
    compare_dns(Kind::Envoy, 6)
}

#[test]
fn haproxy_and_dns() -> Result<()> {
    compare_dns(Kind::Haproxy, 1)
}
