//! What it takes to start to intercept a pod's connections, and what stays.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use interceptor_userspace::api::{Answer, Request};
use serde::Serialize;

use super::{hooks, mode::Mode, pair::listens, signals, stats::quantile};
use crate::{
    cgroup::Cgroup,
    cli::Cli,
    command::{unique_name, wait_until, workspace_binary},
    daemon::{Daemon, cni},
    pod::{Credentials, Host, Pod},
};

/// What attaching many pods took.
#[derive(Debug, Serialize)]
pub(crate) struct Attach {
    pub(crate) mode: String,
    /// How many pods, attached one after the other and all at the end.
    pub(crate) pods: usize,
    /// The command's time, in milliseconds, from its start to its end; the daemon's from
    /// the request to the answer.
    pub(crate) p50_ms: f64,
    /// The same, of the slowest in a hundred.
    pub(crate) p99_ms: f64,
    /// Kernel memory of programs and maps for each pod; not known of iptables, and not
    /// measured twice.
    pub(crate) bytes_per_pod: Option<f64>,
}

/// Attaches so many new pods.
pub(crate) fn measure(mode: Mode, pods: usize) -> Result<Attach> {
    let mut times = Vec::new();
    let mut attached = Vec::new();
    for _ in 0..pods {
        signals::check()?;
        let pod = Pod::new()?;
        let start = Instant::now();
        let cli = mode.install(&pod)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
        // Detached before the pod goes.
        attached.push((cli, pod));
    }
    let memory = attached
        .iter()
        .filter_map(|(cli, pod)| Some(hooks::memory(cli.as_ref()?, pod)))
        .collect::<Result<Vec<_>>>()?;
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let per_pod = memory.iter().sum::<f64>() / pods as f64;
    Ok(Attach {
        mode: mode.to_string(),
        pods,
        p50_ms: quantile(&times, 0.5),
        p99_ms: quantile(&times, 0.99),
        bytes_per_pod: (!memory.is_empty()).then_some(per_pod),
    })
}

/// The resident memory of `interceptor proxy` when nothing has connected yet, in
/// bytes.
pub(crate) fn proxy_memory() -> Result<f64> {
    let pod = Pod::new()?;
    let program = workspace_binary("interceptor", "INTERCEPTOR_BIN")?;
    let mut child = pod
        .command(Host::Pod, Credentials::PROXY, program)?
        .arg("proxy")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start `interceptor proxy`")?;
    let memory = wait_until("it listens", Duration::from_secs(10), || {
        Ok(listens(pod.netns(), 15006)?.then_some(()))
    })
    .and_then(|()| resident(child.id()));
    // It may be gone already; then there is nothing left to do.
    let _ = child.kill();
    let _ = child.wait();
    memory
}

/// What attaching so many pods takes the daemon, from the runtime's ADD to the answer,
/// and its resident memory afterwards, in bytes.
pub(crate) fn daemon(pods: usize) -> Result<(Attach, f64)> {
    let parent_name = unique_name("interceptor-bench");
    let _parent = Cgroup::new(&parent_name)?;
    let cli = Cli::new()?;
    let settings = format!("select = 'all'\ncgroup-parent = '/{parent_name}'");
    let mut daemon = Daemon::start(&cli, &settings)?;
    let mut times = Vec::new();
    let mut attached = Vec::new();
    for number in 0..pods {
        signals::check()?;
        let pod = Pod::below(&parent_name)?;
        let request = Request::CniAdd(cni(&format!("bench{number}"), &pod));
        let start = Instant::now();
        let answer = daemon.ask(&request)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
        ensure!(matches!(answer, Answer::Attached { .. }), "{answer:?}");
        attached.push(pod);
    }
    let attach = Attach {
        mode: "interceptor daemon".to_owned(),
        pods,
        p50_ms: quantile(&times, 0.5),
        p99_ms: quantile(&times, 0.99),
        bytes_per_pod: None,
    };
    let memory = resident(u32::try_from(daemon.pid()?)?)?;
    Ok((attach, memory))
}

fn resident(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kilobytes: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"))
        .context("no VmRSS")?
        .parse()?;
    Ok(kilobytes * 1024.0)
}
