//! How many connections a pod can have open at once.

use anyhow::Result;
use serde::Serialize;

use super::{
    load::Targets,
    mode::{Mode, Path},
    say,
    stage::Stage,
    worker::{Job, Worker},
};

/// Connections that one process keeps: client's and proxy's end are two of its
/// 20,000 descriptors, or fewer.
const PER_PROCESS: u32 = 9_500;

/// The kernel's own range of ports to connect from.
const ALL_PORTS: &str = "32768 60999";
/// A thousand of them.
const FEW_PORTS: &str = "32768 33767";

/// How many outbound connections were open when the next one failed.
#[derive(Debug, Serialize)]
pub(crate) struct Capacity {
    pub(crate) mode: String,
    /// How many ports there are to connect from.
    pub(crate) ports: u32,
    /// To how many destinations.
    pub(crate) destinations: u32,
    /// How many.
    pub(crate) open: u32,
    /// Why there are no more; none if no more were tried.
    pub(crate) failure: Option<String>,
}

/// Opens connections with few ports and, for `full`, with all of them from that
/// many processes.
pub(crate) fn measure(stage: &mut Stage, full: Option<u32>, cpu: usize) -> Result<Vec<Capacity>> {
    let mode = stage.mode;
    let one = Path::Outbound.targets(mode);
    let many = Path::Outbound.many_targets(mode);
    let mut found = Vec::new();
    let range = "ipv4/ip_local_port_range";
    say(&format!("connections at once: {mode}"));
    stage.flush()?;
    stage.pod().netns().sysctl(range, FEW_PORTS)?;
    // Without interception there is one destination, the proxy.
    for to in if mode.intercepts() {
        vec![one, many]
    } else {
        vec![one]
    } {
        let workers = &mut [stage.worker(Path::Outbound)];
        found.push(open(mode, 1000, workers, to)?);
    }
    stage.pod().netns().sysctl(range, ALL_PORTS)?;
    if let Some(processes) = full {
        let mut workers = (0..processes)
            .map(|_| stage.another_worker(cpu))
            .collect::<Result<Vec<_>>>()?;
        let mut workers: Vec<&mut Worker> = workers.iter_mut().collect();
        found.push(open(mode, 28_232, &mut workers, many)?);
    }
    Ok(found)
}

/// One process after the other opens what it can.
fn open(mode: Mode, ports: u32, workers: &mut [&mut Worker], to: Targets) -> Result<Capacity> {
    let mut open = 0;
    let mut failure = None;
    for worker in workers.iter_mut() {
        let held = worker.run(Job::Hold {
            to,
            limit: PER_PROCESS,
        })?;
        open += held.units;
        failure = held.failure;
        if failure.is_some() {
            break;
        }
    }
    for worker in workers {
        worker.run(Job::Release)?;
    }
    say(&format!("{open} of {mode} with {ports} ports"));
    Ok(Capacity {
        mode: mode.to_string(),
        ports,
        destinations: to.count,
        open,
        failure,
    })
}
