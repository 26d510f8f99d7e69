//! What is compared: the two ways of intercepting a pod's connections.

use std::process::Command;

use anyhow::Result;

use crate::{
    command::{run, workspace_binary},
    iptables::{self, Flavour},
    pod::Pod,
};

/// A way to intercept a pod's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interception {
    /// The chains of live iptables.
    Iptables(Flavour),
    /// Interceptor.
    Interceptor,
}

/// Interception that is in force in a pod until this is dropped. (Chains go
/// with the pod's network namespace.)
#[derive(Debug)]
pub struct Installed {
    attached: Option<String>,
}

impl Interception {
    /// Starts to intercept the pod's connections.
    ///
    /// # Errors
    ///
    /// If iptables or `interceptor` fails.
    pub fn install(self, pod: &Pod) -> Result<Installed> {
        let attached = match self {
            Self::Iptables(flavour) => {
                iptables::install(pod, flavour)?;
                None
            }
            Self::Interceptor => {
                let netns = pod.netns().path();
                run(interceptor()?
                    .args(["attach", "--pod", pod.name()])
                    .arg("--cgroup")
                    .arg(pod.cgroup().path())
                    .arg("--netns")
                    .arg(netns))?;
                Some(pod.name().to_owned())
            }
        };
        Ok(Installed { attached })
    }
}

impl Drop for Installed {
    #[expect(clippy::print_stderr, reason = "nothing else can be told from drop")]
    fn drop(&mut self) {
        let Some(pod) = &self.attached else {
            return;
        };
        let detached =
            interceptor().and_then(|mut command| run(command.args(["detach", "--pod", pod])));
        if let Err(error) = detached {
            eprintln!("pod {pod} stays attached: {error:#}");
        }
    }
}

/// The `interceptor` command.
///
/// # Errors
///
/// If it isn't built.
pub fn interceptor() -> Result<Command> {
    Ok(Command::new(workspace_binary(
        "interceptor",
        "INTERCEPTOR_BIN",
    )?))
}
