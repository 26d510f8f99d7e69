//! Throwaway network namespaces.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::command::{ip, require_root};

/// A named network namespace with `lo` up, removed when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes one of this name.
    ///
    /// # Errors
    ///
    /// If `ip netns` fails.
    pub fn new(name: &str) -> Result<Self> {
        require_root()?;
        ip(&format!("netns add {name}"))?;
        let netns = Self {
            name: name.to_owned(),
        };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Opens the file that stands for it.
    ///
    /// # Errors
    ///
    /// If it is gone.
    pub fn open(&self) -> Result<File> {
        let path = self.path();
        File::open(&path).with_context(|| format!("open {}", path.display()))
    }

    /// Runs `ip` with these arguments on this namespace.
    ///
    /// # Errors
    ///
    /// If it fails.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        ip(&format!("-n {} {arguments}", self.name))
    }

    /// Sets a sysctl of the namespace; `name` is below `/proc/sys/net`.
    ///
    /// # Errors
    ///
    /// If it can't be written.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.enter(|| {
            let path = format!("/proc/sys/net/{name}");
            fs::write(&path, value).with_context(|| format!("write {value} to {path}"))
        })
    }

    /// Runs `f` in a thread of its own that is inside the namespace.
    ///
    /// # Errors
    ///
    /// If the thread can't enter it, or `f` fails.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = self.open()?;
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&file, CloneFlags::CLONE_NEWNET)
                        .with_context(|| format!("enter netns {}", self.name))?;
                    f()
                })
                .join()
                .unwrap_or_else(|_| Err(anyhow!("panic inside netns {}", self.name)))
        })
    }
}

impl Drop for Netns {
    #[expect(clippy::print_stderr, reason = "nothing else can be told from drop")]
    fn drop(&mut self) {
        if let Err(error) = ip(&format!("netns del {}", self.name)) {
            eprintln!("netns {} stays behind: {error:#}", self.name);
        }
    }
}
