//! `interceptor chains`.

use comfy_table::CellAlignment;
use interceptor_userspace::{
    api::{Answer, Request},
    datapath::Pins,
    pod::PodName,
};

use super::{Output, node};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The pod's name, as it was attached.
    #[arg(long, value_name = "NAME")]
    pod: PodName,

    #[command(flatten)]
    node: node::Node,
}

pub(crate) fn run(args: Args, pins: &Pins, output: Output) -> anyhow::Result<()> {
    let request = Request::Chains { pod: args.pod };
    let chains = match args.node.ask(pins, &request, |_| Ok(()))? {
        Answer::Chains { chains } => chains,
        answer => return Err(node::unexpected(&answer)),
    };
    if output == Output::Json {
        return super::print_json(&chains);
    }
    for (index, chain) in chains.iter().enumerate() {
        if index > 0 {
            super::print("")?;
        }
        let from = match &*chain.from {
            "" => String::new(),
            from => format!("from {from}, "),
        };
        let family = match &*chain.family {
            "both" => String::new(),
            family => format!("{family}, "),
        };
        super::print(format!(
            "Chain {} ({family}{from}one count per connection)",
            chain.chain
        ))?;
        let mut table = super::table(&["num", "hits", "target", "rule"]);
        for rule in &chain.rules {
            table.add_row([
                rule.number.to_string(),
                rule.hits
                    .map_or_else(|| "-".to_owned(), |hits| hits.to_string()),
                rule.target.clone(),
                rule.text.clone(),
            ]);
        }
        for column in [0, 1] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        super::print(table.trim_fmt())?;
    }
    Ok(())
}
