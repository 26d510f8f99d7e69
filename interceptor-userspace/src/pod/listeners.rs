//! Listeners that are older than the attachment: found in the pod's network
//! namespace, and taken from a process that holds them.
//!
//! A BPF iterator could hand them to the kernel programs instead, but before
//! Linux 6.5 (and the stable kernels of that time) it holds the very lock that
//! a socket map takes: the machine would hang.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader},
    os::fd::OwnedFd,
};

use procfs::{
    FromBufReadSI as _, current_system_info,
    net::{TcpNetEntries, TcpState},
    process::{FDTarget, Process, all_processes},
};
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::{cgroup::Cgroup, netns::Netns};
use crate::{Error, Result};

/// A socket that listens on one of the wanted ports.
#[derive(Debug)]
pub(crate) struct Listener {
    /// Its port, in host byte order.
    pub(crate) port: u16,
    /// A descriptor of it.
    pub(crate) socket: OwnedFd,
}

/// The TCP sockets of the namespace that listen on these ports (host byte
/// order). The holders are looked for in the pod's cgroup first. One that is
/// closed meanwhile is left out, and one that no process holds.
///
/// # Errors
///
/// If the namespace can't be looked into, or a process gives no socket away.
pub(crate) fn find(cgroup: &Cgroup, netns: &Netns, ports: &[u16]) -> Result<Vec<Listener>> {
    let mut wanted = listening(netns)?;
    wanted.retain(|(port, _)| ports.contains(port));
    let mut found = Vec::new();
    if wanted.is_empty() {
        return Ok(found);
    }
    let in_pod = cgroup
        .processes()
        .filter_map(|pid| Process::new(pid.try_into().ok()?).ok());
    let others = all_processes().into_iter().flatten().filter_map(Result::ok);
    for process in in_pod.chain(others) {
        take(&process, &mut wanted, &mut found)?;
        if wanted.is_empty() {
            break;
        }
    }
    Ok(found)
}

/// The ports and inodes of all sockets that listen.
fn listening(netns: &Netns) -> Result<Vec<(u16, u64)>> {
    netns.enter(|| {
        let mut sockets = Vec::new();
        for name in ["tcp", "tcp6"] {
            // The namespace of this thread, not of the process.
            let path = format!("/proc/thread-self/net/{name}");
            match read_listening(&path) {
                Ok(entries) => sockets.extend(entries),
                // A kernel without IPv6.
                Err(error) if name == "tcp6" && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::system(format!("reading {path}"))(error)),
            }
        }
        Ok(sockets)
    })
}

fn read_listening(path: &str) -> io::Result<Vec<(u16, u64)>> {
    // They come first: what follows may be a hundred thousand connections.
    let mut text = String::new();
    for (number, line) in BufReader::new(File::open(path)?).lines().enumerate() {
        let line = line?;
        if number > 0 && line.split_ascii_whitespace().nth(3) != Some("0A") {
            break;
        }
        text += &line;
        text.push('\n');
    }
    let entries = TcpNetEntries::from_buf_read(text.as_bytes(), current_system_info())
        .map_err(io::Error::other)?;
    Ok(entries
        .0
        .into_iter()
        .filter(|entry| entry.state == TcpState::Listen)
        .map(|entry| (entry.local_address.port(), entry.inode))
        .collect())
}

/// Takes the wanted sockets that the process holds.
fn take(process: &Process, wanted: &mut Vec<(u16, u64)>, found: &mut Vec<Listener>) -> Result<()> {
    // It may end meanwhile, or close a descriptor.
    let Ok(descriptors) = process.fd() else {
        return Ok(());
    };
    for descriptor in descriptors.filter_map(Result::ok) {
        let FDTarget::Socket(inode) = descriptor.target else {
            continue;
        };
        let Some(position) = wanted.iter().position(|(_, other)| *other == inode) else {
            continue;
        };
        match duplicate(process.pid(), descriptor.fd) {
            Ok(socket) => {
                let (port, _) = wanted.swap_remove(position);
                found.push(Listener { port, socket });
            }
            Err(Errno::SRCH | Errno::BADF) => {}
            Err(errno) => {
                return Err(Error::system(format!(
                    "taking the listener {} of process {} (which CAP_SYS_PTRACE allows)",
                    descriptor.fd,
                    process.pid()
                ))(errno.into()));
            }
        }
    }
    Ok(())
}

/// The socket that is another process's descriptor (`pidfd_getfd`, Linux 5.6).
fn duplicate(pid: i32, fd: i32) -> rustix::io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(Errno::SRCH)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    pidfd_getfd(&process, fd, PidfdGetfdFlags::empty())
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::fd::AsRawFd as _};

    use super::*;

    #[test]
    fn a_socket_that_listens_is_seen_and_can_be_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let sockets = read_listening("/proc/thread-self/net/tcp").unwrap();
        let (_, inode) = *sockets.iter().find(|(other, _)| *other == port).unwrap();
        let myself = Process::myself().unwrap();
        let mut wanted = vec![(port, inode), (1, u64::MAX)];
        let mut found = Vec::new();
        take(&myself, &mut wanted, &mut found).unwrap();
        assert_eq!(wanted, [(1, u64::MAX)]);
        let same = TcpListener::from(found.pop().unwrap().socket);
        assert_ne!(same.as_raw_fd(), listener.as_raw_fd());
        assert_eq!(same.local_addr().unwrap(), listener.local_addr().unwrap());
    }
}
