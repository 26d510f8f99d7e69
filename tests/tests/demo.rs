//! The demo ends with all cases right, and leaves nothing behind.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use interceptor_tests::{
    cgroup::Cgroup,
    command::{require_root, run, wait_until},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn demo(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_interceptor-demo"));
    command.args(arguments.split(' '));
    command
}

/// The namespaces, cgroups and pins of a run of the demo.
fn left_by(pid: u32) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for directory in [
        Path::new("/run/netns"),
        &Cgroup::mount()?,
        Path::new("/sys/fs/bpf/interceptor"),
    ] {
        // The pins' directory goes with the last pod.
        for entry in fs::read_dir(directory).into_iter().flatten() {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with(&format!("interceptor-pod-{pid}-")) {
                left.push(directory.join(name).display().to_string());
            }
        }
    }
    Ok(left)
}

#[test]
fn no_case_differs_from_iptables() -> Result<()> {
    require_root()?;
    let output = run(&mut demo("--proxy embedded --compare"))?;
    assert_eq!(
        output.lines().last(),
        Some("69 cases, 0 differ from iptables")
    );
    Ok(())
}

#[test]
fn json_has_every_case() -> Result<()> {
    require_root()?;
    let output: serde_json::Value = serde_json::from_str(&run(&mut demo("-o json"))?)?;
    assert_eq!(output["summary"], "69 cases, 0 wrong");
    assert_eq!(output["cases"].as_array().map(Vec::len), Some(69));
    Ok(())
}

#[test]
fn an_interrupt_removes_everything() -> Result<()> {
    require_root()?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut child = demo("--compare")
            .stdout(Stdio::null())
            .spawn()
            .context("start the demo")?;
        let pid = child.id();
        let limit = Duration::from_secs(20);
        wait_until("the demo has attached its pod", limit, || {
            let pins = format!("/sys/fs/bpf/interceptor/interceptor-pod-{pid}-0");
            Ok(Path::new(&pins).exists().then_some(()))
        })?;
        kill(Pid::from_raw(pid.try_into()?), signal)?;
        let status = child.wait()?;
        ensure!(!status.success(), "it says that all is right");
        assert_eq!(left_by(pid)?, [""; 0], "{signal}");
    }
    Ok(())
}

#[test]
fn a_kept_pod_goes_with_its_keeper() -> Result<()> {
    require_root()?;
    let output = demo("--keep").output().context("run the demo")?;
    ensure!(output.status.success(), "{output:?}");
    let told = String::from_utf8(output.stderr)?;
    let keeper: u32 = told
        .lines()
        .find_map(|line| line.strip_prefix("Remove it all: kill "))
        .with_context(|| format!("it doesn't say how to remove the pod: {told}"))?
        .parse()?;
    // Two network namespaces, a cgroup, and the pins.
    assert_eq!(left_by(keeper)?.len(), 4);
    kill(Pid::from_raw(keeper.try_into()?), Signal::SIGTERM)?;
    wait_until("everything is gone", Duration::from_secs(20), || {
        Ok(left_by(keeper)?.is_empty().then_some(()))
    })
}
