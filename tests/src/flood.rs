//! Very many connections: a client and a server that do nothing else.
//!
//! The server tells each connection its original destination, in 18 bytes; the
//! client compares them with what it asked for. Both run as processes of the
//! pod or its peer.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::AddAssign,
    process::{Child, ChildStdin, ChildStdout, Stdio},
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    command::workspace_binary,
    inside::original_dst,
    pod::{Credentials, Host, Pod},
};

/// What a flood process does.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Listens, answers and never ends.
    Serve(Serve),
    /// Connects, and ends with a [`Tally`].
    Connect(Connect),
}

/// Listeners to open.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Serve {
    /// Where to listen.
    pub addresses: Vec<SocketAddr>,
    /// How many threads accept from each, every one from a listener of its own.
    pub acceptors: usize,
    /// The listeners' backlog.
    pub backlog: i32,
    /// Whether to accept nothing before [`Server::accept`].
    pub wait: bool,
}

/// Connections to make. The destinations are the pairs of `addresses` and
/// `ports`, over and over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connect {
    /// How many connections.
    pub connections: usize,
    /// How many threads share them.
    pub threads: usize,
    /// The first of the destination addresses.
    pub address: IpAddr,
    /// How many addresses follow each other.
    pub addresses: u32,
    /// The first of the ports.
    pub port: u16,
    /// How many ports follow each other.
    pub ports: u16,
    /// How long a connection may take altogether.
    pub timeout: Duration,
    /// Whether all stay open until the last is made.
    pub keep: bool,
}

impl Connect {
    fn destination(&self, number: usize) -> SocketAddr {
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let offset = number % self.addresses;
        let address: IpAddr = match self.address {
            IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() + offset).into(),
            IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits() + u128::from(offset)).into(),
        };
        let port = u32::from(self.port) + (number / self.addresses) % u32::from(self.ports);
        SocketAddr::new(address, u16::try_from(port).unwrap_or(u16::MAX))
    }
}

/// How the connections went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// The server named the destination that was asked for.
    pub right: usize,
    /// It named another one, or none.
    pub wrong: usize,
    /// There was no answer.
    pub failed: usize,
    /// Some of those that were wrong or failed.
    pub examples: Vec<String>,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.right += other.right;
        self.wrong += other.wrong;
        self.failed += other.failed;
        self.examples.extend(other.examples);
    }
}

/// A flood process.
#[derive(Debug)]
struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    fn start(pod: &Pod, host: Host, owner: Credentials, task: &Task) -> Result<Self> {
        let program = workspace_binary("interceptor-flood", "INTERCEPTOR_FLOOD")?;
        let mut child = pod
            .command(host, owner, &program)?
            .arg(serde_json::to_string(task)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {} in the {host:?}", program.display()))?;
        let stdin = child.stdin.take().context("its stdin")?;
        let stdout = BufReader::new(child.stdout.take().context("its stdout")?);
        Ok(Self {
            child,
            stdin,
            stdout,
        })
    }

    fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("the flood process said {line:?}"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server that runs until it is dropped.
#[derive(Debug)]
pub struct Server(Process);

impl Server {
    /// Starts one and waits until it listens.
    ///
    /// # Errors
    ///
    /// If it can't listen.
    pub fn start(pod: &Pod, host: Host, owner: Credentials, serve: Serve) -> Result<Self> {
        let mut process = Process::start(pod, host, owner, &Task::Serve(serve))?;
        process.answer::<()>().context("the server")?;
        Ok(Self(process))
    }

    /// Lets one that waits accept.
    ///
    /// # Errors
    ///
    /// If it has ended.
    pub fn accept(&mut self) -> Result<()> {
        Ok(self.0.stdin.write_all(b"\n")?)
    }
}

/// Connections being made.
#[derive(Debug)]
pub struct Clients(Process);

impl Clients {
    /// Starts to make connections.
    ///
    /// # Errors
    ///
    /// If the program is missing or can't be started.
    pub fn start(pod: &Pod, host: Host, owner: Credentials, connect: Connect) -> Result<Self> {
        Process::start(pod, host, owner, &Task::Connect(connect)).map(Self)
    }

    /// Waits until all are made.
    ///
    /// # Errors
    ///
    /// If the process fails.
    pub fn tally(mut self) -> Result<Tally> {
        self.0.answer().context("the clients")
    }
}

/// The process's own side: does the task in the first argument.
///
/// # Errors
///
/// If the argument is no task, or the server can't listen.
pub fn run() -> Result<()> {
    let task = std::env::args().nth(1).context("no task")?;
    match serde_json::from_str(&task).with_context(|| format!("parse {task}"))? {
        Task::Serve(serve) => run_server(&serve),
        Task::Connect(connect) => answer(&run_clients(&connect)?),
    }
}

fn answer(answer: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    Ok(io::stdout().write_all(&line)?)
}

fn run_server(serve: &Serve) -> Result<()> {
    let listeners = serve
        .addresses
        .iter()
        .flat_map(|address| std::iter::repeat_n(*address, serve.acceptors))
        .map(|address| listen(address, serve.backlog))
        .collect::<Result<Vec<_>>>()?;
    answer(&())?;
    if serve.wait {
        io::stdin().read_line(&mut String::new())?;
    }
    let accepting: Vec<_> = listeners
        .into_iter()
        .map(|listener| {
            thread::spawn(move || -> io::Result<()> {
                loop {
                    let (mut client, peer) = match listener.accept() {
                        Ok(accepted) => accepted,
                        // Reset before it was accepted.
                        Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => continue,
                        Err(error) => return Err(error),
                    };
                    // All zero stands for an error.
                    let destination = peer
                        .as_socket()
                        .and_then(|peer| original_dst(&client, peer).ok());
                    // A client that has given up is no error here.
                    let _ = client.write_all(&encode(destination));
                }
            })
        })
        .collect();
    // None ends but by an error.
    for thread in accepting {
        thread
            .join()
            .ok()
            .context("a thread panicked")?
            .context("accept")?;
    }
    Ok(())
}

fn listen(address: SocketAddr, backlog: i32) -> Result<Socket> {
    let socket = tcp(address)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(backlog)?;
    Ok(socket)
}

fn run_clients(connect: &Connect) -> Result<Tally> {
    let connect = Arc::new(connect.clone());
    let start = Arc::new(Barrier::new(connect.threads));
    let end = Arc::new(Barrier::new(connect.threads));
    let threads: Vec<_> = (0..connect.threads)
        .map(|first| {
            let connect = Arc::clone(&connect);
            let (start, end) = (Arc::clone(&start), Arc::clone(&end));
            thread::spawn(move || {
                start.wait();
                let mut tally = Tally::default();
                let mut kept = Vec::new();
                for number in (first..connect.connections).step_by(connect.threads) {
                    let to = connect.destination(number);
                    let example = match ask(to, connect.timeout) {
                        Ok((socket, answer)) if answer == encode(Some(to)) => {
                            tally.right += 1;
                            if connect.keep {
                                kept.push(socket);
                            }
                            continue;
                        }
                        Ok((_, answer)) => {
                            tally.wrong += 1;
                            format!("{to}: {answer:?}")
                        }
                        Err(error) => {
                            tally.failed += 1;
                            format!("{to}: {error}")
                        }
                    };
                    if tally.examples.len() < 4 {
                        tally.examples.push(example);
                    }
                }
                end.wait();
                tally
            })
        })
        .collect();
    let mut total = Tally::default();
    for thread in threads {
        total += thread.join().ok().context("a thread panicked")?;
    }
    ensure!(
        total.right + total.wrong + total.failed == connect.connections,
        "connections that nobody made"
    );
    Ok(total)
}

fn ask(to: SocketAddr, timeout: Duration) -> io::Result<(Socket, [u8; 18])> {
    let mut socket = tcp(to)?;
    // Bounds connect(), too.
    socket.set_write_timeout(Some(timeout))?;
    socket.set_read_timeout(Some(timeout))?;
    socket.connect(&to.into())?;
    let mut answer = [0; 18];
    socket.read_exact(&mut answer)?;
    Ok((socket, answer))
}

fn tcp(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )
}

fn encode(address: Option<SocketAddr>) -> [u8; 18] {
    let mut bytes = [0; 18];
    if let Some(address) = address {
        let ip = match address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        bytes[..16].copy_from_slice(&ip.octets());
        bytes[16..].copy_from_slice(&address.port().to_be_bytes());
    }
    bytes
}
