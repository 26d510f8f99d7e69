//! Where pins lie: a directory per pod below one root on bpffs, with the pod's
//! maps in `maps/` and its links in `links/`.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::{Error, Result, pod::PodName};

/// Where pins lie if nothing else is said.
pub const DEFAULT_ROOT: &str = "/sys/fs/bpf/interceptor";

/// The pin, among a pod's maps, of what who attached it wants to find again.
pub(crate) const NOTE: &str = "NOTE";

/// Below the root: locked by the daemon as long as it runs. No pod can have this
/// name.
const DAEMON: &str = "+daemon";

/// Where bpffs is mounted by convention.
const BPFFS: &str = "/sys/fs/bpf";

/// The root of all pins.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

/// Held while pins are made or removed; other processes wait. The root goes
/// with the lock if it is empty then.
#[derive(Debug)]
pub(crate) struct Lock {
    root: PathBuf,
    _directory: Flock<File>,
}

/// Held as long as a daemon runs: there is one for a root of pins. It goes with
/// the process.
#[derive(Debug)]
pub struct DaemonLock {
    pins: Pins,
    _directory: Flock<File>,
}

impl Pins {
    /// The pins below `root`, which need not exist yet.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of a pod.
    pub fn pod(&self, pod: &PodName) -> PathBuf {
        self.root.join(pod.as_ref())
    }

    /// The directory in which a pod's pins are made, before it is renamed. No
    /// pod can have this name.
    pub(crate) fn attaching(&self, pod: &PodName) -> PathBuf {
        self.root.join(format!("{pod}+attaching"))
    }

    /// What a pod's directory is renamed to before its pins are removed.
    pub(crate) fn detaching(&self, pod: &PodName) -> PathBuf {
        self.root.join(format!("{pod}+detaching"))
    }

    /// The pods that have a directory.
    ///
    /// # Errors
    ///
    /// If the root can't be read.
    pub fn pods(&self) -> Result<Vec<PodName>> {
        let mut pods: Vec<PodName> = self
            .entries()?
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        pods.sort();
        Ok(pods)
    }

    /// The pods of which something is half made or half removed.
    pub(crate) fn leftovers(&self) -> Result<Vec<PodName>> {
        let mut pods: Vec<PodName> = self
            .entries()?
            .iter()
            .filter_map(|name| {
                name.strip_suffix("+attaching")
                    .or_else(|| name.strip_suffix("+detaching"))?
                    .parse()
                    .ok()
            })
            .collect();
        pods.dedup();
        Ok(pods)
    }

    /// The directory that the daemon locks.
    pub(crate) fn daemon(&self) -> PathBuf {
        self.root.join(DAEMON)
    }

    /// Takes the place of the one daemon that looks after these pins.
    ///
    /// # Errors
    ///
    /// If another one has it: says which.
    pub fn lock_daemon(&self) -> Result<DaemonLock> {
        let _lock = self.lock()?;
        let path = self.daemon();
        let system = |operation: &str| Error::system(format!("{operation} {}", path.display()));
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(system("making")(error));
            }
            _ => {}
        }
        let directory = File::open(&path).map_err(system("opening"))?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(directory) => Ok(DaemonLock {
                pins: self.clone(),
                _directory: directory,
            }),
            Err((_, Errno::EWOULDBLOCK)) => Err(Error::DaemonRuns {
                pid: self.daemon_pid(),
                root: self.root.clone(),
            }),
            Err((_, errno)) => Err(system("locking")(errno.into())),
        }
    }

    /// The process of the daemon that looks after these pins, if one does and
    /// can be seen from here.
    pub fn daemon_pid(&self) -> Option<i32> {
        let directory = fs::metadata(self.daemon()).ok()?;
        procfs::locks()
            .ok()?
            .into_iter()
            .find(|lock| {
                lock.inode == directory.ino()
                    && nix::sys::stat::makedev(lock.devmaj.into(), lock.devmin.into())
                        == directory.dev()
            })
            .and_then(|lock| lock.pid)
            .filter(|pid| *pid > 0)
    }

    fn entries(&self) -> Result<Vec<String>> {
        match fs::read_dir(&self.root) {
            Ok(entries) => Ok(entries
                .filter_map(io::Result::ok)
                .filter_map(|entry| entry.file_name().into_string().ok())
                .collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::system(format!("reading {}", self.root.display()))(
                error,
            )),
        }
    }

    /// Makes the root, mounting bpffs at `/sys/fs/bpf` if that is all that is
    /// missing, and takes its lock.
    pub(crate) fn lock(&self) -> Result<Lock> {
        if self.root.starts_with(BPFFS) && !on_bpffs(Path::new(BPFFS)) {
            mount(
                Some("bpf"),
                BPFFS,
                Some("bpf"),
                MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
                Some("mode=0700"),
            )
            .map_err(|errno| {
                Error::system(format!("mounting a BPF file system at {BPFFS}"))(errno.into())
            })?;
        }
        let existing = self.root.ancestors().find(|path| path.exists());
        if !existing.is_some_and(on_bpffs) {
            return Err(Error::NotBpffs {
                path: self.root.clone(),
            });
        }
        let system =
            |operation: &str| Error::system(format!("{operation} {}", self.root.display()));
        loop {
            // Where everybody may enter bpffs, the pods' names are nobody's business.
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.root)
                .map_err(system("making"))?;
            let directory = match File::open(&self.root) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(system("opening"))?,
            };
            let directory =
                Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| {
                    // It may have been made just now; with pods in it, it stays.
                    let _: io::Result<()> = fs::remove_dir(&self.root);
                    system("locking")(errno.into())
                })?;
            // Who held the lock before may have removed the directory.
            let ours = directory.metadata().map_err(system("reading"))?.ino();
            if fs::metadata(&self.root).is_ok_and(|current| current.ino() == ours) {
                return Ok(Lock {
                    root: self.root.clone(),
                    _directory: directory,
                });
            }
        }
    }
}

impl Drop for DaemonLock {
    fn drop(&mut self) {
        // While it is locked, so that nobody waits for what is gone.
        if let Ok(_lock) = self.pins.lock() {
            let _: io::Result<()> = fs::remove_dir(self.pins.daemon());
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Fails, as it should, as long as a pod is attached.
        let _: io::Result<()> = fs::remove_dir(&self.root);
    }
}

/// Removes a directory of pins, if it is there.
pub(crate) fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::system(format!(
            "removing {}",
            directory.display()
        ))(error)),
        _ => Ok(()),
    }
}

/// A directory of pins in the making: removed, unless it is kept.
#[derive(Debug)]
pub(crate) struct Staging {
    directory: PathBuf,
    kept: bool,
}

impl Staging {
    pub(crate) fn make(directory: PathBuf) -> Result<Self> {
        let make = |path: &Path| {
            fs::create_dir(path).map_err(Error::system(format!("making {}", path.display())))
        };
        make(&directory)?;
        let staging = Self {
            directory,
            kept: false,
        };
        for inside in ["maps", "links"] {
            make(&staging.directory.join(inside))?;
        }
        Ok(staging)
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        map_pin(&self.directory, name)
    }

    pub(crate) fn link(&self, name: &str) -> PathBuf {
        link_pin(&self.directory, name)
    }

    /// Makes it what it was made for, in one step.
    pub(crate) fn keep_as(mut self, directory: &Path) -> Result<()> {
        fs::rename(&self.directory, directory).map_err(Error::system(format!(
            "renaming {} to {}",
            self.directory.display(),
            directory.display()
        )))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.kept {
            // The error that brought us here is the one to report; a later
            // attach or detach of the pod removes what stays.
            let _: Result<()> = remove(&self.directory);
        }
    }
}

/// The pin of a map in a pod's directory.
pub(crate) fn map_pin(pod: &Path, name: &str) -> PathBuf {
    pod.join("maps").join(name)
}

/// The pin of a link in a pod's directory.
pub(crate) fn link_pin(pod: &Path, name: &str) -> PathBuf {
    pod.join("links").join(name)
}

fn on_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|info| info.filesystem_type() == BPF_FS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directories_of_one_pod_are_no_pods_names() {
        let pins = Pins::at("/sys/fs/bpf/x");
        let pod: PodName = "web".parse().unwrap();
        for directory in [pins.attaching(&pod), pins.detaching(&pod)] {
            let name = directory.file_name().unwrap().to_str().unwrap();
            assert!(name.parse::<PodName>().is_err(), "{name}");
        }
    }

    #[test]
    fn no_root_means_no_pods() {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::at(directory.path().join("none"));
        assert_eq!(pins.pods().unwrap(), []);
    }

    #[test]
    fn another_file_system_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let error = Pins::at(directory.path()).lock().unwrap_err();
        assert!(matches!(error, Error::NotBpffs { .. }), "{error}");
    }
}
