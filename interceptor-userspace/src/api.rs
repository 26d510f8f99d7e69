//! What travels over the daemon's socket: requests and answers, one JSON object
//! to a line, and a client that waits for the answer.
//!
//! Only root, and the user whom the daemon runs as, may connect. A field that
//! one side doesn't know is ignored, so that the CNI plugin and the daemon may be
//! replaced one after the other; an unknown request is refused.

mod pins;

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

pub use self::pins::from_pins;
use crate::{
    datapath::{ChainView, Connection, PodView},
    pod::PodName,
};

/// Where the daemon listens if nothing else is said.
pub const DEFAULT_SOCKET: &str = "/run/interceptor/daemon.sock";

/// The most bytes that a line may have, its end included.
pub const MAX_MESSAGE: usize = 1 << 20;

/// What the daemon can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// A pod gets its network (CNI's ADD): attach it, if it is to be attached.
    /// Answered with [`Answer::Attached`] when the programs are in force, with
    /// [`Answer::LeftAlone`], or with [`Answer::Refused`]: then the pod must
    /// not start.
    CniAdd(CniPod),
    /// A pod's network is taken away (CNI's DEL): detach it. Answered with
    /// [`Answer::Done`] for a pod that is gone or was never attached, too.
    CniDel(CniAttachment),
    /// Is the pod attached still, as it was at ADD (CNI's CHECK)? Answered as
    /// [`Request::CniAdd`] is.
    CniCheck(CniPod),
    /// Detach all that CNI's ADD attached but these (CNI's GC). Answered with
    /// [`Answer::Done`].
    CniGc {
        /// CNI's `cni.dev/valid-attachments`.
        valid: Vec<CniAttachment>,
    },
    /// Can pods be attached now (CNI's STATUS)? Answered with [`Answer::Done`] or
    /// [`Answer::Refused`].
    CniStatus,
    /// How the daemon is. Answered with [`Answer::Status`].
    Status,
    /// Which pods the daemon knows. Answered with [`Answer::Pods`].
    Pods,
    /// What is attached for a pod, or for all. Answered with an [`Answer::View`] or an
    /// [`Answer::NoView`] for each pod, and at the end [`Answer::Done`].
    View {
        /// The pod's name; none for all.
        #[serde(default)]
        pod: Option<PodName>,
    },
    /// A pod's chains. Answered with [`Answer::Chains`].
    Chains {
        /// The pod's name.
        pod: PodName,
    },
    /// The live connections of a pod, or of all. Answered with as many
    /// [`Answer::Connections`] as it takes, and at the end [`Answer::Done`].
    Connections {
        /// The pod's name; none for all.
        #[serde(default)]
        pod: Option<PodName>,
    },
}

impl Request {
    /// Whether there is more than one answer: the last is [`Answer::Done`], or
    /// [`Answer::Refused`] if the others aren't all there is.
    pub const fn is_answered_in_parts(&self) -> bool {
        matches!(self, Self::View { .. } | Self::Connections { .. })
    }
}

/// A pod's interface, as CNI tells one from another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CniAttachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub interface: String,
}

/// A pod, as CNI tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniPod {
    /// Which interface of which container it is about.
    #[serde(flatten)]
    pub attachment: CniAttachment,
    /// `CNI_NETNS`: the path of the pod's network namespace.
    pub netns: PathBuf,
    /// `K8S_POD_NAMESPACE` of `CNI_ARGS`, if it is there.
    #[serde(default)]
    pub namespace: Option<String>,
    /// `K8S_POD_NAME` of `CNI_ARGS`, if it is there.
    #[serde(default)]
    pub name: Option<String>,
    /// `K8S_POD_UID` of `CNI_ARGS`, if it is there.
    #[serde(default)]
    pub uid: Option<String>,
    /// The pod's annotations, if the runtime was asked for them: the capability
    /// `io.kubernetes.cri.pod-annotations` of the plugin's configuration.
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
    /// `CNI_ARGS` as it came, for the log.
    #[serde(default)]
    pub args: String,
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// The pod is attached.
    Attached {
        /// Under this name, as `interceptor pods` shows it.
        pod: String,
    },
    /// The pod is not attached, and rightly so.
    LeftAlone {
        /// Why: it ends a sentence that begins with "left alone, because".
        because: String,
    },
    /// What was asked is done.
    Done,
    /// What was asked is not done.
    Refused {
        /// What failed, from the operation to its cause.
        error: String,
        /// Whether it may succeed if it is asked again, with nothing changed.
        #[serde(default)]
        again: bool,
    },
    /// How the daemon is.
    Status(DaemonStatus),
    /// The pods that it knows.
    Pods {
        /// By name.
        pods: Vec<PodStatus>,
    },
    /// What is attached for a pod.
    View(Box<PodView>),
    /// What is attached for a pod can't be told.
    NoView {
        /// Its name.
        pod: PodName,
        /// Why.
        error: String,
    },
    /// A pod's chains.
    Chains {
        /// In their order.
        chains: Vec<ChainView>,
    },
    /// Some of the live connections.
    Connections {
        /// In no order.
        connections: Vec<Connection>,
    },
}

/// How the daemon is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// For how many seconds it has run.
    pub uptime_seconds: u64,
    /// Below which directory it pins.
    pub pins: PathBuf,
    /// Where it serves metrics, health and readiness.
    pub metrics: SocketAddr,
    /// Whether it has seen all pods that were there when it started.
    pub ready: bool,
    /// Where it learns of pods.
    pub sources: Vec<String>,
    /// How many pods are in which state.
    pub pods: BTreeMap<PodState, usize>,
}

/// What has become of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// Its connections go through its proxy.
    Attached,
    /// It is none of Interceptor's.
    LeftAlone,
    /// It should be attached and isn't.
    Failed,
}

/// A pod that the daemon knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// Under which name its pins lie, or would.
    pub pod: String,
    /// What has become of it.
    pub state: PodState,
    /// Why, if it isn't attached.
    #[serde(default)]
    pub because: Option<String>,
    /// Who told of it: `cni`, `cgroups`, `directory`, `kubernetes`, or `command` if it was
    /// attached by hand.
    pub source: String,
    /// Its cgroup, if that is known.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// The inode of its network namespace, if that is known.
    #[serde(default)]
    pub netns_inode: Option<u64>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon answers at {socket}: is `interceptor daemon` running?")]
    NoDaemon {
        /// Its socket.
        socket: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The conversation failed.
    #[error("asking the daemon at {socket}")]
    Failed {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A conversation with the daemon.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
    limit: Duration,
}

impl Client {
    /// Begins one with the daemon that listens at `socket`. Each answer, and being
    /// heard, may take as long as `limit`.
    ///
    /// # Errors
    ///
    /// If no daemon listens, or this process may not speak to it.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self, ClientError> {
        let connected = UnixStream::connect(socket).and_then(|stream| {
            stream.set_read_timeout(Some(limit))?;
            stream.set_write_timeout(Some(limit))?;
            Ok(stream)
        });
        let socket = socket.to_owned();
        match connected {
            Ok(stream) => Ok(Self {
                socket,
                stream: BufReader::new(stream),
                limit,
            }),
            Err(source) => Err(match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ClientError::NoDaemon { socket, source }
                }
                _ => ClientError::Failed { socket, source },
            }),
        }
    }

    /// Asks, and waits for the answer: the first, if it comes in parts.
    ///
    /// # Errors
    ///
    /// If it doesn't come in time, or not in this protocol.
    pub fn ask(&mut self, request: &Request) -> Result<Answer, ClientError> {
        self.send(request)
            .and_then(|()| self.receive())
            .map_err(|source| self.failed(source))
    }

    /// The next part of an answer.
    ///
    /// # Errors
    ///
    /// As of [`Self::ask`].
    pub fn next_part(&mut self) -> Result<Answer, ClientError> {
        self.receive().map_err(|source| self.failed(source))
    }

    fn send(&self, request: &Request) -> io::Result<()> {
        let line = to_line(request)?;
        (&mut self.stream.get_ref()).write_all(&line)
    }

    fn receive(&mut self) -> io::Result<Answer> {
        let mut answer = Vec::new();
        (&mut self.stream)
            .take(MAX_MESSAGE as u64)
            .read_until(b'\n', &mut answer)?;
        from_line(&answer)
    }

    fn failed(&self, source: io::Error) -> ClientError {
        ClientError::Failed {
            socket: self.socket.clone(),
            source: match source.kind() {
                io::ErrorKind::WouldBlock => io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("it has not answered within {:?}", self.limit),
                ),
                _ => source,
            },
        }
    }
}

/// Asks the daemon that listens at `socket` one thing, and waits no longer than `limit`
/// for each of: being heard, and the answer.
///
/// # Errors
///
/// If no daemon listens, it doesn't answer in time, or not in this protocol.
pub fn ask(socket: &Path, request: &Request, limit: Duration) -> Result<Answer, ClientError> {
    Client::connect(socket, limit)?.ask(request)
}

/// A message as it travels, with the end of its line.
///
/// # Errors
///
/// If it is longer than [`MAX_MESSAGE`].
pub fn to_line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > MAX_MESSAGE {
        return Err(too_long());
    }
    Ok(line)
}

/// Reads a message off a line, which must have its end.
///
/// # Errors
///
/// If the line is cut off or too long, or isn't such a message.
pub fn from_line<T: for<'a> Deserialize<'a>>(line: &[u8]) -> io::Result<T> {
    match line.strip_suffix(b"\n") {
        Some(message) => Ok(serde_json::from_slice(message)?),
        None if line.len() >= MAX_MESSAGE => Err(too_long()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn too_long() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("a message has more than {MAX_MESSAGE} bytes"),
    )
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use proptest::prelude::*;

    use super::*;

    fn pod() -> CniPod {
        CniPod {
            attachment: CniAttachment {
                container_id: "abc".to_owned(),
                interface: "eth0".to_owned(),
            },
            netns: "/run/netns/x".into(),
            namespace: Some("default".to_owned()),
            name: Some("web".to_owned()),
            uid: None,
            annotations: None,
            args: "K8S_POD_NAME=web".to_owned(),
        }
    }

    #[test]
    fn a_message_is_one_line_and_comes_back() {
        for request in [
            Request::CniAdd(pod()),
            Request::CniDel(pod().attachment),
            Request::CniCheck(pod()),
            Request::CniGc {
                valid: vec![pod().attachment],
            },
            Request::CniStatus,
            Request::Status,
            Request::Pods,
            Request::View { pod: None },
            Request::Chains {
                pod: "web".parse().unwrap(),
            },
            Request::Connections {
                pod: Some("web".parse().unwrap()),
            },
        ] {
            let line = to_line(&request).unwrap();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            assert_eq!(from_line::<Request>(&line).unwrap(), request);
        }
    }

    #[test]
    fn the_least_that_a_plugin_must_say() {
        let line = br#"{"request":"cni_add","container_id":"a","interface":"eth0","netns":"/n","from_later":1}
"#;
        let request: Request = from_line(line).unwrap();
        assert!(matches!(request, Request::CniAdd(pod) if pod.netns == Path::new("/n")));
    }

    proptest! {
        #[test]
        fn a_damaged_message_is_an_error_or_another_message(
            position: prop::sample::Index,
            length in 0_usize..9,
            patch in prop::collection::vec(any::<u8>(), 0..9),
        ) {
            let mut line = to_line(&Request::CniAdd(pod())).unwrap();
            let start = position.index(line.len());
            let end = line.len().min(start + length);
            line.splice(start..end, patch);
            if let Ok(request) = from_line::<Request>(&line) {
                let line = to_line(&request).unwrap();
                prop_assert_eq!(from_line::<Request>(&line).unwrap(), request);
            }
        }
    }

    #[test]
    fn half_a_message_is_none() {
        let line = to_line(&Request::Pods).unwrap();
        let error = from_line::<Request>(&line[..line.len() - 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let error = from_line::<Request>(&vec![b' '; MAX_MESSAGE]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(from_line::<Request>(b"{\"request\":\"nothing\"}\n").is_err());
    }

    #[test]
    fn the_client_says_what_went_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let limit = Duration::from_millis(200);
        let error = ask(&socket, &Request::Pods, limit).unwrap_err();
        assert!(matches!(error, ClientError::NoDaemon { .. }), "{error}");

        let listener = UnixListener::bind(&socket).unwrap();
        let error = ask(&socket, &Request::Pods, limit).unwrap_err();
        assert!(
            matches!(&error, ClientError::Failed { source, .. } if source.kind() == io::ErrorKind::TimedOut),
            "{error:?}"
        );
        let server = thread::spawn(move || {
            // The one that gave up, then the one that is answered.
            drop(listener.accept().unwrap());
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&to_line(&Answer::Done).unwrap()).unwrap();
        });
        let answer = ask(&socket, &Request::CniStatus, Duration::from_secs(5)).unwrap();
        assert_eq!(answer, Answer::Done);
        server.join().unwrap();
    }
}
