//! `interceptor connections`.

use std::io::Write as _;

use interceptor_userspace::{
    api::{Answer, Request},
    datapath::{Connection, Direction, Pins, Side},
    pod::PodName,
};

use super::{Output, node};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this pod's.
    #[arg(long, value_name = "NAME")]
    pod: Option<PodName>,

    #[command(flatten)]
    node: node::Node,
}

pub(crate) fn run(args: Args, pins: &Pins, output: Output) -> anyhow::Result<()> {
    let mut listing = Listing {
        output,
        told: 0,
        to: std::io::BufWriter::new(std::io::stdout().lock()),
    };
    let request = Request::Connections { pod: args.pod };
    let asked = args.node.ask(pins, &request, |answer| match answer {
        Answer::Connections { connections } => connections
            .iter()
            .try_for_each(|connection| listing.add(connection)),
        answer => Err(node::unexpected(&answer)),
    });
    // What was told of stands, also if there is more.
    listing.end(asked.is_ok())?;
    asked.map(drop)
}

/// Prints connections as they come: there may be very many.
struct Listing<W: std::io::Write> {
    output: Output,
    told: u64,
    to: std::io::BufWriter<W>,
}

impl<W: std::io::Write> Listing<W> {
    fn add(&mut self, connection: &Connection) -> anyhow::Result<()> {
        match self.output {
            Output::Json => {
                let before = if self.told == 0 { "[\n" } else { ",\n" };
                write!(self.to, "{before}  {}", serde_json::to_string(connection)?)?;
            }
            Output::Text => {
                if self.told == 0 {
                    self.line(&[
                        "pod",
                        "direction",
                        "side",
                        "state",
                        "client",
                        "proxy",
                        "original destination",
                        "owner",
                        "rule",
                    ])?;
                }
                let owner = match (connection.uid, connection.gid) {
                    (Some(uid), Some(gid)) => format!("{uid}:{gid}"),
                    _ => "-".to_owned(),
                };
                let rule = match &connection.rule {
                    Some(rule) => format!("{} {}: {}", rule.chain, rule.number, rule.text),
                    None => "-".to_owned(),
                };
                self.line(&[
                    &connection.pod,
                    match connection.direction {
                        Direction::Outbound => "outbound",
                        Direction::Inbound => "inbound",
                    },
                    match connection.side {
                        Side::Client => "client",
                        Side::Proxy => "proxy",
                    },
                    &connection.state,
                    &connection.client.to_string(),
                    &connection.proxy.to_string(),
                    &connection.original_destination.to_string(),
                    &owner,
                    &rule,
                ])?;
            }
        }
        self.told += 1;
        Ok(())
    }

    /// The width of each column can't wait for the last row.
    fn line(&mut self, cells: &[&str; 9]) -> anyhow::Result<()> {
        const WIDTHS: [usize; 8] = [20, 9, 6, 10, 21, 21, 21, 9];
        for (cell, width) in cells.iter().zip(WIDTHS) {
            write!(self.to, "{cell:width$} ")?;
        }
        Ok(writeln!(self.to, "{}", cells[8])?)
    }

    fn end(mut self, complete: bool) -> anyhow::Result<()> {
        match (self.output, self.told) {
            (Output::Json, 0) if complete => writeln!(self.to, "[]")?,
            (Output::Json, 0) => {}
            (Output::Json, _) => writeln!(self.to, "\n]")?,
            (Output::Text, 0) if complete => {
                writeln!(self.to, "no connection goes through a proxy")?;
            }
            (Output::Text, _) => {}
        }
        Ok(self.to.flush()?)
    }
}
