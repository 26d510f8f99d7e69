//! Finding a pod's cgroup and network namespace.

use super::rules;
use crate::{
    Error, Result,
    api::CniPod,
    daemon::sources::{
        directory::{Namespace, PodFile},
        kubernetes::KubernetesPod,
    },
    pod::{PodName, cgroup::Cgroup, netns::Netns},
    settings::Settings,
};

/// Why a pod is not attached.
#[derive(Debug)]
pub(crate) enum Why {
    /// Rightly.
    LeftAlone(String),
    /// It should be.
    Failed(Error),
}

impl Why {
    pub(crate) fn host_network() -> Self {
        Self::LeftAlone(rules::HOST_NETWORK.to_owned())
    }
}

impl From<Error> for Why {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// What is to be attached, and how.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) cgroup: Cgroup,
    pub(crate) netns: Netns,
    pub(crate) settings: Settings,
    /// How the namespace was named: a path, or a process.
    given: String,
}

impl Target {
    pub(crate) const fn new(
        cgroup: Cgroup,
        netns: Netns,
        given: String,
        settings: Settings,
    ) -> Self {
        Self {
            cgroup,
            netns,
            settings,
            given,
        }
    }

    /// What a pod file names.
    pub(crate) fn of_file(file: &PodFile, settings: Settings) -> Result<Self, Why> {
        let cgroup = Cgroup::open(&file.cgroup)?;
        let given = file.netns.to_string();
        let netns = Netns::open(&given)?;
        if netns.is_host() {
            return Err(Why::host_network());
        }
        if let Namespace::Process(pid) = &file.netns
            && !cgroup.processes().any(|process| process == *pid)
        {
            return Err(Why::Failed(Error::setting(
                "netns",
                pid,
                format!(
                    "is no process of the cgroup {}: give one of the pod's",
                    cgroup.path().display()
                ),
            )));
        }
        Ok(Self::new(cgroup, netns, given, settings))
    }

    pub(crate) fn given(&self) -> &str {
        &self.given
    }

    /// Whether what was opened is still what its names say: a name may have got
    /// another owner between being opened and being attached to.
    ///
    /// # Errors
    ///
    /// If not.
    pub(crate) fn check(&self) -> Result<()> {
        let cgroup = Cgroup::open(self.cgroup.path())?;
        let netns = Netns::open(&self.given)?;
        if cgroup.id() == self.cgroup.id() && netns.id() == self.netns.id() {
            Ok(())
        } else {
            Err(Error::setting(
                "network namespace",
                &self.given,
                "became another while it was being attached: ask again",
            ))
        }
    }
}

/// The name of a pod that CNI tells of: its own, and a part of its container's id,
/// because another of its name may not be gone yet.
///
/// # Errors
///
/// If the container's id isn't one.
pub(crate) fn cni_name(pod: &CniPod) -> Result<PodName> {
    let id = &pod.attachment.container_id;
    let valid = id.starts_with(|first: char| first.is_ascii_alphanumeric())
        && id.len() <= 256
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if !valid {
        return Err(Error::setting(
            "CNI_CONTAINERID",
            id,
            "is no container's id: it has letters, digits, `-`, `_` and `.`",
        ));
    }
    // The end tells apart what begins alike.
    let id = plain(id, 64);
    let parts: Vec<String> = [&pod.namespace, &pod.name]
        .into_iter()
        .flatten()
        .map(|part| plain(part, 24))
        .chain([if id.len() == 64 {
            id[..12].to_owned()
        } else {
            id
        }])
        .collect();
    parts.join("_").parse()
}

/// The name of a pod that was found in the cgroup tree.
pub(crate) fn cgroup_name(path: &std::path::Path, id: u64) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name
        .strip_suffix(".slice")
        .or_else(|| name.strip_suffix(".scope"))
        .unwrap_or(&name);
    format!("{}-{id}", plain(name, 80))
}

/// The name of a pod that the Kubernetes API tells of.
///
/// # Errors
///
/// If its uid isn't one.
pub(crate) fn kubernetes_name(pod: &KubernetesPod) -> Result<PodName> {
    [
        plain(&pod.namespace, 24),
        plain(&pod.name, 24),
        plain(&pod.uid, 64),
    ]
    .join("_")
    .parse()
}

/// A text in the letters of pods' names, cut off.
fn plain(text: &str, most: usize) -> String {
    text.chars()
        .map(|letter| match letter {
            letter if letter.is_ascii_alphanumeric() => letter,
            _ => '-',
        })
        .take(most)
        .collect()
}

/// The network namespace of a cgroup's processes, and the process that it was taken
/// from. With `proxy`, one process must run as one of these uids.
pub(crate) fn netns_of(cgroup: &Cgroup, proxy: Option<&[u32]>) -> Result<(u32, Netns), Why> {
    let mut on_host = false;
    let mut has_proxy = proxy.is_none();
    let mut oldest: Option<(u64, u32, Netns)> = None;
    for pid in cgroup.processes() {
        // It may end at any moment.
        let Some(process) = i32::try_from(pid)
            .ok()
            .and_then(|pid| procfs::process::Process::new(pid).ok())
        else {
            continue;
        };
        if let (Some(uids), Ok(uid)) = (proxy, process.uid()) {
            has_proxy |= uids.contains(&uid);
        }
        let (Ok(stat), Ok(netns)) = (process.stat(), Netns::open(&pid.to_string())) else {
            continue;
        };
        if netns.is_host() {
            on_host = true;
        } else if oldest
            .as_ref()
            .is_none_or(|(start, ..)| stat.starttime < *start)
        {
            // A container may have made one of its own: the pod's is older.
            oldest = Some((stat.starttime, pid, netns));
        }
    }
    match oldest {
        Some(_) if !has_proxy => Err(Why::LeftAlone(format!(
            "it has no proxy: no process runs as uid {}",
            proxy
                .unwrap_or_default()
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" or ")
        ))),
        Some((_, pid, netns)) => Ok((pid, netns)),
        None if on_host => Err(Why::host_network()),
        None => Err(Why::LeftAlone("no process is in its cgroup".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::api::CniAttachment;

    fn pod(container_id: &str) -> CniPod {
        CniPod {
            attachment: CniAttachment {
                container_id: container_id.to_owned(),
                interface: "eth0".to_owned(),
            },
            netns: "/run/netns/x".into(),
            namespace: Some("default".to_owned()),
            name: Some("web.example".to_owned()),
            uid: None,
            annotations: None,
            args: String::new(),
        }
    }

    #[test]
    fn a_pods_name_has_its_own_and_its_containers() {
        let id = "635441d43acd3ae874a214d9f7cba8a387ee6f5c76637b565dcb983dce065c19";
        assert_eq!(
            cni_name(&pod(id)).unwrap().as_ref(),
            "default_web-example_635441d43acd"
        );
        assert_eq!(
            cni_name(&CniPod {
                namespace: None,
                name: None,
                ..pod("short.id")
            })
            .unwrap()
            .as_ref(),
            "short-id"
        );
        for id in ["", "../x", "a b", ".a", &"x".repeat(300)] {
            assert!(cni_name(&pod(id)).is_err(), "{id}");
        }
        let path = Path::new("/c/kubepods-pod1_2.slice");
        let name = cgroup_name(path, 7);
        assert_eq!(name, "kubepods-pod1-2-7");
        assert!(name.parse::<PodName>().is_ok());
    }

    proptest! {
        #[test]
        fn whatever_cni_says_the_name_is_one_directory(
            id in ".{0,300}",
            namespace in proptest::option::of(".{0,300}"),
            name in proptest::option::of(".{0,300}"),
        ) {
            let given = CniPod { namespace, name, ..pod(&id) };
            if let Ok(name) = cni_name(&given) {
                prop_assert!(name.as_ref().parse::<PodName>().is_ok());
            }
        }
    }
}
