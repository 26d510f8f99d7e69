//! `interceptor cni-install`.

use std::{
    env,
    io::ErrorKind,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::ValueEnum;
use inotify::{Inotify, WatchMask};
use interceptor_userspace::{
    api,
    cni::install::{Changes, DEFAULT_CONFIGURATION, DEFAULT_PROGRAMS, Entry, Node},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use super::Output;

/// How long changes may come after one another before they are looked at, and how long
/// until all is looked at though nothing seems to have happened, both in milliseconds.
const SETTLE: u16 = 100;
const AGAIN: u16 = 30_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    node: NodeArgs,

    /// The plugin's program [default: the `interceptor-cni` beside this program].
    #[arg(long, value_name = "FILE")]
    plugin: Option<PathBuf>,

    /// Where the plugin finds the daemon.
    #[arg(long, value_name = "PATH", default_value = api::DEFAULT_SOCKET, env = "INTERCEPTOR_SOCKET")]
    socket: PathBuf,

    /// What becomes of a pod while no daemon answers.
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "fail",
        env = "INTERCEPTOR_CNI_ON_ERROR"
    )]
    on_error: OnError,

    /// Go on until a signal comes, and install it again whenever the network's files change.
    #[arg(long)]
    watch: bool,
}

/// The node's directories.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeArgs {
    /// The directory of network configurations.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_CONFIGURATION, env = "INTERCEPTOR_CNI_CONF_DIR")]
    conf_dir: PathBuf,

    /// The directory of CNI plugins.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_PROGRAMS, env = "INTERCEPTOR_CNI_BIN_DIR")]
    bin_dir: PathBuf,
}

impl NodeArgs {
    pub(crate) fn node(self) -> Node {
        Node {
            configuration: self.conf_dir,
            programs: self.bin_dir,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnError {
    /// It doesn't start.
    Fail,
    /// It starts, and its connections go past the proxy.
    Pass,
}

pub(crate) fn run(args: Args, output: Output) -> anyhow::Result<()> {
    let node = args.node.node();
    let plugin = match args.plugin {
        Some(plugin) => plugin,
        None => env::current_exe()
            .context("finding this program's own path")?
            .with_file_name("interceptor-cni"),
    };
    let entry = Entry {
        socket: args.socket,
        pass: args.on_error == OnError::Pass,
    };
    if args.watch {
        return watch(&node, &plugin, &entry, output);
    }
    let changes = node.install(&plugin, &entry)?;
    print(&changes, output)
}

fn print(changes: &Changes, output: Output) -> anyhow::Result<()> {
    match output {
        Output::Text => {
            let done = |changed| if changed { "installed" } else { "unchanged" };
            super::print(format!(
                "{}: {}",
                changes.program.display(),
                done(changes.program_changed)
            ))?;
            for path in &changes.configurations {
                let done = done(changes.configurations_changed);
                super::print(format!("{}: {done}", path.display()))?;
            }
            Ok(())
        }
        Output::Json => super::print_json(changes),
    }
}

/// Installs it whenever it isn't. What goes wrong is said, and tried again when something
/// changes.
fn watch(node: &Node, plugin: &Path, entry: &Entry, output: Output) -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("blocking signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("signalfd")?;
    let mut changes = Inotify::init().context("watching for changes")?;
    let mut events = [0; 4096];
    let mut said = None;
    let mut first = true;
    loop {
        // Each time: a directory may have come, or have been replaced.
        for directory in [&node.configuration, &node.programs] {
            let wanted = WatchMask::CLOSE_WRITE
                | WatchMask::MOVED_TO
                | WatchMask::MOVED_FROM
                | WatchMask::DELETE;
            match changes.watches().add(directory, wanted) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("watching {}", directory.display()));
                }
            }
        }
        match node.install(plugin, entry) {
            Ok(done) => {
                if done.any() || first {
                    print(&done, output)?;
                }
                first = false;
                said = None;
            }
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                if said.as_ref() != Some(&error) {
                    eprintln!("error: {error}");
                }
                said = Some(error);
            }
        }
        if ready(&signals, &changes, AGAIN)? {
            return Ok(());
        }
        while changes.read_events(&mut events).is_ok() {
            if ready(&signals, &changes, SETTLE)? {
                return Ok(());
            }
        }
    }
}

/// Waits for a change, no longer than so many milliseconds; whether a signal has come.
fn ready(signals: &SignalFd, changes: &Inotify, milliseconds: u16) -> anyhow::Result<bool> {
    let mut wanted = [
        PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        PollFd::new(changes.as_fd(), PollFlags::POLLIN),
    ];
    match poll(&mut wanted, PollTimeout::from(milliseconds)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno).context("waiting for changes"),
    }
    Ok(wanted[0].any().unwrap_or_default())
}
