//! `interceptor cni-uninstall`.

use super::{Output, cni_install::NodeArgs};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    node: NodeArgs,
}

pub(crate) fn run(args: Args, output: Output) -> anyhow::Result<()> {
    let changes = args.node.node().uninstall()?;
    match output {
        Output::Text => {
            if !changes.any() {
                return super::print("the plugin is not installed");
            }
            for path in &changes.configurations {
                super::print(format!("{}: entry removed", path.display()))?;
            }
            if changes.program_changed {
                super::print(format!("{}: removed", changes.program.display()))?;
            }
            Ok(())
        }
        Output::Json => super::print_json(&changes),
    }
}
