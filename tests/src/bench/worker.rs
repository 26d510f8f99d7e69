//! The processes that are measured, and how they are told what to do.
//!
//! A [`Worker`] is the client of a path and, with the proxy's listener handed
//! to it, the proxy as well: one thread makes a connection and accepts it, so
//! that nothing waits for another process to be woken, and the time that
//! passes is the work that is done. Sockets belong where socket() and listen()
//! were called: the client's to the worker's host, the proxy's to the pod.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::fd::{AsFd as _, AsRawFd as _},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    poll::{PollFd, PollFlags, poll},
};
use serde::{Deserialize, Serialize};
use socket2::Socket;

use super::{
    load::{Close, Load, Targets},
    signals,
};
use crate::pod::{Credentials, Host, Pod};

/// How long a job may take.
const LIMIT: Duration = Duration::from_secs(120);

/// What a worker can be told to do.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Job {
    /// Make connections, one after the other.
    Connections {
        /// Where to.
        to: Targets,
        /// How they end.
        close: Close,
        /// Whether a request of 64 bytes is answered by as many.
        request: bool,
        /// How many.
        count: u32,
    },
    /// Make connections from a thread on each CPU.
    Rate {
        /// Where to.
        to: Targets,
        /// How many in each thread.
        count: u32,
    },
    /// Send 64 bytes to and fro on one connection.
    RoundTrips {
        /// Where to.
        to: Targets,
        /// How many.
        count: u32,
    },
    /// Send bytes on one connection.
    Bulk {
        /// Where to.
        to: Targets,
        /// How many MiB.
        mebibytes: u32,
    },
    /// Make connections and keep them, until one fails.
    Hold {
        /// Where to.
        to: Targets,
        /// How many at most.
        limit: u32,
    },
    /// Close what is kept.
    Release,
}

/// What a job took. A unit is a connection, a round trip or a MiB.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Nanoseconds per unit: the median of many small parts.
    pub(crate) unit_ns: f64,
    /// The median of the connect() calls or round trips, in nanoseconds.
    pub(crate) p50_ns: f64,
    /// Their 99th percentile.
    pub(crate) p99_ns: f64,
    /// The process's CPU time per unit, in nanoseconds: client and proxy.
    pub(crate) cpu_ns: f64,
    /// How long the whole machine's CPUs were busy, in nanoseconds, in all.
    pub(crate) machine_ns: f64,
    /// How many units.
    pub(crate) units: u32,
    /// Why there are no more, if that was a failure.
    pub(crate) failure: Option<String>,
}

/// How a worker is started.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The descriptor of the proxy's listener; without one, others accept.
    #[arg(long)]
    listener: Option<i32>,
    /// Whether `SO_ORIGINAL_DST` must say where the client meant to go.
    #[arg(long)]
    intercepted: bool,
    /// The CPU to run on.
    #[arg(long)]
    cpu: usize,
}

/// A running worker; killed when dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts one on a host of the pod, that accepts from `listener`.
    pub(crate) fn start(
        pod: &Pod,
        host: Host,
        listener: Option<&Socket>,
        intercepted: bool,
        cpu: usize,
    ) -> Result<Self> {
        let this = std::env::current_exe().context("find this program's own path")?;
        let mut command = pod.command(host, Credentials::ROOT, this)?;
        command.args(["worker", "--cpu", &cpu.to_string()]);
        if let Some(listener) = listener {
            // The child inherits it.
            fcntl(listener, FcntlArg::F_SETFD(FdFlag::empty()))?;
            command.args(["--listener", &listener.as_raw_fd().to_string()]);
        }
        if intercepted {
            command.arg("--intercepted");
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a worker")?;
        if let Some(listener) = listener {
            fcntl(listener, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        let input = child.stdin.take().context("the worker's input")?;
        let output = child.stdout.take().context("the worker's output")?;
        Ok(Self {
            child,
            input,
            output: BufReader::new(output),
        })
    }

    /// Has a job done. A failed connection is an error, but of [`Job::Hold`].
    pub(crate) fn run(&mut self, job: Job) -> Result<Measured> {
        let mut line = serde_json::to_vec(&job)?;
        line.push(b'\n');
        self.input
            .write_all(&line)
            .context("give a worker its job")?;
        self.wait()
            .with_context(|| format!("the worker's job {job:?}"))?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("a worker has ended; what it printed is above");
        }
        serde_json::from_str(&line).with_context(|| format!("a worker's answer: {line}"))
    }

    /// Waits until it has answered.
    fn wait(&self) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < LIMIT {
            signals::check()?;
            let mut answer = [PollFd::new(
                self.output.get_ref().as_fd(),
                PollFlags::POLLIN,
            )];
            match poll(&mut answer, 500_u16) {
                Ok(0) | Err(Errno::EINTR) => {}
                result => return Ok(result.map(drop)?),
            }
        }
        bail!("not done after {LIMIT:?}")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The worker's own side: does the jobs on standard input.
pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let mut load = Load::new(arguments.listener, arguments.intercepted, arguments.cpu)?;
    for line in std::io::stdin().lock().lines() {
        let job = serde_json::from_str(&line?)?;
        let measured = load
            .run(job)
            .with_context(|| format!("the worker's job {job:?}"))?;
        let mut line = serde_json::to_vec(&measured)?;
        line.push(b'\n');
        std::io::stdout().write_all(&line)?;
    }
    Ok(())
}
