//! `interceptor explain`.

use std::net::{IpAddr, SocketAddr};

use interceptor_userspace::{
    datapath::{self, Pins, Question},
    pod::PodName,
};

use super::Output;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Asks the policy that the kernel programs ask, about the pod's maps as they are now. Nothing is sent.")]
pub(crate) struct Args {
    /// The pod's name, as it was attached.
    #[arg(long, value_name = "NAME")]
    pod: PodName,

    /// Where the connection comes from: the address that a socket of the pod is bound to, or
    /// another host's, for a connection that arrives.
    #[arg(long, value_name = "ADDR")]
    from: Option<IpAddr>,

    /// Where it goes: an address and a port, `10.0.0.1:80` or `[fd00::1]:80`.
    #[arg(long, value_name = "ADDR:PORT")]
    to: SocketAddr,

    /// Whose the socket is, as this machine numbers uids.
    #[arg(long, value_name = "UID", default_value_t = 1000)]
    uid: u32,

    /// Its group, as this machine numbers gids.
    #[arg(long, value_name = "GID", default_value_t = 1000)]
    gid: u32,

    /// A datagram of UDP, not a connection of TCP.
    #[arg(long)]
    udp: bool,
}

pub(crate) fn run(args: &Args, pins: &Pins, output: Output) -> anyhow::Result<()> {
    let explanation = datapath::explain(
        pins,
        &args.pod,
        &Question {
            from: args.from,
            to: args.to,
            uid: args.uid,
            gid: args.gid,
            udp: args.udp,
        },
    )?;
    if output == Output::Json {
        return super::print_json(&explanation);
    }
    super::print(match (explanation.outcome, explanation.port) {
        ("proxy", Some(port)) => format!("{}: to the proxy's port {port}", explanation.direction),
        ("refused", Some(port)) => format!(
            "{}: refused, because no proxy listens on port {port}",
            explanation.direction
        ),
        (outcome, _) => format!("{}: {outcome}", explanation.direction),
    })?;
    match &explanation.text {
        Some(text) => super::print(format!(
            "{} rule {}: {text}",
            explanation.chain, explanation.rule
        ))?,
        None => super::print(format!("no rule of {} decides", explanation.chain))?,
    }
    for fact in &explanation.facts {
        super::print(format!("  {fact}"))?;
    }
    Ok(())
}
