//! `interceptor import`.

use std::path::PathBuf;

use anyhow::Context as _;
use interceptor_userspace::settings;

use super::Output;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Changes nothing. The settings are printed as JSON. If a rule has no equal, the first such rule is \
named, and the exit status is 1.")]
pub(crate) struct Args {
    /// What iptables-save and ip6tables-save print in a pod, in one file or in two; `-` reads
    /// standard input.
    #[arg(value_name = "FILE", required = true, num_args = 1..=2)]
    files: Vec<PathBuf>,
}

pub(crate) fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    let mut text = String::new();
    for path in &args.files {
        text += &super::read_text(path).with_context(|| format!("reading {}", path.display()))?;
        text.push('\n');
    }
    let settings = settings::import(&text).context("no settings are equal to these chains")?;
    match output {
        Output::Text | Output::Json => super::print_json(&settings),
    }
}
