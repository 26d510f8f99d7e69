//! Which pods are left alone, by what the runtime or the Kubernetes API says of
//! them: the rules of the mesh's own CNI plugin.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::{
    api::CniPod,
    daemon::{
        config::{Options, Select},
        sources::kubernetes::KubernetesPod,
    },
    settings,
};

/// The proxy's container.
pub(crate) const PROXY: &str = "istio-proxy";

/// The container of initialisation that makes the mesh's iptables rules.
const REDIRECTS: &str = "istio-init";

/// What the injector leaves: what it has added to the pod, as JSON.
const STATUS: &str = "sidecar.istio.io/status";

/// Whether a proxy is wanted. As a label it counts more than as an annotation.
const INJECT: &str = "sidecar.istio.io/inject";

/// On a pod whose connections the mesh takes from outside of it.
const AMBIENT: &str = "ambient.istio.io/redirection";

/// A pod's label that asks for that.
const MODE: &str = "istio.io/dataplane-mode";

/// Whether somebody here reads an annotation or a label.
pub(crate) fn is_read(key: &str) -> bool {
    [STATUS, INJECT, AMBIENT, MODE].contains(&key) || settings::is_read(key)
}

/// Who says what a pod is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Told<'a> {
    /// The container runtime, through CNI.
    Runtime(&'a CniPod),
    /// The Kubernetes API.
    Api(&'a KubernetesPod),
}

impl<'a> Told<'a> {
    fn namespace(self) -> Option<&'a str> {
        match self {
            Self::Runtime(pod) => pod.namespace.as_deref(),
            Self::Api(pod) => Some(&pod.namespace),
        }
    }

    fn annotations(self) -> Option<&'a BTreeMap<String, String>> {
        match self {
            Self::Runtime(pod) => pod.annotations.as_ref(),
            Self::Api(pod) => Some(&pod.annotations),
        }
    }

    fn annotation(self, name: &str) -> Option<&'a str> {
        self.annotations()?.get(name).map(String::as_str)
    }

    fn label(self, name: &str) -> Option<&'a str> {
        match self {
            Self::Runtime(_) => None,
            Self::Api(pod) => pod.labels.get(name).map(String::as_str),
        }
    }

    /// Whether a container of its own makes iptables rules.
    fn redirects(self) -> bool {
        /// A part of what the injector leaves.
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Status {
            init_containers: Option<Vec<String>>,
        }
        match self {
            Self::Api(pod) => pod.containers.contains(REDIRECTS),
            Self::Runtime(_) => self
                .annotation(STATUS)
                .and_then(|status| serde_json::from_str::<Status>(status).ok())
                .and_then(|status| status.init_containers)
                .is_some_and(|names| names.iter().any(|name| name == REDIRECTS)),
        }
    }

    /// Whether, and by what, it is said that no proxy is wanted.
    fn injection_off(self) -> Option<&'static str> {
        let (what, value) = match (self.label(INJECT), self.annotation(INJECT)) {
            (Some(label), _) => ("label", label),
            (None, Some(annotation)) => ("annotation", annotation),
            (None, None) => return None,
        };
        (parse_bool(value) == Some(false)).then_some(what)
    }
}

/// Why a pod is left alone, if it is. That it is on the machine's own network may
/// come out later, when its namespace is looked at.
pub(crate) fn left_alone(options: &Options, told: Told<'_>) -> Option<String> {
    if let Some(namespace) = told.namespace()
        && options
            .exclude_namespaces()
            .iter()
            .any(|name| name == namespace)
    {
        return Some(format!("the namespace {namespace} is excluded"));
    }
    if let Told::Api(pod) = told
        && pod.host_network
    {
        return Some(HOST_NETWORK.to_owned());
    }
    let has_status = told.annotation(STATUS).is_some();
    // A proxy beside it comes first.
    if told.annotation(AMBIENT) == Some("enabled")
        || told.label(MODE) == Some("ambient") && !has_status
    {
        return Some("the mesh intercepts it from outside: it is in ambient mode".to_owned());
    }
    if told.redirects() {
        return Some(format!(
            "its container {REDIRECTS} redirects already, by iptables: turn that off in the mesh"
        ));
    }
    if let Some(what) = told.injection_off() {
        return Some(format!("its {what} {INJECT} is false"));
    }
    if options.select.unwrap_or_default() == Select::All {
        return None;
    }
    if told.annotations().is_none() {
        return Some(
            "its annotations aren't known, by which pods with a proxy are told: give \
             interceptor-cni the capability io.kubernetes.cri.pod-annotations, or the daemon \
             --kubernetes or --select all"
                .to_owned(),
        );
    }
    if let Told::Api(pod) = told
        && let Some(because) = without_proxy(pod)
    {
        return Some(because);
    }
    (!has_status).then(|| format!("it has no proxy: the annotation {STATUS} is missing"))
}

/// What is said of a pod on the machine's own network.
pub(crate) const HOST_NETWORK: &str = "it is on the machine's own network";

/// Why a pod's containers are no application's with a proxy.
fn without_proxy(pod: &KubernetesPod) -> Option<String> {
    if !pod.containers.contains(PROXY) {
        return Some(format!("it has no proxy: no container is named {PROXY}"));
    }
    if pod.proxy_off {
        return Some(format!(
            "it has no proxy: {PROXY} is told so, by DISABLE_ENVOY"
        ));
    }
    match pod.proxy_type.as_deref() {
        None | Some("sidecar") => None,
        Some(other) => Some(format!("its proxy is a {other}, no sidecar")),
    }
}

/// What the mesh's programs, which are written in Go, take for a truth value.
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::CniAttachment;

    const INJECTED: (&str, &str) = (STATUS, r#"{"initContainers":["istio-validation"]}"#);

    fn options(select: Select) -> Options {
        Options {
            select: Some(select),
            ..Options::default()
        }
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn of_runtime(annotations: Option<&[(&str, &str)]>) -> CniPod {
        CniPod {
            attachment: CniAttachment {
                container_id: "a".to_owned(),
                interface: "eth0".to_owned(),
            },
            netns: "/run/netns/x".into(),
            namespace: Some("default".to_owned()),
            name: Some("web".to_owned()),
            uid: None,
            annotations: annotations.map(map),
            args: String::new(),
        }
    }

    fn of_api() -> KubernetesPod {
        KubernetesPod {
            namespace: "default".to_owned(),
            name: "web".to_owned(),
            uid: "1".to_owned(),
            annotations: map(&[INJECTED]),
            containers: ["app", PROXY].map(str::to_owned).into(),
            proxy_type: Some("sidecar".to_owned()),
            ..KubernetesPod::default()
        }
    }

    #[test]
    fn by_the_runtimes_word() {
        let injected = options(Select::Injected);
        let why = |pod: &CniPod| left_alone(&injected, Told::Runtime(pod));
        assert!(why(&of_runtime(None)).unwrap().contains("aren't known"));
        assert!(why(&of_runtime(Some(&[]))).unwrap().contains("no proxy"));
        assert_eq!(why(&of_runtime(Some(&[INJECTED]))), None);
        for odd in ["", "{}", "x", "[]", r#"{"initContainers":null}"#] {
            assert_eq!(why(&of_runtime(Some(&[(STATUS, odd)]))), None, "{odd}");
        }
        for (pair, said) in [
            ((INJECT, "false"), "its annotation sidecar.istio.io/inject"),
            ((INJECT, "F"), "its annotation sidecar.istio.io/inject"),
            ((AMBIENT, "enabled"), "ambient"),
            (
                (STATUS, r#"{"initContainers":["istio-init"]}"#),
                "redirects already",
            ),
        ] {
            let because = why(&of_runtime(Some(&[INJECTED, pair]))).unwrap();
            assert!(because.contains(said), "{because}");
        }
        for fine in ["true", "", "perhaps"] {
            assert_eq!(why(&of_runtime(Some(&[INJECTED, (INJECT, fine)]))), None);
        }
        let system = CniPod {
            namespace: Some("kube-system".to_owned()),
            ..of_runtime(Some(&[INJECTED]))
        };
        assert!(why(&system).unwrap().contains("kube-system"));
        let all = options(Select::All);
        assert_eq!(left_alone(&all, Told::Runtime(&of_runtime(None))), None);
    }

    #[test]
    fn by_the_apis_word() {
        type Change<'a> = &'a dyn Fn(&mut KubernetesPod);
        let why = |select, change: Change<'_>| {
            let mut pod = of_api();
            change(&mut pod);
            left_alone(&options(select), Told::Api(&pod))
        };
        assert_eq!(why(Select::Injected, &|_| {}), None);
        let label = |name: &str, value: &str| map(&[(name, value)]);
        // Whether they hold for all pods, too.
        let cases: [(Change<'_>, &str, bool); 10] = [
            (&|pod| pod.host_network = true, "own network", true),
            (
                &|pod| pod.namespace = "istio-system".to_owned(),
                "istio-system",
                true,
            ),
            (
                &|pod| pod.labels = label(INJECT, "false"),
                "its label",
                true,
            ),
            (
                &|pod| pod.containers.extend([REDIRECTS.to_owned()]),
                "redirects already",
                true,
            ),
            (
                &|pod| pod.annotations.extend(map(&[(AMBIENT, "enabled")])),
                "ambient",
                true,
            ),
            (
                &|pod| {
                    pod.annotations.clear();
                    pod.labels = label(MODE, "ambient");
                },
                "ambient",
                true,
            ),
            (
                &|pod| pod.containers.retain(|name| name != PROXY),
                "no container is named",
                false,
            ),
            (&|pod| pod.proxy_off = true, "DISABLE_ENVOY", false),
            (
                &|pod| pod.proxy_type = Some("router".to_owned()),
                "router",
                false,
            ),
            (
                &|pod| pod.annotations.clear(),
                "sidecar.istio.io/status is missing",
                false,
            ),
        ];
        for (change, said, for_all) in cases {
            let because = why(Select::Injected, change).unwrap();
            assert!(because.contains(said), "{because}");
            assert_eq!(why(Select::All, change).is_some(), for_all, "{said}");
        }
        // The label counts more.
        let both = |pod: &mut KubernetesPod| {
            pod.labels = label(INJECT, "true");
            pod.annotations
                .insert(INJECT.to_owned(), "false".to_owned());
        };
        assert_eq!(why(Select::Injected, &both), None);
        // A proxy in the pod comes before ambient mode.
        let both = |pod: &mut KubernetesPod| pod.labels = label(MODE, "ambient");
        assert_eq!(why(Select::Injected, &both), None);
    }
}
