//! `interceptor set`.

use anyhow::{Context as _, ensure};
use interceptor_userspace::{
    datapath::{self, Change, Pins},
    pod::PodName,
};

use super::{Output, settings::SettingsArgs};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The pod's name, as it was attached.
    #[arg(value_name = "NAME")]
    pod: PodName,

    #[command(flatten)]
    settings: SettingsArgs,
}

pub(crate) fn run(args: &Args, pins: &Pins, output: Output) -> anyhow::Result<()> {
    ensure!(
        !args.settings.is_empty(),
        "nothing to set: name the settings to change, or a --profile to start anew from"
    );
    let before = datapath::view(pins, &args.pod)?.settings;
    let settings = args.settings.over(&before)?;
    let change = datapath::set(pins, &args.pod, &settings)
        .with_context(|| format!("the settings of {} are as they were", args.pod))?;
    match output {
        Output::Text => super::print(match change {
            Change::Made => format!("changed {}", args.pod),
            Change::None => format!("{} has these settings already", args.pod),
        }),
        Output::Json => super::print_json(&serde_json::json!({
            "pod": args.pod.as_ref(),
            "changed": change == Change::Made,
            "settings": settings,
        })),
    }
}
