//! The node's daemon under test, with a socket, pins and a directory of pod files
//! that no other test sees.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use interceptor_userspace::api::{
    self, Answer, CniAttachment, CniPod, DaemonStatus, PodState, PodStatus, Request,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{cli::Cli, command::wait_until, pod::Pod};

/// How long anything may take that the daemon does.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A daemon, and where it is told of pods. When dropped it is killed.
#[derive(Debug)]
pub struct Daemon {
    // Killed first.
    process: Option<Child>,
    directory: TempDir,
    pins: PathBuf,
    /// Whether it runs in a mount namespace of its own.
    apart: bool,
    /// What runs as the daemon, if not the command that is tested.
    program: Option<PathBuf>,
}

impl Daemon {
    /// Starts one for the pins of `cli`, with more lines of its file, and waits until
    /// it is ready.
    ///
    /// # Errors
    ///
    /// If it doesn't start.
    pub fn start(cli: &Cli, settings: &str) -> Result<Self> {
        let mut daemon = Self::prepare(cli, settings)?;
        daemon.restart(cli)?;
        Ok(daemon)
    }

    /// Starts one in a mount namespace of its own.
    ///
    /// # Errors
    ///
    /// If it doesn't start.
    pub fn start_apart(cli: &Cli, settings: &str) -> Result<Self> {
        let mut daemon = Self::prepare(cli, settings)?;
        daemon.apart = true;
        daemon.restart(cli)?;
        Ok(daemon)
    }

    /// Makes all that one needs, and doesn't start it.
    ///
    /// # Errors
    ///
    /// If something can't be made.
    pub fn prepare(cli: &Cli, settings: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        fs::create_dir(directory.path().join("pods"))?;
        let daemon = Self {
            process: None,
            directory,
            pins: cli.pins().to_owned(),
            apart: false,
            program: None,
        };
        fs::write(
            daemon.config(),
            format!(
                "socket = '{}'\npods = '{}'\npins = '{}'\nmetrics = '127.0.0.1:0'\n\
                 profile = 'default'\n{settings}\n",
                daemon.socket().display(),
                daemon.pods_directory().display(),
                daemon.pins.display(),
            ),
        )?;
        Ok(daemon)
    }

    /// The command that runs it.
    ///
    /// # Errors
    ///
    /// If it isn't built.
    pub fn command(&self, cli: &Cli) -> Result<Command> {
        let mut command = match &self.program {
            Some(program) => Command::new(program),
            None => cli.command()?,
        };
        command.arg("daemon").arg("--config").arg(self.config());
        if !self.apart {
            return Ok(command);
        }
        let mut apart = Command::new("unshare");
        apart
            // It sees what is mounted later, such as network namespaces.
            .args(["--mount", "--propagation", "slave"])
            .arg(command.get_program())
            .args(command.get_args());
        Ok(apart)
    }

    /// From the next start on this program runs, or, with none, the command that is
    /// tested.
    pub fn set_program(&mut self, program: Option<&Path>) {
        self.program = program.map(Path::to_owned);
    }

    /// Starts it after it was stopped or killed, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// If it doesn't start.
    pub fn restart(&mut self, cli: &Cli) -> Result<()> {
        self.restart_until(cli, |status| status.ready)
    }

    /// Starts it, and waits until its status is as it should be.
    ///
    /// # Errors
    ///
    /// If it doesn't start.
    pub fn restart_until(&mut self, cli: &Cli, good: impl Fn(&DaemonStatus) -> bool) -> Result<()> {
        self.restart_soon(cli)?;
        self.wait_until(good)
    }

    /// Waits until one that was started is ready.
    ///
    /// # Errors
    ///
    /// If it ends instead, or doesn't get there.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        self.wait_until(|status| status.ready)
    }

    fn wait_until(&mut self, good: impl Fn(&DaemonStatus) -> bool) -> Result<()> {
        let result = wait_until("the daemon has started", LIMIT, || {
            if let Some(status) = self.process()?.try_wait()? {
                bail!("the daemon ended: {status}");
            }
            Ok(self.status().ok().filter(&good).map(|_| ()))
        });
        result.with_context(|| self.log())
    }

    /// Starts it, and waits for nothing.
    ///
    /// # Errors
    ///
    /// If it can't be started.
    pub fn restart_soon(&mut self, cli: &Cli) -> Result<()> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join("log"))?;
        let child = self
            .command(cli)?
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.process = Some(child);
        Ok(())
    }

    fn process(&mut self) -> Result<&mut Child> {
        self.process.as_mut().context("the daemon isn't running")
    }

    /// Its process.
    ///
    /// # Errors
    ///
    /// If it was killed.
    pub fn pid(&mut self) -> Result<i32> {
        Ok(i32::try_from(self.process()?.id())?)
    }

    /// Kills it, as a crash does.
    ///
    /// # Errors
    ///
    /// If it has ended before.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the daemon isn't running")?;
        ensure!(
            process.try_wait()?.is_none(),
            "the daemon has ended:\n{}",
            self.log()
        );
        process.kill()?;
        process.wait()?;
        Ok(())
    }

    /// Stops it, as systemd does.
    ///
    /// # Errors
    ///
    /// If it ends with an error.
    pub fn stop(&mut self) -> Result<()> {
        let pid = self.pid()?;
        let mut process = self.process.take().context("the daemon isn't running")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        let status = process.wait()?;
        ensure!(status.success(), "{status}\n{}", self.log());
        Ok(())
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Its file.
    pub fn config(&self) -> PathBuf {
        self.directory.path().join("daemon.toml")
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("run/daemon.sock")
    }

    /// Where pod files go.
    pub fn pods_directory(&self) -> PathBuf {
        self.directory.path().join("pods")
    }

    /// The root of its pins.
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// Asks it.
    ///
    /// # Errors
    ///
    /// If it doesn't answer.
    pub fn ask(&self, request: &Request) -> Result<Answer> {
        api::ask(&self.socket(), request, LIMIT).with_context(|| format!("ask {request:?}"))
    }

    /// How it is.
    ///
    /// # Errors
    ///
    /// If it doesn't answer.
    pub fn status(&self) -> Result<DaemonStatus> {
        match self.ask(&Request::Status)? {
            Answer::Status(status) => Ok(status),
            answer => bail!("{answer:?}"),
        }
    }

    /// The pods that it knows.
    ///
    /// # Errors
    ///
    /// If it doesn't answer.
    pub fn pods(&self) -> Result<Vec<PodStatus>> {
        match self.ask(&Request::Pods)? {
            Answer::Pods { pods } => Ok(pods),
            answer => bail!("{answer:?}"),
        }
    }

    /// What it knows of a pod.
    ///
    /// # Errors
    ///
    /// If it doesn't answer.
    pub fn pod(&self, name: &str) -> Result<Option<PodStatus>> {
        Ok(self.pods()?.into_iter().find(|pod| pod.pod == name))
    }

    /// Waits until a pod is in this state.
    ///
    /// # Errors
    ///
    /// If it doesn't get there: the error has what the daemon has logged.
    pub fn wait_for(&self, name: &str, state: PodState) -> Result<PodStatus> {
        wait_until(&format!("{name} is {state:?}"), LIMIT, || {
            Ok(self.pod(name)?.filter(|pod| pod.state == state))
        })
        .with_context(|| format!("{:?}\n{}", self.pods(), self.log()))
    }

    /// Waits until it knows no such pod.
    ///
    /// # Errors
    ///
    /// If it goes on to know it.
    pub fn wait_until_gone(&self, name: &str) -> Result<()> {
        wait_until(&format!("{name} is gone"), LIMIT, || {
            Ok(self.pod(name)?.is_none().then_some(()))
        })
        .with_context(|| self.log())
    }

    /// Writes a pod's file.
    ///
    /// # Errors
    ///
    /// If it can't be written.
    pub fn write_pod(&self, pod: &Pod) -> Result<()> {
        self.write_file(
            pod.name(),
            &format!(
                "cgroup = '{}'\nnetns = '{}'\n",
                pod.cgroup().path().display(),
                pod.netns().path().display()
            ),
        )
    }

    /// Writes a file for a pod of this name.
    ///
    /// # Errors
    ///
    /// If it can't be written.
    pub fn write_file(&self, name: &str, text: &str) -> Result<()> {
        let path = self.pods_directory().join(format!("{name}.toml"));
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Removes a pod's file.
    ///
    /// # Errors
    ///
    /// If it isn't there.
    pub fn remove_file(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(
            self.pods_directory().join(format!("{name}.toml")),
        )?)
    }

    /// What it answers to an HTTP request: the status and the body.
    ///
    /// # Errors
    ///
    /// If it doesn't answer.
    pub fn http(&self, path: &str) -> Result<(u16, String)> {
        get(self.status()?.metrics, path)
    }
}

/// What CNI tells of a harness' pod.
pub fn cni(container_id: &str, pod: &Pod) -> CniPod {
    CniPod {
        attachment: CniAttachment {
            container_id: container_id.to_owned(),
            interface: "eth0".to_owned(),
        },
        netns: pod.netns().path(),
        namespace: Some("default".to_owned()),
        name: Some("web".to_owned()),
        uid: None,
        annotations: None,
        args: String::new(),
    }
}

fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(LIMIT))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    let status = head.split(' ').nth(1).context("no status")?;
    Ok((status.parse()?, body.to_owned()))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended; then there is nothing left to do.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
