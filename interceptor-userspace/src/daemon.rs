//! The node's daemon: it learns of pods, attaches each before its application can
//! open a socket, follows their routes, and detaches those that are gone.
//!
//! Nothing on the data path waits for it: pods stay attached when it stops or is
//! killed, and the next one takes them over.

mod config;
mod metrics;
mod namespaces;
mod pods;
mod privileges;
mod server;
mod sources;

use std::{
    fs,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Semaphore,
    time::interval,
};
use tracing::{error, info, warn};

pub use config::{Config, LogFormat, OnFailure, Options, Select};
pub use privileges::CAPABILITIES;
pub use sources::{
    cgroups::{Pattern, patterns},
    directory::{Namespace, PodFile, parse as parse_pod_file},
};

use self::{
    metrics::Metrics,
    pods::{Message, Registry, View},
    server::{READINGS, Server},
    sources::{cgroups::Watched, kubernetes::Kubernetes},
};
use crate::{
    Error, Result,
    api::DaemonStatus,
    datapath::{need_root, raise_locked_memory},
};

/// How long stopping may take: what is under way is finished.
const STOPPING: Duration = Duration::from_secs(10);

/// Runs the daemon until SIGTERM or SIGINT. All pods stay attached.
///
/// # Errors
///
/// If it can't start: another one runs, a privilege is missing, an address is
/// taken.
pub fn run(config: Config) -> Result<()> {
    need_root()?;
    let _lock = config.pins.lock_daemon()?;
    // In the root of the cgroup tree even root makes one only with a capability that the
    // daemon gives up.
    if let Some(parent) = config.options.cgroup_parent_in(&sources::cgroups::mount()?) {
        fs::create_dir_all(&parent).map_err(|error| {
            Error::setting(
                "cgroup-parent",
                parent.display(),
                format!("can't be made: {error}: make it before the daemon starts"),
            )
        })?;
    }
    // With a capability that the daemon gives up, too.
    raise_locked_memory();
    privileges::reduce()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::system("starting the runtime"))?;
    let result = runtime.block_on(serve(config));
    runtime.shutdown_background();
    result
}

async fn serve(config: Config) -> Result<()> {
    let started = Instant::now();
    let failed = || Error::system("watching for signals");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed())?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed())?;

    let metrics = Arc::new(Metrics::default());
    let view = View::default();
    let http = metrics::listen(config.options.metrics()).await?;
    let http_address = http
        .local_addr()
        .map_err(Error::system("asking for the address of the metrics"))?;
    let (messages, received) = mpsc::channel();
    // Before pods are taken over, so that no change is missed.
    namespaces::watch(messages.clone())?;
    let registry = Registry::start(config.clone(), Arc::clone(&metrics), view.clone())?;
    let registry = thread::Builder::new()
        .name("pods".to_owned())
        .spawn(move || registry.run(&received))
        .map_err(Error::system("starting a thread"))?;
    let kubernetes = match config.options.kubernetes_node()? {
        Some(node) => Some(Kubernetes::new(&config.options, node, Arc::clone(&metrics)).await?),
        None => None,
    };
    let sources = start_sources(&config, kubernetes.as_ref(), &messages)?;
    let listener = server::listen(&config.options.socket())?;
    let server = Arc::new(Server {
        messages: messages.clone(),
        metrics: Arc::clone(&metrics),
        view: view.clone(),
        kubernetes,
        status: DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: 0,
            pins: config.pins.root().to_owned(),
            metrics: http_address,
            ready: false,
            sources,
            pods: [].into(),
        },
        started,
        readings: Arc::new(Semaphore::new(READINGS)),
    });
    info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %config.options.socket().display(),
        metrics = %http_address,
        pins = %config.pins.root().display(),
        "running"
    );

    let watchdog = watchdog(view.clone());
    let stopped = tokio::select! {
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        result = server.serve(listener) => result.map_err(Error::system("serving the socket")),
        result = metrics::serve(http, metrics, view, config.pins.clone()) => {
            result.map_err(Error::system("serving the metrics"))
        }
        () = watchdog => Ok(()),
    };
    notify(sd_notify::NotifyState::Stopping);
    stop(&messages, registry).await;
    // It is this daemon's still: the next one waits for the lock.
    let _: std::io::Result<()> = fs::remove_file(config.options.socket());
    info!("stopped; all pods stay attached");
    stopped
}

/// Starts what tells of pods; says what that is.
fn start_sources(
    config: &Config,
    kubernetes: Option<&Arc<Kubernetes>>,
    messages: &mpsc::Sender<Message>,
) -> Result<Vec<String>> {
    let mut names = vec!["cni".to_owned()];
    if let Some(directory) = &config.options.pods {
        sources::directory::watch(directory.clone(), messages.clone())?;
        names.push(format!("directory {}", directory.display()));
    }
    let patterns_of = |texts: &[String]| -> Result<Vec<Pattern>> {
        let patterns: Vec<_> = texts
            .iter()
            .map(|text| patterns(text))
            .collect::<Result<_>>()?;
        Ok(patterns.into_iter().flatten().collect())
    };
    let mut pods = config.options.cgroups.clone().unwrap_or_default();
    let mut others: Vec<String> = config
        .options
        .cgroup_parent
        .iter()
        .map(|parent| format!("{}/*", parent.display()))
        .collect();
    if let Some(kubernetes) = kubernetes {
        tokio::spawn(Arc::clone(kubernetes).watch(messages.clone()));
        names.push(format!(
            "kubernetes node {}",
            config.options.node_name.as_deref().unwrap_or_default()
        ));
        // Which of these are to be attached, the API says. The tree says when.
        pods.retain(|pattern| pattern != sources::cgroups::OF_KUBERNETES);
        others.push(sources::cgroups::OF_KUBERNETES.to_owned());
    }
    let (pods, others) = (patterns_of(&pods)?, patterns_of(&others)?);
    if !pods.is_empty() || !others.is_empty() {
        sources::cgroups::watch(
            Watched {
                mount: sources::cgroups::mount()?,
                pods,
                others,
            },
            messages.clone(),
        )?;
    }
    if let Some(patterns) = &config.options.cgroups {
        names.push(format!("cgroups {}", patterns.join(",")));
    }
    Ok(names)
}

/// Tells systemd that the daemon has started when it has, and alive as long as it is.
/// The Kubernetes API isn't waited for: it may need this node's services itself.
/// Never ends.
async fn watchdog(view: View) {
    let every = sd_notify::watchdog_enabled().map_or(Duration::from_secs(5), |limit| limit / 3);
    let mut ticks = interval(every.min(Duration::from_secs(1)));
    let mut ready = false;
    loop {
        ticks.tick().await;
        if !ready && view.get().started {
            ready = true;
            notify(sd_notify::NotifyState::Ready);
        }
        if metrics::is_healthy(&view) {
            notify(sd_notify::NotifyState::Watchdog);
        } else {
            error!("stuck: the watchdog isn't fed");
        }
    }
}

fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!(%error, "telling systemd");
    }
}

async fn stop(messages: &mpsc::Sender<Message>, registry: thread::JoinHandle<()>) {
    let _: Result<(), _> = messages.send(Message::Stop);
    let ended = tokio::task::spawn_blocking(move || registry.join());
    match tokio::time::timeout(STOPPING, ended).await {
        Ok(Ok(Ok(()))) => {}
        Ok(_) => error!("the thread of the pods has panicked"),
        Err(_) => warn!("what was under way is cut off; the next daemon takes it back"),
    }
}
