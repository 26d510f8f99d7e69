//! The suite against the reference itself: live iptables, legacy and nft, does
//! what the tables say. This proves the tables and the harness.

use anyhow::{Context, Result};
use interceptor_tests::{
    cases::{Bed, Case, Family, Recorder, Row, assert_same, exactly, table},
    interception::Interception,
    iptables::Flavour,
    proxies::{Kind, Proxy},
};

fn live(flavour: Flavour, recorder: Recorder) -> Result<()> {
    let bed = Bed::new()?;
    let _recorder = bed.start_recorder(recorder)?;
    let _chains = Interception::Iptables(flavour).install(bed.pod())?;
    for family in Family::ALL {
        let rows = table(family)?;
        assert_same(&rows, &bed.observe_all(&rows, None)?, exactly)
            .with_context(|| format!("{family}, {flavour:?}"))?;
    }
    Ok(())
}

#[test]
fn legacy_iptables_does_what_the_tables_say() -> Result<()> {
    live(Flavour::Legacy, Recorder::Separate)
}

#[test]
fn nft_iptables_does_what_the_tables_say() -> Result<()> {
    live(Flavour::Nft, Recorder::Separate)
}

#[test]
fn a_dual_stack_proxy_makes_no_difference() -> Result<()> {
    live(Flavour::Nft, Recorder::DualStack)
}

#[test]
fn without_a_proxy_its_connections_are_refused() -> Result<()> {
    let bed = Bed::new()?;
    let _chains = Interception::Iptables(Flavour::Nft).install(bed.pod())?;
    for family in Family::ALL {
        let rows: Vec<Row> = table(family)?.into_iter().map(Row::without_proxy).collect();
        assert_same(&rows, &bed.observe_all(&rows, None)?, exactly)
            .with_context(|| format!("{family}"))?;
    }
    Ok(())
}

/// The suite would notice if nothing intercepted.
#[test]
fn without_chains_no_redirected_row_is_the_same() -> Result<()> {
    let bed = Bed::new()?;
    let _recorder = bed.start_recorder(Recorder::Separate)?;
    for family in Family::ALL {
        let rows = table(family)?;
        for (expected, observed) in rows.iter().zip(bed.observe_all(&rows, None)?) {
            if expected.observed.served_by.starts_with("PROXY") {
                assert_ne!(*expected, observed, "{family}");
            }
        }
    }
    Ok(())
}

/// What is expected through a real proxy, [`Row::through_proxy`], is what there
/// is under live iptables.
fn through(kind: Kind) -> Result<()> {
    let bed = Bed::new()?;
    let _chains = Interception::Iptables(Flavour::Nft).install(bed.pod())?;
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
fn the_embedded_proxy_works_under_iptables() -> Result<()> {
    through(Kind::Embedded)
}

#[test]
fn envoy_works_under_iptables() -> Result<()> {
    through(Kind::Envoy)
}

#[test]
fn haproxy_works_under_iptables() -> Result<()> {
    through(Kind::Haproxy)
}

#[test]
fn every_ipv4_case_has_its_twins() -> Result<()> {
    let cases: Vec<Case> = table(Family::V4)?.into_iter().map(|row| row.case).collect();
    assert_eq!(cases.len(), 26);
    for family in [Family::V6, Family::Mapped] {
        let twins: Vec<Case> = cases.iter().filter_map(|case| case.twin(family)).collect();
        let table: Vec<Case> = table(family)?.into_iter().map(|row| row.case).collect();
        assert_eq!(twins, table, "{family}");
    }
    Ok(())
}
