//! The pod's routes and addresses change after it was attached.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use interceptor_tests::world::{EVERYWHERE, PORT, Way, World, assert_direct, assert_served};

/// Addresses that the peer has and that no route of the pod but the default
/// one leads to.
const BEHIND_THE_PEER: [&str; 2] = ["10.99.0.1", "fd00:99::1"];

const STOPPED: &str = "connections stopped because the routes have changed: attach the pod again";

/// A pod without default routes, attached, and a proxy that listens.
fn without_default_routes() -> Result<World> {
    let world = World::new()?;
    for address in BEHIND_THE_PEER {
        world
            .pod
            .peer()
            .ip(&format!("address add {address} dev lo"))?;
    }
    let pod = world.pod.netns();
    pod.ip("route del default")?;
    pod.ip("-6 route del default")?;
    world.cli.attach(&world.pod)?;
    Ok(world)
}

fn add_default_routes(world: &World) -> Result<()> {
    let pod = world.pod.netns();
    pod.ip("route add default via 10.77.0.1")?;
    pod.ip("-6 route add default via fd00:77::1")?;
    Ok(())
}

fn destinations() -> Result<Vec<SocketAddr>> {
    BEHIND_THE_PEER
        .iter()
        .map(|address| Ok(SocketAddr::new(address.parse()?, PORT)))
        .collect()
}

#[test]
fn a_route_that_comes_later_is_no_way_past_the_proxy() -> Result<()> {
    let world = without_default_routes()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    for to in destinations()? {
        let error = world.app.connect(to)?.unwrap_err();
        ensure!(
            error.raw_os_error() == Some(nix::errno::Errno::ENETUNREACH as i32),
            "{to}: {error}"
        );
    }
    ensure!(world.cli.event(world.name(), STOPPED)? == 0);

    add_default_routes(&world)?;
    for to in destinations()? {
        if let Ok(conversation) = world.app.connect(to)? {
            anyhow::bail!("{to}: {:?}", conversation.served);
        }
        // The proxy's own connections don't depend on what was read.
        assert_direct("PEER", &world.proxy, to)?;
    }
    ensure!(world.cli.event(world.name(), STOPPED)? == 2);

    world.cli.attach(&world.pod)?;
    for to in destinations()? {
        assert_served(Way::Out, &world.app, to)?;
    }
    Ok(())
}

#[test]
fn an_address_that_comes_later_is_local_when_the_pod_is_attached_again() -> Result<()> {
    let world = World::new()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    world.cli.attach(&world.pod)?;
    world.pod.netns().ip("address add 10.77.0.9/32 dev eth0")?;
    world.cli.attach(&world.pod)?;
    assert_direct(
        "APP",
        &world.app,
        SocketAddr::new("10.77.0.9".parse()?, PORT),
    )?;
    world.assert_intercepted()?;
    Ok(())
}

/// With rules that choose tables, which route a connection takes can't be told
/// beforehand: it is redirected, as any other.
#[test]
fn a_pod_with_routing_rules_is_intercepted() -> Result<()> {
    let world = without_default_routes()?;
    let _proxy = world.start_proxy(&EVERYWHERE)?;
    let pod = world.pod.netns();
    for (family, gateway) in [("-4", "10.77.0.1"), ("-6", "fd00:77::1")] {
        pod.ip(&format!(
            "{family} route add default via {gateway} table 100"
        ))?;
        pod.ip(&format!("{family} rule add to default table 100"))?;
    }
    world.cli.attach(&world.pod)?;
    for to in destinations()? {
        assert_served(Way::Out, &world.app, to)?;
    }
    Ok(())
}
