//! The daemon's socket: who may ask, what, and how much.

use std::{
    collections::BTreeMap,
    fs, io,
    ops::ControlFlow,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::Path,
    sync::{Arc, mpsc::Sender},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedWriteHalf, UCred},
    },
    sync::{Semaphore, mpsc::channel, oneshot},
    task::spawn_blocking,
    time::timeout,
};
use tracing::{debug, warn};

use super::{
    metrics::Metrics,
    pods::{Message, View, give_memory_back},
    sources::kubernetes::Kubernetes,
};
use crate::{
    Error, Result,
    api::{
        Answer, CniPod, DaemonStatus, MAX_MESSAGE, PodState, Request, from_line, from_pins, to_line,
    },
    datapath::Pins,
};

/// The most conversations at a time; more wait to be accepted.
const CONVERSATIONS: usize = 256;

/// The most answers at a time that are read from the pins; more wait.
pub(crate) const READINGS: usize = 4;

/// How long a conversation may be silent.
const SILENCE: Duration = Duration::from_secs(10);

/// What answers are made of.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) messages: Sender<Message>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) view: View,
    /// Who knows the annotations of Kubernetes' pods, where that is asked.
    pub(crate) kubernetes: Option<Arc<Kubernetes>>,
    pub(crate) status: DaemonStatus,
    pub(crate) started: Instant,
    /// Places for [`READINGS`].
    pub(crate) readings: Arc<Semaphore>,
}

/// Listens at `path`, for root and the daemon's own user only. What is there from a
/// daemon before is replaced.
///
/// # Errors
///
/// If the path can't be made or listened at.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    let failed = || Error::system(format!("listening at {}", path.display()));
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed())?;
    }
    // Made under another name, so that nobody meets it before its mode is set.
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed()(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&new).map_err(failed())?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).map_err(failed())?;
    fs::rename(&new, path).map_err(failed())?;
    Ok(listener)
}

impl Server {
    /// Answers, until it is dropped.
    pub(crate) async fn serve(self: Arc<Self>, listener: UnixListener) -> io::Result<()> {
        let places = Arc::new(Semaphore::new(CONVERSATIONS));
        loop {
            let place = Arc::clone(&places)
                .acquire_owned()
                .await
                .map_err(io::Error::other)?;
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: others will end.
                    warn!(%error, "accepting a conversation");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let server = Arc::clone(&self);
            tokio::spawn(async move {
                if let Err(error) = server.converse(stream).await {
                    debug!(%error, "a conversation ended");
                }
                drop(place);
            });
        }
    }

    async fn converse(&self, stream: UnixStream) -> io::Result<()> {
        let peer = stream.peer_cred()?;
        if !may_ask(&peer) {
            warn!(uid = peer.uid(), pid = peer.pid(), "not allowed to ask");
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let (from, mut to) = stream.into_split();
        let mut from = BufReader::new(from);
        loop {
            let mut line = Vec::new();
            let mut bounded = (&mut from).take(MAX_MESSAGE as u64);
            timeout(SILENCE, bounded.read_until(b'\n', &mut line)).await??;
            if line.is_empty() {
                return Ok(());
            }
            match from_line(&line) {
                Ok(request) => {
                    let name = request_name(&request);
                    let answer = self.answer(request, &mut to).await?;
                    self.metrics.answered(name, answer_name(&answer));
                    write(&mut to, &answer).await?;
                }
                Err(error) => {
                    self.metrics.answered("unreadable", "refused");
                    let answer = Answer::Refused {
                        error: format!("no request that this daemon knows: {error}"),
                        again: false,
                    };
                    write(&mut to, &answer).await?;
                    // Where the next one would begin can't be told.
                    if !line.ends_with(b"\n") {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// The answer, or its last part after the others have been written.
    async fn answer(&self, request: Request, to: &mut OwnedWriteHalf) -> io::Result<Answer> {
        Ok(match request {
            Request::Status => Answer::Status(self.status()),
            Request::Pods => Answer::Pods {
                pods: self.view.get().pods,
            },
            Request::View { .. } | Request::Chains { .. } | Request::Connections { .. } => {
                self.read(request, to).await?
            }
            Request::CniAdd(pod) => self.add(pod).await,
            request => self.ask(request).await,
        })
    }

    /// Answers from the pins, as fast as the parts can be written. The thread of the
    /// pods has no part in it.
    async fn read(&self, request: Request, to: &mut OwnedWriteHalf) -> io::Result<Answer> {
        let place = Arc::clone(&self.readings)
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        let (parts, mut received) = channel(1);
        let pins = Pins::at(&self.status.pins);
        let reading = spawn_blocking(move || {
            let answer = from_pins(&pins, &request, |part| {
                // Who asked may be gone.
                match parts.blocking_send(part) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            });
            give_memory_back();
            drop(place);
            answer
        });
        while let Some(part) = received.recv().await {
            write(to, &part).await?;
        }
        reading.await.map_err(io::Error::other)
    }

    /// Asks for the pod's annotations first, if the runtime has not given them. Here,
    /// so that no other request waits for the API server.
    async fn add(&self, pod: CniPod) -> Answer {
        let told = match &self.kubernetes {
            Some(kubernetes) if pod.annotations.is_none() => kubernetes.pod_of(&pod).await,
            _ => Ok(None),
        };
        match told.transpose() {
            None => self.ask(Request::CniAdd(pod)).await,
            Some(told) => self.send(|answer| Message::Added(pod, told, answer)).await,
        }
    }

    async fn ask(&self, request: Request) -> Answer {
        self.send(|answer| Message::Asked(request, answer)).await
    }

    async fn send(&self, message: impl FnOnce(oneshot::Sender<Answer>) -> Message) -> Answer {
        let (answer, answered) = oneshot::channel();
        let stopping = || Answer::Refused {
            error: "the daemon stops".to_owned(),
            again: true,
        };
        if self.messages.send(message(answer)).is_err() {
            return stopping();
        }
        answered.await.unwrap_or_else(|_| stopping())
    }

    fn status(&self) -> DaemonStatus {
        let published = self.view.get();
        let mut pods = BTreeMap::new();
        for state in [PodState::Attached, PodState::LeftAlone, PodState::Failed] {
            let count = published.pods.iter().filter(|pod| pod.state == state);
            pods.insert(state, count.count());
        }
        DaemonStatus {
            uptime_seconds: self.started.elapsed().as_secs(),
            ready: published.ready,
            pods,
            ..self.status.clone()
        }
    }
}

async fn write(to: &mut OwnedWriteHalf, answer: &Answer) -> io::Result<()> {
    let line = to_line(answer).or_else(|error| {
        to_line(&Answer::Refused {
            error: format!("the answer is too long: {error}"),
            again: false,
        })
    })?;
    timeout(SILENCE, to.write_all(&line)).await?
}

/// Whether a process may ask: root's, or the daemon's own user's.
fn may_ask(peer: &UCred) -> bool {
    peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw()
}

const fn request_name(request: &Request) -> &'static str {
    match request {
        Request::CniAdd(_) => "cni_add",
        Request::CniDel(_) => "cni_del",
        Request::CniCheck(_) => "cni_check",
        Request::CniGc { .. } => "cni_gc",
        Request::CniStatus => "cni_status",
        Request::Status => "status",
        Request::Pods => "pods",
        Request::View { .. } => "view",
        Request::Chains { .. } => "chains",
        Request::Connections { .. } => "connections",
    }
}

const fn answer_name(answer: &Answer) -> &'static str {
    match answer {
        Answer::Attached { .. } => "attached",
        Answer::LeftAlone { .. } => "left_alone",
        Answer::Refused { .. } => "refused",
        _ => "done",
    }
}
