//! Interceptor does with every case of the tables what live iptables did.

use anyhow::{Context, Result};
use interceptor_tests::{
    cases::{Bed, Family, Recorder, Row, as_interceptor_may, assert_same, exactly, table},
    interception::{Interception, Rule, decider},
    iptables::Flavour,
    proxies::{Kind, Proxy},
};

/// Compares with the tables, changed to what is expected now.
fn compare(bed: &Bed, expect: impl Fn(Row) -> Row) -> Result<()> {
    for family in Family::ALL {
        let rows: Vec<Row> = table(family)?.into_iter().map(&expect).collect();
        assert_same(&rows, &bed.observe_all(&rows, None)?, as_interceptor_may)
            .with_context(|| format!("{family}"))?;
    }
    Ok(())
}

fn with_recorder(recorder: Recorder) -> Result<()> {
    let bed = Bed::new()?;
    let _attached = Interception::Interceptor.install(bed.pod())?;
    let _recorder = bed.start_recorder(recorder)?;
    compare(&bed, |row| row)
}

#[test]
fn with_a_proxy_that_listens_after_the_pod_is_attached() -> Result<()> {
    with_recorder(Recorder::Separate)
}

#[test]
fn with_a_proxy_that_listens_before_the_pod_is_attached() -> Result<()> {
    let bed = Bed::new()?;
    let _recorder = bed.start_recorder(Recorder::Separate)?;
    let _attached = Interception::Interceptor.install(bed.pod())?;
    compare(&bed, |row| row)
}

#[test]
fn with_a_dual_stack_proxy() -> Result<()> {
    with_recorder(Recorder::DualStack)
}

#[test]
fn with_a_proxy_of_several_workers() -> Result<()> {
    with_recorder(Recorder::Workers)
}

#[test]
fn with_a_proxy_that_comes_goes_and_comes_again() -> Result<()> {
    let bed = Bed::new()?;
    let _attached = Interception::Interceptor.install(bed.pod())?;
    for round in 1..=2 {
        compare(&bed, Row::without_proxy).with_context(|| format!("round {round}, no proxy"))?;
        let _recorder = bed.start_recorder(Recorder::Separate)?;
        compare(&bed, |row| row).with_context(|| format!("round {round}, a proxy"))?;
    }
    Ok(())
}

fn through(kind: Kind) -> Result<()> {
    let bed = Bed::new()?;
    let _attached = Interception::Interceptor.install(bed.pod())?;
    let proxy = Proxy::start(bed.pod(), kind)?;
    for family in kind.families() {
        let rows: Vec<Row> = table(*family)?
            .into_iter()
            .map(Row::through_proxy)
            .collect();
        assert_same(&rows, &bed.observe_all(&rows, Some(&proxy))?, exactly)
            .with_context(|| format!("{family}, {kind:?}"))?;
    }
    Ok(())
}

#[test]
fn through_the_embedded_proxy() -> Result<()> {
    through(Kind::Embedded)
}

#[test]
fn through_envoy() -> Result<()> {
    through(Kind::Envoy)
}

#[test]
fn through_haproxy() -> Result<()> {
    through(Kind::Haproxy)
}

/// Each case, and the rule that decides it.
fn deciders(interception: Interception) -> Result<Vec<String>> {
    let bed = Bed::new()?;
    let _installed = interception.install(bed.pod())?;
    let _recorder = bed.start_recorder(Recorder::Separate)?;
    let mut deciders = Vec::new();
    for family in Family::ALL {
        let mut before = interception.rules(bed.pod(), family)?;
        for Row { case, .. } in table(family)? {
            bed.observe(&case, None)?;
            let after = interception.rules(bed.pod(), family)?;
            let Rule {
                chain,
                number,
                target,
                ..
            } = decider(&before, &after)
                .with_context(|| format!("no rule decided {family} {}", case.name))?;
            deciders.push(format!("{family} {}: {chain} {number} {target}", case.name));
            before = after;
        }
    }
    Ok(deciders)
}

#[test]
fn the_same_rule_decides() -> Result<()> {
    assert_eq!(
        deciders(Interception::Interceptor)?,
        deciders(Interception::Iptables(Flavour::Nft))?
    );
    Ok(())
}

#[test]
fn a_detached_pod_is_as_it_was() -> Result<()> {
    let bed = Bed::new()?;
    let _recorder = bed.start_recorder(Recorder::Separate)?;
    let observe = || -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for family in Family::ALL {
            rows.extend(bed.observe_all(&table(family)?, None)?);
        }
        Ok(rows)
    };
    let before = observe()?;
    let addresses = bed.pod().netns().ip("address show")?;
    let attached = Interception::Interceptor.install(bed.pod())?;
    observe()?;
    drop(attached);
    assert_same(&before, &observe()?, exactly)?;
    assert_eq!(bed.pod().netns().ip("address show")?, addresses);
    Ok(())
}
