//! Throwaway cgroups.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};

use crate::command::{require_root, wait_until};

/// The kubelet's directory of pods, with the cgroup driver `cgroupfs`.
const KUBEPODS: &str = "kubepods";

/// A directory in the cgroup v2 tree, removed when dropped, after the end of
/// every process that is still in it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes one of this name below the tree's root.
    ///
    /// # Errors
    ///
    /// If there is no cgroup v2 tree or the directory can't be made.
    pub fn new(name: &str) -> Result<Self> {
        require_root()?;
        let path = Self::mount()?.join(name.trim_start_matches('/'));
        fs::create_dir(&path).with_context(|| format!("make cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Makes the one of a pod of Kubernetes' with this uid. The directory of all
    /// such pods goes with the last.
    ///
    /// # Errors
    ///
    /// If there is no cgroup v2 tree or the directory can't be made.
    pub fn of_kubernetes(uid: &str) -> Result<Self> {
        require_root()?;
        let path = Self::mount()?.join(KUBEPODS).join(format!("pod{uid}"));
        // Another test's last pod may go at the same moment.
        wait_until(
            "the directory of pods is there",
            Duration::from_secs(5),
            || match fs::create_dir_all(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                result => result
                    .map(Some)
                    .with_context(|| format!("make cgroup {}", path.display())),
            },
        )?;
        Ok(Self { path })
    }

    /// Where the cgroup v2 tree is mounted.
    ///
    /// # Errors
    ///
    /// If it isn't.
    pub fn mount() -> Result<PathBuf> {
        mounted("cgroup2")?.into_iter().next().context(
            "no cgroup v2 tree: mount one (`mount -t cgroup2 none /sys/fs/cgroup/unified`)",
        )
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file into which a process writes 0 to enter.
    ///
    /// # Errors
    ///
    /// If it is gone.
    pub fn open_procs(&self) -> Result<File> {
        let path = self.path.join("cgroup.procs");
        OpenOptions::new()
            .write(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))
    }

    fn remove(&self) -> Result<()> {
        // Busy until the last process is gone.
        wait_until("its processes end", Duration::from_secs(5), || {
            kill_all(&self.path)?;
            match remove_tree(&self.path) {
                Ok(()) => Ok(Some(())),
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    }
}

/// Where the cgroup trees of both versions are mounted.
pub(crate) fn mounts() -> Result<Vec<PathBuf>> {
    Ok([mounted("cgroup")?, mounted("cgroup2")?].concat())
}

/// Where file systems of this kind are mounted.
fn mounted(kind: &str) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    Ok(mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .filter(|(_, other)| *other == kind)
        .map(|(path, _)| PathBuf::from(path))
        .collect())
}

/// Kills the processes of the cgroup and of those below it.
fn kill_all(path: &Path) -> Result<()> {
    let kill = path.join("cgroup.kill");
    if kill.exists() {
        return fs::write(&kill, "1").context("write cgroup.kill");
    }
    // Before Linux 5.14 one by one; whoever asks asks until none is left.
    let procs = fs::read_to_string(path.join("cgroup.procs")).context("read cgroup.procs")?;
    for pid in procs.lines().filter_map(|line| line.parse().ok()) {
        // It may have ended meanwhile.
        let _ = signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            kill_all(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes the cgroup and those below it. (Its files go by themselves.)
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

impl Drop for Cgroup {
    #[expect(clippy::print_stderr, reason = "nothing else can be told from drop")]
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("cgroup {} stays behind: {error:#}", self.path.display());
        }
        if let Some(parent) = self.path.parent()
            && parent.ends_with(KUBEPODS)
        {
            // Others may have theirs in it.
            let _ = fs::remove_dir(parent);
        }
    }
}
