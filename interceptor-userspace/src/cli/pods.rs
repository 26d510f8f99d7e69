//! `interceptor pods`.

use interceptor_userspace::{
    api::{Answer, PodState, Request},
    datapath::Pins,
};

use super::{Output, node};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    node: node::Node,
}

pub(crate) fn run(args: &Args, pins: &Pins, output: Output) -> anyhow::Result<()> {
    // The pins tell what is attached, though not what was left alone.
    let pods = match args.node.ask(pins, &Request::Pods, |_| Ok(()))? {
        Answer::Pods { pods } => pods,
        answer => return Err(node::unexpected(&answer)),
    };
    if output == Output::Json {
        return super::print_json(&pods);
    }
    if pods.is_empty() {
        return super::print("no pods are known");
    }
    let mut table = super::table(&["pod", "state", "source", "cgroup", "because"]);
    for pod in &pods {
        table.add_row([
            &*pod.pod,
            match pod.state {
                PodState::Attached => "attached",
                PodState::LeftAlone => "left alone",
                PodState::Failed => "FAILED",
            },
            &pod.source,
            &pod.cgroup
                .as_deref()
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            pod.because.as_deref().unwrap_or_default(),
        ]);
    }
    super::print(table.trim_fmt())
}
