//! `interceptor attach`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::ValueEnum;
use interceptor_userspace::{
    datapath::{self, Attached, LogLevel, Pins, Request},
    pod::{PodName, cgroup::Cgroup, netns::Netns},
    settings::Settings,
};

use super::{Output, settings::SettingsArgs};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The name for the pod; its pins lie below a directory of this name.
    #[arg(long, value_name = "NAME")]
    pod: PodName,

    /// The pod's cgroup (version 2): a directory below /sys/fs/cgroup that holds all of the pod's
    /// containers.
    #[arg(long, value_name = "PATH")]
    cgroup: PathBuf,

    /// The pod's network namespace: its file, or the PID of one of the pod's processes.
    #[arg(long, value_name = "PATH|PID")]
    netns: String,

    #[command(flatten)]
    settings: SettingsArgs,

    /// What the kernel programs log, for `interceptor logs`; what is below the level costs nothing.
    #[arg(long, value_name = "LEVEL", default_value = "off")]
    log_level: Level,

    /// Attach even to the root cgroup or to the machine's own network namespace.
    #[arg(long)]
    allow_host: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Level {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<Level> for LogLevel {
    fn from(level: Level) -> Self {
        match level {
            Level::Off => Self::Off,
            Level::Error => Self::Error,
            Level::Warn => Self::Warn,
            Level::Info => Self::Info,
            Level::Debug => Self::Debug,
            Level::Trace => Self::Trace,
        }
    }
}

pub(crate) fn run(args: Args, pins: &Pins, output: Output) -> anyhow::Result<()> {
    let settings = args.settings.over(&Settings::default())?;
    datapath::need_root()?;
    let cgroup = Cgroup::open(&args.cgroup)?;
    let netns = Netns::open(&args.netns)?;
    let attached = datapath::attach(
        pins,
        &Request {
            pod: &args.pod,
            cgroup: &cgroup,
            netns: &netns,
            settings: &settings,
            log_level: args.log_level.into(),
            allow_host: args.allow_host,
            note: None,
            pass_at_start: false,
        },
    )
    .with_context(|| format!("the pod {} is not attached", args.pod))?;
    match output {
        Output::Text => super::print(match attached {
            Attached::Newly => format!("attached {}", args.pod),
            Attached::Already => format!(
                "{} is attached already; its routes are up to date",
                args.pod
            ),
        }),
        Output::Json => super::print_json(&serde_json::json!({
            "pod": args.pod.as_ref(),
            "attached": match attached {
                Attached::Newly => "newly",
                Attached::Already => "already",
            },
            "pins": pins.pod(&args.pod),
        })),
    }
}
