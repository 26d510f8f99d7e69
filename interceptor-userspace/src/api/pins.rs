//! What can be answered from the pins alone, whether a daemon runs or not.

use std::ops::ControlFlow;

use super::{Answer, PodState, PodStatus, Request};
use crate::{
    datapath::{self, Pins},
    error::in_one_line,
};

/// The most connections in one part of an answer: of the longest, they are well below
/// [`super::MAX_MESSAGE`].
const CONNECTIONS: usize = 512;

/// Answers `request` from the pins. `part` gets all parts of the answer but the last,
/// which is returned, until it breaks.
///
/// Of pods it knows only those that are attached; what only a daemon can do is refused.
pub fn from_pins(
    pins: &Pins,
    request: &Request,
    mut part: impl FnMut(Answer) -> ControlFlow<()>,
) -> Answer {
    let answered = match request {
        Request::Pods => pods(pins),
        Request::View { pod } => {
            let pods = match pod {
                Some(pod) => Ok(vec![pod.clone()]),
                None => datapath::pods(pins),
            };
            pods.map(|pods| {
                for pod in pods {
                    let answer = match datapath::view(pins, &pod) {
                        Ok(view) => Answer::View(Box::new(view)),
                        Err(error) => Answer::NoView {
                            error: in_one_line(&error),
                            pod,
                        },
                    };
                    if part(answer).is_break() {
                        break;
                    }
                }
                Answer::Done
            })
        }
        Request::Chains { pod } => {
            datapath::chains(pins, pod).map(|chains| Answer::Chains { chains })
        }
        Request::Connections { pod } => {
            let mut connections = Vec::new();
            let told = datapath::connections(pins, pod.as_ref(), |connection| {
                connections.push(connection);
                if connections.len() < CONNECTIONS {
                    return ControlFlow::Continue(());
                }
                part(Answer::Connections {
                    connections: std::mem::take(&mut connections),
                })
            });
            if !connections.is_empty() {
                // The last one, whatever comes of it.
                let _: ControlFlow<()> = part(Answer::Connections { connections });
            }
            told.map(|()| Answer::Done)
        }
        Request::CniAdd(_)
        | Request::CniDel(_)
        | Request::CniCheck(_)
        | Request::CniGc { .. }
        | Request::CniStatus
        | Request::Status => {
            return Answer::Refused {
                error: "only a daemon can answer that".to_owned(),
                again: false,
            };
        }
    };
    answered.unwrap_or_else(|error| Answer::Refused {
        error: in_one_line(&error),
        again: false,
    })
}

/// What is attached, and why what should be isn't whole.
fn pods(pins: &Pins) -> crate::Result<Answer> {
    let source = "pins (no daemon runs)";
    let pods = datapath::pods(pins)?
        .into_iter()
        .map(|pod| match datapath::view(pins, &pod) {
            Ok(view) => PodStatus {
                pod: view.pod,
                state: PodState::Attached,
                because: None,
                source: source.to_owned(),
                cgroup: view.cgroup,
                netns_inode: Some(view.netns_inode),
            },
            Err(error) => PodStatus {
                pod: pod.to_string(),
                state: PodState::Failed,
                because: Some(in_one_line(&error)),
                source: source.to_owned(),
                cgroup: None,
                netns_inode: None,
            },
        });
    Ok(Answer::Pods {
        pods: pods.collect(),
    })
}
