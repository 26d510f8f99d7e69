//! What the daemon can be told: each setting once, as a flag, an environment
//! variable and a key of the file; the first that is given counts.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result, api,
    datapath::UntilProxyListens,
    settings::{Profile, Settings},
};

/// The settings that were given. The file has the same names, with `-`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[command(next_help_heading = "Daemon")]
pub struct Options {
    /// The directory on a BPF file system below which pods are pinned: `--pins`.
    #[arg(skip)]
    pub pins: Option<PathBuf>,

    /// Where the daemon listens for `interceptor-cni`, and for `interceptor pods`, `status`,
    /// `chains` and `connections`.
    #[arg(long, value_name = "PATH", env = "INTERCEPTOR_SOCKET")]
    pub socket: Option<PathBuf>,

    /// Where metrics, health and readiness are served over HTTP; port 0 takes any.
    #[arg(long, value_name = "ADDRESS", env = "INTERCEPTOR_METRICS")]
    pub metrics: Option<SocketAddr>,

    /// A directory of pod files, for machines without Kubernetes.
    #[arg(long, value_name = "DIR", env = "INTERCEPTOR_PODS")]
    pub pods: Option<PathBuf>,

    /// Which cgroups are pods: `kubepods`, `podman`, and paths below the cgroup tree in which `*`
    /// stands for any part of a name.
    #[arg(
        long,
        value_name = "PATTERNS",
        value_delimiter = ',',
        env = "INTERCEPTOR_CGROUPS"
    )]
    pub cgroups: Option<Vec<String>>,

    /// The cgroup in which a pod's own will be made, for runtimes that make it after CNI's ADD:
    /// `libpod_parent` for podman.
    #[arg(long, value_name = "PATH", env = "INTERCEPTOR_CGROUP_PARENT")]
    pub cgroup_parent: Option<PathBuf>,

    /// Whether the Kubernetes API is asked for the pods of this node.
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        env = "INTERCEPTOR_KUBERNETES"
    )]
    pub kubernetes: Option<bool>,

    /// This node's name in Kubernetes.
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub node_name: Option<String>,

    /// Where the Kubernetes API is, and who asks it; if not given, what Kubernetes tells the pod
    /// in which the daemon runs.
    #[arg(long, value_name = "FILE", env = "INTERCEPTOR_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,

    /// Which pods are attached.
    #[arg(long, value_name = "WHICH", env = "INTERCEPTOR_SELECT")]
    pub select: Option<Select>,

    /// Namespaces whose pods are left alone.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        env = "INTERCEPTOR_EXCLUDE_NAMESPACES"
    )]
    pub exclude_namespaces: Option<Vec<String>>,

    /// What becomes of a pod that should be attached and can't be, at CNI's ADD.
    #[arg(long, value_name = "WHAT", env = "INTERCEPTOR_ON_FAILURE")]
    pub on_failure: Option<OnFailure>,

    /// What becomes of a pod's captured connections until its proxy begins to listen.
    #[arg(long, value_name = "WHAT", env = "INTERCEPTOR_UNTIL_PROXY_LISTENS")]
    pub until_proxy_listens: Option<UntilProxyListens>,

    /// For how many seconds connections are held at most, from when the pod is attached;
    /// 30 if nothing is said.
    #[arg(long, value_name = "SECONDS", env = "INTERCEPTOR_HOLD_LIMIT")]
    pub hold_limit: Option<u32>,

    /// The form of the log.
    #[arg(long, value_name = "FORM", env = "INTERCEPTOR_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,

    /// What is logged: `error`, `warn`, `info`, `debug` or `trace`, or a filter such as
    /// `info,interceptor_userspace=debug`.
    #[arg(long, value_name = "FILTER", env = "INTERCEPTOR_LOG")]
    pub log: Option<String>,

    /// Where the settings of pods start from: `--profile`.
    #[arg(skip)]
    pub profile: Option<Profile>,

    /// The settings of pods that say nothing else, over the profile's.
    #[arg(skip)]
    pub settings: Option<toml::Table>,
}

/// Which pods are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Select {
    /// Those that have a proxy: the injector's annotation says so, or, where annotations aren't
    /// known, a process of the proxy's uid runs in them.
    #[default]
    Injected,
    /// All.
    All,
}

/// What becomes of a pod that can't be attached at CNI's ADD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// It doesn't start.
    #[default]
    Fail,
    /// It starts, and its connections go past the proxy.
    Pass,
}

/// The form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object to a line.
    Json,
}

impl Options {
    /// Reads the file.
    ///
    /// # Errors
    ///
    /// If it can't be read, or has a key or value that can't be.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = || Error::system(format!("reading {}", path.display()));
        let text = fs::read_to_string(path).map_err(failed())?;
        toml::from_str(&text).map_err(|error| failed()(io::Error::other(error)))
    }

    /// These, and where one wasn't given, that of `file`.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        Self {
            pins: self.pins.or(file.pins),
            socket: self.socket.or(file.socket),
            metrics: self.metrics.or(file.metrics),
            pods: self.pods.or(file.pods),
            cgroups: self.cgroups.or(file.cgroups),
            cgroup_parent: self.cgroup_parent.or(file.cgroup_parent),
            kubernetes: self.kubernetes.or(file.kubernetes),
            node_name: self.node_name.or(file.node_name),
            kubeconfig: self.kubeconfig.or(file.kubeconfig),
            select: self.select.or(file.select),
            exclude_namespaces: self.exclude_namespaces.or(file.exclude_namespaces),
            on_failure: self.on_failure.or(file.on_failure),
            until_proxy_listens: self.until_proxy_listens.or(file.until_proxy_listens),
            hold_limit: self.hold_limit.or(file.hold_limit),
            log_format: self.log_format.or(file.log_format),
            log: self.log.or(file.log),
            profile: self.profile.or(file.profile),
            settings: self.settings.or(file.settings),
        }
    }

    /// Where the settings of pods start from.
    pub fn profile(&self) -> Profile {
        self.profile.unwrap_or(Profile::Cni)
    }

    /// The settings of pods that say nothing else.
    ///
    /// # Errors
    ///
    /// If one can't be.
    pub fn pod_settings(&self) -> Result<Settings> {
        let base = Settings::of(self.profile());
        match &self.settings {
            Some(table) => overlay(base, table),
            None => Ok(base),
        }
    }

    /// This node's name, if the Kubernetes API is to be asked.
    ///
    /// # Errors
    ///
    /// If there is none, or it can't be a node's.
    pub(crate) fn kubernetes_node(&self) -> Result<Option<&str>> {
        if self.kubernetes != Some(true) {
            return match &self.kubeconfig {
                Some(path) => Err(Error::setting(
                    "kubeconfig",
                    path.display(),
                    "is of no use without `kubernetes = true` or --kubernetes",
                )),
                None => Ok(None),
            };
        }
        let name = self.node_name.as_deref().unwrap_or_default();
        // A DNS name (RFC 1123), as Kubernetes has it: it becomes a part of a selector.
        let valid = (1..=253).contains(&name.len())
            && name.bytes().all(|byte| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.')
            });
        if valid {
            Ok(Some(name))
        } else {
            Err(Error::setting(
                "node-name",
                name,
                "is no node's name: with kubernetes, give this node's by --node-name or NODE_NAME",
            ))
        }
    }

    /// Where the daemon listens.
    pub fn socket(&self) -> PathBuf {
        self.socket
            .clone()
            .unwrap_or_else(|| api::DEFAULT_SOCKET.into())
    }

    /// The directory of the cgroup in which a pod's own will be made, in the tree that is
    /// mounted at `mount`.
    pub(crate) fn cgroup_parent_in(&self, mount: &Path) -> Option<PathBuf> {
        let path = self.cgroup_parent.as_ref()?;
        Some(mount.join(path.strip_prefix("/").unwrap_or(path)))
    }

    /// Where metrics are served.
    pub fn metrics(&self) -> SocketAddr {
        self.metrics
            .unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 15095).into())
    }

    /// How long connections are held.
    pub(crate) fn hold_limit(&self) -> Duration {
        Duration::from_secs(self.hold_limit.unwrap_or(30).into())
    }

    /// Namespaces whose pods are left alone.
    pub fn exclude_namespaces(&self) -> Vec<String> {
        self.exclude_namespaces
            .clone()
            .unwrap_or_else(|| ["istio-system", "kube-system"].map(str::to_owned).to_vec())
    }
}

/// `settings`, with those of a table over them.
///
/// # Errors
///
/// If one of the table can't be.
pub(crate) fn overlay(settings: Settings, table: &toml::Table) -> Result<Settings> {
    let failed = |error: String| {
        let names: Vec<&str> = table.keys().map(String::as_str).collect();
        Error::setting("settings", names.join(", "), error)
    };
    let mut all: BTreeMap<String, serde_json::Value> = serde_json::to_value(settings)
        .and_then(serde_json::from_value)
        .map_err(|error| failed(error.to_string()))?;
    for (name, value) in table {
        let value = serde_json::to_value(value).map_err(|error| failed(error.to_string()))?;
        all.insert(name.clone(), value);
    }
    let settings: Settings = serde_json::to_value(all)
        .and_then(serde_json::from_value)
        .map_err(|error| failed(error.to_string()))?;
    settings.check()?;
    Ok(settings)
}

/// What a running daemon goes by.
#[derive(Clone, Debug)]
pub struct Config {
    /// What it was told.
    pub options: Options,
    /// The root of its pins.
    pub pins: crate::datapath::Pins,
    /// The settings of pods that say nothing else.
    pub settings: Settings,
}

/// How long the pods of a source are left before they are looked at anew, though
/// nothing seems to have happened.
pub(crate) const RESYNC: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Ports;

    #[test]
    fn a_flag_comes_before_the_file() {
        let file: Options =
            toml::from_str("socket = '/a'\nselect = 'all'\n[settings]\noutbound_port = 16001\n")
                .unwrap();
        let given = Options {
            socket: Some("/b".into()),
            ..Options::default()
        };
        let options = given.or(file);
        assert_eq!(options.socket(), Path::new("/b"));
        assert_eq!(options.select, Some(Select::All));
        let settings = options.pod_settings().unwrap();
        assert_eq!(settings.outbound_port, 16001);
        assert_eq!(
            settings.excluded_inbound_ports,
            Settings::of(Profile::Cni).excluded_inbound_ports
        );
    }

    #[test]
    fn kubernetes_needs_the_nodes_name() {
        let of = |text: &str| -> Result<Option<String>> {
            let options: Options = toml::from_str(text).unwrap();
            Ok(options.kubernetes_node()?.map(str::to_owned))
        };
        assert_eq!(of("node-name = 'n'").unwrap(), None);
        assert_eq!(of("kubernetes = false").unwrap(), None);
        assert_eq!(
            of("kubernetes = true\nnode-name = 'node-1.example'").unwrap(),
            Some("node-1.example".to_owned())
        );
        for text in [
            "kubernetes = true",
            "kubernetes = true\nnode-name = ''",
            "kubernetes = true\nnode-name = 'a,metadata.name=b'",
        ] {
            let error = of(text).unwrap_err().to_string();
            assert!(error.contains("NODE_NAME"), "{error}");
        }
        let error = of("kubeconfig = '/k'").unwrap_err().to_string();
        assert!(error.contains("--kubernetes"), "{error}");
    }

    #[test]
    fn what_can_not_be_is_named() {
        let error = toml::from_str::<Options>("sockt = '/a'").unwrap_err();
        assert!(error.to_string().contains("sockt"), "{error}");
        for (table, name) in [
            ("outbound_prt = 1", "outbound_prt"),
            ("outbound_port = 70000", "70000"),
        ] {
            let error = overlay(Settings::default(), &table.parse().unwrap()).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        let table = "inbound_ports = '80,90'".parse().unwrap();
        let settings = overlay(Settings::default(), &table).unwrap();
        assert_eq!(settings.inbound_ports, "80,90".parse::<Ports>().unwrap());
    }
}
