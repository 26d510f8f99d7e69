//! Pods of podman, whose network's last plugin is `interceptor-cni`, and how the plugin
//! gets onto a node.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use interceptor_tests::{
    bpf::{self, Id},
    cli::Cli,
    command::{run, wait_until, workspace_binary},
    daemon::{Daemon, LIMIT},
    interception::interceptor,
    intruder::{self, Target, open_ways},
    podman::{BUSYBOX, GATEWAY, Podman, Role},
    proxies::{self, Logged, envoy_configuration},
    world::objects,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const POD: &str = "web";
const APP: &str = "app";

/// What a container's last words are if nobody took its connection.
const REFUSED: &str = "Connection refused";

/// What a server on the node answers, and on which port.
const HELLO: &str = "hello from the node";
const PORT: u16 = 8080;

/// Podman, and the daemon that looks after its pods.
struct Machine {
    daemon: Daemon,
    /// The daemon's process.
    pid: i32,
    cli: Cli,
    podman: Podman,
}

impl Machine {
    fn new() -> Result<Self> {
        let podman = Podman::new(&json!({}))?;
        let cli = Cli::new()?;
        let settings = format!("select = 'all'\ncgroup-parent = '/{}'", podman.name());
        let mut daemon = Daemon::start(&cli, &settings)?;
        podman.set_plugin(&json!({ "socket": daemon.socket() }))?;
        Ok(Self {
            pid: daemon.pid()?,
            daemon,
            cli,
            podman,
        })
    }

    fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid))?.count())
    }

    /// The resident memory, in KiB.
    fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|line| line.trim().strip_suffix(" kB"))
            .and_then(|number| number.parse().ok())
            .with_context(|| format!("no VmRSS in {status}"))
    }

    /// Nothing of any pod is there any more.
    fn assert_nothing_left(&self) -> Result<()> {
        let pods = self.daemon.pods()?;
        ensure!(pods.is_empty(), "still known: {pods:?}");
        let mut pins = self.cli.directories()?;
        // The running daemon's own.
        pins.retain(|name| name != "+daemon");
        ensure!(pins.is_empty(), "pins stay behind: {pins:?}");
        ensure!(self.podman.cables()? == 0, "a cable stays behind");
        Ok(())
    }
}

/// A server on the node, and how many connections it has had.
fn serve(podman: &Podman) -> Result<Arc<AtomicUsize>> {
    let listener = podman
        .node()
        .enter(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?))?;
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    // It ends with this process.
    thread::spawn(move || {
        for stream in listener.incoming() {
            counted.fetch_add(1, Ordering::SeqCst);
            let Ok(mut stream) = stream else { return };
            // A client may have gone.
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(HELLO.as_bytes());
        }
    });
    Ok(count)
}

/// A command of the shell that connects, says a word, and prints the answer. (As busybox's
/// wget doesn't work where no C library is installed.)
fn ask(address: SocketAddr) -> String {
    format!(
        "echo hello | nc -w 5 {} {} 2>&1",
        address.ip(),
        address.port()
    )
}

fn node_address() -> SocketAddr {
    SocketAddr::new(GATEWAY, PORT)
}

/// An init container that asks the node's server and says how that went.
fn create_asking_init(podman: &Podman, pod: &str) -> Result<()> {
    let ask = format!("{}; true", ask(node_address()));
    podman.create_container(pod, "init", Role::Init, BUSYBOX, &[], &["sh", "-c", &ask])
}

/// Asks the node's server from the application's container.
fn ask_from_app(podman: &Podman) -> Result<String> {
    podman.exec(POD, APP, &["sh", "-c", &ask(node_address())])
}

/// What a sidecar's log says of the connections that went through it.
fn logged(podman: &Podman, port: u16) -> Result<Vec<SocketAddr>> {
    let log = podman.logs(POD, PROXY)?;
    Ok(log
        .lines()
        .filter_map(Logged::parse)
        .filter(|logged| logged.port == port)
        .map(|logged| logged.original_dst)
        .collect())
}

const PROXY: &str = "proxy";

/// Waits until the sidecar's log has a connection to this address on this port.
fn wait_until_logged(podman: &Podman, port: u16, address: SocketAddr) -> Result<()> {
    wait_until("the sidecar logs the connection", LIMIT, || {
        Ok(logged(podman, port)?.contains(&address).then_some(()))
    })
    .with_context(|| podman.logs(POD, PROXY).unwrap_or_default())
}

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
    ensure!(podman.cgroups()?.is_empty(), "the pod has a cgroup");
    podman.remove_pod(POD)?;

    podman.set_plugin(&json!({ "socket": nobody, "on_error": "pass" }))?;
    create_idle(&podman)?;
    podman.start_pod(POD)?;
    let addresses = podman.exec(POD, APP, &["ip", "addr", "show", "eth0"])?;
    ensure!(addresses.contains("inet 10.89."), "{addresses}");
    ensure!(podman.cgroups()?.len() == 1, "the pod has no cgroup");
    // It can be ended, too.
    podman.remove_pod(POD)?;
    ensure!(podman.cables()? == 0, "a cable stays behind");
    Ok(())
}

#[test]
fn the_first_syn_of_an_init_container_is_intercepted() -> Result<()> {
    let machine = Machine::new()?;
    let podman = &machine.podman;
    let connections = serve(podman)?;

    // What it would do otherwise: the same pod, which is not intercepted, reaches the server.
    let nobody = Path::new("/nonexistent/daemon.sock");
    podman.set_plugin(&json!({ "socket": nobody, "on_error": "pass" }))?;
    create_idle(podman)?;
    create_asking_init(podman, POD)?;
    podman.start_pod(POD)?;
    let said = podman.logs(POD, "init")?;
    ensure!(said.contains(HELLO), "{said}");
    ensure!(connections.swap(0, Ordering::SeqCst) == 1);
    podman.remove_pod(POD)?;

    podman.set_plugin(&json!({ "socket": machine.daemon.socket() }))?;
    podman.image("localhost/proxy", &[&proxies::Kind::Embedded.binary()?])?;
    let descriptors = machine.descriptors()?;
    create_idle(podman)?;
    create_asking_init(podman, POD)?;
    podman.create_container(
        POD,
        PROXY,
        Role::App,
        "localhost/proxy",
        &["--user", "1337:1337"],
        &["/usr/bin/interceptor", "proxy"],
    )?;
    podman
        .start_pod(POD)
        .with_context(|| machine.daemon.log())?;
    // No proxy ran yet: its connection was for the proxy, and was refused.
    let said = podman.logs(POD, "init")?;
    ensure!(said.contains(REFUSED), "{said}\n{}", machine.daemon.log());
    ensure!(connections.load(Ordering::SeqCst) == 0, "its SYN got out");

    let said = ask_from_app(podman).with_context(|| machine.daemon.log())?;
    ensure!(said.contains(HELLO), "{said}");
    wait_until_logged(podman, 15001, node_address())?;

    let pods = machine.daemon.pods()?;
    ensure!(pods.len() == 1, "{pods:?}");
    let objects = objects(&machine.cli, &pods[0].pod)?;
    podman.remove_pod(POD)?;
    machine.assert_nothing_left()?;
    bpf::wait_until_gone(&objects)?;
    wait_until("its descriptors are closed", LIMIT, || {
        Ok((machine.descriptors()? <= descriptors).then_some(()))
    })
}

#[test]
fn envoy_is_a_sidecar_both_ways() -> Result<()> {
    let machine = Machine::new()?;
    let podman = &machine.podman;
    let connections = serve(podman)?;
    podman.image("localhost/envoy", &[&proxies::Kind::Envoy.binary()?])?;
    let configuration = podman.directory().join("envoy.yaml");
    fs::write(&configuration, envoy_configuration())?;
    podman.create_pod(POD)?;
    let serve = "mkdir /www && echo hello from the pod > /www/index.html && \
                 exec httpd -f -p 8080 -h /www";
    podman.create_container(POD, APP, Role::App, BUSYBOX, &[], &["sh", "-c", serve])?;
    podman.create_container(
        POD,
        PROXY,
        Role::App,
        "localhost/envoy",
        &[
            "--user",
            "1337:1337",
            "--volume",
            &format!("{}:/envoy.yaml:ro", configuration.display()),
        ],
        &[
            "/usr/bin/envoy",
            "--concurrency",
            "2",
            "--disable-hot-restart",
            "--log-level",
            "warning",
            "--file-flush-interval-msec",
            "10",
            "-c",
            "/envoy.yaml",
        ],
    )?;
    podman
        .start_pod(POD)
        .with_context(|| machine.daemon.log())?;
    // It takes a moment to listen; until then connections are refused.
    let said = wait_until("Envoy carries a request", LIMIT, || {
        Ok(ask_from_app(podman).ok())
    })
    .with_context(|| podman.logs(POD, PROXY).unwrap_or_default())?;
    ensure!(said.contains(HELLO), "{said}");
    ensure!(connections.load(Ordering::SeqCst) == 1);
    wait_until_logged(podman, 15001, node_address())?;

    let address: IpAddr = podman.address(POD, APP)?;
    let to = SocketAddr::new(address, PORT);
    let answer = podman.node().enter(|| {
        let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    ensure!(answer.contains("hello from the pod"), "{answer}");
    wait_until_logged(podman, 15006, to)?;
    podman.remove_pod(POD)?;
    machine.assert_nothing_left()
}

#[test]
fn root_in_a_pod_reaches_nothing_of_it() -> Result<()> {
    let mut machine = Machine::new()?;
    machine
        .podman
        .image("localhost/intruder", &[&intruder::program()?])?;
    let podman = &machine.podman;
    podman.create_pod(POD)?;
    let idle = ["sleep", "1000000"];
    // With the capabilities of every container, and with one for its own network.
    for (name, options) in [(APP, &[][..]), ("admin", &["--cap-add", "NET_ADMIN"][..])] {
        podman.create_container(POD, name, Role::App, "localhost/intruder", options, &idle)?;
    }
    podman
        .start_pod(POD)
        .with_context(|| machine.daemon.log())?;
    let pods = machine.daemon.pods()?;
    ensure!(pods.len() == 1, "{pods:?}");
    let name = &pods[0].pod;
    let before = objects(&machine.cli, name)?;
    let mut target = Target::new(&machine.cli, &mut machine.daemon, name)?;
    // The node's own address, too.
    let port = target.metrics[0].port();
    target.metrics.push(SocketAddr::new(GATEWAY, port));
    for container in [APP, "admin"] {
        let argument = target.argument()?;
        // The application's user, and the proxy's, whose connections are left alone.
        for user in ["0", "1337"] {
            let printed = podman.podman(
                &["exec", "--user", user, &format!("{POD}-{container}")],
                &["/usr/bin/interceptor-intruder", &argument],
            )?;
            let ways = open_ways(&printed)?;
            ensure!(ways.is_empty(), "to {user} in {container}: {ways:?}");
        }
    }
    ensure!(objects(&machine.cli, name)? == before);
    // The way to its own network is open to the one, so that they were not the same.
    let set = ["ip", "link", "set", "lo", "mtu", "60000"];
    ensure!(podman.exec(POD, APP, &set).is_err());
    podman.exec(POD, "admin", &set)?;
    podman.remove_pod(POD)?;
    machine.assert_nothing_left()
}

/// Podman takes about a second of one processor for each pod, so CI makes few at a time.
/// The environment variable `PODMAN_PODS` says otherwise.
const PODS: usize = 8;

#[test]
fn pods_that_come_and_go_in_parallel_leave_nothing() -> Result<()> {
    const ROUNDS: usize = 3;
    let pods = match std::env::var("PODMAN_PODS") {
        Ok(number) => number.parse().context("PODMAN_PODS")?,
        Err(_) => PODS,
    };
    let machine = &Machine::new()?;
    let podman = &machine.podman;
    let connections = serve(podman)?;
    // The first round makes what is kept for good.
    let mut baseline = None;
    for round in 0..=ROUNDS {
        let ended = AtomicBool::new(false);
        let seen = thread::scope(|scope| {
            let seeing = scope.spawn(|| all_objects(machine, &ended));
            let threads: Vec<_> = (0..pods)
                .map(|index| {
                    let pod = format!("{POD}-{round}-{index}");
                    scope.spawn(move || -> Result<()> {
                        podman.create_pod(&pod)?;
                        create_asking_init(podman, &pod)?;
                        let idle = ["sleep", "1000000"];
                        podman.create_container(&pod, APP, Role::App, BUSYBOX, &[], &idle)?;
                        podman
                            .start_pod(&pod)
                            .with_context(|| machine.daemon.log())?;
                        let said = podman.logs(&pod, "init")?;
                        ensure!(
                            said.contains(REFUSED),
                            "{pod}: {said}\n{}",
                            machine.daemon.log()
                        );
                        podman.remove_pod(&pod)
                    })
                })
                .collect();
            let panicked = |_| anyhow::anyhow!("a thread panicked");
            let results: Vec<_> = threads
                .into_iter()
                .map(|thread| thread.join().map_err(panicked))
                .collect();
            ended.store(true, Ordering::SeqCst);
            for result in results {
                result??;
            }
            seeing.join().map_err(panicked)?
        })?;
        ensure!(seen.len() == pods, "only {} pods were seen", seen.len());
        ensure!(connections.load(Ordering::SeqCst) == 0, "a SYN got out");
        machine.assert_nothing_left()?;
        // Programs, maps and links, whoever may hold them still.
        bpf::wait_until_gone(&seen.into_values().flatten().collect::<Vec<_>>())?;
        wait_until("the kernel has freed what was ours", LIMIT, || {
            Ok((held_by(machine.pid)? == 0).then_some(()))
        })?;
        let now = (machine.descriptors()?, machine.memory()?);
        let (descriptors, memory) = *baseline.get_or_insert(now);
        ensure!(
            now.0 <= descriptors,
            "{} descriptors after round {round}, {descriptors} after the first",
            now.0
        );
        // What an allocator keeps; a leak of a pod's state would be more each round.
        ensure!(
            now.1 <= memory + 4096,
            "{} KiB after round {round}, {memory} after the first",
            now.1
        );
    }
    Ok(())
}

/// The kernel's objects of every pod that is attached until this has ended, by the
/// pods' names.
fn all_objects(machine: &Machine, ended: &AtomicBool) -> Result<BTreeMap<String, Vec<Id>>> {
    let mut seen = BTreeMap::new();
    while !ended.load(Ordering::SeqCst) {
        for pod in machine.daemon.pods()? {
            // While it is moved it has more, and while it is detached less.
            if let Entry::Vacant(entry) = seen.entry(pod.pod)
                && let Ok(objects) = objects(&machine.cli, entry.key())
            {
                entry.insert(objects);
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(seen)
}

/// How many of the kernel's programs, maps and links the process has open.
fn held_by(pid: i32) -> Result<usize> {
    let mut held = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // It may be closed meanwhile.
        let Ok(target) = fs::read_link(entry?.path()) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        held += usize::from(target.contains("bpf-") || target.contains("bpf_link"));
    }
    Ok(held)
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
