//! The Kubernetes API: this node's pods, listed and watched, and a single one asked
//! for at CNI's ADD.
//!
//! kube's own watcher isn't used. It gives a list up for one object that can't be
//! read, and tries a watch again for ever that the server refuses with 410.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher as _, RandomState},
    io,
    mem::replace,
    path::Path,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use kube::{
    Client,
    api::{GetParams, ListParams, WatchEvent, WatchParams},
    config::{Config, KubeConfigOptions, Kubeconfig},
    core::{Request, request},
};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{info, warn};

use crate::{
    Error, Result,
    api::CniPod,
    daemon::{
        config::Options,
        metrics::Metrics,
        pods::{Listing, Message, give_memory_back, rules},
        sources::cgroups,
    },
    error::in_one_line,
};

/// How long the server may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// To answer at CNI's ADD: the container runtime waits.
    add: Duration,
    /// To answer otherwise.
    answer: Duration,
    /// To end a watch, as it is asked to: one that goes on has lost its server.
    watch: Duration,
    /// Before it is asked again after a failure: the shortest time, and the longest if
    /// it answered and if it didn't.
    again: (Duration, Duration, Duration),
}

const LIMITS: Limits = Limits {
    add: Duration::from_secs(5),
    answer: Duration::from_secs(30),
    watch: Duration::from_secs(300),
    again: (
        Duration::from_millis(500),
        Duration::from_secs(2),
        Duration::from_secs(30),
    ),
};

/// How long changes are gathered: many pods may start at once.
const GATHER: Duration = Duration::from_millis(20);

/// For how many seconds the server is asked to go on with a watch; less than 295,
/// says kube.
const WATCH_SECONDS: u32 = 290;

/// What is kept of a pod: all that decides whether and how it is attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KubernetesPod {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// The uid that the kubelet names the pod's cgroup by. For one of a file of the
    /// kubelet's it isn't the API's.
    pub(crate) uid: String,
    pub(crate) host_network: bool,
    /// Of the annotations those that somebody here reads.
    pub(crate) annotations: BTreeMap<String, String>,
    /// The same of the labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// The names of its containers, those of initialisation too.
    pub(crate) containers: BTreeSet<String>,
    /// Which kind of proxy its proxy's container starts, if it says so.
    pub(crate) proxy_type: Option<String>,
    /// Whether its proxy's container is told to start none.
    pub(crate) proxy_off: bool,
}

/// All pods of the node that have not ended, by uid.
pub(crate) type Pods = BTreeMap<String, Arc<KubernetesPod>>;

/// The API server, and what it has told so far.
#[derive(Debug)]
pub(crate) struct Kubernetes {
    options: Options,
    selector: String,
    client: Mutex<Connection>,
    pods: Mutex<Pods>,
    metrics: Arc<Metrics>,
    limits: Limits,
}

/// A client, which says nothing of itself.
struct Connection(Client);

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection")
    }
}

/// The path of all pods.
const PODS: &str = "/api/v1/pods";

impl Kubernetes {
    /// Prepares to ask for the pods of the node `node`. The server isn't spoken to
    /// yet.
    ///
    /// # Errors
    ///
    /// If it isn't said where the API server is, or who asks it.
    pub(crate) async fn new(
        options: &Options,
        node: &str,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            options: options.clone(),
            selector: format!("spec.nodeName={node}"),
            client: Mutex::new(Connection(connect(options).await?)),
            pods: Mutex::default(),
            metrics,
            limits: LIMITS,
        }))
    }

    fn client(&self) -> Client {
        lock(&self.client).0.clone()
    }

    /// Tells of the node's pods, whenever one comes, goes or changes. Never ends.
    pub(crate) async fn watch(self: Arc<Self>, messages: Sender<Message>) {
        let mut watching = Watching::default();
        let (least, brief, most) = self.limits.again;
        let mut wait = least / 2;
        loop {
            (watching.since, watching.listed) = (None, false);
            let result = self.round(&mut watching, &messages).await;
            let lasted = watching
                .since
                .map_or(Duration::ZERO, |start| start.elapsed());
            match result {
                Ok(()) if lasted > least => continue,
                Ok(()) => {}
                Err(error) => {
                    watching.failed(&error);
                    if is_unauthorized(&error) {
                        self.connect_anew().await;
                        if !replace(&mut watching.renewed, true) {
                            continue;
                        }
                    }
                    // Too long ago, and not listed just now.
                    if watching.version.is_none() && !watching.listed && lasted > Duration::ZERO {
                        continue;
                    }
                }
            }
            wait = match watching.since {
                // What went well for longer than was waited for it has failed anew.
                Some(_) if lasted > wait => least,
                Some(_) => (wait * 2).min(brief),
                None => (wait * 2).min(most),
            };
            // Not all nodes at once.
            sleep(wait.mul_f64(0.5 + 0.5 * chance())).await;
        }
    }

    /// The token or certificate may have been replaced.
    async fn connect_anew(&self) {
        match connect(&self.options).await {
            Ok(client) => *lock(&self.client) = Connection(client),
            Err(error) => warn!(
                error = in_one_line(&error),
                "reading the credentials for the Kubernetes API anew"
            ),
        }
    }

    fn failed(&self, operation: &'static str, error: &Error) {
        self.metrics.failed(operation, error);
    }

    /// Lists, unless that was done, and watches from there until the server ends it.
    async fn round(&self, watching: &mut Watching, messages: &Sender<Message>) -> Result<()> {
        if watching.version.is_none() {
            let listed = self.list().await;
            let (version, pods) = listed.inspect_err(|error| self.failed("list", error))?;
            *lock(&self.pods) = pods;
            self.tell(messages);
            give_memory_back();
            (watching.version, watching.listed) = (Some(version), true);
        }
        let result = self.follow(watching, messages).await;
        let result = result.inspect_err(|error| self.failed("watch", error));
        if let Err(Error::Kubernetes { error, .. }) = &result
            && is_expired(error)
        {
            // What happened meanwhile nobody knows any more.
            watching.version = None;
        }
        result
    }

    async fn list(&self) -> Result<(String, Pods)> {
        const OPERATION: &str = "listing the node's pods";
        let failed = |error| kubernetes_error(OPERATION, error);
        // Without a limit: older servers don't read a part of a list from memory.
        let request = Request::new(PODS).list(&ListParams::default().fields(&self.selector));
        let request = request.map_err(built(OPERATION))?;
        let client = self.client();
        let answer = timeout(self.limits.answer, client.request_text(request))
            .await
            .map_err(|_| late(OPERATION))?
            .map_err(failed)?;
        let (version, objects) = read_list(&answer).map_err(|problem| Error::KubernetesAnswer {
            operation: OPERATION.to_owned(),
            problem,
        })?;
        let mut pods = Pods::new();
        for object in objects {
            match object.pod {
                Ok(pod) if object.ended => drop(pod),
                Ok(pod) => drop(pods.insert(pod.uid.clone(), Arc::new(pod))),
                Err(problem) => self.unreadable("list", problem),
            }
        }
        Ok((version, pods))
    }

    /// One object that can't be read spoils no other.
    fn unreadable(&self, operation: &'static str, problem: String) {
        let error = Error::KubernetesAnswer {
            operation: "reading a pod".to_owned(),
            problem,
        };
        self.failed(operation, &error);
        warn!(error = in_one_line(&error), "left out");
    }

    async fn follow(&self, watching: &mut Watching, messages: &Sender<Message>) -> Result<()> {
        const OPERATION: &str = "watching the node's pods";
        let failed = |error| kubernetes_error(OPERATION, error);
        let end = Instant::now() + self.limits.watch;
        let params = WatchParams::default()
            .fields(&self.selector)
            .timeout(WATCH_SECONDS);
        let from = watching.version.clone().unwrap_or_default();
        let request = Request::new(PODS).watch(&params, &from);
        let request = request.map_err(built(OPERATION))?;
        let client = self.client();
        let events = timeout(self.limits.answer, client.request_events::<Object>(request))
            .await
            .map_err(|_| late(OPERATION))?
            .map_err(failed)?;
        watching.goes_on();
        let mut events = pin!(events);
        // When what has changed is told, if something has.
        let mut tell_at = None;
        let result = loop {
            match timeout_at(tell_at.unwrap_or(end), events.try_next()).await {
                Err(_) if tell_at.is_some() => {}
                Err(_) => break Err(late(OPERATION)),
                Ok(Ok(None)) => break Ok(()),
                Ok(Ok(Some(event))) => match self.apply(event, watching) {
                    Ok(true) => tell_at = tell_at.or_else(|| Some(Instant::now() + GATHER)),
                    Ok(false) => {}
                    Err(error) => break Err(error),
                },
                Ok(Err(kube::Error::SerdeError(error))) => {
                    // Which pod it was about nobody knows.
                    self.unreadable("watch", error.to_string());
                    watching.version = None;
                    break Ok(());
                }
                Ok(Err(error)) => break Err(failed(error)),
            }
            if tell_at.is_some_and(|at| at <= Instant::now()) {
                tell_at = None;
                self.tell(messages);
            }
        };
        if tell_at.is_some() {
            self.tell(messages);
        }
        result
    }

    /// Takes over what an event says; returns whether that changes something.
    fn apply(&self, event: WatchEvent<Object>, watching: &mut Watching) -> Result<bool> {
        let (object, deleted) = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => (object, false),
            WatchEvent::Deleted(object) => (object, true),
            WatchEvent::Bookmark(bookmark) => {
                watching.version = Some(bookmark.metadata.resource_version);
                return Ok(false);
            }
            WatchEvent::Error(status) => {
                return Err(kubernetes_error(
                    "watching the node's pods",
                    kube::Error::Api(status),
                ));
            }
        };
        let mut pods = lock(&self.pods);
        let changed = match object.pod {
            Ok(pod) if deleted || object.ended => pods.remove(&pod.uid).is_some(),
            Ok(pod) if pods.get(&pod.uid).is_some_and(|known| **known == pod) => false,
            Ok(pod) => {
                pods.insert(pod.uid.clone(), Arc::new(pod));
                true
            }
            Err(problem) if deleted => {
                // Which one is gone the next list tells.
                watching.version = None;
                return Err(Error::KubernetesAnswer {
                    operation: "reading which pod was deleted".to_owned(),
                    problem,
                });
            }
            Err(problem) => {
                self.unreadable("watch", problem);
                false
            }
        };
        drop(pods);
        if let Some(version) = object.version {
            watching.version = Some(version);
        }
        Ok(changed)
    }

    fn tell(&self, messages: &Sender<Message>) {
        let pods = lock(&self.pods).clone();
        // When nobody listens any more, the daemon stops.
        let _: Result<(), _> = messages.send(Message::Listing(Listing::Kubernetes(pods)));
    }

    /// The pod that CNI's ADD is about; nothing, if it is none of Kubernetes' or of
    /// an excluded namespace.
    ///
    /// # Errors
    ///
    /// If the server doesn't say.
    pub(crate) async fn pod_of(&self, pod: &CniPod) -> Result<Option<Arc<KubernetesPod>>> {
        let (Some(namespace), Some(name)) = (&pod.namespace, &pod.name) else {
            return Ok(None);
        };
        if self.options.exclude_namespaces().contains(namespace) {
            return Ok(None);
        }
        let known = pod
            .uid
            .as_ref()
            .and_then(|uid| lock(&self.pods).get(uid).cloned());
        if known.is_some() {
            return Ok(known);
        }
        let asked = self.ask_for(namespace, name, pod.uid.as_deref()).await;
        asked
            .inspect_err(|error| self.failed("get", error))
            .map(|pod| Some(Arc::new(pod)))
    }

    async fn ask_for(
        &self,
        namespace: &str,
        name: &str,
        uid: Option<&str>,
    ) -> Result<KubernetesPod> {
        let operation = format!("asking the Kubernetes API server for the pod {namespace}/{name}");
        let unreadable = |problem: String| Error::KubernetesAnswer {
            operation: operation.clone(),
            problem,
        };
        // They become parts of a path.
        if let Some(part) = [namespace, name].iter().find(|part| !is_name(part)) {
            return Err(Error::setting(
                "CNI_ARGS",
                part,
                "is no name of Kubernetes': it has lower-case letters, digits, `-` and `.`",
            ));
        }
        let request = Request::new(format!("/api/v1/namespaces/{namespace}/pods"))
            .get(name, &GetParams::default())
            .map_err(built(&operation))?;
        let client = self.client();
        let answer = timeout(self.limits.add, client.request_text(request))
            .await
            .map_err(|_| late(&operation))?
            .map_err(|error| kubernetes_error(&operation, error))?;
        let object: Object =
            serde_json::from_str(&answer).map_err(|error| unreadable(error.to_string()))?;
        let pod = object.pod.map_err(unreadable)?;
        match uid {
            Some(uid) if uid != pod.uid => Err(Error::setting(
                "K8S_POD_UID",
                uid,
                format!(
                    "is not that of the pod {namespace}/{name}, which is {}: it has been replaced",
                    pod.uid
                ),
            )),
            _ => Ok(pod),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far the watch has got.
#[derive(Debug, Default)]
struct Watching {
    /// The version of the last thing that was heard; none if all is to be listed.
    version: Option<String>,
    /// Since when the server has told of changes, this time.
    since: Option<Instant>,
    /// Whether all was listed, this time.
    listed: bool,
    /// Whether the credentials were read anew since it last answered.
    renewed: bool,
    /// The failure that was told last, while it lasts.
    told: Option<String>,
}

impl Watching {
    fn failed(&mut self, error: &Error) {
        let text = in_one_line(error);
        if self.told.as_ref() != Some(&text) {
            warn!(
                error = text,
                "the node's pods are not followed; it is tried again"
            );
            self.told = Some(text);
        }
    }

    fn goes_on(&mut self) {
        self.since = Some(Instant::now());
        self.renewed = false;
        if self.told.take().is_some() {
            info!("the node's pods are followed again");
        }
    }
}

/// Reads the configuration, and the files that it names.
async fn connect(options: &Options) -> Result<Client> {
    let mut config = match &options.kubeconfig {
        Some(path) => of_kubeconfig(path).await?,
        None => Config::incluster().map_err(|error| {
            Error::setting(
                "kubernetes",
                true,
                format!(
                    "no pod's service account is here ({}): run the daemon in a pod that has one, \
                     or give a --kubeconfig",
                    in_one_line(&error)
                ),
            )
        })?,
    };
    config.connect_timeout = Some(LIMITS.add);
    // Failures are to be seen and counted here.
    config.default_retry = false;
    Client::try_from(config).map_err(|error| {
        Error::setting(
            "kubernetes",
            true,
            format!("the API can't be asked: {}", in_one_line(&error)),
        )
    })
}

async fn of_kubeconfig(path: &Path) -> Result<Config> {
    let failed = |problem: String| Error::setting("kubeconfig", path.display(), problem);
    let file = Kubeconfig::read_from(path).map_err(|error| failed(in_one_line(&error)))?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .map_err(|error| failed(in_one_line(&error)))?;
    if config.auth_info.exec.is_some() || config.auth_info.auth_provider.is_some() {
        return Err(failed(
            "has its credentials made by a program, which the daemon may not start: give a \
             token, a tokenFile or a client certificate"
                .to_owned(),
        ));
    }
    Ok(config)
}

fn kubernetes_error(operation: &str, error: kube::Error) -> Error {
    Error::Kubernetes {
        operation: operation.to_owned(),
        error: Box::new(error),
    }
}

fn built(operation: &str) -> impl FnOnce(request::Error) -> Error {
    move |error| kubernetes_error(operation, kube::Error::BuildRequest(error))
}

fn late(operation: &str) -> Error {
    let error = io::Error::from_raw_os_error(libc::ETIMEDOUT);
    Error::system(operation)(error)
}

fn is_unauthorized(error: &Error) -> bool {
    matches!(
        error,
        Error::Kubernetes { error, .. }
            if matches!(&**error, kube::Error::Api(status) if status.code == 401)
    )
}

fn is_expired(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 410)
}

/// Between 0 and 1.
fn chance() -> f64 {
    let random = RandomState::new().hash_one(());
    f64::from(u32::try_from(random >> 32).unwrap_or_default()) / f64::from(u32::MAX)
}

/// Whether a text can be the name of a namespace or a pod (RFC 1123).
fn is_name(text: &str) -> bool {
    (1..=253).contains(&text.len())
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.')
        })
}

/// The version of a list, and its objects.
fn read_list(text: &str) -> Result<(String, Vec<Object>), String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct List {
        metadata: ListMetadata,
        items: Option<Vec<Object>>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct ListMetadata {
        resource_version: String,
    }
    let list: List = serde_json::from_str(text).map_err(|error| error.to_string())?;
    Ok((
        list.metadata.resource_version,
        list.items.unwrap_or_default(),
    ))
}

/// A pod of the API's, or what is wrong with it.
#[derive(Clone, Debug)]
struct Object {
    version: Option<String>,
    /// All its containers have ended, and none will be started.
    ended: bool,
    pod: Result<KubernetesPod, String>,
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(|value| Self::of(&value))
    }
}

/// The parts of a pod that are read. All may be missing, or null.
mod wire {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    #[derive(Deserialize)]
    pub(super) struct Pod {
        pub(super) metadata: Metadata,
        pub(super) spec: Option<Spec>,
        pub(super) status: Option<Status>,
    }

    #[derive(Deserialize)]
    pub(super) struct Metadata {
        pub(super) namespace: Option<String>,
        pub(super) name: Option<String>,
        pub(super) uid: Option<String>,
        pub(super) annotations: Option<BTreeMap<String, String>>,
        pub(super) labels: Option<BTreeMap<String, String>>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(super) struct Spec {
        pub(super) host_network: Option<bool>,
        pub(super) init_containers: Option<Vec<Container>>,
        pub(super) containers: Option<Vec<Container>>,
    }

    #[derive(Deserialize)]
    pub(super) struct Container {
        pub(super) name: String,
        pub(super) args: Option<Vec<String>>,
        pub(super) env: Option<Vec<Variable>>,
    }

    #[derive(Deserialize)]
    pub(super) struct Variable {
        pub(super) name: String,
        pub(super) value: Option<String>,
    }

    #[derive(Deserialize)]
    pub(super) struct Status {
        pub(super) phase: Option<String>,
    }
}

/// On the API's copy of a pod that the kubelet has from a file: the uid that the
/// kubelet gave it.
const MIRROR: &str = "kubernetes.io/config.mirror";

impl Object {
    fn of(value: &Value) -> Self {
        let version = value["metadata"]["resourceVersion"]
            .as_str()
            .filter(|version| !version.is_empty())
            .map(str::to_owned);
        let pod = wire::Pod::deserialize(value).map_err(|error| error.to_string());
        let phase = pod.as_ref().ok().and_then(|pod| pod.status.as_ref());
        let phase = phase.and_then(|status| status.phase.as_deref());
        Self {
            version,
            ended: matches!(phase, Some("Succeeded" | "Failed")),
            pod: pod.and_then(kept),
        }
    }
}

/// What is kept of a pod.
fn kept(pod: wire::Pod) -> Result<KubernetesPod, String> {
    let metadata = pod.metadata;
    let mut annotations = metadata.annotations.unwrap_or_default();
    let mut labels = metadata.labels.unwrap_or_default();
    let uid = annotations
        .remove(MIRROR)
        .or(metadata.uid)
        .unwrap_or_default();
    let (namespace, name) = (
        metadata.namespace.unwrap_or_default(),
        metadata.name.unwrap_or_default(),
    );
    if !cgroups::is_uid(&uid) || !is_name(&namespace) || !is_name(&name) {
        return Err(format!(
            "`{namespace}/{name}` with the uid `{uid}` is no pod"
        ));
    }
    annotations.retain(|key, _| rules::is_read(key));
    labels.retain(|key, _| rules::is_read(key));
    let mut kept = KubernetesPod {
        namespace,
        name,
        uid,
        annotations,
        labels,
        ..KubernetesPod::default()
    };
    let Some(spec) = pod.spec else {
        return Ok(kept);
    };
    kept.host_network = spec.host_network.unwrap_or_default();
    for container in [spec.init_containers, spec.containers]
        .into_iter()
        .flatten()
        .flatten()
    {
        if container.name == rules::PROXY {
            // As in `proxy sidecar --domain ...`.
            if let [first, kind, ..] = container.args.as_deref().unwrap_or_default()
                && first == "proxy"
            {
                kept.proxy_type = Some(kind.clone());
            }
            kept.proxy_off = container.env.unwrap_or_default().iter().any(|variable| {
                variable.name == "DISABLE_ENVOY"
                    && variable.value.as_deref().and_then(rules::parse_bool) == Some(true)
            });
        }
        kept.containers.insert(container.name);
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn pod() -> Value {
        json!({
            "metadata": {
                "name": "web", "namespace": "shop", "uid": "8f-2c", "resourceVersion": "7",
                "annotations": {
                    "sidecar.istio.io/status": "{}",
                    "traffic.sidecar.istio.io/excludeOutboundPorts": "25",
                    "kubectl.kubernetes.io/last-applied-configuration": "{}",
                },
                "labels": {"app": "web", "sidecar.istio.io/inject": "true"},
            },
            "spec": {
                "initContainers": [{"name": "istio-validation"}],
                "containers": [
                    {"name": "app", "args": ["proxy", "other"]},
                    {"name": "istio-proxy", "args": ["proxy", "sidecar"], "env": [
                        {"name": "DISABLE_ENVOY", "value": "1"},
                        {"name": "POD", "valueFrom": {}},
                    ]},
                ],
            },
            "status": {"phase": "Running"},
        })
    }

    #[test]
    fn of_a_pod_what_decides_is_kept() {
        let object = Object::of(&pod());
        assert!(!object.ended);
        assert_eq!(object.version.as_deref(), Some("7"));
        let kept = object.pod.unwrap();
        assert_eq!(
            (&*kept.namespace, &*kept.name, &*kept.uid),
            ("shop", "web", "8f-2c")
        );
        assert_eq!(
            kept.annotations.keys().collect::<Vec<_>>(),
            [
                "sidecar.istio.io/status",
                "traffic.sidecar.istio.io/excludeOutboundPorts"
            ]
        );
        assert_eq!(
            kept.labels.keys().collect::<Vec<_>>(),
            ["sidecar.istio.io/inject"]
        );
        assert_eq!(
            kept.containers.iter().collect::<Vec<_>>(),
            ["app", "istio-proxy", "istio-validation"]
        );
        assert_eq!(kept.proxy_type.as_deref(), Some("sidecar"));
        assert!(kept.proxy_off && !kept.host_network);
    }

    #[test]
    fn one_of_the_kubelets_own_has_the_kubelets_uid() {
        let mut pod = pod();
        pod["metadata"]["annotations"][MIRROR] = "0a1b".into();
        assert_eq!(Object::of(&pod).pod.unwrap().uid, "0a1b");
        for phase in ["Succeeded", "Failed"] {
            pod["status"]["phase"] = phase.into();
            assert!(Object::of(&pod).ended);
        }
    }

    #[test]
    fn what_is_no_pod_is_told() {
        for (part, value) in [
            ("/metadata/uid", json!("../x")),
            ("/metadata/uid", Value::Null),
            ("/metadata/name", json!("a/b")),
            ("/metadata/namespace", json!("")),
            ("/metadata/annotations", json!({"a": 1})),
            ("/spec/containers", json!([{}])),
        ] {
            let mut pod = pod();
            *pod.pointer_mut(part).unwrap() = value;
            let object = Object::of(&pod);
            assert!(object.pod.is_err(), "{part}: {object:?}");
            assert_eq!(object.version.as_deref(), Some("7"));
        }
    }

    #[test]
    fn a_list_is_read_though_an_object_of_it_can_not_be() {
        let list = json!({"metadata": {"resourceVersion": "9"}, "items": [pod(), null, {}]});
        let (version, objects) = read_list(&list.to_string()).unwrap();
        assert_eq!((&*version, objects.len()), ("9", 3));
        assert!(objects[0].pod.is_ok() && objects[1].pod.is_err() && objects[2].pod.is_err());
        let none = json!({"metadata": {"resourceVersion": "9"}, "items": null});
        assert!(read_list(&none.to_string()).unwrap().1.is_empty());
        for text in ["", "[]", "{}", r#"{"metadata":{},"items":[]}"#] {
            assert!(read_list(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_name_is_more_than_a_part_of_a_path(name in ".{0,300}") {
            if is_name(&name) {
                prop_assert!(!name.contains(['/', '%', '?']) && !name.starts_with('.'));
            }
        }

        #[test]
        fn no_text_does_harm(text in "\\PC{0,200}", part in 0..6_usize) {
            let parts = ["/metadata", "/metadata/uid", "/metadata/labels", "/spec", "/status",
                "/spec/containers/1/args"];
            let mut pod = pod();
            *pod.pointer_mut(parts[part]).unwrap() = text.clone().into();
            let _: Object = Object::of(&pod);
            let _: Result<_, String> = read_list(&text);
        }
    }

    #[test]
    fn chance_is_a_part_of_one() {
        for _ in 0..100 {
            assert!((0.0..=1.0).contains(&chance()));
        }
    }
}
