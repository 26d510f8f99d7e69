//! The processes of the pod and its peer that listen and connect.
//!
//! An [`Agent`] is a child process on one of the two hosts. It is told what to
//! do in lines of JSON, so that several requests may be under way at once; the
//! other end of the line is [`worker`]. Whole connections are made by
//! [`Agent::connect`], and single system calls through [`calls`].

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::{
    command::workspace_binary,
    pod::{Credentials, Host, Pod},
};

pub mod calls;
mod sockets;
pub mod worker;

/// How long a reply may take, over what the request itself may take.
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// What an agent can be told to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Open listeners.
    Listen(Listen),
    /// Close the listeners of the `Listen` request with this id.
    Close(u64),
    /// Connect, and listen to what the server says.
    Connect(Connect),
    /// Make a system call.
    Call(calls::Call),
}

/// What an agent answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The listeners are open, or closed.
    Done,
    /// How a connection went.
    Connected(Outcome),
    /// What a system call returned.
    Answered(calls::Answer),
}

/// A request or a reply, and which reply belongs to which request.
#[derive(Debug, Serialize, Deserialize)]
struct Numbered<T> {
    id: u64,
    body: T,
}

/// Listeners to open. Each connection that they accept is told in one line of
/// JSON what the server saw ([`Served`]); then they echo what they get.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listen {
    /// What the server calls itself.
    pub name: String,
    /// Where to listen.
    pub addresses: Vec<SocketAddr>,
    /// Whether an IPv6 listener on `::` leaves IPv4 alone.
    pub v6only: bool,
    /// How many sockets share each address (`SO_REUSEPORT` if more than one).
    pub sockets: usize,
    /// The listeners' backlog.
    pub backlog: i32,
    /// Whose the sockets are.
    pub owner: Credentials,
    /// Whether the sockets answer from addresses that aren't the host's
    /// (`IP_TRANSPARENT`).
    pub transparent: bool,
    /// Whether they are of UDP: each datagram is answered with what the server
    /// saw.
    pub datagrams: bool,
}

impl Listen {
    /// One socket of root's on each address.
    pub fn new(name: &str, addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            name: name.to_owned(),
            addresses: addresses.into_iter().collect(),
            v6only: true,
            sockets: 1,
            backlog: 128,
            owner: Credentials::ROOT,
            transparent: false,
            datagrams: false,
        }
    }

    /// The same, but someone else's.
    #[must_use]
    pub fn owned_by(self, owner: Credentials) -> Self {
        Self { owner, ..self }
    }
}

/// A connection to make. Its socket is of the address family of `to`, so a
/// `to` of the form `::ffff:a.b.c.d` means IPv4 on an `AF_INET6` socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connect {
    /// Whose the socket is.
    pub owner: Credentials,
    /// What to bind the socket to; port 0 leaves it to the kernel.
    pub bind: Option<SocketAddr>,
    /// The socket's mark (`SO_MARK`). With one, the address to bind to need not be
    /// the host's (`IP_TRANSPARENT`). For TCP.
    pub mark: Option<u32>,
    /// Where to connect.
    pub to: SocketAddr,
    /// Whether connect() is called on a non-blocking socket.
    pub nonblocking: bool,
    /// How long connect() and each read may take.
    pub timeout: Duration,
    /// How many bytes to send for the server to echo.
    pub payload: usize,
    /// By which protocol, and which calls.
    pub means: Means,
}

/// How a client talks to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Means {
    /// TCP.
    Tcp,
    /// UDP, by sendto() and recvfrom(): the peer's name is where the answer came
    /// from.
    Datagram,
    /// UDP, by connect() and send(); the answer must come from the peer.
    ConnectedDatagram,
}

impl Connect {
    /// An unbound, blocking connection.
    pub fn new(owner: Credentials, to: SocketAddr) -> Self {
        Self {
            owner,
            bind: None,
            mark: None,
            to,
            nonblocking: false,
            timeout: Duration::from_secs(5),
            payload: 1000,
            means: Means::Tcp,
        }
    }
}

/// How a connection went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// bind() or connect() failed: `REFUSED`, `TIMEOUT` or the errno's name.
    Failed(String),
    /// connect() succeeded.
    Connected {
        /// The client's getsockname.
        getsockname: SocketAddr,
        /// The client's getpeername, or the errno's name.
        getpeername: Result<SocketAddr, String>,
        /// What the server said, or why it didn't.
        served: Result<Served, String>,
    },
}

/// What a server saw of a connection, right after it accepted it. IPv4
/// addresses have their own form, whatever the socket's family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// What the server calls itself.
    pub server: String,
    /// What `SO_ORIGINAL_DST` said, or the errno's name.
    pub original_dst: Result<SocketAddr, String>,
    /// The server's getpeername.
    pub getpeername: SocketAddr,
    /// The server's getsockname.
    pub getsockname: SocketAddr,
}

/// Who waits for which reply. The reader drops it when the agent has ended.
type Waiting = Arc<Mutex<Option<HashMap<u64, mpsc::Sender<Result<Reply, String>>>>>>;

/// Open listeners of an agent, to be closed by [`Agent::close`].
#[derive(Debug)]
pub struct Listening(u64);

/// A child process that listens and connects; ends when dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    stdin: Mutex<(ChildStdin, u64)>,
    waiting: Waiting,
}

impl Agent {
    /// Starts one on a host of the pod. It stays root, and changes the
    /// credentials of a thread where a request asks for others.
    ///
    /// # Errors
    ///
    /// If the program is missing or can't be started.
    pub fn start(pod: &Pod, host: Host) -> Result<Self> {
        let program = workspace_binary("interceptor-agent", "INTERCEPTOR_AGENT")?;
        let mut child = pod
            .command(host, Credentials::ROOT, &program)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {} in the {host:?}", program.display()))?;
        let stdin = child.stdin.take().context("the agent's stdin")?;
        let stdout = child.stdout.take().context("the agent's stdout")?;
        let stderr = child.stderr.take().context("the agent's stderr")?;
        thread::spawn(move || complain(stderr));
        let waiting = Waiting::new(Mutex::new(Some(HashMap::new())));
        thread::spawn({
            let waiting = Arc::clone(&waiting);
            move || dispatch(stdout, &waiting)
        });
        Ok(Self {
            child,
            stdin: Mutex::new((stdin, 0)),
            waiting,
        })
    }

    /// Opens listeners.
    ///
    /// # Errors
    ///
    /// If one can't be opened; then none is.
    pub fn listen(&self, listen: Listen) -> Result<Listening> {
        let what = format!("listen on {:?}", listen.addresses);
        let (id, reply) = self.send(Request::Listen(listen))?;
        match Self::receive(&reply, REPLY_LIMIT).context(what)? {
            Reply::Done => Ok(Listening(id)),
            other => bail!("unexpected reply {other:?}"),
        }
    }

    /// Closes listeners.
    ///
    /// # Errors
    ///
    /// If the agent has ended.
    pub fn close(&self, listening: Listening) -> Result<()> {
        let (_, reply) = self.send(Request::Close(listening.0))?;
        Self::receive(&reply, REPLY_LIMIT).context("close a listener")?;
        Ok(())
    }

    /// Makes a connection.
    ///
    /// # Errors
    ///
    /// If the agent fails; that the connection fails is no error.
    pub fn connect(&self, connect: Connect) -> Result<Outcome> {
        let what = format!("{connect:?}");
        let limit = REPLY_LIMIT + connect.timeout * 3;
        let (_, reply) = self.send(Request::Connect(connect))?;
        match Self::receive(&reply, limit).context(what)? {
            Reply::Connected(outcome) => Ok(outcome),
            other => bail!("unexpected reply {other:?}"),
        }
    }

    fn send(&self, body: Request) -> Result<(u64, mpsc::Receiver<Result<Reply, String>>)> {
        let (sender, receiver) = mpsc::channel();
        let (stdin, last_id) = &mut *lock(&self.stdin);
        *last_id += 1;
        let id = *last_id;
        lock(&self.waiting)
            .as_mut()
            .context("the agent has ended")?
            .insert(id, sender);
        let mut line = serde_json::to_vec(&Numbered { id, body })?;
        line.push(b'\n');
        stdin.write_all(&line).context("write to the agent")?;
        Ok((id, receiver))
    }

    fn receive(reply: &mpsc::Receiver<Result<Reply, String>>, limit: Duration) -> Result<Reply> {
        reply
            .recv_timeout(limit)
            .context("no reply from the agent")?
            .map_err(|error| anyhow!(error))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Gives each reply to the one that waits for it, until the agent ends.
fn dispatch(stdout: ChildStdout, waiting: &Waiting) {
    for line in BufReader::new(stdout).lines() {
        let Ok(reply) = line
            .map_err(anyhow::Error::from)
            .and_then(|line| Ok(serde_json::from_str::<Numbered<_>>(&line)?))
        else {
            break;
        };
        let sender = lock(waiting).as_mut().and_then(|w| w.remove(&reply.id));
        if let Some(sender) = sender {
            // Whoever asked may have stopped waiting.
            let _ = sender.send(reply.body);
        }
    }
    // Ends every wait.
    *lock(waiting) = None;
}

/// Passes on what the agent says of its own failures. (With the harness's own
/// standard error, it would keep that open.)
#[expect(clippy::print_stderr, reason = "it is what the agent printed there")]
fn complain(stderr: ChildStderr) {
    for line in BufReader::new(stderr).lines() {
        let Ok(line) = line else { return };
        eprintln!("agent: {line}");
    }
}

/// Locks, whether or not another thread panicked meanwhile: what these locks
/// guard is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
