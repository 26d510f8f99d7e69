//! The user namespace that owns a pod's network namespace: `--uid-owner 1337` in
//! the pod means 1337 there.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
};

use nix::{
    sched::{CloneFlags, setns},
    sys::wait::waitpid,
    unistd::{ForkResult, fork, pipe},
};

use super::netns::Netns;
use crate::{Error, Result, settings::IdMap};

/// `NS_GET_USERNS` (linux/nsfs.h; Linux 4.9).
const NS_GET_USERNS: libc::c_ulong = 0xb701;

/// How the user namespace that owns `netns` numbers uids and gids, seen from
/// this process's own.
///
/// # Errors
///
/// If the kernel doesn't tell.
pub(crate) fn id_maps(netns: &Netns) -> Result<(IdMap, IdMap)> {
    let failed = || {
        Error::system(format!(
            "reading the user namespace of the network namespace {}",
            netns.given()
        ))
    };
    let namespace = owner(netns).map_err(failed())?;
    let ours = fs::metadata("/proc/self/ns/user").map_err(failed())?;
    let theirs = namespace.metadata().map_err(failed())?;
    if (ours.ino(), ours.dev()) == (theirs.ino(), theirs.dev()) {
        return Ok((IdMap::default(), IdMap::default()));
    }
    read_maps(&namespace).map_err(failed())
}

fn owner(netns: &Netns) -> io::Result<File> {
    use std::os::fd::AsFd as _;
    // SAFETY: takes no argument and returns a descriptor.
    let fd = unsafe { libc::ioctl(netns.as_fd().as_raw_fd(), NS_GET_USERNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Reads the maps through a child that enters the namespace, because a process
/// need not live in it, and only one without threads may enter it.
fn read_maps(namespace: &File) -> io::Result<(IdMap, IdMap)> {
    let (entered, child_entered) = pipe()?;
    let (child_leave, leave) = pipe()?;
    // SAFETY: the child makes system calls only, on descriptors opened before.
    let child = match unsafe { fork() }? {
        ForkResult::Child => {
            drop((entered, leave));
            let errno = match setns(namespace, CloneFlags::CLONE_NEWUSER) {
                Ok(()) => 0,
                Err(errno) => errno as i32,
            };
            let _ = File::from(child_entered).write_all(&errno.to_ne_bytes());
            // Until the parent has read, or is gone.
            let _ = File::from(child_leave).read(&mut [0]);
            // SAFETY: ends the child without running what the parent registered.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => child,
    };
    drop((child_entered, child_leave));
    let read = || -> io::Result<_> {
        let mut errno = [0; 4];
        File::from(entered).read_exact(&mut errno)?;
        match i32::from_ne_bytes(errno) {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        let map = |name| fs::read_to_string(format!("/proc/{child}/{name}"));
        Ok((parse(&map("uid_map")?)?, parse(&map("gid_map")?)?))
    };
    let maps = read();
    drop(leave);
    waitpid(child, None)?;
    maps
}

/// Reads lines of three numbers.
fn parse(text: &str) -> io::Result<IdMap> {
    text.lines()
        .map(|line| {
            let numbers: Vec<u32> = line
                .split_whitespace()
                .map(str::parse)
                .collect::<Result<_, _>>()
                .map_err(io::Error::other)?;
            match numbers[..] {
                [inside, outside, count] => Ok((inside, outside, count)),
                _ => Err(io::Error::other(format!("not three numbers: {line}"))),
            }
        })
        .collect::<io::Result<_>>()
        .map(IdMap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_lines_of_three_numbers() {
        let map = parse("         0     100000      65536\n     65536       1000          1\n");
        assert_eq!(
            map.unwrap(),
            IdMap(vec![(0, 100_000, 65536), (65536, 1000, 1)])
        );
        assert!(parse("0 1").is_err());
        assert!(parse("0 1 x").is_err());
    }
}
