//! Asking what is on this node: the daemon, or the pins where none runs.

use std::{ops::ControlFlow, path::PathBuf, time::Duration};

use anyhow::bail;
use interceptor_userspace::{
    api::{self, Answer, Client, ClientError, Request},
    datapath::Pins,
};

/// How long the daemon may take for an answer, or for a part of one.
const LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(crate) struct Node {
    /// Where the daemon listens. If none does, or one with other --pins, the pins are read.
    #[arg(long, value_name = "PATH", default_value = api::DEFAULT_SOCKET, env = "INTERCEPTOR_SOCKET")]
    socket: PathBuf,
}

impl Node {
    /// Asks the daemon that looks after the pins, or the pins themselves. `part` gets the
    /// parts of an answer that comes in parts; other answers are returned.
    pub(crate) fn ask(
        &self,
        pins: &Pins,
        request: &Request,
        mut part: impl FnMut(Answer) -> anyhow::Result<()>,
    ) -> anyhow::Result<Answer> {
        let answer = match self.daemon(pins)? {
            Some(mut daemon) => {
                let mut answer = daemon.ask(request)?;
                if request.is_answered_in_parts() {
                    while !matches!(answer, Answer::Done | Answer::Refused { .. }) {
                        part(answer)?;
                        answer = daemon.next_part()?;
                    }
                }
                answer
            }
            None => {
                let mut failed = Ok(());
                let answer = api::from_pins(pins, request, |answer| {
                    failed = part(answer);
                    if failed.is_ok() {
                        ControlFlow::Continue(())
                    } else {
                        ControlFlow::Break(())
                    }
                });
                failed?;
                answer
            }
        };
        match answer {
            Answer::Refused { error, .. } => bail!("{error}"),
            answer => Ok(answer),
        }
    }

    fn daemon(&self, pins: &Pins) -> anyhow::Result<Option<Client>> {
        let mut daemon = match Client::connect(&self.socket, LIMIT) {
            Ok(daemon) => daemon,
            Err(ClientError::NoDaemon { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match daemon.ask(&Request::Status)? {
            Answer::Status(status) if status.pins == pins.root() => Ok(Some(daemon)),
            Answer::Status(_) => Ok(None),
            answer => bail!("the daemon answered {answer:?}"),
        }
    }
}

/// The error of an answer that isn't one to what was asked.
pub(crate) fn unexpected(answer: &Answer) -> anyhow::Error {
    anyhow::anyhow!("the daemon answered {answer:?}")
}
