//! `interceptor daemon`.

use std::path::PathBuf;

use anyhow::Context as _;
use interceptor_userspace::{
    daemon::{self, Config, LogFormat, Options},
    datapath::{DEFAULT_ROOT, Pins},
    settings::Settings,
};
use tracing_subscriber::EnvFilter;

use super::settings::SettingsArgs;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The daemon's settings: TOML, with the names of the flags. The flags and the environment come
    /// over it.
    #[arg(long, value_name = "FILE", env = "INTERCEPTOR_CONFIG")]
    config: Option<PathBuf>,

    #[command(flatten)]
    options: Options,

    #[command(flatten)]
    settings: SettingsArgs,
}

pub(crate) fn run(args: Args, pins: Option<PathBuf>) -> anyhow::Result<()> {
    let config = config(args, pins)?;
    start_log(&config)?;
    daemon::run(config).context("the daemon can't run")
}

fn config(args: Args, pins: Option<PathBuf>) -> anyhow::Result<Config> {
    let given = Options {
        pins,
        profile: args.settings.profile(),
        ..args.options
    };
    let file = match &args.config {
        Some(path) => Options::read(path)?,
        None => Options::default(),
    };
    let options = given.or(file);
    let settings: Settings = args
        .settings
        .without_profile()
        .over(&options.pod_settings()?)?;
    Ok(Config {
        pins: Pins::at(options.pins.clone().unwrap_or_else(|| DEFAULT_ROOT.into())),
        options,
        settings,
    })
}

fn start_log(config: &Config) -> anyhow::Result<()> {
    // The client of the Kubernetes API would say all failures twice.
    let filter = config.options.log.as_deref();
    let filter = filter.unwrap_or("info,kube_client=off");
    let filter = EnvFilter::builder()
        .parse(filter)
        .with_context(|| format!("--log `{filter}`"))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false);
    match config.options.log_format.unwrap_or_default() {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    }
    .map_err(|error| anyhow::anyhow!("starting the log: {error}"))
}
