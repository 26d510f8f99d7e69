//! The `interceptor` command as a user runs it, with a root of pins that no
//! other test sees.

use std::{
    fs,
    mem::offset_of,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use interceptor_common::pod::Attachment;
use serde_json::Value;

use crate::{
    bpf,
    command::{require_root, run, unique_name},
    interception::interceptor,
    pod::Pod,
};

/// The command and its root of pins. When dropped, every pod below that root
/// is detached and the root is removed.
#[derive(Debug)]
pub struct Cli {
    pins: PathBuf,
}

impl Cli {
    /// Chooses a root of pins; nothing is made.
    ///
    /// # Errors
    ///
    /// If this process isn't root's.
    pub fn new() -> Result<Self> {
        require_root()?;
        Ok(Self {
            pins: Path::new("/sys/fs/bpf").join(unique_name("interceptor-test")),
        })
    }

    /// The root of pins.
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// The command, without a subcommand.
    ///
    /// # Errors
    ///
    /// If it isn't built.
    pub fn command(&self) -> Result<Command> {
        let mut command = interceptor()?;
        command.arg("--pins").arg(&self.pins);
        Ok(command)
    }

    /// The command that attaches the pod under its own name.
    ///
    /// # Errors
    ///
    /// If it isn't built.
    pub fn attach_command(&self, pod: &Pod) -> Result<Command> {
        let mut command = self.command()?;
        command
            .args(["attach", "-o", "json", "--pod", pod.name(), "--cgroup"])
            .arg(pod.cgroup().path())
            .arg("--netns")
            .arg(pod.netns().path());
        Ok(command)
    }

    /// Attaches the pod under its own name; `newly` or `already`.
    ///
    /// # Errors
    ///
    /// If the command fails.
    pub fn attach(&self, pod: &Pod) -> Result<String> {
        let answer = run_json(&mut self.attach_command(pod)?)?;
        answer["attached"]
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("no `attached` in {answer}"))
    }

    /// Detaches the pod of this name.
    ///
    /// # Errors
    ///
    /// If the command fails.
    pub fn detach(&self, name: &str) -> Result<()> {
        run(self.command()?.args(["detach", "--pod", name])).map(drop)
    }

    /// What `interceptor status` says of the pod of this name.
    ///
    /// # Errors
    ///
    /// If the command fails.
    pub fn status(&self, name: &str) -> Result<Value> {
        let pods = run_json(
            self.command()?
                .args(["status", "-o", "json", "--pod", name]),
        )?;
        Ok(pods[0].clone())
    }

    /// How often an event happened whose description contains `words`.
    ///
    /// # Errors
    ///
    /// If the command fails or there is no such event.
    pub fn event(&self, name: &str, words: &str) -> Result<u64> {
        let status = self.status(name)?;
        status["events"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|event| {
                event["event"]
                    .as_str()
                    .is_some_and(|text| text.contains(words))
            })
            .and_then(|event| event["count"].as_u64())
            .with_context(|| format!("no event `{words}` in {status}"))
    }

    /// The names of all directories below the root of pins, also of those that
    /// are no pods.
    ///
    /// # Errors
    ///
    /// If the root can't be read.
    pub fn directories(&self) -> Result<Vec<String>> {
        if !self.pins.exists() {
            return Ok(Vec::new());
        }
        fs::read_dir(&self.pins)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    }
}

impl Drop for Cli {
    #[expect(clippy::print_stderr, reason = "nothing else can be told from drop")]
    fn drop(&mut self) {
        for name in self.directories().unwrap_or_default() {
            // What is half made goes with the root.
            if !name.contains('+')
                && let Err(error) = self.detach(&name)
            {
                eprintln!("{name}: {error:#}");
            }
        }
        if self.pins.exists()
            && let Err(error) = fs::remove_dir_all(&self.pins)
        {
            eprintln!("{} stays behind: {error:#}", self.pins.display());
        }
    }
}

/// Makes an attached pod one that a version with another layout has attached.
///
/// # Errors
///
/// If the pod isn't attached.
pub fn set_layout(cli: &Cli, pod: &str, layout: u32) -> Result<()> {
    let pin = cli.pins().join(pod).join("maps/ATTACHMENT");
    bpf::change_first(&pin, size_of::<Attachment>(), |attachment| {
        attachment[offset_of!(Attachment, layout)..][..4].copy_from_slice(&layout.to_ne_bytes());
    })
}

/// Runs a command and parses its output.
///
/// # Errors
///
/// If it fails or prints no JSON.
pub fn run_json(command: &mut Command) -> Result<Value> {
    let output = run(command)?;
    serde_json::from_str(&output).with_context(|| format!("{command:?} printed {output}"))
}
