//! The plugin's configuration, as a container runtime hands it over.

use std::{collections::BTreeMap, path::PathBuf};

use rscni_types::{
    error::Error,
    types::{Cmd, GcAttachment},
    version::{PluginInfo, SpecVersion},
};
use serde::{Deserialize, Deserializer};
use serde_json::{error::Category, value::RawValue};

use crate::api;

/// The capability by which containerd hands a pod's annotations over.
pub const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// What becomes of a pod while no daemon answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnError {
    /// It doesn't start.
    #[default]
    Fail,
    /// It starts, and is not intercepted.
    Pass,
}

/// The entry of the network configuration's list of plugins, and what runtimes
/// add to it.
#[derive(Debug, Deserialize)]
pub(super) struct Config<'a> {
    #[serde(rename = "cniVersion")]
    declared_version: String,

    /// Where the daemon listens.
    #[serde(default = "default_socket")]
    pub(super) socket: PathBuf,

    /// What becomes of a pod while no daemon answers.
    #[serde(default)]
    pub(super) on_error: OnError,

    /// What the plugin before this one has answered, as it was written.
    #[serde(borrow, default, rename = "prevResult")]
    previous: Option<&'a RawValue>,

    #[serde(default, rename = "runtimeConfig")]
    runtime: RuntimeConfig,

    /// The attachments that GC must leave. Runtimes that are written in Go send
    /// null for an empty list; one that isn't there is another thing.
    #[serde(
        default,
        rename = "cni.dev/valid-attachments",
        deserialize_with = "list_or_null"
    )]
    valid: Option<Vec<GcAttachment>>,
}

#[derive(Debug, Default, Deserialize)]
struct RuntimeConfig {
    #[serde(default, rename = "io.kubernetes.cri.pod-annotations")]
    annotations: Option<BTreeMap<String, String>>,
}

fn default_socket() -> PathBuf {
    api::DEFAULT_SOCKET.into()
}

fn list_or_null<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<GcAttachment>>, D::Error> {
    let list: Option<Vec<GcAttachment>> = Deserialize::deserialize(deserializer)?;
    Ok(Some(list.unwrap_or_default()))
}

impl<'a> Config<'a> {
    /// Reads it off what the runtime writes to standard input.
    ///
    /// # Errors
    ///
    /// If it isn't JSON (6), or JSON of another shape (7).
    pub(super) fn read(text: &'a [u8]) -> Result<Self, Error> {
        serde_json::from_slice(text).map_err(|error| match error.classify() {
            Category::Data => Error::InvalidNetworkConfig(format!(
                "{error}: correct the entry of \
                 the type `interceptor-cni` in the network configuration"
            )),
            Category::Io | Category::Syntax | Category::Eof => Error::FailedToDecode(format!(
                "the configuration on standard input is no JSON: {error}"
            )),
        })
    }

    /// The version of the specification that it asks for.
    ///
    /// # Errors
    ///
    /// If this plugin doesn't speak it, or it lacks the command (1).
    pub(super) fn version(&self, command: Cmd) -> Result<SpecVersion, Error> {
        let version: SpecVersion = self.declared_version.parse()?;
        PluginInfo::default().validate(version)?;
        version.allows(command)?;
        Ok(version)
    }

    /// The previous plugin's result, to be passed on.
    ///
    /// # Errors
    ///
    /// If there is none (7).
    pub(super) fn previous(&self) -> Result<&'a str, Error> {
        match self.previous.map(RawValue::get) {
            Some(result) if result.starts_with('{') => Ok(result),
            Some(other) => Err(Error::InvalidNetworkConfig(format!(
                "prevResult is no object: {other}"
            ))),
            None => Err(Error::InvalidNetworkConfig(
                "there is no prevResult: put interceptor-cni into the list of plugins after the one \
                 that makes the pod's network"
                    .to_owned(),
            )),
        }
    }

    /// The pod's annotations, if the runtime sends them.
    pub(super) fn annotations(&mut self) -> Option<BTreeMap<String, String>> {
        self.runtime.annotations.take()
    }

    /// The attachments that GC must leave.
    ///
    /// # Errors
    ///
    /// If the list is missing (7): it would mean all.
    pub(super) fn valid_attachments(&self) -> Result<Vec<api::CniAttachment>, Error> {
        let valid = self.valid.as_ref().ok_or_else(|| {
            Error::InvalidNetworkConfig(
                "GC needs the list `cni.dev/valid-attachments`: without it every pod would be \
                 detached"
                    .to_owned(),
            )
        })?;
        Ok(valid
            .iter()
            .map(|attachment| api::CniAttachment {
                container_id: attachment.container_id.clone(),
                interface: attachment.ifname.clone(),
            })
            .collect())
    }
}

/// The version that a configuration or a request for the versions names, if
/// this plugin speaks it; else the newest.
pub(super) fn version_to_answer_in(text: &[u8]) -> SpecVersion {
    #[derive(Deserialize)]
    struct Version {
        #[serde(rename = "cniVersion")]
        version: SpecVersion,
    }
    serde_json::from_slice(text)
        .ok()
        .map(|Version { version }| version)
        .filter(|version| PluginInfo::default().validate(*version).is_ok())
        .unwrap_or_default()
}
