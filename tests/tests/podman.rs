//! Pods of podman, whose network's last plugin is `interceptor-cni`.

use std::path::Path;

use anyhow::{Result, ensure};
use interceptor_tests::podman::{BUSYBOX, Podman, Role};
use serde_json::json;

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
