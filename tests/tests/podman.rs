//! Pods of podman, whose network's last plugin is `interceptor-cni`, and how the plugin
//! gets onto a node.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use interceptor_tests::{
    command::{run, wait_until, workspace_binary},
    interception::interceptor,
    podman::{BUSYBOX, Podman, Role},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const POD: &str = "web";
const APP: &str = "app";

/// An application that does nothing.
fn create_idle(podman: &Podman) -> Result<()> {
    podman.create_pod(POD)?;
    podman.create_container(POD, APP, Role::App, BUSYBOX, &[], &["sleep", "1000000"])
}

#[test]
fn a_pod_does_not_start_without_the_daemon_unless_it_may() -> Result<()> {
    let nobody = Path::new("/nonexistent/daemon.sock");
    let podman = Podman::new(&json!({ "socket": nobody }))?;
    create_idle(&podman)?;
    let error = podman.start_pod(POD).unwrap_err().to_string();
    for words in [
        "interceptor-cni",
        "no daemon answers at /nonexistent/daemon.sock",
        "is `interceptor daemon` running?",
    ] {
        ensure!(error.contains(words), "{error}");
    }
    // Nothing is half: podman has taken the network away again.
    ensure!(podman.cables()? == 0, "a cable stays behind");
    ensure!(!podman.cgroup(POD)?.exists(), "the pod has a cgroup");
    podman.remove_pod(POD)?;

    podman.set_plugin(&json!({ "socket": nobody, "on_error": "pass" }))?;
    create_idle(&podman)?;
    podman.start_pod(POD)?;
    let addresses = podman.exec(POD, APP, &["ip", "addr", "show", "eth0"])?;
    ensure!(addresses.contains("inet 10.89."), "{addresses}");
    ensure!(podman.cgroup(POD)?.exists(), "the pod has no cgroup");
    // It can be ended, too.
    podman.remove_pod(POD)?;
    ensure!(podman.cables()? == 0, "a cable stays behind");
    Ok(())
}

/// A node's directories for CNI, with a network's configuration.
struct Node {
    directory: TempDir,
    chain: PathBuf,
}

const CHAIN: &str = r#"{
  "cniVersion": "0.4.0", "name": "net",
  "plugins": [ { "type": "ptp" }, { "type": "portmap" } ]
}
"#;

impl Node {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let chain = directory.path().join("net.d/10-net.conflist");
        fs::create_dir(directory.path().join("net.d"))?;
        fs::create_dir(directory.path().join("bin"))?;
        fs::write(&chain, CHAIN)?;
        Ok(Self { directory, chain })
    }

    fn command(&self, name: &str) -> Result<Command> {
        let mut command = interceptor()?;
        command
            .arg(name)
            .arg("--conf-dir")
            .arg(self.directory.path().join("net.d"))
            .arg("--bin-dir")
            .arg(self.directory.path().join("bin"));
        Ok(command)
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("bin/interceptor-cni")
    }

    /// The types of the chain's plugins.
    fn plugins(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(&self.chain)?;
        let chain: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        let plugins = chain["plugins"].as_array().context("no plugins")?;
        Ok(plugins
            .iter()
            .map(|plugin| plugin["type"].as_str().unwrap_or_default().to_owned())
            .collect())
    }
}

const WITH_OURS: [&str; 3] = ["ptp", "portmap", "interceptor-cni"];

/// A process that is killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_plugin_is_installed_again_whenever_the_network_rewrites_its_file() -> Result<()> {
    let node = Node::new()?;
    let mut watch = Running(
        node.command("cni-install")?
            .arg("--watch")
            .stdout(Stdio::null())
            .spawn()?,
    );
    let limit = Duration::from_secs(10);
    let installed = || -> Result<Option<()>> {
        let there = fs::metadata(node.program()).is_ok();
        Ok((there && node.plugins()? == WITH_OURS).then_some(()))
    };
    wait_until("it is installed", limit, installed)?;
    for _ in 0..5 {
        // As networks do it: a file beside, and a rename.
        let new = node.chain.with_extension("new");
        fs::write(&new, CHAIN)?;
        fs::rename(&new, &node.chain)?;
        wait_until("it is installed again", limit, installed)?;
    }
    fs::remove_file(node.program())?;
    wait_until("the program is installed again", limit, installed)?;

    // It ends when it is told to, and leaves the plugin: pods must not get past it while a
    // release replaces another.
    kill(Pid::from_raw(watch.0.id().cast_signed()), Signal::SIGTERM)?;
    ensure!(watch.0.wait()?.success());
    ensure!(node.plugins()? == WITH_OURS && node.program().is_file());

    run(&mut node.command("cni-uninstall")?)?;
    ensure!(fs::read_to_string(&node.chain)? == CHAIN && !node.program().exists());
    Ok(())
}

#[test]
fn installing_and_uninstalling_survive_being_killed() -> Result<()> {
    const TIMES: u64 = 60;
    let node = Node::new()?;
    let whole = fs::read(workspace_binary("interceptor-cni", "INTERCEPTOR_CNI")?)?;
    let (mut killed, mut incomplete) = (0, 0);
    for time in 0..TIMES {
        for (name, wanted) in [
            ("cni-install", &WITH_OURS[..]),
            ("cni-uninstall", &WITH_OURS[..2]),
        ] {
            let mut child = node.command(name)?.stdout(Stdio::null()).spawn()?;
            // From before it does anything until after it is done.
            thread::sleep(Duration::from_micros(time * 500));
            child.kill()?;
            killed += u64::from(!child.wait()?.success());
            let plugins = node.plugins()?;
            ensure!(
                plugins == WITH_OURS || plugins == WITH_OURS[..2],
                "{plugins:?}"
            );
            incomplete += u64::from(plugins != wanted);
            let program = fs::read(node.program());
            ensure!(
                program.as_ref().map_or(true, |program| *program == whole),
                "half a program"
            );
            // Runtimes call what is in the chain.
            ensure!(program.is_ok() || plugins == WITH_OURS[..2], "no program");
        }
    }
    // Neither all nor none: else the moments were not what they should be.
    ensure!(
        killed > 0 && incomplete > 0 && incomplete < TIMES * 2,
        "{killed} were killed, {incomplete} left it undone"
    );
    run(&mut node.command("cni-install")?)?;
    ensure!(node.plugins()? == WITH_OURS && fs::read(node.program())? == whole);
    run(&mut node.command("cni-uninstall")?)?;
    ensure!(fs::read_to_string(&node.chain)? == CHAIN);
    for (directory, files) in [("net.d", 1), ("bin", 0)] {
        let left = fs::read_dir(node.directory.path().join(directory))?.count();
        ensure!(left == files, "{left} files in {directory}");
    }
    Ok(())
}
