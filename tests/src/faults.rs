//! Makes a command's system calls fail, one at a time: what a full disk, a missing
//! privilege, a full map or the verifier's refusal would do, at every step.
//!
//! The kernel asks this process about each call (seccomp's user notification) and
//! is told to fail it, or to go on.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use aya_obj::generated::bpf_cmd;
use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_FILTER_FLAG_NEW_LISTENER,
    SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND, SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF,
    SECCOMP_SET_MODE_FILTER, SECCOMP_USER_NOTIF_FLAG_CONTINUE, seccomp_notif, seccomp_notif_resp,
    sock_filter, sock_fprog,
};

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The descriptor under which the command's process holds its end until this process
/// has it, too: no other comes so far.
const LISTENER: RawFd = 250;

/// The calls that are asked about, each with the error that it fails with.
const CALLS: [(libc::c_long, i32); 9] = [
    (libc::SYS_bpf, libc::EPERM),
    (libc::SYS_setns, libc::EPERM),
    (libc::SYS_socket, libc::EMFILE),
    (libc::SYS_sendto, libc::ENOBUFS),
    (libc::SYS_sendmsg, libc::ENOBUFS),
    (libc::SYS_flock, libc::ENOLCK),
    (libc::SYS_pidfd_getfd, libc::EPERM),
    (MKDIR, libc::EROFS),
    (RENAME, libc::EROFS),
];

#[cfg(target_arch = "x86_64")]
const MKDIR: libc::c_long = libc::SYS_mkdir;
#[cfg(not(target_arch = "x86_64"))]
const MKDIR: libc::c_long = libc::SYS_mkdirat;
#[cfg(target_arch = "x86_64")]
const RENAME: libc::c_long = libc::SYS_rename;
#[cfg(not(target_arch = "x86_64"))]
const RENAME: libc::c_long = libc::SYS_renameat;

/// What flock(2) is asked for.
const UNLOCK: u64 = libc::LOCK_UN.cast_unsigned() as u64;

/// A system call that a command makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    number: libc::c_long,
    /// What of bpf(2) is called; 0 for others.
    command: u64,
}

impl Call {
    /// What an error must say that comes of its failure: the kernel's own words, but
    /// where a library keeps them to itself, and where it takes the failure for the
    /// lack of a feature.
    pub fn words(self) -> String {
        let types = u64::from(bpf_cmd::BPF_BTF_LOAD as u32);
        if [libc::SYS_sendto, libc::SYS_sendmsg].contains(&self.number) {
            "through netlink".to_owned()
        } else if (self.number, self.command) == (libc::SYS_bpf, types) {
            "own types".to_owned()
        } else {
            io::Error::from_raw_os_error(self.error()).to_string()
        }
    }

    /// The error that such a call fails with.
    fn error(self) -> i32 {
        let is = |command: bpf_cmd| {
            self.number == libc::SYS_bpf && self.command == u64::from(command as u32)
        };
        if is(bpf_cmd::BPF_MAP_CREATE) {
            libc::ENOMEM
        } else if is(bpf_cmd::BPF_MAP_UPDATE_ELEM) {
            // A full map.
            libc::E2BIG
        } else if is(bpf_cmd::BPF_PROG_LOAD) {
            // The verifier's refusal.
            libc::EACCES
        } else if is(bpf_cmd::BPF_OBJ_PIN) {
            libc::EROFS
        } else {
            CALLS
                .iter()
                .find(|(number, _)| *number == self.number)
                .map_or(libc::EPERM, |(_, errno)| *errno)
        }
    }
}

/// What a command did.
#[derive(Debug)]
pub struct Run {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed to standard error.
    pub stderr: String,
    /// Its calls, in their order.
    pub calls: Vec<Call>,
}

/// Runs a command and fails its call number `fails`, from 0.
///
/// # Errors
///
/// If it can't be run, or doesn't end.
pub fn run(command: &mut Command, fails: Option<usize>) -> Result<Run> {
    let mut stderr = tempfile::tempfile()?;
    command
        .stdout(File::create("/dev/null")?)
        .stderr(stderr.try_clone()?);
    let filter = filter();
    // SAFETY: two system calls, which allocate nothing, on what was made before.
    unsafe {
        command.pre_exec(move || listen(&filter));
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("run {command:?}"))?;
    let answered = listener(&child).and_then(|listener| answer(&mut child, &listener, fails));
    if answered.is_err() {
        // Its calls would wait for ever.
        let _ = child.kill();
        let _ = child.wait();
    }
    let (status, calls) = answered.with_context(|| format!("{command:?}"))?;
    let mut text = String::new();
    stderr.rewind()?;
    stderr.read_to_string(&mut text)?;
    Ok(Run {
        status,
        stderr: text,
        calls,
    })
}

/// The kernel shall ask about [`CALLS`], and let all others go on.
fn filter() -> Vec<sock_filter> {
    let statement = |code: u32, k: u32| sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt: 0,
        jf: 0,
        k,
    };
    // The number of the call is the first word of what the filter sees.
    let mut filter = vec![statement(BPF_LD | BPF_W | BPF_ABS, 0)];
    for (index, (number, _)) in CALLS.iter().enumerate() {
        filter.push(sock_filter {
            jt: u8::try_from(CALLS.len() - index).unwrap_or_default(),
            ..statement(
                BPF_JMP | BPF_JEQ | BPF_K,
                u32::try_from(*number).unwrap_or_default(),
            )
        });
    }
    filter.push(statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    filter.push(statement(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF));
    filter
}

/// Puts the filter in force for this process.
fn listen(filter: &[sock_filter]) -> io::Result<()> {
    let program = sock_fprog {
        len: u16::try_from(filter.len()).unwrap_or_default(),
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: a program of the length given, which the kernel copies.
    unsafe {
        let listener = libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_SET_MODE_FILTER,
            SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        );
        let listener = i32::try_from(listener).map_err(io::Error::other)?;
        // Not closed by exec().
        if listener < 0 || libc::dup2(listener, LISTENER) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The other end of what the process listens with.
fn listener(child: &Child) -> Result<OwnedFd> {
    // SAFETY: calls that return a new descriptor, which is ours.
    unsafe {
        let owned = |fd: libc::c_long| -> io::Result<OwnedFd> {
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(OwnedFd::from_raw_fd(
                i32::try_from(fd).map_err(io::Error::other)?,
            ))
        };
        let process = owned(libc::syscall(libc::SYS_pidfd_open, child.id(), 0))
            .context("open the process")?;
        owned(libc::syscall(
            libc::SYS_pidfd_getfd,
            process.as_raw_fd(),
            LISTENER,
            0,
        ))
        .context("take the listener of its calls")
    }
}

/// Answers until the process ends.
fn answer(
    child: &mut Child,
    listener: &OwnedFd,
    fails: Option<usize>,
) -> Result<(ExitStatus, Vec<Call>)> {
    let start = Instant::now();
    let mut calls = Vec::new();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok((status, calls));
        }
        if start.elapsed() > LIMIT {
            bail!("not done after {LIMIT:?}");
        }
        let mut poll = libc::pollfd {
            fd: listener.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one structure.
        unsafe {
            libc::poll(&raw mut poll, 1, 20);
        }
        if poll.revents & libc::POLLIN == 0 {
            continue;
        }
        // SAFETY: all zero is a valid value of this plain struct, and what the kernel
        // wants.
        let mut asked: seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes no more than the struct's length.
        let received = unsafe {
            libc::ioctl(
                listener.as_raw_fd(),
                SECCOMP_IOCTL_NOTIF_RECV,
                &raw mut asked,
            )
        };
        if received < 0 {
            // Who called has ended meanwhile.
            continue;
        }
        let number = libc::c_long::from(asked.data.nr);
        let call = Call {
            number,
            command: if number == libc::SYS_bpf {
                asked.data.args[0]
            } else {
                0
            },
        };
        // A lock can always be given back.
        let counts = number != libc::SYS_flock || asked.data.args[1] != UNLOCK;
        let fails = counts && fails == Some(calls.len());
        if counts {
            calls.push(call);
        }
        let mut answer = seccomp_notif_resp {
            id: asked.id,
            val: 0,
            error: 0,
            flags: 0,
        };
        if fails {
            answer.error = -call.error();
        } else {
            answer.flags = u32::try_from(SECCOMP_USER_NOTIF_FLAG_CONTINUE)?;
        }
        // SAFETY: a whole answer. An error means that who called has ended.
        unsafe {
            libc::ioctl(
                listener.as_raw_fd(),
                SECCOMP_IOCTL_NOTIF_SEND,
                &raw mut answer,
            );
        }
    }
}
