//! `interceptor detach`.

use anyhow::Context as _;
use interceptor_userspace::{
    datapath::{self, Pins},
    pod::PodName,
};

use super::Output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The pod's name, as it was attached.
    #[arg(long, value_name = "NAME")]
    pod: PodName,
}

pub(crate) fn run(args: &Args, pins: &Pins, output: Output) -> anyhow::Result<()> {
    datapath::detach(pins, &args.pod)
        .with_context(|| format!("the pod {} is not detached", args.pod))?;
    match output {
        Output::Text => super::print(format!("detached {}", args.pod)),
        Output::Json => super::print_json(&serde_json::json!({ "pod": args.pod.as_ref() })),
    }
}
