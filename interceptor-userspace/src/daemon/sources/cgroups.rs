//! The cgroup tree, watched: pods are the directories whose paths match a pattern.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    str::FromStr,
    sync::mpsc::Sender,
    thread,
    time::Duration,
};

use inotify::{Inotify, WatchDescriptor, WatchMask};

use crate::{
    Error, Result,
    daemon::pods::{Listing, Message},
    pod::cgroup,
};

/// How long changes are gathered.
const GATHER: Duration = Duration::from_millis(5);

/// A path below the root of the cgroup tree, in whose names `*` stands for any
/// part.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pattern(Vec<String>);

impl FromStr for Pattern {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let names: Vec<String> = text
            .split('/')
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect();
        if names.is_empty() || names.iter().any(|name| name == "." || name == "..") {
            return Err(Error::setting(
                "cgroups",
                text,
                "is no pattern: give `kubepods`, `podman`, or a path below the cgroup tree such \
                 as /pods/*",
            ));
        }
        Ok(Self(names))
    }
}

/// What stands for the pods of Kubernetes.
pub(crate) const OF_KUBERNETES: &str = "kubepods";

/// The paths of pods under Kubernetes: with the runtime's cgroup driver
/// `cgroupfs`, then with `systemd`; guaranteed, burstable and best-effort ones.
const KUBEPODS: [&str; 6] = [
    "kubepods/pod*",
    "kubepods/burstable/pod*",
    "kubepods/besteffort/pod*",
    "kubepods.slice/kubepods-pod*.slice",
    "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod*.slice",
    "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod*.slice",
];

/// The paths of podman's pods, and of its containers without one: with its cgroup
/// manager `cgroupfs`, then with `systemd`.
const PODMAN: [&str; 3] = [
    "libpod_parent/*",
    "machine.slice/machine-libpod_pod_*.slice",
    "machine.slice/libpod-*.scope",
];

/// What `kubepods`, `podman` or a pattern of one's own stands for.
///
/// # Errors
///
/// If it is no pattern.
pub fn patterns(text: &str) -> Result<Vec<Pattern>> {
    match text {
        OF_KUBERNETES => KUBEPODS.iter().copied().map(str::parse).collect(),
        "podman" => PODMAN.iter().copied().map(str::parse).collect(),
        own => own.parse().map(|pattern| vec![pattern]),
    }
}

/// Whether a text can be a pod's uid: it becomes a part of a path.
pub(crate) fn is_uid(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// The cgroup of the Kubernetes pod with this uid, if it is there.
pub(crate) fn of_kubernetes(mount: &Path, uid: &str) -> Option<PathBuf> {
    if !is_uid(uid) {
        return None;
    }
    KUBEPODS.iter().find_map(|pattern| {
        // systemd's names take no `-`.
        let uid = if pattern.ends_with(".slice") {
            uid.replace('-', "_")
        } else {
            uid.to_owned()
        };
        let path = mount.join(pattern.replace('*', &uid));
        path.is_dir().then_some(path)
    })
}

/// A cgroup that is a pod's, or may become one's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sighting {
    pub(crate) path: PathBuf,
    /// The kernel's number of it.
    pub(crate) id: u64,
    /// Whether it is to be attached for itself; if not, it is watched only for
    /// pods that are attached above it.
    pub(crate) wanted: bool,
    /// Its own name and those of the cgroups in it: containers' ids are parts of
    /// them.
    pub(crate) names: Vec<String>,
}

/// What is watched, and what for.
pub(crate) struct Watched {
    /// Where the tree is mounted.
    pub(crate) mount: PathBuf,
    /// The patterns of pods.
    pub(crate) pods: Vec<Pattern>,
    /// Those of cgroups that are watched only for pods that are attached above
    /// them.
    pub(crate) others: Vec<Pattern>,
}

impl Watched {
    /// All cgroups that match now. `visit` is told of every directory on the way,
    /// before it is read, and of every match.
    fn list(&self, visit: &mut dyn FnMut(&Path)) -> Vec<Sighting> {
        let mut found = BTreeMap::new();
        for (patterns, wanted) in [(&self.others, false), (&self.pods, true)] {
            for pattern in patterns {
                walk(&self.mount, &pattern.0, visit, &mut |path| {
                    found.insert(path.to_owned(), wanted);
                });
            }
        }
        found
            .into_iter()
            .filter_map(|(path, wanted)| {
                let id = fs::metadata(&path).ok()?.ino();
                let mut names = directories(&path).unwrap_or_default();
                names.extend(
                    path.file_name()
                        .and_then(|name| name.to_str().map(str::to_owned)),
                );
                Some(Sighting {
                    path,
                    id,
                    wanted,
                    names,
                })
            })
            .collect()
    }
}

fn walk(
    directory: &Path,
    names: &[String],
    visit: &mut dyn FnMut(&Path),
    found: &mut dyn FnMut(&Path),
) {
    visit(directory);
    let [first, rest @ ..] = names else {
        found(directory);
        return;
    };
    // One that is gone meanwhile has none.
    for name in directories(directory).unwrap_or_default() {
        if matches(first, &name) {
            walk(&directory.join(name), rest, visit, found);
        }
    }
}

/// The names of the directories in one.
fn directories(path: &Path) -> io::Result<Vec<String>> {
    Ok(fs::read_dir(path)?
        .filter_map(io::Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect())
}

/// Whether a name matches a pattern in which `*` stands for any part.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Tells of the pods in the tree now, and whenever one comes, goes, or gets its
/// first process.
///
/// # Errors
///
/// If the tree can't be watched.
pub(crate) fn watch(watched: Watched, messages: Sender<Message>) -> Result<()> {
    let failed = || Error::system(format!("watching {}", watched.mount.display()));
    let mut inotify = Inotify::init().map_err(failed())?;
    thread::Builder::new()
        .name("cgroups".to_owned())
        .spawn(move || {
            let mut buffer = [0; 1 << 14];
            loop {
                // Each directory is watched before it is read: what comes later is
                // told of, and what came before is found.
                let mut watcher = inotify.watches();
                let listing = watched.list(&mut |path| {
                    let mask = WatchMask::CREATE
                        | WatchMask::DELETE
                        | WatchMask::MOVED_FROM
                        | WatchMask::MOVED_TO
                        | WatchMask::ONLYDIR;
                    match watcher.add(path, mask) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => {
                            tracing::error!(%error, cgroup = %path.display(), "watching a cgroup");
                        }
                        // The kernel removes the watch of one that goes.
                        _ => {}
                    }
                });
                for sighting in &listing {
                    let path = sighting.path.join("cgroup.events");
                    // Says whether there are processes. Gone with the cgroup.
                    let _: io::Result<WatchDescriptor> = watcher.add(path, WatchMask::MODIFY);
                }
                if messages
                    .send(Message::Listing(Listing::Cgroups(listing)))
                    .is_err()
                {
                    return;
                }
                if let Err(error) = inotify.read_events_blocking(&mut buffer) {
                    tracing::error!(%error, "watching the cgroup tree");
                    thread::sleep(Duration::from_secs(1));
                }
                thread::sleep(GATHER);
            }
        })
        .map(drop)
        .map_err(Error::system("starting a thread"))
}

/// Where the cgroup tree is mounted.
///
/// # Errors
///
/// If it isn't.
pub(crate) fn mount() -> Result<PathBuf> {
    cgroup::mount_point().ok_or_else(|| {
        Error::system("looking for the cgroup v2 tree")(io::Error::other(
            "none is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup`",
        ))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_star_stands_for_any_part_of_a_name() {
        for (pattern, name, expected) in [
            ("*", "anything", true),
            ("pod*", "pod1", true),
            ("pod*", "xpod1", false),
            ("kubepods-pod*.slice", "kubepods-pod1_2.slice", true),
            ("kubepods-pod*.slice", "kubepods-burstable.slice", false),
            ("a*b*c", "a1b2c", true),
            ("a*b*c", "a1c2b", false),
            ("pod", "pod", true),
            ("pod", "pods", false),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn pods_are_found_where_the_patterns_say() {
        let mount = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = mount.path().join(path);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let pods = [
            make("kubepods/pod1/container"),
            make("kubepods/besteffort/pod2"),
            make("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod3_4.slice"),
        ];
        make("kubepods/burstable");
        make("system.slice/sshd.service");
        make("libpod_parent/other");
        let watched = Watched {
            mount: mount.path().to_owned(),
            pods: patterns("kubepods").unwrap(),
            others: patterns("podman").unwrap(),
        };
        let mut visited = Vec::new();
        let listing = watched.list(&mut |path| visited.push(path.to_owned()));
        let found: Vec<&Path> = listing
            .iter()
            .filter(|sighting| sighting.wanted)
            .map(|sighting| sighting.path.as_path())
            .collect();
        assert_eq!(found, [&pods[1], pods[0].parent().unwrap(), &pods[2]]);
        assert_eq!(listing.len(), 4);
        assert!(visited.contains(&mount.path().join("kubepods/burstable")));
        assert_eq!(
            of_kubernetes(mount.path(), "3-4").as_deref(),
            Some(&*pods[2])
        );
        assert_eq!(of_kubernetes(mount.path(), "5"), None);
        let pod = &listing[1];
        assert_eq!(pod.names, ["container", "pod1"], "{:?}", pod.path);
    }

    proptest! {
        #[test]
        fn no_uid_leads_out_of_its_directory(uid in ".{0,80}") {
            if is_uid(&uid) {
                prop_assert!(!uid.contains(['/', '.']));
            } else {
                prop_assert_eq!(of_kubernetes(Path::new("/"), &uid), None);
            }
        }
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for text in ["", "/", "a/../b"] {
            assert!(patterns(text).is_err(), "{text}");
        }
    }
}
