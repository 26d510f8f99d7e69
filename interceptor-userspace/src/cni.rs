//! The chained CNI plugin, `interceptor-cni`: it tells the node's daemon of each pod
//! that gets its network or loses it, and hands the previous plugin's result on.
//!
//! It follows the CNI specification 1.1.0 and speaks the versions back to 0.3.0.
//! A failure is an error object on standard output with the specification's codes,
//! and [`REFUSED`] and [`ODD_ANSWER`] of our own.

mod config;
mod conflist;
mod environment;
pub mod install;

use std::{ffi::OsString, io::Read, path::Path, sync::mpsc, thread, time::Duration};

use rscni_types::{
    error::Error,
    types::{Cmd, ErrorResult},
    version::{PluginInfo, SpecVersion},
};

use self::{
    config::{Config, OnError},
    environment::Environment,
};
use crate::{
    api::{self, Answer, Request},
    error::in_one_line,
};

pub use config::POD_ANNOTATIONS;

/// How long the daemon may take. Attaching takes milliseconds; the daemon may be
/// starting.
pub const LIMIT: Duration = Duration::from_secs(20);

/// The code of an error whose cause the daemon names, and which asking again
/// doesn't change.
pub const REFUSED: u32 = 100;

/// The code of an error that the daemon's answer is to another question.
pub const ODD_ANSWER: u32 = 101;

/// The most bytes of a configuration that are read.
const MOST: u64 = api::MAX_MESSAGE as u64;

/// What a run of the plugin says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// What goes to standard output: a result, an error object, or nothing.
    pub stdout: String,
    /// What goes to standard error.
    pub warning: Option<String>,
    /// Whether the exit code is 0.
    pub succeeded: bool,
}

/// Runs the plugin: `variable` looks up the environment, `input` is standard
/// input, and the daemon may take as long as `limit`.
pub fn run(
    variable: impl Fn(&str) -> Option<OsString>,
    input: impl Read,
    limit: Duration,
) -> Reply {
    let mut text = Vec::new();
    let mut version = SpecVersion::CURRENT;
    let result = read(input, &mut text).and_then(|()| {
        version = config::version_to_answer_in(&text);
        execute(&Environment(variable), &text, version, limit)
    });
    result.unwrap_or_else(|error| Reply {
        stdout: line(&ErrorResult::new(version, &error)),
        warning: None,
        succeeded: false,
    })
}

fn read(input: impl Read, text: &mut Vec<u8>) -> Result<(), Error> {
    input
        .take(MOST + 1)
        .read_to_end(text)
        .map_err(|error| Error::IOFailure(format!("reading standard input: {error}")))?;
    if text.len() as u64 > MOST {
        return Err(Error::FailedToDecode(format!(
            "the configuration on standard input has more than {MOST} bytes"
        )));
    }
    Ok(())
}

fn execute(
    environment: &Environment<impl Fn(&str) -> Option<OsString>>,
    text: &[u8],
    version: SpecVersion,
    limit: Duration,
) -> Result<Reply, Error> {
    let command = environment.command()?;
    if command == Cmd::Version {
        let supported = PluginInfo::default().supported_versions().to_vec();
        return Ok(success(line(&PluginInfo::new(version, supported))));
    }
    let mut config = Config::read(text)?;
    config.version(command)?;
    // What is printed on success: ADD's result, nothing else has one.
    let mut result = String::new();
    let request = match command {
        Cmd::Add | Cmd::Check => {
            let previous = config.previous()?;
            let mut pod = environment.pod()?;
            pod.annotations = config.annotations();
            if command == Cmd::Add {
                result = format!("{previous}\n");
                Request::CniAdd(pod)
            } else {
                Request::CniCheck(pod)
            }
        }
        Cmd::Del => Request::CniDel(environment.attachment()?),
        Cmd::Gc => Request::CniGc {
            valid: config.valid_attachments()?,
        },
        Cmd::Status => Request::CniStatus,
        Cmd::Version => unreachable!("answered above"),
    };
    match ask(&config.socket, request, limit) {
        Ok(answer) => judge(command, answer).map(|()| success(result)),
        // What is pinned for a pod that is gone, the daemon removes when it starts. No pod
        // must be kept from ending because Interceptor has.
        Err(NoAnswer::NoDaemon(_)) if matches!(command, Cmd::Del | Cmd::Gc) => Ok(success(result)),
        Err(NoAnswer::NoDaemon(why) | NoAnswer::Silent(why)) => match (config.on_error, command) {
            (OnError::Pass, Cmd::Add) => Ok(Reply {
                warning: Some(format!(
                    "the pod is NOT intercepted, as `on_error` has it: {why}"
                )),
                ..success(result)
            }),
            (OnError::Pass, Cmd::Status | Cmd::Check) => Ok(success(result)),
            (_, Cmd::Status) => Err(Error::PluginNotAvailable(why)),
            _ => Err(Error::TryAgainLater(why)),
        },
    }
}

/// Why there is no answer.
enum NoAnswer {
    /// Nobody listens.
    NoDaemon(String),
    /// Somebody does.
    Silent(String),
}

/// Asks the daemon. No step of it takes longer than all may: connect() has no
/// limit of its own, and reading has one for each piece.
fn ask(socket: &Path, request: Request, limit: Duration) -> Result<Answer, NoAnswer> {
    let (sender, answers) = mpsc::channel();
    let path = socket.to_owned();
    // Ends with this process, if not before.
    thread::spawn(move || {
        // Nobody waits any more if it took too long.
        let _ = sender.send(api::ask(&path, &request, limit));
    });
    match answers.recv_timeout(limit) {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => {
            let why = in_one_line(&error);
            Err(match error {
                api::ClientError::NoDaemon { .. } => NoAnswer::NoDaemon(why),
                api::ClientError::Failed { .. } => NoAnswer::Silent(why),
            })
        }
        Err(_) => Err(NoAnswer::Silent(format!(
            "the daemon at {} has not answered within {limit:?}: see its log",
            socket.display()
        ))),
    }
}

fn judge(command: Cmd, answer: Answer) -> Result<(), Error> {
    match answer {
        Answer::Attached { .. } | Answer::LeftAlone { .. } | Answer::Done => Ok(()),
        Answer::Refused { error, .. } if command == Cmd::Status => {
            Err(Error::PluginNotAvailable(error))
        }
        Answer::Refused { error, again: true } => Err(Error::TryAgainLater(error)),
        Answer::Refused {
            error,
            again: false,
        } => Err(Error::Custom(
            REFUSED,
            "Interceptor's daemon refused".to_owned(),
            error,
        )),
        Answer::Status(_)
        | Answer::Pods { .. }
        | Answer::View(_)
        | Answer::NoView { .. }
        | Answer::Chains { .. }
        | Answer::Connections { .. } => Err(Error::Custom(
            ODD_ANSWER,
            "Interceptor's daemon answered another question".to_owned(),
            "install the plugin and the daemon from one release".to_owned(),
        )),
    }
}

fn success(stdout: String) -> Reply {
    Reply {
        stdout,
        warning: None,
        succeeded: true,
    }
}

/// A line of JSON.
fn line(value: &impl serde::Serialize) -> String {
    // These are plain structs of strings and numbers, which have no way to fail.
    let mut text = serde_json::to_string(value).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests;
