//! `interceptor cleanup`.

use anyhow::bail;
use interceptor_userspace::datapath::{self, Pins};

use super::Output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Remove it all. Connections that are open go on; new ones go past the proxies.
    #[arg(long)]
    remove: bool,
}

pub(crate) fn run(args: &Args, pins: &Pins, output: Output) -> anyhow::Result<()> {
    let found = datapath::everything(pins)?;
    if args.remove
        && let Some(pid) = pins.daemon_pid()
    {
        bail!("the daemon (process {pid}) would attach pods again: stop it first, then clean up");
    }
    let mut failed = Vec::new();
    if args.remove {
        for one in &found {
            if let Err(error) = datapath::remove(pins, one) {
                failed.push(format!("{}: {error}", one.pod));
            }
        }
        datapath::remove_root(pins)?;
    }
    match output {
        Output::Json => super::print_json(&serde_json::json!({
            "removed": args.remove,
            "found": found,
        }))?,
        Output::Text if found.is_empty() => super::print(format!(
            "nothing of Interceptor's lies below {}",
            pins.root().display()
        ))?,
        Output::Text => {
            let mut table = super::table(&["pod", "state"]);
            for one in &found {
                table.add_row([one.pod.as_ref(), &one.state.to_string()]);
            }
            super::print(table.trim_fmt())?;
            super::print(if args.remove {
                "removed"
            } else {
                "`interceptor cleanup --remove` removes it all"
            })?;
        }
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}
