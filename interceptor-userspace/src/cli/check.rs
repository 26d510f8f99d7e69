//! `interceptor check`.

use std::path::PathBuf;

use anyhow::bail;
use interceptor_userspace::{
    check::{Outcome, check},
    pod::{cgroup::Cgroup, netns::Netns},
};

use super::Output;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Changes nothing and needs no pod. The exit status is 0 if attaching can work, and 1 if a check fails; \
warnings don't count.")]
pub(crate) struct Args {
    /// Look at the programs of others from this cgroup up, not only at the root's.
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    /// Look for the mesh's iptables chains in this network namespace.
    #[arg(long, value_name = "PATH|PID")]
    netns: Option<String>,
}

pub(crate) fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    let cgroup = args.cgroup.as_deref().map(Cgroup::open).transpose()?;
    let netns = args.netns.as_deref().map(Netns::open).transpose()?;
    let checks = check(cgroup.as_ref(), netns.as_ref());
    match output {
        Output::Json => super::print_json(&checks)?,
        Output::Text => {
            let width = checks
                .iter()
                .map(|check| check.name.len())
                .max()
                .unwrap_or(0);
            for check in &checks {
                let word = match check.outcome {
                    Outcome::Pass => "pass",
                    Outcome::Warn => "WARN",
                    Outcome::Fail => "FAIL",
                };
                super::print(format!("{word}  {:width$}  {}", check.name, check.found))?;
                if let Some(fix) = &check.fix {
                    super::print(format!("{:width$}        fix: {fix}", ""))?;
                }
            }
        }
    }
    let failed = checks
        .iter()
        .filter(|check| check.outcome == Outcome::Fail)
        .count();
    if failed > 0 {
        bail!("{failed} of {} checks failed", checks.len());
    }
    Ok(())
}
