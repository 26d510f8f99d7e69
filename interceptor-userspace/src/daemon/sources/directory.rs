//! A directory of pod files: `NAME.toml` or `NAME.json`, for machines without
//! Kubernetes.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::mpsc::Sender,
    thread,
    time::Duration,
};

use inotify::{Inotify, WatchMask};
use serde::Deserialize;

use crate::{
    Error, Result,
    daemon::pods::{Listing, Message},
    pod::PodName,
};

/// The most bytes that a pod file may have.
const MAX_FILE: u64 = 64 << 10;

/// How long changes are gathered: an editor makes several.
const GATHER: Duration = Duration::from_millis(20);

/// What a pod file says. Its name is the pod's.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodFile {
    /// The pod's cgroup: a directory.
    pub cgroup: PathBuf,
    /// The pod's network namespace: its file, or the number of one of its
    /// processes.
    pub netns: Namespace,
    /// The pod's annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// The pod's settings, over the daemon's.
    #[serde(default)]
    pub settings: toml::Table,
}

/// How a pod file names a network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Namespace {
    /// By a process in it.
    Process(u32),
    /// By its file.
    File(String),
}

impl std::fmt::Display for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "{pid}"),
            Self::File(path) => f.write_str(path),
        }
    }
}

/// Reads a pod file.
///
/// # Errors
///
/// If its name can't be a pod's, it is too long, or it says what can't be: in
/// words for people.
fn read(path: &Path) -> Result<PodFile, String> {
    path.file_stem()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
        .parse::<PodName>()
        .map_err(|error| error.to_string())?;
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text))
        .map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("it has more than {MAX_FILE} bytes"));
    }
    parse(&text, path.extension().is_some_and(|end| end == "json"))
}

/// Reads what a pod file says.
///
/// # Errors
///
/// If it can't be: in words for people.
pub fn parse(text: &str, json: bool) -> Result<PodFile, String> {
    if json {
        serde_json::from_str(text).map_err(|error| error.to_string())
    } else {
        toml::from_str(text).map_err(|error| error.to_string())
    }
}

/// Tells of the directory's pods now, and whenever a file changes.
///
/// # Errors
///
/// If the directory can't be watched.
pub(crate) fn watch(directory: PathBuf, messages: Sender<Message>) -> Result<()> {
    let failed = || Error::system(format!("watching {}", directory.display()));
    let mut inotify = Inotify::init().map_err(failed())?;
    inotify
        .watches()
        .add(
            &directory,
            WatchMask::CLOSE_WRITE
                | WatchMask::MOVED_FROM
                | WatchMask::MOVED_TO
                | WatchMask::DELETE
                | WatchMask::ONLYDIR,
        )
        .map_err(failed())?;
    let first = list(&directory).map_err(failed())?;
    thread::Builder::new()
        .name("pod files".to_owned())
        .spawn(move || {
            let mut buffer = [0; 4096];
            let mut listing = Ok(first);
            loop {
                match listing {
                    Ok(files) => {
                        if messages
                            .send(Message::Listing(Listing::Directory(files)))
                            .is_err()
                        {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::error!(%error, directory = %directory.display(), "reading pod files");
                    }
                }
                if let Err(error) = inotify.read_events_blocking(&mut buffer) {
                    tracing::error!(%error, "watching pod files");
                    thread::sleep(Duration::from_secs(1));
                }
                thread::sleep(GATHER);
                listing = list(&directory);
            }
        })
        .map(drop)
        .map_err(Error::system("starting a thread"))
}

/// All pod files, by the pods' names.
fn list(directory: &Path) -> io::Result<BTreeMap<String, Result<PodFile, String>>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let (Some(stem), Some(end)) = (
            path.file_stem().and_then(|name| name.to_str()),
            path.extension().and_then(|end| end.to_str()),
        ) else {
            continue;
        };
        if !matches!(end, "toml" | "json") || stem.starts_with('.') {
            continue;
        }
        let twin = files.insert(stem.to_owned(), read(&path));
        if twin.is_some() {
            let both = format!("there are {stem}.toml and {stem}.json: remove one");
            files.insert(stem.to_owned(), Err(both));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_file_names_its_pods_cgroup_and_namespace() {
        let toml = "cgroup = '/c'\nnetns = '/run/netns/a'\n[annotations]\na = 'b'\n\
                    [settings]\noutbound_port = 1\n";
        let file = parse(toml, false).unwrap();
        assert_eq!(file.netns, Namespace::File("/run/netns/a".to_owned()));
        assert_eq!(file.settings.len(), 1);
        let file = parse(r#"{"cgroup": "/c", "netns": 12}"#, true).unwrap();
        assert_eq!(file.netns, Namespace::Process(12));
    }

    #[test]
    fn what_can_not_be_is_said() {
        for (text, said) in [
            ("cgroup = '/c'", "netns"),
            ("cgroup = '/c'\nnetns = '/n'\nnets = 1", "nets"),
            ("cgroup = 1\nnetns = '/n'", "cgroup"),
        ] {
            let error = parse(text, false).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a b.toml");
        fs::write(&path, "").unwrap();
        assert!(read(&path).unwrap_err().contains("a b"));
        let path = directory.path().join("big.toml");
        fs::write(&path, vec![b'#'; 1 << 20]).unwrap();
        assert!(read(&path).unwrap_err().contains("more than"));
    }

    #[test]
    fn a_pod_has_one_file() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.toml", "a.json", "b.toml~", ".c.toml", "d.txt"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        let files = list(directory.path()).unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["a"]);
        assert!(files["a"].as_ref().unwrap_err().contains("remove one"));
    }

    proptest! {
        #[test]
        fn no_text_does_harm(text in ".{0,200}", json: bool) {
            let _: Result<PodFile, String> = parse(&text, json);
        }

        #[test]
        fn a_damaged_file_is_an_error_or_another_file(
            position: prop::sample::Index,
            length in 0_usize..9,
            patch in prop::collection::vec(any::<u8>(), 0..9),
        ) {
            let mut text = b"cgroup = '/c'\nnetns = 12\n[annotations]\na = 'b'\n\
                [settings]\noutbound_port = 1\n"
                .to_vec();
            let start = position.index(text.len());
            let end = text.len().min(start + length);
            text.splice(start..end, patch);
            // As it comes from the directory: not always text.
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("web.toml");
            fs::write(&path, &text).unwrap();
            if let Err(error) = read(&path) {
                prop_assert!(!error.is_empty());
            }
        }
    }
}
