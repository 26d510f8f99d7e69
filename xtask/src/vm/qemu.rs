//! The machine that a guest runs on.

use std::{
    collections::VecDeque,
    fmt,
    fs::{self, File},
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::sys::{prctl, signal::Signal};

use crate::process::command;

const PROGRAM: &str = "qemu-system-x86_64";

/// How many of a guest's last lines are kept.
const LAST_LINES: usize = 40;

/// What runs a guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU.
    Tcg,
}

impl Accelerator {
    /// The processor, where it can.
    pub(super) fn of_this_machine() -> Self {
        // The device alone says nothing: without the processor's flags guests hang.
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let device = File::options().read(true).write(true).open("/dev/kvm");
        if has_virtualization(&processor) && device.is_ok() {
            Self::Kvm
        } else {
            Self::Tcg
        }
    }

    const fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "guests run on the processor (KVM)",
            Self::Tcg => "guests are emulated, some ten times slower: no KVM here",
        })
    }
}

fn has_virtualization(processor: &str) -> bool {
    processor
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
}

/// A machine to start.
pub(super) struct Machine<'a> {
    pub(super) accelerator: Accelerator,
    pub(super) processors: usize,
    pub(super) image: &'a Path,
    pub(super) initramfs: &'a Path,
}

impl Machine<'_> {
    /// The command that is the machine. Its serial line is standard output.
    ///
    /// # Errors
    ///
    /// If there is no archive.
    pub(super) fn command(&self) -> Result<Command> {
        let archive = fs::metadata(self.initramfs).context("look at the guest's archive")?;
        // The archive is there twice while the kernel unpacks it.
        let memory = 1024 + 2 * archive.len() / (1024 * 1024);
        let mut command = command(PROGRAM);
        command
            .args(["-M", "q35"])
            .args(self.accelerator.arguments())
            .args(["-m", &memory.to_string()])
            .args(["-smp", &self.processors.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-no-reboot", "-serial", "stdio"])
            .arg("-kernel")
            .arg(self.image)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", "console=ttyS0 quiet reboot=t panic=-1"]);
        Ok(command)
    }
}

/// How a guest ended.
#[derive(Debug)]
pub(super) enum End {
    /// By itself; a panic ends it so, too.
    Exited(ExitStatus),
    /// It was running for so long.
    Killed(Duration),
}

/// What has been seen of a guest.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) end: End,
    /// Its last lines.
    pub(super) last: Vec<String>,
}

/// Runs a machine to its end, or until the limit, and gives each line that it
/// prints to `read`, which says what is to be seen of it.
///
/// # Errors
///
/// If it can't be started.
pub(super) fn watch(
    machine: &mut Command,
    limit: Duration,
    mut read: impl FnMut(&str) -> String,
) -> Result<Watched> {
    let start = Instant::now();
    machine.stdin(Stdio::null()).stdout(Stdio::piped());
    // SAFETY: between fork and exec only one system call is made.
    unsafe {
        // It must not go on without its watcher.
        machine.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
    let mut child = machine
        .spawn()
        .with_context(|| format!("start {PROGRAM}"))?;
    let output = BufReader::new(child.stdout.take().context("the machine's output")?);
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in output.split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            if sender.send(line.trim_end_matches('\r').to_owned()).is_err() {
                return;
            }
        }
    });
    let mut last = VecDeque::new();
    let killed = loop {
        match lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok(line) => {
                last.push_back(read(&line));
                if last.len() > LAST_LINES {
                    last.pop_front();
                }
            }
            Err(RecvTimeoutError::Disconnected) => break false,
            Err(RecvTimeoutError::Timeout) => break true,
        }
    };
    if killed {
        child.kill().context("kill the machine")?;
    }
    let status = child.wait().context("wait for the machine")?;
    Ok(Watched {
        end: if killed {
            End::Killed(limit)
        } else {
            End::Exited(status)
        },
        last: last.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> (Vec<String>, Watched) {
        let mut lines = Vec::new();
        let watched = watch(command("sh").args(["-c", script]), limit, |line| {
            lines.push(line.to_owned());
            line.to_owned()
        });
        (lines, watched.unwrap())
    }

    #[test]
    fn a_guests_lines_are_read_and_the_last_ones_kept() {
        let script = "printf 'one\\r\\n'; seq 100; printf end";
        let (lines, watched) = shell(script, Duration::from_secs(60));
        assert_eq!(lines.len(), 102);
        assert_eq!((lines[0].as_str(), lines[101].as_str()), ("one", "end"));
        assert_eq!(watched.last, lines[62..]);
        assert!(matches!(watched.end, End::Exited(status) if status.success()));
    }

    #[test]
    fn a_guest_that_hangs_is_killed() {
        let start = Instant::now();
        let (lines, watched) = shell("echo here; exec sleep 60", Duration::from_millis(300));
        assert_eq!(lines, ["here"]);
        assert!(matches!(watched.end, End::Killed(_)));
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn the_processors_flags_say_whether_it_can() {
        assert!(has_virtualization(
            "processor : 0\nflags\t\t: fpu vmx sse\n"
        ));
        assert!(has_virtualization("flags : svm\n"));
        assert!(!has_virtualization("flags : fpu hypervisor\nbugs : vmx\n"));
    }
}
