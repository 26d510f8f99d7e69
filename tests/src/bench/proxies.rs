//! Real proxies under real load generators: what is left of the difference when
//! a proxy does its work, too.
//!
//! wrk and sockperf run in the pod, the server at the peer, and Envoy or HAProxy
//! between them. Without interception the proxy is dialled, and told the
//! server's address.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;

use super::{
    mode::Mode,
    pair::listens,
    rounds::{Data, whose_turn},
    say, signals,
    stage::flush,
};
use crate::{
    cli::Cli,
    command::{run, wait_until},
    iptables::Flavour,
    netns::Netns,
    pod::{Credentials, Host, PEER_V4, Pod},
    proxies::Kind,
};

const MODES: [Mode; 4] = [
    Mode::Direct,
    Mode::DirectAgain,
    Mode::Iptables(Flavour::Nft),
    Mode::Interceptor("interceptor", &[]),
];

/// How often everything is measured in each mode.
const ROUNDS: usize = 9;
/// How long a load generator runs, in seconds.
const SECONDS: &str = "2";
/// Connections that wrk keeps busy.
const CONNECTIONS: &str = "16";
/// The server's port.
const PORT: u16 = 8080;

/// Measures both proxies in all modes.
pub(crate) fn measure(data: &mut Data) -> Result<()> {
    for (kind, name) in [(Kind::Envoy, "envoy"), (Kind::Haproxy, "haproxy")] {
        say(&format!("{name}: making pods"));
        let sites = MODES
            .into_iter()
            .map(|mode| Site::new(kind, mode).with_context(|| format!("set {mode} up")))
            .collect::<Result<Vec<_>>>()
            .with_context(|| name.to_owned())?;
        for (load, measures) in LOADS {
            say(&format!("{name}: {}", measures[0]));
            let servers = sites
                .iter()
                .map(|site| load.serve(&site.pod))
                .collect::<Result<Vec<_>>>()?;
            for round in 0..ROUNDS {
                for turn in 0..sites.len() {
                    signals::check()?;
                    let site = &sites[whose_turn(turn, round, sites.len())];
                    let values = load
                        .run(site)
                        .with_context(|| format!("{name}, {}, {}", site.mode, measures[0]))?;
                    for (measure, value) in measures.iter().zip(values) {
                        data.add(name, measure, site.mode, value);
                    }
                }
            }
            drop(servers);
        }
    }
    Ok(())
}

/// A load generator and what it measures.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    /// wrk with connections that stay open.
    Wrk,
    /// wrk with a connection for each request.
    WrkClose,
    /// sockperf's ping-pong over one connection.
    Sockperf,
}

const LOADS: [(Load, [&str; 2]); 3] = [
    (Load::Wrk, ["wrk_requests_per_second", "wrk_p99"]),
    (
        Load::WrkClose,
        ["wrk_close_requests_per_second", "wrk_close_p99"],
    ),
    (Load::Sockperf, ["sockperf_p50", "sockperf_p99"]),
];

impl Load {
    /// Starts the server for it.
    fn serve(self, pod: &Pod) -> Result<Process> {
        let port = PORT.to_string();
        let mut command = match self {
            Self::Wrk | Self::WrkClose => {
                let this = std::env::current_exe().context("find this program's own path")?;
                let mut command = pod.command(Host::Peer, Credentials::ROOT, this)?;
                command.args(["http", "--port", &port]);
                command
            }
            Self::Sockperf => {
                let mut command = pod.command(Host::Peer, Credentials::ROOT, "sockperf")?;
                command.args(["server", "--tcp", "-p", &port, "-i"]);
                command.arg(PEER_V4.to_string());
                command
            }
        };
        // sockperf can't listen while there are connections in TIME_WAIT.
        flush(pod.peer())?;
        let mut process = Process::start(&mut command)?;
        process
            .wait_until_it_listens(pod.peer(), PORT)
            .with_context(|| format!("{command:?}"))?;
        Ok(process)
    }

    /// Runs it; returns its two measures. On a machine that is too busy sockperf
    /// observes nothing: then it runs again, three times at most.
    fn run(self, site: &Site) -> Result<[f64; 2]> {
        let mut result = self.run_once(site);
        for _ in 0..2 {
            match &result {
                Err(error) if format!("{error:#}").contains("No valid observations") => {
                    result = self.run_once(site);
                }
                _ => break,
            }
        }
        result
    }

    fn run_once(self, site: &Site) -> Result<[f64; 2]> {
        let (ip, port) = site.target();
        let mut command = match self {
            Self::Wrk | Self::WrkClose => site.wrk()?,
            Self::Sockperf => {
                let pod = &site.pod;
                let mut command = pod.command(Host::Pod, Credentials::ROOT, "sockperf")?;
                command.args(["ping-pong", "--tcp", "-t", SECONDS, "-i", &ip]);
                command.args(["-p", &port.to_string()]);
                command
            }
        };
        if self == Self::WrkClose {
            command.args(["-H", "Connection: close"]);
        }
        let output = run(&mut command)?;
        match self {
            Self::Wrk | Self::WrkClose => wrk_results(&output),
            Self::Sockperf => sockperf_results(&output),
        }
        .with_context(|| format!("{command:?} printed:\n{output}"))
    }
}

/// The requests per second, and the 99th percentile of their time in ns.
fn wrk_results(output: &str) -> Result<[f64; 2]> {
    ensure!(
        !output.contains("Socket errors") && !output.contains("Non-2xx"),
        "requests have failed"
    );
    let value = |key: &str| {
        output
            .lines()
            .find_map(|line| line.trim().strip_prefix(key))
            .map(str::trim)
            .with_context(|| format!("no `{key}`"))
    };
    let rate: f64 = value("Requests/sec:")?.parse()?;
    ensure!(rate > 0.0, "no requests");
    Ok([rate, nanoseconds(value("99%")?)?])
}

/// A time as wrk writes it: `1.50ms`.
fn nanoseconds(text: &str) -> Result<f64> {
    for (unit, factor) in [("us", 1e3), ("ms", 1e6), ("s", 1e9)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Ok(number.trim().parse::<f64>()? * factor);
        }
    }
    bail!("`{text}` is no time")
}

/// The median and the 99th percentile of half a round trip, in ns.
fn sockperf_results(output: &str) -> Result<[f64; 2]> {
    let percentile = |which: &str| -> Result<f64> {
        let text = output
            .lines()
            .find_map(|line| line.split_once(which))
            .and_then(|(_, value)| value.trim().strip_prefix('='))
            .with_context(|| format!("no {which}"))?;
        Ok(text.trim().parse::<f64>()? * 1e3)
    };
    let median = percentile("percentile 50.000")?;
    Ok([median, percentile("percentile 99.000")?])
}

/// A pod with a proxy. All goes in this order.
struct Site {
    proxy: Process,
    _configuration: TempDir,
    _attached: Option<Cli>,
    pod: Pod,
    mode: Mode,
}

impl Site {
    fn new(kind: Kind, mode: Mode) -> Result<Self> {
        let pod = Pod::new()?;
        let attached = mode.install(&pod)?;
        if mode.intercepts() {
            refused_without_proxy(&pod)?;
        }
        let configuration = tempfile::tempdir().context("make a temporary directory")?;
        let (program, arguments) = prepare(kind, mode, &configuration)?;
        let mut command = pod.command(Host::Pod, Credentials::PROXY, program)?;
        let proxy = Process::start(command.args(arguments))?;
        let mut site = Self {
            proxy,
            _configuration: configuration,
            _attached: attached,
            pod,
            mode,
        };
        site.proxy.wait_until_it_listens(site.pod.netns(), 15001)?;
        Ok(site)
    }

    /// Where clients connect to.
    fn target(&self) -> (String, u16) {
        if self.mode.intercepts() {
            (PEER_V4.to_string(), PORT)
        } else {
            (Ipv4Addr::LOCALHOST.to_string(), 15001)
        }
    }

    fn wrk(&self) -> Result<Command> {
        let (ip, port) = self.target();
        let mut command = self.pod.command(Host::Pod, Credentials::ROOT, "wrk")?;
        command.args(["-t", "1", "-c", CONNECTIONS, "-d", SECONDS, "--latency"]);
        command.arg(format!("http://{ip}:{port}/"));
        Ok(command)
    }
}

/// Checks that connections are intercepted: no proxy listens yet, but a server
/// does, and is not reached.
fn refused_without_proxy(pod: &Pod) -> Result<()> {
    let server = Load::Wrk.serve(pod)?;
    let mut command = pod.command(Host::Pod, Credentials::ROOT, "wrk")?;
    command.args(["-t", "1", "-c", "1", "-d", "1"]);
    command.arg(format!("http://{PEER_V4}:{PORT}/"));
    let output = command.output().context("start wrk")?;
    drop(server);
    ensure!(
        String::from_utf8_lossy(&output.stderr).contains("Connection refused"),
        "a connection was not intercepted: {output:?}"
    );
    Ok(())
}

/// Leaves the proxy's program and its configuration where its user may read
/// them; returns its path and its arguments.
fn prepare(kind: Kind, mode: Mode, directory: &TempDir) -> Result<(PathBuf, Vec<String>)> {
    let readable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(directory.path(), readable.clone())?;
    let program = directory.path().join("proxy");
    run(Command::new("cp").arg(kind.binary()?).arg(&program))?;
    fs::set_permissions(&program, readable)?;
    let path = directory.path().join("configuration.yaml");
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let (text, mut arguments) = match kind {
        Kind::Envoy => (
            envoy(mode),
            words("--concurrency 2 --disable-hot-restart --log-level error -c"),
        ),
        Kind::Haproxy => (haproxy(mode), words("-db -f")),
        Kind::Embedded => bail!("the embedded proxy is no real one"),
    };
    fs::write(&path, text)?;
    arguments.push(path.display().to_string());
    Ok((program, arguments))
}

/// Envoy's configuration: a TCP proxy that writes no log.
fn envoy(mode: Mode) -> String {
    let (filters, cluster) = if mode.intercepts() {
        (
            "
    listener_filters:
    - name: envoy.filters.listener.original_dst
      typed_config: { \"@type\": type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst }",
            "type: ORIGINAL_DST
    lb_policy: CLUSTER_PROVIDED"
                .to_owned(),
        )
    } else {
        (
            "",
            format!(
                "type: STATIC
    load_assignment:
      cluster_name: outbound
      endpoints:
      - lb_endpoints:
        - endpoint: {{ address: {{ socket_address: {{ address: {PEER_V4}, port_value: {PORT} }} }} }}"
            ),
        )
    };
    format!(
        "\
static_resources:
  listeners:
  - name: outbound
    address: {{ socket_address: {{ address: 0.0.0.0, port_value: 15001 }} }}{filters}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: outbound
          cluster: outbound
  clusters:
  - name: outbound
    connect_timeout: 2s
    {cluster}
"
    )
}

/// HAProxy's configuration: the same.
fn haproxy(mode: Mode) -> String {
    let server = if mode.intercepts() {
        "0.0.0.0".to_owned()
    } else {
        format!("{PEER_V4}:{PORT}")
    };
    format!(
        "\
global
    maxconn 4096
    nbthread 2
defaults
    mode tcp
    timeout connect 2s
    timeout client 30s
    timeout server 30s
frontend outbound
    bind 0.0.0.0:15001
    default_backend outbound
backend outbound
    server server {server}
"
    )
}

/// A process of a pod; killed when dropped.
#[derive(Debug)]
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn();
        Ok(Self(child.with_context(|| format!("start {command:?}"))?))
    }

    fn wait_until_it_listens(&mut self, netns: &Netns, port: u16) -> Result<()> {
        wait_until("it listens", Duration::from_secs(20), || {
            if let Some(status) = self.0.try_wait()? {
                bail!("it ended: {status}");
            }
            Ok(listens(netns, port)?.then_some(()))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing left to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How the HTTP server is started.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Http {
    /// The port to listen on
    #[arg(long)]
    port: u16,
}

/// Answers every request with the same few bytes, until it is killed. Each
/// connection has a thread.
pub(crate) fn http(arguments: Http) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, arguments.port))?;
    loop {
        let (connection, _) = listener.accept()?;
        // What goes wrong ends the one connection; its client says so.
        thread::spawn(move || answer(connection));
    }
}

fn answer(mut connection: TcpStream) -> std::io::Result<()> {
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n";
    const LAST: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nok\n";
    connection.set_nodelay(true)?;
    let mut request = [0; 4096];
    let mut length = 0;
    loop {
        match connection.read(&mut request[length..])? {
            0 => return Ok(()),
            more => length += more,
        }
        if request[..length].ends_with(b"\r\n\r\n") {
            let close = request[..length]
                .windows(17)
                .any(|part| part == b"Connection: close");
            connection.write_all(if close { LAST } else { ANSWER })?;
            if close {
                return Ok(());
            }
            length = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrks_results_are_read() {
        let output = "\
Running 2s test @ http://10.77.0.1:8080/
  Latency Distribution
     50%  300.00us
     99%    1.50ms
  23456 requests in 2.00s, 1.20MB read
Requests/sec:  11728.00
Transfer/sec:    614.40KB
";
        assert_eq!(wrk_results(output).unwrap(), [11728.0, 1.5e6]);
        for failed in ["Non-2xx or 3xx responses: 3", "Socket errors: connect 0"] {
            assert!(wrk_results(&format!("{output}  {failed}\n")).is_err());
        }
        assert!(wrk_results("").is_err());
        assert_eq!(nanoseconds("12.00us").unwrap(), 12e3);
        assert_eq!(nanoseconds("1.20s").unwrap(), 1.2e9);
        assert!(nanoseconds("5m").is_err());
    }

    #[test]
    fn sockperfs_results_are_read() {
        let output = "\
sockperf: ---> percentile 99.900 =   55.000
sockperf: ---> percentile 99.000 =   42.500
sockperf: ---> percentile 50.000 =   21.250
";
        assert_eq!(sockperf_results(output).unwrap(), [21_250.0, 42_500.0]);
        assert!(sockperf_results("").is_err());
    }
}
