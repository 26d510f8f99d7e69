//! `interceptor logs`.

use anyhow::{Context as _, bail};
use aya_log::EbpfLogger;
use interceptor_userspace::{
    datapath::{self, Pins},
    pod::PodName,
};
use tokio::{
    io::unix::AsyncFd,
    signal::unix::{SignalKind, signal},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The pod's name, as it was attached.
    #[arg(long, value_name = "NAME")]
    pod: PodName,
}

pub(crate) fn run(args: &Args, pins: &Pins) -> anyhow::Result<()> {
    let view = datapath::view(pins, &args.pod)?;
    if view.log_level == 0 {
        bail!(
            "the programs of {} log nothing: detach the pod and attach it with --log-level",
            args.pod
        );
    }
    let program = view.links.first().context("no program is attached")?;
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Trace)
        .filter_module("aya", log::LevelFilter::Warn)
        .format_target(false)
        .target(env_logger::Target::Stdout)
        .init();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(follow(program.program_id))
}

async fn follow(program_id: u32) -> anyhow::Result<()> {
    let logger = EbpfLogger::init_from_id(program_id)?;
    // SAFETY: the logger owns its descriptor, and keeps the same one until it
    // is dropped with the registration.
    let mut logger =
        unsafe { AsyncFd::register_with_interest(logger, tokio::io::Interest::READABLE) }?;
    let mut terminate = signal(SignalKind::terminate())?;
    loop {
        tokio::select! {
            ready = logger.readable_mut() => {
                let mut ready = ready?;
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
            _ = tokio::signal::ctrl_c() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        }
    }
}
