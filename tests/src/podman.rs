//! Real pods: those of podman, whose networks have `interceptor-cni` in their chain
//! of plugins.
//!
//! Podman gets storage, state, configuration and a network namespace of its own, in
//! which the pods' cables end; nothing of the machine's own podman or network is
//! touched. A pod's cgroup is `/NAME/ID`, where NAME is [`Podman::name`]; the runtime
//! makes it after the plugins have run.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::unix::{fs::symlink, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::prctl,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    cgroup,
    command::{require_root, run, unique_name, wait_until, workspace_binary},
    netns::Netns,
    proxies,
};

/// The image with a shell and busybox's other programs.
pub const BUSYBOX: &str = "localhost/busybox";

/// The node's end of every pod's cable.
pub const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 89, 0, 1));

/// How long one call of podman may take, in seconds: starting a pod takes one.
const LIMIT: &str = "300";

/// What becomes of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It runs to its end before the others start.
    Init,
    /// It runs as long as the pod.
    App,
}

/// Podman on a node of its own. When dropped, also by a panic, its pods are removed,
/// and so is all that it has made.
#[derive(Debug)]
pub struct Podman {
    name: String,
    node: Netns,
    directory: TempDir,
}

impl Podman {
    /// Makes the node. `plugin` has the settings of the plugin's entry in the network
    /// configuration, such as `socket`.
    ///
    /// # Errors
    ///
    /// If a program is missing or the first image can't be made.
    pub fn new(plugin: &Value) -> Result<Self> {
        require_root()?;
        let name = unique_name("interceptor-node");
        let podman = Self {
            node: Netns::new(&name)?,
            // Short: podman has sockets in it, whose paths may have 108 bytes.
            directory: tempfile::Builder::new().prefix("ip-").tempdir()?,
            name,
        };
        podman.configure(plugin)?;
        podman.image(BUSYBOX, &[])?;
        Ok(podman)
    }

    /// Its name, unique on this machine: the network's and the parent cgroup's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node's network namespace, in which every pod's cable ends at [`GATEWAY`].
    pub fn node(&self) -> &Netns {
        &self.node
    }

    /// A directory for what a test needs besides; it goes with the node.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The file with the chain of plugins.
    pub fn network_configuration(&self) -> PathBuf {
        self.path("cni").join(format!("{}.conflist", self.name))
    }

    /// The cgroups of the pods that run or ran, in the cgroup v2 tree.
    ///
    /// # Errors
    ///
    /// If there is no such tree.
    pub fn cgroups(&self) -> Result<Vec<PathBuf>> {
        let parent = cgroup::Cgroup::mount()?.join(&self.name);
        if !parent.exists() {
            return Ok(Vec::new());
        }
        let mut paths = Vec::new();
        for entry in fs::read_dir(parent)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                paths.push(entry.path());
            }
        }
        Ok(paths)
    }

    /// Makes an image of busybox and these programs, with the libraries that they
    /// need, which are in `/usr/bin`.
    ///
    /// # Errors
    ///
    /// If a file can't be copied or podman fails.
    pub fn image(&self, name: &str, programs: &[&Path]) -> Result<()> {
        let directory = tempfile::tempdir_in(self.directory())?;
        let root = directory.path().join("root");
        for path in ["bin", "etc", "proc", "sys", "dev", "tmp", "usr/bin"] {
            fs::create_dir_all(root.join(path))?;
        }
        let busybox = proxies::find("busybox", "INTERCEPTOR_BUSYBOX")
            .context("no busybox: apt-get install busybox-static")?;
        fs::copy(&busybox, root.join("bin/busybox"))?;
        for applet in run(Command::new(&busybox).arg("--list"))?.lines() {
            if applet != "busybox" {
                symlink("busybox", root.join("bin").join(applet))?;
            }
        }
        for program in programs {
            let file = program.file_name().context("a program without a name")?;
            run(Command::new("cp")
                .arg("--dereference")
                .arg(program)
                .arg(root.join("usr/bin").join(file)))?;
            for library in libraries(program)? {
                let place = root.join(library.strip_prefix("/")?);
                fs::create_dir_all(place.parent().context("a library without a directory")?)?;
                fs::copy(&library, &place)
                    .with_context(|| format!("copy {}", library.display()))?;
            }
        }
        let archive = directory.path().join("root.tar");
        run(Command::new("tar")
            .arg("-C")
            .arg(&root)
            .args(["--owner=0", "--group=0", "--mode=a+rX", "-cf"])
            .arg(&archive)
            .arg("."))?;
        self.podman(&["import", "--quiet"], &[path_text(&archive)?, name])
            .map(drop)
    }

    /// Makes a pod, which doesn't run yet.
    ///
    /// # Errors
    ///
    /// If podman fails.
    pub fn create_pod(&self, pod: &str) -> Result<()> {
        let parent = format!("/{}", self.name);
        self.podman(
            &["pod", "create", "--no-hosts", "--infra-image", BUSYBOX],
            &[
                "--infra-command",
                "/bin/sleep 1000000",
                "--cgroup-parent",
                &parent,
                "--name",
                pod,
            ],
        )
        .map(drop)
    }

    /// Adds a container to a pod that doesn't run yet; it is called `POD-NAME`.
    /// `options` go to podman as they are.
    ///
    /// # Errors
    ///
    /// If podman fails.
    pub fn create_container(
        &self,
        pod: &str,
        name: &str,
        role: Role,
        image: &str,
        options: &[&str],
        command: &[&str],
    ) -> Result<()> {
        let name = format!("{pod}-{name}");
        let mut arguments = vec!["create", "--pod", pod, "--name", &name];
        if role == Role::Init {
            arguments.push("--init-ctr=always");
        }
        arguments.extend(options);
        arguments.push(image);
        self.podman(&arguments, command).map(drop)
    }

    /// Starts a pod: its network is made, the init containers run, then the others.
    ///
    /// # Errors
    ///
    /// If podman fails; the error has what it says.
    pub fn start_pod(&self, pod: &str) -> Result<()> {
        self.podman(&["pod", "start"], &[pod]).map(drop)
    }

    /// Ends a pod's containers and removes it. Podman leaves its cgroup in the v2 tree.
    ///
    /// # Errors
    ///
    /// If podman fails.
    pub fn remove_pod(&self, pod: &str) -> Result<()> {
        self.podman(&["pod", "rm", "--force", "--time", "0"], &[pod])
            .map(drop)
    }

    /// A running pod's address.
    ///
    /// # Errors
    ///
    /// If a container of this name doesn't run.
    pub fn address(&self, pod: &str, name: &str) -> Result<IpAddr> {
        let shown = self.exec(pod, name, &["ip", "-4", "-o", "addr", "show", "eth0"])?;
        shown
            .split_whitespace()
            .filter_map(|word| word.split_once('/'))
            .find_map(|(address, _)| address.parse().ok())
            .with_context(|| format!("no address in {shown}"))
    }

    /// What a container has printed.
    ///
    /// # Errors
    ///
    /// If podman fails.
    pub fn logs(&self, pod: &str, name: &str) -> Result<String> {
        self.podman(&["logs"], &[&format!("{pod}-{name}")])
    }

    /// Runs a command in a running container and returns what it prints.
    ///
    /// # Errors
    ///
    /// If it fails.
    pub fn exec(&self, pod: &str, name: &str, command: &[&str]) -> Result<String> {
        self.podman(&["exec", &format!("{pod}-{name}")], command)
    }

    /// Runs podman and returns what it prints.
    ///
    /// # Errors
    ///
    /// If it fails; the error has what it says.
    pub fn podman(&self, first: &[&str], rest: &[&str]) -> Result<String> {
        // Podman waits for the end of a container's monitor, whose parent has gone: the
        // shell takes it in and lets it end, also where process 1 doesn't.
        let mut command = Command::new("sh");
        command
            .args(["-c", "\"$@\"; exit $?", "sh", "timeout", LIMIT, "podman"])
            .args(first)
            .args(rest)
            .env("CONTAINERS_CONF", self.path("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", self.path("storage.conf"))
            .env("TMPDIR", self.directory());
        let node = self.node.open()?;
        let enter = move || {
            setns(&node, CloneFlags::CLONE_NEWNET)?;
            Ok(prctl::set_child_subreaper(true)?)
        };
        // SAFETY: between fork and exec only system calls are made, on a file opened
        // before.
        unsafe { command.pre_exec(enter) };
        run(&mut command)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes podman's configuration and the network's.
    fn configure(&self, plugin: &Value) -> Result<()> {
        for name in ["plugins", "cni", "state"] {
            fs::create_dir(self.path(name))?;
        }
        let binary = workspace_binary("interceptor-cni", "INTERCEPTOR_CNI")?;
        symlink(&binary, self.path("plugins/interceptor-cni"))?;
        let at = |name| format!("{:?}", self.path(name));
        fs::write(
            self.path("storage.conf"),
            format!(
                "[storage]\ndriver = \"overlay\"\ngraphroot = {}\nrunroot = {}\n",
                at("storage"),
                at("run")
            ),
        )?;
        // Without CAP_SYS_RESOURCE limits can't be raised; the monitor's own lock is a file,
        // not the machine's shared memory.
        fs::write(
            self.path("containers.conf"),
            format!(
                "[containers]\n\
                 default_ulimits = [\"nofile=20000:20000\", \"nproc=1000:1000\"]\n\
                 pids_limit = 0\n\
                 [engine]\n\
                 cgroup_manager = \"cgroupfs\"\n\
                 runtime = \"runc\"\n\
                 events_logger = \"file\"\n\
                 lock_type = \"file\"\n\
                 tmp_dir = {}\n\
                 [network]\n\
                 network_backend = \"cni\"\n\
                 default_network = {:?}\n\
                 network_config_dir = {}\n\
                 cni_plugin_dirs = [{}, \"/usr/lib/cni\", \"/opt/cni/bin\"]\n",
                at("state"),
                self.name,
                at("cni"),
                at("plugins"),
            ),
        )?;
        self.set_plugin(plugin)
    }

    /// Writes the network's configuration, with these settings of the plugin's entry.
    ///
    /// # Errors
    ///
    /// If the file can't be written.
    pub fn set_plugin(&self, settings: &Value) -> Result<()> {
        let mut entry = json!({ "type": "interceptor-cni" });
        for (key, value) in settings.as_object().context("settings are an object")? {
            entry[key] = value.clone();
        }
        let chain = json!({
            "cniVersion": "1.0.0",
            "name": self.name,
            "plugins": [
                {
                    "type": "ptp",
                    "ipam": {
                        "type": "host-local",
                        "dataDir": self.path("addresses"),
                        "ranges": [[{ "subnet": "10.89.0.0/16", "gateway": GATEWAY }]],
                        "routes": [{ "dst": "0.0.0.0/0" }],
                    },
                },
                entry,
            ],
        });
        let path = self.network_configuration();
        fs::write(&path, chain.to_string()).with_context(|| format!("write {}", path.display()))
    }

    /// The pods' ends of cables that are still there.
    ///
    /// # Errors
    ///
    /// If `ip` fails.
    pub fn cables(&self) -> Result<usize> {
        Ok(self.node.ip("-o link show type veth")?.lines().count())
    }

    /// Removes the pods' cgroups, of every hierarchy.
    fn remove_cgroups(&self) -> Result<()> {
        for mount in cgroup::mounts()? {
            let path = mount.join(&self.name);
            wait_until(
                "the cgroup is empty",
                Duration::from_secs(5),
                || match cgroup::remove_tree(&path) {
                    Ok(()) => Ok(Some(())),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Some(())),
                    Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => Ok(None),
                    Err(error) => Err(error.into()),
                },
            )
            .with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

impl Drop for Podman {
    #[expect(clippy::print_stderr, reason = "nothing else can be told from drop")]
    fn drop(&mut self) {
        let removed = self
            .podman(&["pod", "rm", "--force", "--all"], &["--time", "0"])
            .and_then(|_| self.remove_cgroups());
        if let Err(error) = removed {
            eprintln!("podman's {} stays behind: {error:#}", self.name);
        }
    }
}

/// The shared libraries of a program, and the loader.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = run(Command::new("ldd").arg(program))?;
    ensure!(!listed.contains("not found"), "{listed}");
    Ok(listed
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is no UTF-8", path.display()))
}
