//! `interceptor attach`.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use interceptor_common::config::{Owners, Ports, Settings};
use interceptor_userspace::{
    datapath::{self, Attached, LogLevel, Pins, Request},
    pod::{PodName, cgroup::Cgroup, netns::Netns},
};

use super::Output;

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

    /// Uids whose connections are the proxy's own.
    #[arg(
        long,
        value_name = "UID",
        value_delimiter = ',',
        default_value = "1337"
    )]
    proxy_uid: Vec<u32>,

    /// Gids whose connections are the proxy's own.
    #[arg(
        long,
        value_name = "GID",
        value_delimiter = ',',
        default_value = "1337"
    )]
    proxy_gid: Vec<u32>,

    /// The proxy's port for connections that the pod makes.
    #[arg(long, value_name = "PORT", default_value_t = 15001, value_parser = clap::value_parser!(u16).range(1..))]
    outbound_port: u16,

    /// The proxy's port for connections that arrive at the pod.
    #[arg(long, value_name = "PORT", default_value_t = 15006, value_parser = clap::value_parser!(u16).range(1..))]
    inbound_port: u16,

    /// Ports at which arriving connections are left alone; an empty value leaves none alone.
    #[arg(long, value_name = "PORTS", default_value = "22,15090,15020")]
    exclude_inbound_ports: String,

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
    let settings = settings(&args)?;
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

fn settings(args: &Args) -> anyhow::Result<Settings> {
    if args.outbound_port == args.inbound_port {
        bail!(
            "--outbound-port and --inbound-port are both {}: the proxy can't tell its connections apart",
            args.outbound_port
        );
    }
    let excluded = args
        .exclude_inbound_ports
        .split(',')
        .filter(|port| !port.is_empty())
        .map(|port| {
            port.trim().parse::<u16>().with_context(|| {
                format!("--exclude-inbound-ports: `{port}` is no port: give numbers from 0 to 65535 with commas between")
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Settings {
        outbound_port: args.outbound_port,
        inbound_port: args.inbound_port,
        proxy_uids: Owners::new(&args.proxy_uid).context("--proxy-uid")?,
        proxy_gids: Owners::new(&args.proxy_gid).context("--proxy-gid")?,
        excluded_inbound_ports: Ports::new(&excluded).context("--exclude-inbound-ports")?,
        ..Settings::default()
    })
}
