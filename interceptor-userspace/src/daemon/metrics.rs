//! What Prometheus is told, and whether the daemon is healthy and ready, over
//! HTTP.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, text::encode},
    metrics::{
        MetricType, counter::ConstCounter, counter::Counter, family::Family, gauge::ConstGauge,
        histogram::Histogram, info::Info,
    },
    registry::{Registry, Unit},
};
use tokio::net::TcpListener;

use super::pods::View;
use crate::{
    Error, Result,
    api::PodState,
    datapath::{self, Counts, Pins},
    pod::PodName,
};

/// How long the registry may be at one thing before it counts as stuck.
const STUCK: Duration = Duration::from_secs(60);

/// What the daemon counts itself. What the kernel programs count is read from the
/// pins when it is asked for.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    attach_seconds: AttachSeconds,
    failures: Family<Vec<(&'static str, String)>, Counter>,
    requests: Family<Vec<(&'static str, &'static str)>, Counter>,
    pub(crate) followed: Counter,
    pub(crate) upgraded: Counter,
}

#[derive(Debug)]
struct AttachSeconds(Histogram);

impl Default for AttachSeconds {
    fn default() -> Self {
        Self(Histogram::new([
            0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
        ]))
    }
}

impl Metrics {
    /// A pod was attached.
    pub(crate) fn attached(&self, took: Duration) {
        self.attach_seconds.0.observe(took.as_secs_f64());
    }

    /// An operation failed.
    pub(crate) fn failed(&self, operation: &'static str, error: &Error) {
        self.failures
            .get_or_create(&vec![
                ("operation", operation.to_owned()),
                ("cause", error.cause()),
            ])
            .inc();
    }

    /// A request was answered.
    pub(crate) fn answered(&self, request: &'static str, answer: &'static str) {
        self.requests
            .get_or_create(&vec![("request", request), ("answer", answer)])
            .inc();
    }
}

/// Everything, in the form that Prometheus reads.
fn registry(metrics: &Metrics, view: &View, pins: &Pins) -> Registry {
    let mut registry = Registry::with_prefix("interceptor");
    registry.register(
        "build",
        "The version that runs",
        Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
    );
    registry.register_with_unit(
        "attach",
        "How long attaching a pod took",
        Unit::Seconds,
        metrics.attach_seconds.0.clone(),
    );
    registry.register("failures", "What failed, and why", metrics.failures.clone());
    registry.register(
        "requests",
        "Requests that were answered over the socket",
        metrics.requests.clone(),
    );
    registry.register(
        "routes_read",
        "How often a pod's routes were read anew",
        metrics.followed.clone(),
    );
    registry.register(
        "pods_upgraded",
        "Pods whose programs were replaced by this version's",
        metrics.upgraded.clone(),
    );
    registry.register_collector(Box::new(Pods {
        view: view.clone(),
        pins: pins.clone(),
    }));
    registry
}

/// Reads what the kernel programs have counted.
#[derive(Debug)]
struct Pods {
    view: View,
    pins: Pins,
}

impl Collector for Pods {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let pods = self.view.get().pods;
        let mut states = encoder.encode_descriptor(
            "pods",
            "The pods that the daemon knows, by state",
            None,
            MetricType::Gauge,
        )?;
        for (state, name) in [
            (PodState::Attached, "attached"),
            (PodState::LeftAlone, "left_alone"),
            (PodState::Failed, "failed"),
        ] {
            let count = pods.iter().filter(|pod| pod.state == state).count();
            let count = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            count.encode(states.encode_family(&[("state", name)])?)?;
        }
        // One that goes meanwhile, or isn't whole, counts nothing.
        let counts: Vec<(&str, Counts)> = pods
            .iter()
            .filter(|pod| pod.state == PodState::Attached)
            .filter_map(|pod| {
                let name: PodName = pod.pod.parse().ok()?;
                Some((&*pod.pod, datapath::counts(&self.pins, &name).ok()?))
            })
            .collect();
        let mut verdicts = encoder.encode_descriptor(
            "verdicts",
            "Connections that a rule of the chains has decided",
            None,
            MetricType::Counter,
        )?;
        for (pod, counts) in &counts {
            for chain in &counts.chains {
                for rule in &chain.rules {
                    let Some(hits) = rule.hits else { continue };
                    let labels = [
                        ("pod", (*pod).to_owned()),
                        ("chain", chain.chain.clone()),
                        ("family", chain.family.clone()),
                        ("rule", rule.number.to_string()),
                        ("target", rule.target.clone()),
                    ];
                    ConstCounter::new(hits).encode(verdicts.encode_family(&labels)?)?;
                }
            }
        }
        let mut events = encoder.encode_descriptor(
            "events",
            "What happened to connections and listeners beside the rules' decisions",
            None,
            MetricType::Counter,
        )?;
        for (pod, counts) in &counts {
            for (event, count) in &counts.events {
                let labels = [("pod", *pod), ("event", *event)];
                ConstCounter::new(*count).encode(events.encode_family(&labels)?)?;
            }
        }
        let mut handshakes = encoder.encode_descriptor(
            "handshakes",
            "Redirected connections that no proxy has accepted yet",
            None,
            MetricType::Gauge,
        )?;
        for (pod, counts) in &counts {
            let count = i64::try_from(counts.handshakes).unwrap_or(i64::MAX);
            ConstGauge::new(count).encode(handshakes.encode_family(&[("pod", *pod)])?)?;
        }
        let mut listeners = encoder.encode_descriptor(
            "listeners",
            "The proxy's listeners that are registered",
            None,
            MetricType::Gauge,
        )?;
        for (pod, counts) in &counts {
            for (port, count) in [
                ("outbound", counts.listeners.outbound),
                ("inbound", counts.listeners.inbound),
                ("dns", counts.listeners.dns),
            ] {
                let count = i64::try_from(count).unwrap_or(i64::MAX);
                let labels = [("pod", *pod), ("port", port)];
                ConstGauge::new(count).encode(listeners.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// Whether the registry isn't stuck.
pub(crate) fn is_healthy(view: &View) -> bool {
    view.get()
        .busy_since
        .is_none_or(|since| since.elapsed() < STUCK)
}

/// Serves `/metrics`, `/healthz` and `/readyz`, until it is dropped.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    view: View,
    pins: Pins,
) -> std::io::Result<()> {
    let (healthy, ready) = (view.clone(), view.clone());
    let app = Router::new()
        .route(
            "/metrics",
            get(async move || text(metrics, view, pins).await),
        )
        .route(
            "/healthz",
            get(async move || {
                if is_healthy(&healthy) {
                    (StatusCode::OK, "ok\n")
                } else {
                    (StatusCode::SERVICE_UNAVAILABLE, "stuck\n")
                }
            }),
        )
        .route(
            "/readyz",
            get(async move || {
                if ready.get().ready {
                    (StatusCode::OK, "ready\n")
                } else {
                    (
                        StatusCode::SERVICE_UNAVAILABLE,
                        "looking at the pods that are there, or waiting for the Kubernetes API \
                         server to tell of them\n",
                    )
                }
            }),
        );
    axum::serve(listener, app).await
}

async fn text(metrics: Arc<Metrics>, view: View, pins: Pins) -> impl IntoResponse {
    let encoded = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        encode(&mut text, &registry(&metrics, &view, &pins)).map(|()| text)
    })
    .await;
    match encoded {
        Ok(Ok(text)) => (
            StatusCode::OK,
            [(
                CONTENT_TYPE,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            )],
            text,
        ),
        _ => (
            StatusCode::INTERNAL_SERVER_ERROR,
            [(CONTENT_TYPE, "text/plain")],
            "the metrics can't be written\n".to_owned(),
        ),
    }
}

/// Listens for HTTP.
///
/// # Errors
///
/// If the address can't be had.
pub(crate) async fn listen(address: std::net::SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(Error::system(format!(
            "listening on {address} for metrics: choose another --metrics"
        )))
}
