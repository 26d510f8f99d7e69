//! `interceptor pods`.

use std::{path::PathBuf, time::Duration};

use anyhow::bail;
use interceptor_userspace::{
    api::{self, Answer, ClientError, PodState, PodStatus, Request},
    datapath::{self, Pins},
};

use super::Output;

/// How long the daemon may take to answer.
const LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the daemon listens.
    #[arg(long, value_name = "PATH", default_value = api::DEFAULT_SOCKET, env = "INTERCEPTOR_SOCKET")]
    socket: PathBuf,
}

pub(crate) fn run(args: &Args, pins: &Pins, output: Output) -> anyhow::Result<()> {
    let pods = match api::ask(&args.socket, &Request::Pods, LIMIT) {
        Ok(Answer::Pods { pods }) => pods,
        Ok(answer) => bail!("the daemon answered {answer:?}"),
        // The pins tell what is attached, though not what was left alone.
        Err(ClientError::NoDaemon { .. }) => from_pins(pins)?,
        Err(error) => return Err(error.into()),
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

/// What is attached, when no daemon runs.
fn from_pins(pins: &Pins) -> anyhow::Result<Vec<PodStatus>> {
    let pods = datapath::pods(pins)?
        .into_iter()
        .map(|pod| match datapath::view(pins, &pod) {
            Ok(view) => PodStatus {
                pod: view.pod,
                state: PodState::Attached,
                because: None,
                source: "pins (no daemon runs)".to_owned(),
                cgroup: view.cgroup,
                netns_inode: Some(view.netns_inode),
            },
            Err(error) => PodStatus {
                pod: pod.to_string(),
                state: PodState::Failed,
                because: Some(error.to_string()),
                source: "pins (no daemon runs)".to_owned(),
                cgroup: None,
                netns_inode: None,
            },
        });
    Ok(pods.collect())
}
