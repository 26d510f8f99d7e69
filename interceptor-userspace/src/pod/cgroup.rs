//! Cgroups, version 2.

use std::{
    fs::{self, File},
    io, iter,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use crate::{Error, Result};

/// An open directory of the cgroup v2 tree.
#[derive(Debug)]
pub struct Cgroup {
    directory: File,
    path: PathBuf,
    id: u64,
}

impl Cgroup {
    /// Opens the cgroup at `path`.
    ///
    /// # Errors
    ///
    /// If there is no directory, or it is not of a cgroup v2 tree.
    pub fn open(path: &Path) -> Result<Self> {
        let not_cgroup2 = |why| Error::NotCgroup2 {
            path: path.to_owned(),
            why,
            mount: mount_point().map_or_else(
                || "a cgroup v2 mount (none is mounted)".to_owned(),
                |mount| mount.display().to_string(),
            ),
        };
        let path = path.canonicalize().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => not_cgroup2(" (no such directory)"),
            _ => Error::system(format!("opening the cgroup {}", path.display()))(error),
        })?;
        let open = || -> io::Result<_> {
            let directory = File::open(&path)?;
            let metadata = directory.metadata()?;
            let file_system = fstatfs(&directory)?.filesystem_type();
            Ok((directory, metadata, file_system))
        };
        let (directory, metadata, file_system) = open().map_err(Error::system(format!(
            "opening the cgroup {}",
            path.display()
        )))?;
        if file_system != CGROUP2_SUPER_MAGIC {
            return Err(not_cgroup2(if path.starts_with("/sys/fs/cgroup") {
                " (it is of a cgroup v1 hierarchy)"
            } else {
                ""
            }));
        }
        if !metadata.is_dir() {
            return Err(not_cgroup2(" (it is a file)"));
        }
        Ok(Self {
            directory,
            path,
            id: metadata.ino(),
        })
    }

    /// The kernel's number of the cgroup, as in `bpf_link_info`.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// Its path, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is the root of the machine's tree, which alone has no
    /// `cgroup.type` (admin-guide/cgroup-v2).
    pub fn is_root(&self) -> bool {
        !self.path.join("cgroup.type").exists()
    }

    /// The processes in it and in those below it. (Those of other PID namespaces
    /// that can't be named here are left out.)
    pub fn processes(&self) -> impl Iterator<Item = u32> {
        with_descendants(self.path.clone()).flat_map(|directory| {
            let pids = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            let pids: Vec<u32> = pids.lines().filter_map(|pid| pid.parse().ok()).collect();
            pids.into_iter().filter(|pid| *pid != 0)
        })
    }

    /// The cgroup and those above it, up to the mount's root.
    pub fn with_ancestors(&self) -> impl Iterator<Item = Self> {
        self.path
            .ancestors()
            .map_while(|path| Self::open(path).ok())
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// Where the cgroup v2 tree is mounted, if it is.
pub fn mount_point() -> Option<PathBuf> {
    procfs::process::Process::myself()
        .and_then(|process| process.mountinfo())
        .ok()?
        .into_iter()
        .find(|mount| mount.fs_type == "cgroup2")
        .map(|mount| mount.mount_point)
}

/// The path of the cgroup with this number, if it still exists.
pub fn path_of(id: u64) -> Option<PathBuf> {
    with_descendants(mount_point()?)
        .find(|directory| fs::metadata(directory).is_ok_and(|metadata| metadata.ino() == id))
}

/// A cgroup's directory and those below it, as far as they can be read.
pub(crate) fn with_descendants(cgroup: PathBuf) -> impl Iterator<Item = PathBuf> {
    let mut pending = vec![cgroup];
    iter::from_fn(move || {
        let directory = pending.pop()?;
        let entries = fs::read_dir(&directory).into_iter().flatten();
        pending.extend(
            entries
                .filter_map(io::Result::ok)
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
        Some(directory)
    })
}
