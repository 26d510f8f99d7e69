//! The pods of the node: what the sources tell of them, what is attached, and the
//! way from the one to the other.
//!
//! One thread does it all, one thing after the other, because attaching takes a
//! lock for the whole node anyway. What others may want to know at any time it
//! publishes.

mod look;
pub(crate) mod rules;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tracing::{debug, error, info, warn};

use self::{
    look::{Target, Why},
    rules::Told,
};
use super::{
    config::{Config, OnFailure, RESYNC, Select, overlay},
    metrics::Metrics,
    namespaces::{NamespaceNumber, Notice, Numbers},
    sources::{
        cgroups::{self, Sighting},
        directory::PodFile,
        kubernetes::{self, KubernetesPod},
    },
};
use crate::{
    Error, Result,
    api::{Answer, CniAttachment, CniPod, PodState, PodStatus, Request},
    datapath::{self, Attached, Holding, UntilProxyListens, Version},
    error::in_one_line,
    pod::{
        PodName,
        cgroup::Cgroup,
        netns::{Netns, NetnsId},
    },
    settings::annotated,
};

/// What the thread is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// Somebody asks.
    Asked(Request, oneshot::Sender<Answer>),
    /// A pod gets its network, and this is what the Kubernetes API says of it.
    Added(CniPod, Result<Arc<KubernetesPod>>, oneshot::Sender<Answer>),
    /// A source tells of all its pods.
    Listing(Listing),
    /// Something has happened in network namespaces.
    Notice(Notice),
    /// The daemon stops.
    Stop,
}

/// All the pods that a source knows.
#[derive(Debug)]
pub(crate) enum Listing {
    /// Of the directory, by name.
    Directory(BTreeMap<String, Result<PodFile, String>>),
    /// Of the cgroup tree.
    Cgroups(Vec<Sighting>),
    /// Of the Kubernetes API.
    Kubernetes(kubernetes::Pods),
}

/// Who told of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Cni,
    Cgroups,
    Directory,
    Kubernetes,
    /// It was attached by hand. The daemon follows its routes, and otherwise leaves
    /// it to the hand.
    Command,
}

impl Source {
    const fn name(self) -> &'static str {
        match self {
            Self::Cni => "cni",
            Self::Cgroups => "cgroups",
            Self::Directory => "directory",
            Self::Kubernetes => "kubernetes",
            Self::Command => "command",
        }
    }
}

/// What is pinned with a pod, so that the next daemon knows whose it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case")]
enum Note {
    Cni { pod: CniPod },
    Cgroups { cgroup: PathBuf },
    Directory { netns: String },
    Kubernetes { uid: String },
}

/// What a source wants of a pod.
#[derive(Clone, Debug, PartialEq)]
enum Wanted {
    /// By CNI's ADD; what has become of it is not tried again.
    Cni(CniPod),
    Cgroup {
        path: PathBuf,
        id: u64,
    },
    File(Result<PodFile, String>),
    /// The pod of the API with this uid.
    Kubernetes(String),
    /// Nothing: it was attached by hand.
    Nothing,
}

impl Wanted {
    const fn source(&self) -> Source {
        match self {
            Self::Cni(_) => Source::Cni,
            Self::Cgroup { .. } => Source::Cgroups,
            Self::File(_) => Source::Directory,
            Self::Kubernetes(_) => Source::Kubernetes,
            Self::Nothing => Source::Command,
        }
    }
}

/// A pod that is attached.
#[derive(Clone, Debug)]
struct Attachment {
    cgroup_id: u64,
    netns: NetnsId,
    /// Its network namespace's number, if the kernel gives it one.
    number: Option<NamespaceNumber>,
}

#[derive(Debug)]
struct Pod {
    wanted: Wanted,
    state: PodState,
    because: Option<String>,
    attachment: Option<Attachment>,
    cgroup: Option<PathBuf>,
    /// When it is looked at again, and how long was waited for that.
    again: Option<(Instant, Duration)>,
    /// Holds its connections, and until when.
    holding: Option<(Holding, Instant)>,
}

impl Pod {
    const fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            state: PodState::LeftAlone,
            because: None,
            attachment: None,
            cgroup: None,
            again: None,
            holding: None,
        }
    }

    /// Whether it is attached to a cgroup in which processes are.
    fn has_processes(&self) -> bool {
        self.attachment.is_some()
            && self
                .cgroup
                .as_ref()
                .and_then(|path| Cgroup::open(path).ok())
                .is_some_and(|cgroup| cgroup.processes().next().is_some())
    }
}

/// What may be known at any time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Published {
    /// Whether all that was there at the start has been looked at.
    pub(crate) ready: bool,
    /// The same, without waiting for anybody outside of this machine.
    pub(crate) started: bool,
    /// The pods, by name.
    pub(crate) pods: Vec<PodStatus>,
    /// Since when the thread has been at one thing.
    pub(crate) busy_since: Option<Instant>,
}

/// What the thread publishes.
#[derive(Clone, Debug, Default)]
pub(crate) struct View(Arc<Mutex<Published>>);

impl View {
    /// What is known now.
    pub(crate) fn get(&self) -> Published {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Published> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The shortest and the longest time before a pod is looked at again.
const AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));

/// How often the daemon looks whether the proxies have begun to listen whose pods'
/// connections it holds.
const HOLDING: Duration = Duration::from_millis(500);

/// The registry of pods.
pub(crate) struct Registry {
    config: Config,
    version: Version,
    numbers: Numbers,
    metrics: Arc<Metrics>,
    view: View,
    pods: BTreeMap<String, Pod>,
    /// The sources whose first listing hasn't come yet.
    awaited: BTreeSet<Source>,
    cgroup_mount: PathBuf,
    /// The id of the cgroup in which pods' cgroups will be made, if there is one.
    parent: Option<PathBuf>,
    sightings: Vec<Sighting>,
    /// What the Kubernetes API says of the node's pods, as each was when it was first
    /// told of: what changes later is not looked at, as by the mesh's own plugin.
    /// None before the API has said anything.
    kubernetes: Option<kubernetes::Pods>,
    swept: Instant,
}

impl Registry {
    /// Takes over what is pinned.
    pub(crate) fn start(config: Config, metrics: Arc<Metrics>, view: View) -> Result<Self> {
        let awaited = [
            (config.options.pods.is_some(), Source::Directory),
            (config.options.cgroups.is_some(), Source::Cgroups),
            (config.options.kubernetes == Some(true), Source::Kubernetes),
        ];
        let cgroup_mount = cgroups::mount()?;
        let mut registry = Self {
            parent: config.options.cgroup_parent_in(&cgroup_mount),
            version: Version::of_this_program()?,
            numbers: Numbers::new()?,
            config,
            metrics,
            view,
            pods: BTreeMap::new(),
            awaited: awaited
                .into_iter()
                .filter_map(|(on, source)| on.then_some(source))
                .collect(),
            cgroup_mount,
            sightings: Vec::new(),
            kubernetes: None,
            swept: Instant::now(),
        };
        for pod in datapath::remove_all_leftovers(&registry.config.pins)? {
            info!(%pod, "removed what was half attached or half detached");
        }
        for pod in registry.config.pins.pods()? {
            registry.adopt(&pod);
        }
        registry.publish();
        Ok(registry)
    }

    /// Does what it is told until it is told to stop. All pods stay attached.
    pub(crate) fn run(mut self, messages: &Receiver<Message>) {
        loop {
            let message = match messages.recv_timeout(self.until_next()) {
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(message) => Some(message),
                Err(RecvTimeoutError::Timeout) => None,
            };
            self.view.lock().busy_since = Some(Instant::now());
            match message {
                Some(Message::Asked(request, answer)) => {
                    let answered = self.answer(request);
                    self.publish();
                    // Who asked may be gone.
                    let _: Result<(), Answer> = answer.send(answered);
                }
                Some(Message::Added(pod, told, answer)) => {
                    let answered = self.added(pod, told);
                    self.publish();
                    let _: Result<(), Answer> = answer.send(answered);
                }
                Some(Message::Listing(Listing::Directory(files))) => self.directory(files),
                Some(Message::Listing(Listing::Cgroups(sightings))) => self.cgroups(sightings),
                Some(Message::Listing(Listing::Kubernetes(pods))) => self.kubernetes(pods),
                Some(Message::Notice(notice)) => self.notice(notice),
                Some(Message::Stop) | None => {}
            }
            self.look_again();
            self.let_go();
            self.publish();
        }
    }

    fn until_next(&self) -> Duration {
        let now = Instant::now();
        let sweep = (self.swept + RESYNC).saturating_duration_since(now);
        let next = self
            .pods
            .values()
            .filter_map(|pod| pod.again)
            .map(|(at, _)| at.saturating_duration_since(now))
            .min()
            .map_or(sweep, |next| next.min(sweep));
        if self.pods.values().any(|pod| pod.holding.is_some()) {
            next.min(HOLDING)
        } else {
            next
        }
    }

    fn publish(&self) {
        let pods = self
            .pods
            .iter()
            .map(|(name, pod)| PodStatus {
                pod: name.clone(),
                state: pod.state,
                because: pod.because.clone(),
                source: pod.wanted.source().name().to_owned(),
                cgroup: pod.cgroup.clone(),
                netns_inode: pod.attachment.as_ref().map(|known| known.netns.inode),
            })
            .collect();
        *self.view.lock() = Published {
            ready: self.awaited.is_empty(),
            started: self.has_started(),
            pods,
            busy_since: None,
        };
    }

    /// Whether the pods that were there have been looked at; those of the Kubernetes
    /// API don't count, which may not be reached for long, and before the node's own
    /// services are there.
    fn has_started(&self) -> bool {
        self.awaited
            .iter()
            .all(|source| *source == Source::Kubernetes)
    }

    /// Takes over a pod that is pinned: verifies it, replaces its programs if they
    /// are others than this version's, and finds out whose it is.
    fn adopt(&mut self, name: &PodName) {
        let pins = &self.config.pins;
        let adopted = datapath::upgrade(pins, name, &self.version)
            .and_then(|replaced| Ok((replaced, datapath::inspect(pins, name)?)));
        let (replaced, found) = match adopted {
            Ok(adopted) => adopted,
            Err(error) => {
                self.metrics.failed("adopt", &error);
                error!(pod = %name, error = in_one_line(&error), "not adopted");
                let pod = Pod {
                    state: PodState::Failed,
                    because: Some(in_one_line(&error)),
                    ..Pod::new(Wanted::Nothing)
                };
                self.pods.insert(name.to_string(), pod);
                return;
            }
        };
        let note = found.note.as_deref().map(serde_json::from_str::<Note>);
        let wanted = match note {
            None => Wanted::Nothing,
            Some(Ok(Note::Cni { pod })) => Wanted::Cni(pod),
            Some(Ok(Note::Cgroups { cgroup })) => Wanted::Cgroup {
                path: cgroup,
                id: found.cgroup_id,
            },
            Some(Ok(Note::Kubernetes { uid })) => Wanted::Kubernetes(uid),
            // The listing says what the file says now.
            Some(Ok(Note::Directory { .. })) => {
                Wanted::File(Err("its file has not been read yet".to_owned()))
            }
            Some(Err(error)) => {
                warn!(pod = %name, %error, "a note that nobody can read: taken for attached by hand");
                Wanted::Nothing
            }
        };
        let netns = self.find_netns(&wanted, found.netns);
        let number = netns.as_ref().and_then(|netns| self.number(netns));
        info!(
            pod = %name,
            source = wanted.source().name(),
            replaced,
            gone = found.gone,
            "adopted"
        );
        if replaced > 0 {
            self.metrics.upgraded.inc();
        }
        let pod = Pod {
            state: PodState::Attached,
            attachment: Some(Attachment {
                cgroup_id: found.cgroup_id,
                netns: found.netns,
                number,
            }),
            cgroup: crate::pod::cgroup::path_of(found.cgroup_id),
            ..Pod::new(wanted)
        };
        self.pods.insert(name.to_string(), pod);
        if found.gone {
            self.ended(name.as_ref());
        } else if let Some(netns) = netns {
            // They may have changed while nobody followed.
            self.follow(name.as_ref(), &netns);
        }
    }

    fn number(&self, netns: &Netns) -> Option<NamespaceNumber> {
        self.numbers
            .of(netns)
            .inspect_err(|error| {
                self.metrics.failed("follow", error);
                warn!(
                    error = in_one_line(error),
                    "a pod's routes are not followed"
                );
            })
            .ok()
    }

    /// A network namespace: where it was when it was attached, or wherever it is.
    fn find_netns(&self, wanted: &Wanted, id: NetnsId) -> Option<Netns> {
        let given = match wanted {
            Wanted::Cni(pod) => pod.netns.to_str().map(str::to_owned),
            Wanted::File(Ok(file)) => Some(file.netns.to_string()),
            _ => None,
        };
        given
            .and_then(|given| Netns::open(&given).ok())
            .filter(|netns| netns.id() == id)
            .or_else(|| Netns::find(id))
    }

    fn answer(&mut self, request: Request) -> Answer {
        match request {
            Request::CniAdd(pod) => self.cni_add(pod),
            Request::CniDel(attachment) => self.cni_del(&attachment),
            Request::CniCheck(pod) => self.cni_check(&pod),
            Request::CniGc { valid } => self.cni_gc(&valid),
            Request::CniStatus if self.has_started() => Answer::Done,
            Request::CniStatus => Answer::Refused {
                error: "the daemon has just started and looks at the pods that are there"
                    .to_owned(),
                again: true,
            },
            // The server answers them: from what is published, or from the pins.
            Request::Status
            | Request::Pods
            | Request::View { .. }
            | Request::Chains { .. }
            | Request::Connections { .. } => Answer::Refused {
                error: "not asked here".to_owned(),
                again: false,
            },
        }
    }

    fn cni_add(&mut self, pod: CniPod) -> Answer {
        let name = match look::cni_name(&pod) {
            Ok(name) => name,
            Err(error) => return refused(&error, false),
        };
        if let Some(because) = rules::left_alone(&self.config.options, Told::Runtime(&pod)) {
            return self.leave_alone(&name, Wanted::Cni(pod), because);
        }
        self.attach_added(&name, pod)
    }

    /// A pod gets its network of whose annotations the runtime says nothing; the
    /// Kubernetes API was asked.
    fn added(&mut self, mut pod: CniPod, told: Result<Arc<KubernetesPod>>) -> Answer {
        let name = match look::cni_name(&pod) {
            Ok(name) => name,
            Err(error) => return refused(&error, false),
        };
        let told = match told {
            Ok(told) => told,
            Err(error) => return self.not_added(&name, Wanted::Cni(pod), &error),
        };
        pod.annotations = Some(told.annotations.clone());
        if let Some(because) = rules::left_alone(&self.config.options, Told::Api(&told)) {
            return self.leave_alone(&name, Wanted::Cni(pod), because);
        }
        self.attach_added(&name, pod)
    }

    fn attach_added(&mut self, name: &PodName, pod: CniPod) -> Answer {
        let uid = pod.uid.clone();
        let wanted = Wanted::Cni(pod);
        let attached = self.look(&wanted).and_then(|target| {
            self.take_from_kubernetes(uid.as_deref(), target.netns.id())?;
            Ok(self.attach(name, &wanted, &target)?)
        });
        match attached {
            Ok(()) => Answer::Attached {
                pod: name.to_string(),
            },
            Err(Why::LeftAlone(because)) => self.leave_alone(name, wanted, because),
            Err(Why::Failed(error)) => self.not_added(name, wanted, &error),
        }
    }

    fn not_added(&mut self, name: &PodName, wanted: Wanted, error: &Error) -> Answer {
        self.metrics.failed("attach", error);
        error!(pod = %name, error = in_one_line(error), "not attached");
        let because = in_one_line(error);
        let entry = self
            .pods
            .entry(name.to_string())
            .or_insert(Pod::new(wanted));
        if entry.attachment.is_none() {
            entry.state = PodState::Failed;
            entry.because = Some(because.clone());
        }
        match self.config.options.on_failure.unwrap_or_default() {
            OnFailure::Fail => {
                // The runtime gives the pod up: nothing is to be kept.
                if entry.attachment.is_none() {
                    self.pods.remove(name.as_ref());
                }
                Answer::Refused {
                    error: because,
                    again: true,
                }
            }
            OnFailure::Pass => Answer::LeftAlone {
                because: format!("it could not be attached ({because}) and --on-failure is pass"),
            },
        }
    }

    /// CNI says when a pod ends, so from its ADD on the pod is CNI's, though the
    /// Kubernetes API may have told of it first. No application runs in it yet.
    fn take_from_kubernetes(&mut self, uid: Option<&str>, netns: NetnsId) -> Result<()> {
        let same: Vec<String> = self
            .pods
            .iter()
            .filter(|(_, pod)| match &pod.wanted {
                Wanted::Kubernetes(other) => {
                    uid == Some(other)
                        || pod
                            .attachment
                            .as_ref()
                            .is_some_and(|known| known.netns == netns)
                }
                _ => false,
            })
            .map(|(name, _)| name.clone())
            .collect();
        same.iter().try_for_each(|name| self.detach(name))
    }

    fn leave_alone(&mut self, name: &PodName, wanted: Wanted, because: String) -> Answer {
        info!(pod = %name, because, "left alone");
        let pod = Pod {
            because: Some(because.clone()),
            ..Pod::new(wanted)
        };
        self.pods.insert(name.to_string(), pod);
        Answer::LeftAlone { because }
    }

    fn cni_del(&mut self, attachment: &CniAttachment) -> Answer {
        let names: Vec<String> = self
            .of_cni()
            .filter(|(_, pod)| pod.attachment == *attachment)
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            if let Err(error) = self.detach(&name) {
                return refused(&error, true);
            }
        }
        Answer::Done
    }

    fn cni_check(&mut self, pod: &CniPod) -> Answer {
        let Some((name, known)) = self
            .of_cni()
            .find(|(_, known)| known.attachment.container_id == pod.attachment.container_id)
            .and_then(|(name, _)| Some((name.clone(), self.pods.get(name)?)))
        else {
            // A daemon before this one may have left it alone: nothing is kept of those.
            if let Some(because) = self.left_alone_by_request(pod) {
                return Answer::LeftAlone { because };
            }
            return Answer::Refused {
                error: format!(
                    "no ADD of the container {} was seen",
                    pod.attachment.container_id
                ),
                again: false,
            };
        };
        let Some(attachment) = &known.attachment else {
            let because = known.because.clone().unwrap_or_default();
            return match known.state {
                PodState::LeftAlone => Answer::LeftAlone { because },
                _ => Answer::Refused {
                    error: because,
                    again: false,
                },
            };
        };
        let check = || -> Result<()> {
            let given = pod.netns.to_string_lossy();
            let netns = Netns::open(&given)?;
            let found = datapath::inspect(&self.config.pins, &name.parse()?)?;
            if netns.id() != attachment.netns || found.netns != attachment.netns || found.gone {
                return Err(Error::setting(
                    "CNI_NETNS",
                    given,
                    "isn't the namespace that the pod is attached to",
                ));
            }
            Ok(())
        };
        match check() {
            Ok(()) => Answer::Attached { pod: name },
            Err(error) => refused(&error, false),
        }
    }

    /// Why a pod is left alone, if what CNI says of it is reason enough.
    fn left_alone_by_request(&self, pod: &CniPod) -> Option<String> {
        rules::left_alone(&self.config.options, Told::Runtime(pod)).or_else(|| {
            let netns = Netns::open(pod.netns.to_str()?).ok()?;
            netns.is_host().then(|| rules::HOST_NETWORK.to_owned())
        })
    }

    fn cni_gc(&mut self, valid: &[CniAttachment]) -> Answer {
        let stale: Vec<String> = self
            .of_cni()
            .filter(|(_, pod)| !valid.contains(&pod.attachment))
            .map(|(name, _)| name.clone())
            .collect();
        for name in stale {
            info!(pod = name, "not among the valid attachments");
            if let Err(error) = self.detach(&name) {
                return refused(&error, true);
            }
        }
        Answer::Done
    }

    fn of_cni(&self) -> impl Iterator<Item = (&String, &CniPod)> {
        self.pods
            .iter()
            .filter_map(|(name, pod)| match &pod.wanted {
                Wanted::Cni(pod) => Some((name, pod)),
                _ => None,
            })
    }

    /// Detaches a pod and forgets it.
    fn detach(&mut self, name: &str) -> Result<()> {
        let Some(pod) = self.pods.get(name) else {
            return Ok(());
        };
        // One that failed may have been adopted damaged: never ours to remove.
        if pod.attachment.is_some() {
            match datapath::detach(&self.config.pins, &name.parse()?) {
                Ok(()) => info!(pod = name, "detached"),
                // By hand, meanwhile.
                Err(Error::NotAttached { .. }) => {}
                Err(error) => {
                    self.metrics.failed("detach", &error);
                    error!(pod = name, error = in_one_line(&error), "not detached");
                    return Err(error);
                }
            }
        }
        self.pods.remove(name);
        Ok(())
    }

    /// Attaches a pod to what was found, and checks that this is still the pod's.
    fn attach(&mut self, name: &PodName, wanted: &Wanted, target: &Target) -> Result<()> {
        if let Some(other) = self.pods.get(name.as_ref())
            && other.wanted.source() != wanted.source()
            && other.attachment.is_some()
        {
            return Err(Error::setting(
                "pod",
                name,
                format!(
                    "is the name of a pod of {} already: choose another",
                    other.wanted.source().name()
                ),
            ));
        }
        // Before its routes are read: no change is missed.
        let number = self.number(&target.netns);
        let note = serde_json::to_string(&note(wanted, target))
            .map_err(|error| Error::system("writing a note")(error.into()))?;
        let start = Instant::now();
        let attached = self.attach_over(name, target, &note)?;
        if let Err(error) = target.check() {
            // What was attached isn't the pod's any more.
            datapath::detach(&self.config.pins, name)?;
            self.pods.remove(name.as_ref());
            return Err(error);
        }
        let took = start.elapsed();
        let mut holding = self
            .pods
            .get_mut(name.as_ref())
            .and_then(|pod| pod.holding.take());
        if attached == Attached::Newly {
            self.metrics.attached(took);
            give_memory_back();
            holding = self.hold(name, &target.netns);
        }
        info!(
            pod = %name,
            source = wanted.source().name(),
            cgroup = %target.cgroup.path().display(),
            netns = target.netns.id().inode,
            took_ms = took.as_millis(),
            newly = attached == Attached::Newly,
            "attached"
        );
        let pod = Pod {
            state: PodState::Attached,
            attachment: Some(Attachment {
                cgroup_id: target.cgroup.id(),
                netns: target.netns.id(),
                number,
            }),
            cgroup: Some(target.cgroup.path().to_owned()),
            holding,
            ..Pod::new(wanted.clone())
        };
        self.pods.insert(name.to_string(), pod);
        Ok(())
    }

    /// Holds a pod's connections, if that is what is to become of them.
    fn hold(&self, name: &PodName, netns: &Netns) -> Option<(Holding, Instant)> {
        if self.start_policy() != UntilProxyListens::Hold {
            return None;
        }
        match datapath::hold(&self.config.pins, name, netns) {
            Ok(holding) => Some((holding, Instant::now() + self.config.options.hold_limit())),
            Err(error) => {
                self.metrics.failed("hold", &error);
                error!(
                    pod = %name,
                    error = in_one_line(&error),
                    "connections are refused, not held, until the proxy listens"
                );
                None
            }
        }
    }

    fn start_policy(&self) -> UntilProxyListens {
        self.config.options.until_proxy_listens.unwrap_or_default()
    }

    /// Ends the holding of those whose proxies have begun to listen, or whose time is up.
    fn let_go(&mut self) {
        let now = Instant::now();
        for (name, pod) in &mut self.pods {
            let Some((holding, until)) = &pod.holding else {
                continue;
            };
            if !holding.is_needed() {
                debug!(pod = name, "the proxy listens");
            } else if *until <= now {
                warn!(
                    pod = name,
                    "the proxy doesn't listen: its connections are refused from now on"
                );
            } else {
                continue;
            }
            pod.holding = None;
        }
    }

    fn attach_over(&self, name: &PodName, target: &Target, note: &str) -> Result<Attached> {
        let pins = &self.config.pins;
        let request = datapath::Request {
            pod: name,
            cgroup: &target.cgroup,
            netns: &target.netns,
            settings: &target.settings,
            log_level: datapath::LogLevel::Off,
            allow_host: false,
            note: Some(note),
            pass_at_start: self.start_policy() == UntilProxyListens::Pass,
        };
        match datapath::attach(pins, &request) {
            Err(Error::AttachedOtherwise {
                what: "settings", ..
            }) => datapath::set(pins, name, &target.settings).map(|_| Attached::Already),
            // Another pod had this name; it is gone.
            Err(Error::AttachedOtherwise {
                what: "cgroup" | "network namespace",
                ..
            }) => {
                datapath::detach(pins, name)?;
                datapath::attach(pins, &request)
            }
            result => result,
        }
    }

    fn directory(&mut self, mut files: BTreeMap<String, Result<PodFile, String>>) {
        self.awaited.remove(&Source::Directory);
        let gone: Vec<String> = self
            .pods
            .iter()
            .filter(|(name, pod)| {
                pod.wanted.source() == Source::Directory && !files.contains_key(*name)
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            // Tried again with the next listing.
            let _: Result<()> = self.detach(&name);
        }
        while let Some((name, file)) = files.pop_first() {
            let wanted = Wanted::File(file);
            match self.pods.get_mut(&name) {
                Some(pod) if pod.wanted == wanted => continue,
                Some(pod) if pod.wanted.source() == Source::Directory => {
                    // A file that can't be read changes nothing that is in force.
                    if let (Wanted::File(Err(error)), Some(_)) = (&wanted, &pod.attachment) {
                        warn!(pod = name, error, "its file can't be: it stays as it was");
                        pod.because = Some(error.clone());
                        continue;
                    }
                    pod.wanted = wanted;
                }
                Some(pod) => {
                    warn!(
                        pod = name,
                        source = pod.wanted.source().name(),
                        "a pod file with the name of another pod"
                    );
                    continue;
                }
                None => drop(self.pods.insert(name.clone(), Pod::new(wanted))),
            }
            self.settle(&name);
        }
    }

    fn kubernetes(&mut self, listed: kubernetes::Pods) {
        self.awaited.remove(&Source::Kubernetes);
        let mut known = self.kubernetes.take().unwrap_or_default();
        known.retain(|uid, _| listed.contains_key(uid));
        for (uid, pod) in listed {
            known.entry(uid).or_insert(pod);
        }
        self.kubernetes = Some(known);
        self.settle_kubernetes();
    }

    /// Brings the pods of the Kubernetes API to what it says, and what the cgroup
    /// tree shows.
    fn settle_kubernetes(&mut self) {
        let Some(listed) = &self.kubernetes else {
            return;
        };
        let added: BTreeMap<&str, (&String, &Pod)> = self
            .pods
            .iter()
            .filter_map(|(name, pod)| match &pod.wanted {
                Wanted::Cni(cni) => Some((cni.uid.as_deref()?, (name, pod))),
                _ => None,
            })
            .collect();
        let mut wanted = Vec::new();
        for (uid, pod) in listed {
            match added.get(&**uid) {
                // One that was let pass at ADD, because this wasn't known.
                Some((name, known))
                    if matches!(&known.wanted, Wanted::Cni(cni) if cni.annotations.is_none())
                        && known.state == PodState::Failed =>
                {
                    wanted.push(((*name).clone(), known.wanted.clone()));
                }
                Some(_) => {}
                None => match look::kubernetes_name(pod) {
                    Ok(name) => {
                        wanted.push((name.to_string(), Wanted::Kubernetes(uid.clone())));
                    }
                    Err(error) => warn!(error = in_one_line(&error), "a pod without a name"),
                },
            }
        }
        for (name, wanted) in wanted {
            let pod = self
                .pods
                .entry(name.clone())
                .or_insert_with(|| Pod::new(wanted.clone()));
            if pod.attachment.is_none() && pod.wanted == wanted {
                self.settle(&name);
            }
        }
        self.release();
    }

    /// Detaches the pods that the Kubernetes API tells of no longer, or as ended, as
    /// soon as no process is left in them. Until then nothing may pass their proxies,
    /// whatever was deleted, and however old the list is.
    fn release(&mut self) {
        let Some(listed) = &self.kubernetes else {
            return;
        };
        let over: Vec<String> = self
            .pods
            .iter()
            .filter(|(_, pod)| match &pod.wanted {
                Wanted::Kubernetes(uid) => !listed.contains_key(uid) && !pod.has_processes(),
                _ => false,
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in over {
            // Tried again with the next change.
            let _: Result<()> = self.detach(&name);
        }
    }

    fn cgroups(&mut self, sightings: Vec<Sighting>) {
        self.sightings = sightings;
        self.move_down();
        self.awaited.remove(&Source::Cgroups);
        let seen: BTreeSet<u64> = self.sightings.iter().map(|sighting| sighting.id).collect();
        let gone: Vec<String> = self
            .pods
            .iter()
            .filter(
                |(_, pod)| matches!(&pod.wanted, Wanted::Cgroup { id, .. } if !seen.contains(id)),
            )
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            let _: Result<()> = self.detach(&name);
        }
        let wanted: Vec<(String, Wanted)> = self
            .sightings
            .iter()
            .filter(|sighting| sighting.wanted)
            .map(|sighting| {
                let wanted = Wanted::Cgroup {
                    path: sighting.path.clone(),
                    id: sighting.id,
                };
                (look::cgroup_name(&sighting.path, sighting.id), wanted)
            })
            .collect();
        for (name, wanted) in wanted {
            let pod = self
                .pods
                .entry(name.clone())
                .or_insert_with(|| Pod::new(wanted));
            if pod.attachment.is_none() {
                self.settle(&name);
            }
        }
        self.settle_kubernetes();
    }

    /// Moves those that were attached to a cgroup above their own to their own,
    /// where that has appeared.
    fn move_down(&mut self) {
        let Some(parent) = self.parent.clone() else {
            return;
        };
        let moves: Vec<(String, PathBuf)> = self
            .of_cni()
            .filter(|(name, _)| {
                self.pods[*name].cgroup.as_deref() == Some(&*parent)
                    && self.pods[*name].attachment.is_some()
            })
            .filter_map(|(name, pod)| {
                let path = self.cgroup_of_container(&parent, &pod.attachment.container_id)?;
                Some((name.clone(), path))
            })
            .collect();
        for (name, path) in moves {
            if let Err(error) = self.move_to(&name, &path) {
                self.metrics.failed("move", &error);
                // It is intercepted still. The next listing tries again.
                error!(
                    pod = name,
                    error = in_one_line(&error),
                    "not moved to its cgroup"
                );
            }
        }
    }

    fn move_to(&mut self, name: &str, path: &Path) -> Result<()> {
        let cgroup = Cgroup::open(path)?;
        datapath::move_to(&self.config.pins, &name.parse()?, &cgroup)?;
        info!(pod = name, cgroup = %path.display(), "moved to its own cgroup");
        if let Some(pod) = self.pods.get_mut(name) {
            pod.cgroup = Some(path.to_owned());
            if let Some(attachment) = &mut pod.attachment {
                attachment.cgroup_id = cgroup.id();
            }
        }
        Ok(())
    }

    /// The cgroup right below `parent` in which a container's is.
    fn cgroup_of_container(&self, parent: &Path, container: &str) -> Option<PathBuf> {
        self.sightings
            .iter()
            .filter(|sighting| sighting.path.parent() == Some(parent))
            .find(|sighting| sighting.names.iter().any(|name| name.contains(container)))
            .map(|sighting| sighting.path.clone())
    }

    /// Brings a pod of the directory or the cgroup tree to what its source wants.
    fn settle(&mut self, name: &str) {
        let Some(pod) = self.pods.get(name) else {
            return;
        };
        let wanted = pod.wanted.clone();
        let result = self.look(&wanted).and_then(|target| {
            let pod_name: PodName = name.parse()?;
            if let Some(other) = self.attached_to(name, target.netns.id()) {
                return Err(Why::LeftAlone(format!("it is attached as {other}")));
            }
            Ok(self.attach(&pod_name, &wanted, &target)?)
        });
        let Err(why) = result else {
            return;
        };
        let (state, because) = match why {
            Why::LeftAlone(because) => (PodState::LeftAlone, because),
            Why::Failed(error) => {
                self.metrics.failed("attach", &error);
                (PodState::Failed, in_one_line(&error))
            }
        };
        let pod = self
            .pods
            .entry(name.to_owned())
            .or_insert_with(|| Pod::new(wanted));
        if pod.because.as_ref() != Some(&because) {
            match state {
                PodState::Failed => error!(pod = name, because, "not attached"),
                _ => info!(pod = name, because, "left alone"),
            }
        }
        if pod.attachment.is_none() {
            pod.state = state;
        }
        pod.because = Some(because);
        let (least, most) = AGAIN;
        let wait = pod.again.map_or(least, |(_, wait)| (wait * 2).min(most));
        pod.again = Some((Instant::now() + wait, wait));
    }

    /// The pod that is attached to a network namespace, other than `name`.
    fn attached_to(&self, name: &str, netns: NetnsId) -> Option<&String> {
        self.pods
            .iter()
            .find(|(other, pod)| {
                *other != name
                    && pod
                        .attachment
                        .as_ref()
                        .is_some_and(|known| known.netns == netns)
            })
            .map(|(other, _)| other)
    }

    /// Looks again at those whose time has come, and now and then at all.
    fn look_again(&mut self) {
        let now = Instant::now();
        let due: Vec<String> = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.again.is_some_and(|(at, _)| at <= now))
            .map(|(name, _)| name.clone())
            .collect();
        for name in due {
            self.settle(&name);
        }
        if now.duration_since(self.swept) < RESYNC {
            return;
        }
        self.swept = now;
        let attached: Vec<String> = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.attachment.is_some())
            .map(|(name, _)| name.clone())
            .collect();
        for name in attached {
            self.verify(&name);
        }
    }

    /// Whether an attached pod is still there and whole.
    fn verify(&mut self, name: &str) {
        let found = name
            .parse()
            .and_then(|pod| datapath::inspect(&self.config.pins, &pod));
        match found {
            Ok(found) if found.gone => self.ended(name),
            Ok(_) => {}
            Err(error) => {
                self.metrics.failed("verify", &error);
                error!(
                    pod = name,
                    error = in_one_line(&error),
                    "not whole any more"
                );
                if let Some(pod) = self.pods.get_mut(name) {
                    pod.state = PodState::Failed;
                    pod.because = Some(in_one_line(&error));
                }
            }
        }
    }

    /// The pod's network namespace or cgroup is gone, and its programs with it.
    fn ended(&mut self, name: &str) {
        let Some(pod) = self.pods.get_mut(name) else {
            return;
        };
        let wanted = pod.wanted.clone();
        if wanted.source() == Source::Command {
            // The hand that attached it detaches it.
            pod.because = Some("its cgroup or its network namespace is gone".to_owned());
            pod.state = PodState::Failed;
            return;
        }
        debug!(pod = name, "ended");
        let may_come_again = match &wanted {
            Wanted::File(_) => true,
            Wanted::Kubernetes(uid) => self
                .kubernetes
                .as_ref()
                .is_some_and(|listed| listed.contains_key(uid)),
            _ => false,
        };
        if self.detach(name).is_ok() && may_come_again {
            self.pods.insert(name.to_owned(), Pod::new(wanted));
            self.settle(name);
        }
    }

    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Gone(numbers) => {
                for name in self.with_numbers(|number| numbers.contains(&number)) {
                    self.number_gone(&name);
                }
            }
            Notice::Changed(numbers) => {
                self.follow_all(|number| numbers.contains(&number));
            }
            Notice::Overrun => {
                warn!("too many notices at once: all pods' routes are read anew");
                self.follow_all(|_| true);
            }
        }
    }

    /// A number is given again as soon as it is free: the notice may be about the one
    /// that had it before this pod's.
    fn number_gone(&mut self, name: &str) {
        let netns = self.netns_of(name);
        let number = netns.as_ref().and_then(|netns| self.number(netns));
        if netns.is_none() {
            self.ended(name);
        } else if let Some(Pod {
            attachment: Some(attachment),
            ..
        }) = self.pods.get_mut(name)
        {
            attachment.number = number;
        }
    }

    /// The network namespace of a pod that is attached.
    fn netns_of(&self, name: &str) -> Option<Netns> {
        let pod = self.pods.get(name)?;
        self.find_netns(&pod.wanted, pod.attachment.as_ref()?.netns)
    }

    fn with_numbers(&self, which: impl Fn(NamespaceNumber) -> bool) -> Vec<String> {
        self.pods
            .iter()
            .filter(|(_, pod)| {
                let number = pod.attachment.as_ref().and_then(|known| known.number);
                number.is_some_and(&which)
            })
            .map(|(name, _)| name.clone())
            .collect()
    }

    fn follow_all(&mut self, which: impl Fn(NamespaceNumber) -> bool) {
        for name in self.with_numbers(which) {
            match self.netns_of(&name) {
                Some(netns) => self.follow(&name, &netns),
                None => debug!(pod = name, "its network namespace can't be found"),
            }
        }
    }

    fn follow(&mut self, name: &str, netns: &Netns) {
        let followed = name
            .parse()
            .and_then(|pod| datapath::follow(&self.config.pins, &pod, netns));
        match followed {
            Ok(()) => {
                self.metrics.followed.inc();
                debug!(pod = name, "routes and interfaces read anew");
            }
            Err(error) => {
                self.metrics.failed("follow", &error);
                error!(
                    pod = name,
                    error = in_one_line(&error),
                    "its routes are not up to date"
                );
            }
        }
    }

    /// Finds what is to be attached, and how.
    fn look(&self, wanted: &Wanted) -> Result<Target, Why> {
        match wanted {
            Wanted::Cni(pod) => self.look_at_cni(pod),
            Wanted::Cgroup { path, .. } => self.look_at_cgroup(path),
            Wanted::File(Ok(file)) => {
                let settings = overlay(self.config.settings.clone(), &file.settings)?;
                let settings =
                    annotated(self.config.options.profile(), settings, &file.annotations)?;
                Target::of_file(file, settings)
            }
            Wanted::Kubernetes(uid) => self.look_at_kubernetes(uid),
            Wanted::File(Err(error)) => Err(Why::Failed(Error::setting(
                "pod file",
                error,
                "can't be read",
            ))),
            Wanted::Nothing => Err(Why::LeftAlone("it was attached by hand".to_owned())),
        }
    }

    fn look_at_cni(&self, pod: &CniPod) -> Result<Target, Why> {
        let given = pod.netns.to_str().ok_or_else(|| {
            Error::setting("CNI_NETNS", pod.netns.display(), "is no text: rename it")
        })?;
        let netns = Netns::open(given)?;
        if netns.is_host() {
            return Err(Why::host_network());
        }
        let told = self.told_of(pod)?;
        let annotations = pod.annotations.as_ref();
        let settings = match annotations.or(told.map(|told| &told.annotations)) {
            Some(annotations) => annotated(
                self.config.options.profile(),
                self.config.settings.clone(),
                annotations,
            )?,
            None => self.config.settings.clone(),
        };
        let cgroup = self.cgroup_of_cni(pod)?;
        Ok(Target::new(cgroup, netns, given.to_owned(), settings))
    }

    /// What the Kubernetes API says of a pod whose annotations the runtime hasn't
    /// given.
    fn told_of(&self, pod: &CniPod) -> Result<Option<&KubernetesPod>, Why> {
        match (&pod.annotations, &pod.uid) {
            (None, Some(uid)) if self.config.options.kubernetes == Some(true) => {
                self.told_by_kubernetes(uid).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// What the Kubernetes API says of a pod that is to be attached.
    fn told_by_kubernetes(&self, uid: &str) -> Result<&KubernetesPod, Why> {
        let told = self
            .kubernetes
            .as_ref()
            .and_then(|listed| listed.get(uid))
            .ok_or_else(|| Why::LeftAlone("the Kubernetes API has not told of it".to_owned()))?;
        match rules::left_alone(&self.config.options, Told::Api(told)) {
            Some(because) => Err(Why::LeftAlone(because)),
            None => Ok(told),
        }
    }

    /// The pod's cgroup, or the one in which it will be made.
    fn cgroup_of_cni(&self, pod: &CniPod) -> Result<Cgroup> {
        if let Some(uid) = &pod.uid
            && let Some(path) = cgroups::of_kubernetes(&self.cgroup_mount, uid)
        {
            return Cgroup::open(&path);
        }
        let Some(parent) = &self.parent else {
            return Err(Error::setting(
                "the container",
                &pod.attachment.container_id,
                "has no cgroup yet, and none of kubepods has its pod's uid: say with \
                 --cgroup-parent where the runtime makes cgroups",
            ));
        };
        if let Some(path) = self.cgroup_of_container(parent, &pod.attachment.container_id) {
            return Cgroup::open(&path);
        }
        // The runtime would make it, and finds it.
        std::fs::create_dir_all(parent)
            .map_err(Error::system(format!("making {}", parent.display())))?;
        Cgroup::open(parent)
    }

    fn look_at_kubernetes(&self, uid: &str) -> Result<Target, Why> {
        let told = self.told_by_kubernetes(uid)?;
        let Some(path) = cgroups::of_kubernetes(&self.cgroup_mount, uid) else {
            return Err(Why::LeftAlone("it has no cgroup yet".to_owned()));
        };
        let cgroup = Cgroup::open(&path)?;
        let (pid, netns) = look::netns_of(&cgroup, None)?;
        let settings = annotated(
            self.config.options.profile(),
            self.config.settings.clone(),
            &told.annotations,
        )?;
        Ok(Target::new(cgroup, netns, pid.to_string(), settings))
    }

    fn look_at_cgroup(&self, path: &Path) -> Result<Target, Why> {
        let settings = self.config.settings.clone();
        let cgroup = Cgroup::open(path)?;
        let proxy = match self.config.options.select.unwrap_or_default() {
            Select::Injected => Some(&*settings.proxy_uids),
            Select::All => None,
        };
        let (pid, netns) = look::netns_of(&cgroup, proxy)?;
        Ok(Target::new(cgroup, netns, pid.to_string(), settings))
    }
}

fn note(wanted: &Wanted, target: &Target) -> Note {
    match wanted {
        Wanted::Cni(pod) => Note::Cni { pod: pod.clone() },
        Wanted::Cgroup { path, .. } => Note::Cgroups {
            cgroup: path.clone(),
        },
        Wanted::Kubernetes(uid) => Note::Kubernetes { uid: uid.clone() },
        Wanted::File(_) | Wanted::Nothing => Note::Directory {
            netns: target.given().to_owned(),
        },
    }
}

fn refused(error: &Error, again: bool) -> Answer {
    Answer::Refused {
        error: in_one_line(error),
        again,
    }
}

/// Loading programs takes some megabytes in several threads, which the allocator
/// would keep for each.
pub(crate) fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator may be asked at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
