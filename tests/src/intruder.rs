//! Somebody who wants to read or change what is Interceptor's, and may not: a process
//! that tries all ways, and says which of them are open.
//!
//! To root on the machine all of them are, which is how the tests know that they are
//! tried in earnest.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use interceptor_userspace::api::{self, Answer, Request};
use nix::{errno::Errno, sys::signal, unistd::Pid};
use serde::{Deserialize, Serialize};

use crate::{
    bpf::{self, Id, Kind},
    cli::Cli,
    command::workspace_binary,
    daemon::Daemon,
    world::objects,
};

const LIMIT: Duration = Duration::from_secs(2);

/// What to reach.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    /// The root of the pins.
    pub pins: PathBuf,
    /// A pod that is attached.
    pub pod: String,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// The daemon's process.
    pub pid: i32,
    /// Where its metrics may be.
    pub metrics: Vec<SocketAddr>,
    /// A program, a map and a link of the pod's.
    objects: [u32; 3],
}

impl Target {
    /// A pod that a daemon has attached.
    ///
    /// # Errors
    ///
    /// If it isn't attached.
    pub fn new(cli: &Cli, daemon: &mut Daemon, pod: &str) -> Result<Self> {
        let all = objects(cli, pod)?;
        let of = |kind| {
            let id = all.iter().find(|id| id.0 == kind).map(|id| id.1);
            id.with_context(|| format!("no {kind:?}"))
        };
        Ok(Self {
            pins: cli.pins().to_owned(),
            pod: pod.to_owned(),
            socket: daemon.socket(),
            pid: daemon.pid()?,
            metrics: vec![daemon.status()?.metrics],
            objects: [of(Kind::Program)?, of(Kind::Map)?, of(Kind::Link)?],
        })
    }

    /// The argument that tells an intruder of it.
    ///
    /// # Errors
    ///
    /// If a path is no text.
    pub fn argument(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }
}

/// A way that was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// What was tried.
    pub what: String,
    /// Why it failed, if it did.
    pub refused: Option<String>,
}

/// The program.
///
/// # Errors
///
/// If it isn't built.
pub fn program() -> Result<PathBuf> {
    workspace_binary("interceptor-intruder", "INTERCEPTOR_INTRUDER")
}

/// The ways that were open, of what an intruder printed.
///
/// # Errors
///
/// If that is something else.
pub fn open_ways(printed: &str) -> Result<Vec<String>> {
    let attempts: Vec<Attempt> =
        serde_json::from_str(printed).with_context(|| format!("the intruder said {printed}"))?;
    ensure!(attempts.len() >= ATTEMPTS, "only {attempts:?}");
    Ok(attempts
        .into_iter()
        .filter(|attempt| attempt.refused.is_none())
        .map(|attempt| attempt.what)
        .collect())
}

/// How many ways there are, with one address of the metrics.
pub const ATTEMPTS: usize = 21;

/// The process's own side: tries all, and prints what became of it.
///
/// # Errors
///
/// If the argument is no target.
pub fn run() -> Result<()> {
    let argument = std::env::args().nth(1).context("no target")?;
    let target: Target = serde_json::from_str(&argument)?;
    let line = serde_json::to_string(&attempts(&target))?;
    Ok(writeln!(io::stdout(), "{line}")?)
}

fn attempts(target: &Target) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    let mut attempt = |what: &str, result: Result<()>| {
        attempts.push(Attempt {
            what: what.to_owned(),
            refused: result.err().map(|error| format!("{error:#}")),
        });
    };
    let pod = target.pins.join(&target.pod);
    let [program, map, link] = target.objects;
    let proc = PathBuf::from(format!("/proc/{}", target.pid));

    attempt("list the pods", list(&target.pins));
    attempt("list a pod's pins", list(&pod.join("maps")));
    attempt(
        "open a pinned map",
        opened(bpf::open_pin(&pod.join("maps/SETTINGS"))),
    );
    attempt(
        "open a pinned link",
        opened(bpf::open_pin(&pod.join("links/sock_ops"))),
    );
    for (name, id) in [
        ("program", Id(Kind::Program, program)),
        ("map", Id(Kind::Map, map)),
        ("link", Id(Kind::Link, link)),
    ] {
        attempt(&format!("open a {name} by its number"), opened(id.open()));
        attempt(
            &format!("list each {name} of the kernel"),
            bpf::list(id.0).map(drop),
        );
    }
    attempt("ask the daemon", ask(&target.socket));
    attempt("list the daemon's descriptors", list(&proc.join("fd")));
    attempt(
        "read its environment",
        opened(fs::read(proc.join("environ"))),
    );
    attempt("open its memory", opened(File::open(proc.join("mem"))));
    attempt(
        "open its namespace",
        opened(File::open(proc.join("ns/net"))),
    );
    attempt("take a descriptor of its", opened(take(target.pid)));
    attempt("send it a signal", send(target.pid));
    for address in &target.metrics {
        attempt("read the metrics", metrics(*address));
    }
    // Last what does harm.
    let made = target.pins.join("intruder");
    attempt(
        "make a directory among the pins",
        opened(fs::create_dir(made)),
    );
    attempt(
        "remove a pin",
        opened(fs::remove_file(pod.join("links/connect4"))),
    );
    attempt("detach a link", detach(Id(Kind::Link, link)));
    attempts
}

fn opened<T>(result: io::Result<T>) -> Result<()> {
    Ok(result.map(drop)?)
}

fn list(path: &Path) -> Result<()> {
    opened(fs::read_dir(path))
}

fn ask(socket: &Path) -> Result<()> {
    let answer = api::ask(socket, &Request::Pods, LIMIT)?;
    ensure!(matches!(answer, Answer::Pods { .. }), "{answer:?}");
    Ok(())
}

fn take(pid: i32) -> io::Result<OwnedFd> {
    let descriptor = |result: libc::c_long| match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(number) if number >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: takes numbers only.
    let process = descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: takes numbers only.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), 2, 0) })
}

fn send(pid: i32) -> Result<()> {
    match signal::kill(Pid::from_raw(pid), None) {
        Err(Errno::ESRCH) => Err(Errno::ESRCH).context("there is no such process here"),
        result => Ok(result?),
    }
}

fn metrics(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    write!(stream, "GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.contains("interceptor_"), "{answer}");
    Ok(())
}

fn detach(link: Id) -> Result<()> {
    Ok(bpf::detach(&link.open()?)?)
}
