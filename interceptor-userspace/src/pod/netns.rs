//! Network namespaces.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    panic,
    path::PathBuf,
    thread,
};

use nix::sched::{CloneFlags, setns};

use crate::{Error, Result};

/// What tells one network namespace from every other that lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetnsId {
    /// The device of its file.
    pub device: u64,
    /// The inode of its file.
    pub inode: u64,
}

/// An open network namespace.
#[derive(Debug)]
pub struct Netns {
    file: File,
    id: NetnsId,
    given: String,
}

impl Netns {
    /// Opens a network namespace by the path of its file, or by the PID of a
    /// process in it.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn open(path_or_pid: &str) -> Result<Self> {
        let path = if path_or_pid.bytes().all(|byte| byte.is_ascii_digit()) {
            PathBuf::from(format!("/proc/{path_or_pid}/ns/net"))
        } else {
            PathBuf::from(path_or_pid)
        };
        let not_netns = |source| Error::NotNetns {
            given: path_or_pid.to_owned(),
            source,
        };
        let file = File::open(&path).map_err(|error| not_netns(Some(error)))?;
        let metadata = file.metadata().map_err(|error| not_netns(Some(error)))?;
        let netns = Self {
            file,
            id: NetnsId {
                device: metadata.dev(),
                inode: metadata.ino(),
            },
            given: path_or_pid.to_owned(),
        };
        // setns() is the kernel's own test of what kind of file it is.
        netns.enter(|| Ok(())).map_err(|error| match error {
            Error::System { source, .. }
                if source.raw_os_error() == Some(nix::errno::Errno::EINVAL as i32) =>
            {
                not_netns(None)
            }
            error => error,
        })?;
        Ok(netns)
    }

    /// A namespace that a process lives in or that a file is mounted on, by
    /// its identity.
    pub fn find(id: NetnsId) -> Option<Self> {
        let mounted = ["/run/netns", "/var/run/netns"]
            .into_iter()
            .filter_map(|directory| fs::read_dir(directory).ok())
            .flatten()
            .filter_map(io::Result::ok)
            .map(|entry| entry.path());
        let processes = procfs::process::all_processes()
            .into_iter()
            .flatten()
            .filter_map(procfs::ProcResult::ok)
            .map(|process| PathBuf::from(format!("/proc/{}/ns/net", process.pid())));
        mounted
            .chain(processes)
            .find(|path| {
                fs::metadata(path)
                    .is_ok_and(|metadata| metadata.ino() == id.inode && metadata.dev() == id.device)
            })
            .and_then(|path| Self::open(path.to_str()?).ok())
            .filter(|netns| netns.id == id)
    }

    /// Its identity.
    pub const fn id(&self) -> NetnsId {
        self.id
    }

    /// How it was named when it was opened.
    pub fn given(&self) -> &str {
        &self.given
    }

    /// Whether it is the machine's own: the one that PID 1 lives in, or, where
    /// that may not be looked at, this process.
    pub fn is_host(&self) -> bool {
        ["/proc/1/ns/net", "/proc/self/ns/net"]
            .iter()
            .find_map(|path| fs::metadata(path).ok())
            .is_none_or(|metadata| {
                metadata.ino() == self.id.inode && metadata.dev() == self.id.device
            })
    }

    /// Runs `work` in the namespace, on a thread of its own, and waits for it.
    ///
    /// # Errors
    ///
    /// If the namespace can't be entered, or `work`'s.
    ///
    /// # Panics
    ///
    /// If `work` does.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| {
                        Error::system(format!("entering the network namespace {}", self.given))(
                            errno.into(),
                        )
                    })?;
                    work()
                })
                .join()
                .unwrap_or_else(|payload| panic::resume_unwind(payload))
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
