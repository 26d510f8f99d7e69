//! Interceptor does with every case of the tables what live iptables did.

use anyhow::{Context, Result};
use interceptor_tests::{
    cases::{Bed, Family, as_interceptor_may, assert_same, table},
    interception::Interception,
};

fn compare(bed: &Bed) -> Result<()> {
    for family in Family::ALL {
        let rows = table(family)?;
        assert_same(&rows, &bed.observe_all(&rows, None)?, as_interceptor_may)
            .with_context(|| format!("{family}"))?;
    }
    Ok(())
}

#[test]
fn with_a_proxy_that_listens_before_the_pod_is_attached() -> Result<()> {
    let bed = Bed::new()?;
    let _recorder = bed.start_recorder()?;
    let _attached = Interception::Interceptor.install(bed.pod())?;
    compare(&bed)
}

#[test]
fn with_a_proxy_that_listens_after_the_pod_is_attached() -> Result<()> {
    let bed = Bed::new()?;
    let _attached = Interception::Interceptor.install(bed.pod())?;
    let _recorder = bed.start_recorder()?;
    compare(&bed)
}
