//! A stand-in for the Kubernetes API server, which is in no package that the tests
//! could install: pods are listed, watched and given one by one over HTTP and TLS,
//! with a certificate and a token as in a cluster, and answers in the API's form. And
//! it can fail in all the ways that the real one can.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    serve::Listener,
};
use futures_util::stream;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    sync::watch,
    time::{Instant, timeout_at},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig, crypto,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
    server::TlsStream,
};

/// How often a watch is told how far it has got.
const BOOKMARKS: Duration = Duration::from_millis(200);

/// What the server does instead of answering.
#[derive(Clone, Debug)]
pub enum Failure {
    /// It refuses: 403, 500 and so on.
    Refuse(u16),
    /// It says nothing.
    Silence,
    /// It says this.
    Say(String),
}

/// A server on 127.0.0.1. When dropped it ends.
#[derive(Debug)]
pub struct ApiServer {
    runtime: Option<Runtime>,
    /// Bound, never listening: keeps the port while the server is stopped, or a
    /// client of somebody else's could be given it.
    reserved: Socket,
    tls: TlsAcceptorOf,
    store: Arc<Store>,
    directory: TempDir,
}

/// One that says nothing of itself.
#[derive(Clone)]
struct TlsAcceptorOf(TlsAcceptor);

impl std::fmt::Debug for TlsAcceptorOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsAcceptor")
    }
}

impl ApiServer {
    /// Starts one that knows no pod.
    ///
    /// # Errors
    ///
    /// If it can't be started.
    pub fn start() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let tls = tls(&directory).context("make certificates")?;
        let mut server = Self {
            runtime: None,
            reserved: bound((Ipv4Addr::LOCALHOST, 0).into()).context("reserve a port")?,
            tls,
            store: Arc::new(Store::new()),
            directory,
        };
        server.want_token("first");
        server.write_token("first")?;
        server.resume()?;
        let address = server.address()?;
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "daemon"}}],
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://{address}"),
                "certificate-authority": server.directory.path().join("ca.crt"),
            }}],
            "users": [{"name": "daemon", "user": {
                "tokenFile": server.directory.path().join("token"),
            }}],
        });
        fs::write(server.kubeconfig(), kubeconfig.to_string())?;
        Ok(server)
    }

    /// The file that says where it is, and who asks.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// Ends it, with all conversations. What it knows it will know again.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }

    /// Starts it again, at the same address.
    ///
    /// # Errors
    ///
    /// If it can't be had.
    pub fn resume(&mut self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let listener = bound(self.address()?)?;
        listener.listen(128)?;
        listener.set_nonblocking(true)?;
        let listener = {
            let _inside = runtime.enter();
            TcpListener::from_std(listener.into())?
        };
        let app = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&self.store));
        let listener = TlsListener {
            listener,
            tls: self.tls.0.clone(),
        };
        runtime.spawn(async move { axum::serve(listener, app).await });
        self.runtime = Some(runtime);
        Ok(())
    }

    fn address(&self) -> Result<SocketAddr> {
        let address = self.reserved.local_addr()?;
        address
            .as_socket()
            .context("not an address of the Internet")
    }

    /// From now on nobody is answered who comes with another token.
    pub fn want_token(&self, token: &str) {
        self.store
            .change(|known| token.clone_into(&mut known.token));
    }

    /// Writes the daemon's file.
    ///
    /// # Errors
    ///
    /// If it can't be written.
    pub fn write_token(&self, token: &str) -> Result<()> {
        fs::write(self.directory.path().join("token"), token).context("write the token")
    }

    /// Makes or changes a pod.
    pub fn put(&self, pod: Value) {
        self.store.change(|known| known.put(pod));
    }

    /// Deletes a pod.
    pub fn delete(&self, namespace: &str, name: &str) {
        self.store.change(|known| known.delete(namespace, name));
    }

    /// Forgets what happened: who watches from before gets 410.
    pub fn compact(&self) {
        self.store.change(Known::compact);
    }

    /// Cuts all watches, in the middle of what they were told.
    pub fn cut(&self) {
        self.store.change(|known| known.cuts += 1);
    }

    /// Says something to all who watch, whatever it is.
    pub fn say(&self, line: &str) {
        self.store.change(|known| {
            known.said.push(line.to_owned());
        });
    }

    /// From now on it fails, or does not any more. Watches go on.
    pub fn fail(&self, failure: Option<Failure>) {
        self.store.change(|known| known.failure = failure);
    }

    /// What was asked: paths with their queries.
    pub fn requests(&self) -> Vec<String> {
        self.store.lock().requests.clone()
    }

    /// How many of what was asked contain this.
    pub fn asked(&self, part: &str) -> usize {
        let requests = self.requests();
        requests.iter().filter(|asked| asked.contains(part)).count()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// One of several that may have the address at once.
fn bound(address: SocketAddr) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// An authority, and a certificate of its for 127.0.0.1.
fn tls(directory: &TempDir) -> Result<TlsAcceptorOf> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    fs::write(
        directory.path().join("ca.crt"),
        authority.self_signed(&key)?.pem(),
    )?;
    let authority = Issuer::new(authority, key);
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec![Ipv4Addr::LOCALHOST.to_string()])?
        .signed_by(&key, &authority)?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    Ok(TlsAcceptorOf(Arc::new(config).into()))
}

struct TlsListener {
    listener: TcpListener,
    tls: TlsAcceptor,
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = Listener::accept(&mut self.listener).await;
            if let Ok(stream) = self.tls.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// What happened to a pod, and when.
#[derive(Clone, Debug)]
struct Event {
    version: u64,
    kind: &'static str,
    pod: Value,
}

#[derive(Debug)]
struct Known {
    version: u64,
    pods: BTreeMap<(String, String), Value>,
    events: VecDeque<Event>,
    /// What happened up to this version is forgotten.
    forgotten: u64,
    token: String,
    failure: Option<Failure>,
    requests: Vec<String>,
    cuts: u32,
    said: Vec<String>,
}

/// What the server knows, and when that changes.
#[derive(Debug)]
struct Store {
    known: Mutex<Known>,
    changes: watch::Sender<()>,
}

impl Store {
    fn new() -> Self {
        Self {
            known: Mutex::new(Known {
                version: 100,
                pods: BTreeMap::new(),
                events: VecDeque::new(),
                forgotten: 0,
                token: String::new(),
                failure: None,
                requests: Vec::new(),
                cuts: 0,
                said: Vec::new(),
            }),
            changes: watch::Sender::new(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Known)) {
        change(&mut self.lock());
        self.changes.send_replace(());
    }
}

impl Known {
    fn put(&mut self, mut pod: Value) {
        self.version += 1;
        if let Some(metadata) = pod["metadata"].as_object_mut() {
            metadata.insert(
                "resourceVersion".to_owned(),
                self.version.to_string().into(),
            );
        }
        let known = self.pods.insert(key(&pod), pod.clone());
        let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
        self.happened(kind, pod);
    }

    fn delete(&mut self, namespace: &str, name: &str) {
        if let Some(mut pod) = self.pods.remove(&(namespace.to_owned(), name.to_owned())) {
            self.version += 1;
            pod["metadata"]["resourceVersion"] = self.version.to_string().into();
            self.happened("DELETED", pod);
        }
    }

    fn happened(&mut self, kind: &'static str, pod: Value) {
        self.events.push_back(Event {
            version: self.version,
            kind,
            pod,
        });
    }

    fn compact(&mut self) {
        self.version += 1;
        self.forgotten = self.version;
        self.events.clear();
    }
}

fn key(pod: &Value) -> (String, String) {
    let text = |name: &str| {
        let value = pod["metadata"][name].as_str();
        value.unwrap_or_default().to_owned()
    };
    (text("namespace"), text("name"))
}

/// Whether a field selector selects a pod. It selects by the node, or all.
fn selects(selector: Option<&str>, pod: &Value) -> bool {
    selector.is_none_or(|selector| {
        selector.strip_prefix("spec.nodeName=") == pod["spec"]["nodeName"].as_str()
    })
}

async fn answer(State(store): State<Arc<Store>>, request: Request) -> Response {
    let uri = request.uri().clone();
    let (token, failure) = {
        let mut known = store.lock();
        known.requests.push(uri.to_string());
        (known.token.clone(), known.failure.clone())
    };
    match failure {
        Some(Failure::Refuse(code)) => return refusal(code, "as the test has it"),
        Some(Failure::Silence) => match std::future::pending::<Infallible>().await {},
        Some(Failure::Say(text)) => return json_text(StatusCode::OK, text),
        None => {}
    }
    let given = request.headers().get(header::AUTHORIZATION);
    if given.is_none_or(|given| given.as_bytes() != format!("Bearer {token}").as_bytes()) {
        return refusal(401, "Unauthorized");
    }
    let query: BTreeMap<String, String> =
        form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes())
            .into_owned()
            .collect();
    let parts: Vec<&str> = uri.path().trim_start_matches('/').split('/').collect();
    match *parts {
        ["api", "v1", "pods"] if query.get("watch").is_some_and(|watch| watch == "true") => {
            watch_pods(store, &query)
        }
        ["api", "v1", "pods"] => list(&store, &query),
        ["api", "v1", "namespaces", namespace, "pods", name] => {
            let known = store.lock();
            let pod = known.pods.get(&(namespace.to_owned(), name.to_owned()));
            match pod {
                Some(pod) => json_text(StatusCode::OK, pod.to_string()),
                None => refusal(404, &format!("pods \"{name}\" not found")),
            }
        }
        _ => refusal(404, "the server could not find the requested resource"),
    }
}

fn json_text(status: StatusCode, text: String) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}

/// The API's word for an error.
fn status(code: u16, message: &str) -> Value {
    let reason = match code {
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        410 => "Expired",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    })
}

fn refusal(code: u16, message: &str) -> Response {
    let text = status(code, message).to_string();
    json_text(
        StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        text,
    )
}

fn list(store: &Store, query: &BTreeMap<String, String>) -> Response {
    let known = store.lock();
    let selector = query.get("fieldSelector").map(String::as_str);
    let items: Vec<Value> = known
        .pods
        .values()
        .filter(|pod| selects(selector, pod))
        .map(|pod| {
            // Those of a list have neither.
            let mut pod = pod.clone();
            if let Some(pod) = pod.as_object_mut() {
                pod.remove("kind");
                pod.remove("apiVersion");
            }
            pod
        })
        .collect();
    let list = json!({
        "kind": "PodList",
        "apiVersion": "v1",
        "metadata": {"resourceVersion": known.version.to_string()},
        "items": items,
    });
    json_text(StatusCode::OK, list.to_string())
}

/// How far a watch has got.
struct Watch {
    store: Arc<Store>,
    changes: watch::Receiver<()>,
    selector: Option<String>,
    version: u64,
    cuts: u32,
    said: usize,
    end: Instant,
    bookmarks: bool,
    over: bool,
}

fn watch_pods(store: Arc<Store>, query: &BTreeMap<String, String>) -> Response {
    let number = |name: &str| query.get(name).and_then(|value| value.parse::<u64>().ok());
    let (cuts, said) = {
        let known = store.lock();
        (known.cuts, known.said.len())
    };
    let watch = Watch {
        changes: store.changes.subscribe(),
        store,
        selector: query.get("fieldSelector").cloned(),
        version: number("resourceVersion").unwrap_or_default(),
        cuts,
        said,
        end: Instant::now() + Duration::from_secs(number("timeoutSeconds").unwrap_or(1800)),
        bookmarks: query
            .get("allowWatchBookmarks")
            .is_some_and(|allowed| allowed == "true"),
        over: false,
    };
    let body = Body::from_stream(stream::unfold(watch, next));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// What a watch is told next.
async fn next(mut watch: Watch) -> Option<(io::Result<Bytes>, Watch)> {
    if watch.over {
        return None;
    }
    let mut bookmark = Instant::now() + BOOKMARKS;
    loop {
        watch.changes.mark_unchanged();
        if let Some(line) = watch.line() {
            return Some((line, watch));
        }
        let until = bookmark.min(watch.end);
        match timeout_at(until, watch.changes.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return None,
            Err(_) if until == watch.end => return None,
            Err(_) if watch.bookmarks => {
                let version = watch.store.lock().version;
                watch.version = version;
                return Some((
                    line(
                        "BOOKMARK",
                        &json!({
                            "kind": "Pod",
                            "apiVersion": "v1",
                            "metadata": {
                                "resourceVersion": version.to_string(),
                                "creationTimestamp": null,
                            },
                            "spec": {"containers": null},
                            "status": {},
                        }),
                    ),
                    watch,
                ));
            }
            Err(_) => bookmark = Instant::now() + BOOKMARKS,
        }
    }
}

impl Watch {
    /// What is to be told now, if there is something.
    fn line(&mut self) -> Option<io::Result<Bytes>> {
        let known = self.store.lock();
        if known.cuts != self.cuts {
            self.over = true;
            return Some(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if let Some(said) = known.said.get(self.said) {
            self.said += 1;
            return Some(Ok(format!("{said}\n").into()));
        }
        if self.version < known.forgotten {
            self.over = true;
            let message = format!(
                "too old resource version: {} ({})",
                self.version, known.forgotten
            );
            return Some(line("ERROR", &status(410, &message)));
        }
        let event = known.events.iter().find(|event| {
            event.version > self.version && selects(self.selector.as_deref(), &event.pod)
        })?;
        self.version = event.version;
        Some(line(event.kind, &event.pod))
    }
}

fn line(kind: &str, object: &Value) -> io::Result<Bytes> {
    // In the order in which the API writes them.
    Ok(format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n").into())
}

/// A pod with a sidecar, as the API has it some seconds after it was started.
pub fn injected_pod(node: &str, namespace: &str, name: &str, uid: &str) -> Value {
    json!({
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "app": name,
                "pod-template-hash": "6d4cf56db6",
                "security.istio.io/tlsMode": "istio",
                "service.istio.io/canonical-name": name,
            },
            "annotations": {
                "istio.io/rev": "default",
                "kubectl.kubernetes.io/default-container": "app",
                "prometheus.io/port": "15020",
                "sidecar.istio.io/status": "{\"initContainers\":[\"istio-validation\"],\
                    \"containers\":[\"istio-proxy\"],\"volumes\":[\"istio-envoy\"],\
                    \"imagePullSecrets\":null,\"revision\":\"default\"}",
            },
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-6d4cf56db6",
                "uid": "0f6f8f3e-1111-2222-3333-444444444444",
                "controller": true, "blockOwnerDeletion": true,
            }],
            "managedFields": [{
                "manager": "kubelet", "operation": "Update", "apiVersion": "v1",
                "time": "2026-01-01T00:00:01Z", "fieldsType": "FieldsV1",
                "fieldsV1": {"f:status": {"f:phase": {}}}, "subresource": "status",
            }],
        },
        "spec": {
            "nodeName": node,
            "serviceAccountName": "default",
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": 30,
            "initContainers": [{
                "name": "istio-validation",
                "image": "proxyv2",
                "args": ["istio-iptables", "-p", "15001", "--run-validation"],
                "resources": {},
            }],
            "containers": [
                {
                    "name": "app", "image": "app",
                    "ports": [{"containerPort": 8080, "protocol": "TCP"}],
                    "env": [{"name": "NODE", "valueFrom": {"fieldRef": {
                        "apiVersion": "v1", "fieldPath": "spec.nodeName",
                    }}}],
                    "resources": {"limits": {"memory": "128Mi"}},
                },
                {
                    "name": "istio-proxy", "image": "proxyv2",
                    "args": ["proxy", "sidecar", "--domain", "$(POD_NAMESPACE).svc.cluster.local"],
                    "env": [{"name": "PILOT_CERT_PROVIDER", "value": "istiod"}],
                    "resources": {"limits": {"cpu": "2"}},
                },
            ],
            "tolerations": [{
                "key": "node.kubernetes.io/not-ready", "operator": "Exists",
                "effect": "NoExecute", "tolerationSeconds": 300,
            }],
        },
        "status": {
            "phase": "Running",
            "conditions": [{
                "type": "Ready", "status": "True", "lastProbeTime": null,
                "lastTransitionTime": "2026-01-01T00:00:02Z",
            }],
            "hostIP": "10.0.0.1",
            "podIP": "10.244.0.7",
            "podIPs": [{"ip": "10.244.0.7"}],
            "containerStatuses": [{
                "name": "app", "ready": true, "restartCount": 0, "image": "app",
                "imageID": "sha256:0", "containerID": "containerd://0", "started": true,
                "state": {"running": {"startedAt": "2026-01-01T00:00:02Z"}}, "lastState": {},
            }],
            "qosClass": "Burstable",
        },
    })
}
