//! What the kernel says of Interceptor's programs and maps: their time, their
//! calls, their memory.

use std::{
    collections::BTreeSet,
    fs,
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use aya_obj::generated::{bpf_cmd, bpf_stats_type};
use serde::Serialize;

use super::{load::Close, mode::Path, stage::Stage, worker::Job};
use crate::{
    bpf::{self, Id, Kind},
    cli::Cli,
    pod::Pod,
};

/// What a hook does for one connection.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Hook {
    /// Its program.
    pub(crate) program: String,
    /// How often it is called.
    pub(crate) calls_per_connection: f64,
    /// What a call takes, the measuring of it included (about 50 ns).
    pub(crate) ns_per_call: f64,
}

/// Measures a path's hooks. Only now does the kernel take their time, which
/// itself takes time.
pub(crate) fn measure(stage: &mut Stage, path: Path) -> Result<Vec<Hook>> {
    const CONNECTIONS: u32 = 5000;
    let job = Job::Connections {
        to: path.targets(stage.mode),
        close: Close::Rst,
        request: false,
        count: CONNECTIONS,
    };
    let cli = stage.cli().context("not attached by Interceptor")?;
    let programs = programs(cli, stage.pod())?;
    let _statistics = statistics()?;
    let before = programs
        .iter()
        .map(|(_, id)| times(*id))
        .collect::<Result<Vec<_>>>()?;
    stage.worker(path).run(job)?;
    programs
        .into_iter()
        .zip(before)
        .map(|((program, id), before)| {
            let after = times(id)?;
            let [ns, calls] = [0, 1].map(|n| after[n] - before[n]);
            Ok(Hook {
                program,
                calls_per_connection: calls / f64::from(CONNECTIONS),
                ns_per_call: if calls > 0.0 { ns / calls } else { 0.0 },
            })
        })
        .collect()
}

/// The kernel memory of a pod's programs and maps, in bytes.
pub(crate) fn memory(cli: &Cli, pod: &Pod) -> Result<f64> {
    let mut objects = BTreeSet::new();
    for (_, id) in programs(cli, pod)? {
        objects.insert(Id(Kind::Program, id));
        objects.extend(bpf::maps_of(id)?);
    }
    objects.into_iter().map(|id| field(id, "memlock")).sum()
}

/// The names and the kernel's numbers of a pod's programs.
fn programs(cli: &Cli, pod: &Pod) -> Result<Vec<(String, u32)>> {
    let status = cli.status(pod.name())?;
    status["links"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|link| {
            let name = link["program"].as_str().context("a program's name")?;
            let id = link["program_id"].as_u64().context("a program's number")?;
            Ok((name.to_owned(), u32::try_from(id)?))
        })
        .collect()
}

/// Has the kernel take the programs' time while this is open.
fn statistics() -> Result<OwnedFd> {
    let mut attr = bpf::zeroed();
    attr.enable_stats.type_ = bpf_stats_type::BPF_STATS_RUN_TIME as u32;
    bpf::bpf_fd(bpf_cmd::BPF_ENABLE_STATS, &mut attr).context("have BPF programs timed")
}

/// A program's nanoseconds and calls so far.
fn times(program: u32) -> Result<[f64; 2]> {
    let id = Id(Kind::Program, program);
    Ok([field(id, "run_time_ns")?, field(id, "run_cnt")?])
}

/// A number that the kernel tells of an object.
fn field(id: Id, name: &str) -> Result<f64> {
    let fd = id.open().with_context(|| format!("open {id:?}"))?;
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|value| value.trim().parse().ok())
        .with_context(|| format!("no {name} of {id:?} in:\n{text}"))
}
