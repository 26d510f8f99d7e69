//! Sockets made inside a pod, and handed to the test.
//!
//! A socket belongs to the network namespace, the cgroup and the user of the
//! process that called socket(). [`Inside`] is such a process in the pod or
//! its peer; what it makes, the test binds, connects, closes and keeps as it
//! likes, in its own threads.

use std::{
    io::{self, BufRead as _, BufReader, ErrorKind, IoSlice, IoSliceMut, Read as _, Write as _},
    net::{Ipv6Addr, Shutdown, SocketAddr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    process::{Child, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
        sendmsg, socketpair,
    },
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    agent::Served,
    command::workspace_binary,
    pod::{Credentials, Host, Pod},
};

/// How long connect() and each read may take.
const LIMIT: Duration = Duration::from_secs(5);

/// The three numbers of a socket() call.
const REQUEST_LEN: usize = 3 * size_of::<i32>();

/// A process that makes sockets for the test; ends when dropped.
#[derive(Debug)]
pub struct Inside {
    child: Child,
    channel: Mutex<OwnedFd>,
}

impl Inside {
    /// Starts one on a host of the pod.
    ///
    /// # Errors
    ///
    /// If the program is missing or can't be started.
    pub fn start(pod: &Pod, host: Host, credentials: Credentials) -> Result<Self> {
        let program = workspace_binary("interceptor-inside", "INTERCEPTOR_INSIDE")?;
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let child = pod
            .command(host, credentials, &program)?
            .stdin(Stdio::from(theirs))
            .spawn()
            .with_context(|| format!("start {} in the {host:?}", program.display()))?;
        Ok(Self {
            child,
            channel: Mutex::new(ours),
        })
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Makes a socket.
    ///
    /// # Errors
    ///
    /// If socket() fails there, or the process has ended.
    pub fn socket(&self, domain: Domain, kind: Type, protocol: Protocol) -> Result<Socket> {
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let request: Vec<u8> = [i32::from(domain), i32::from(kind), i32::from(protocol)]
            .into_iter()
            .flat_map(i32::to_ne_bytes)
            .collect();
        nix::unistd::write(&*channel, &request).context("ask for a socket")?;
        let (errno, socket) = receive(channel.as_raw_fd()).context("receive a socket")?;
        match socket {
            Some(socket) => Ok(socket.into()),
            None => Err(io::Error::from(Errno::from_raw(errno))).context("make a socket"),
        }
    }

    /// Makes a TCP socket of the address's family.
    ///
    /// # Errors
    ///
    /// As [`Inside::socket`].
    pub fn tcp(&self, address: SocketAddr) -> Result<Socket> {
        self.socket(Domain::for_address(address), Type::STREAM, Protocol::TCP)
    }

    /// Makes a TCP socket that listens; one on `::` leaves IPv4 alone.
    ///
    /// # Errors
    ///
    /// If it can't.
    pub fn listen(&self, address: SocketAddr) -> Result<Socket> {
        listen(self.tcp(address)?, address)
    }

    /// Connects.
    ///
    /// # Errors
    ///
    /// Only if no socket can be made: how connecting went is the inner result.
    pub fn connect(&self, to: SocketAddr) -> Result<io::Result<Conversation>> {
        Ok(Conversation::begin(self.tcp(to)?, to))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a socket listen that may share its address with others.
///
/// # Errors
///
/// If it can't.
pub fn listen(socket: Socket, address: SocketAddr) -> Result<Socket> {
    let listen = || -> io::Result<()> {
        if address.ip() == Ipv6Addr::UNSPECIFIED {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(1024)
    };
    listen().with_context(|| format!("listen on {address}"))?;
    Ok(socket)
}

/// A server that tells each connection what it sees of it, as an agent does
/// ([`Served`]), and then echoes. Its listener closes when this is dropped.
#[derive(Debug)]
pub struct Server {
    listener: Arc<Socket>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Accepts from `listener`.
    pub fn start(name: &str, listener: Socket) -> Self {
        let listener = Arc::new(listener);
        let accepting = thread::spawn({
            let (listener, name) = (Arc::clone(&listener), name.to_owned());
            move || accept_all(&listener, &name)
        });
        Self {
            listener,
            accepting: Some(accepting),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ends accept(). The socket closes with its last owner.
        let _ = self.listener.shutdown(Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// Ends when the listener is shut down.
fn accept_all(listener: &Socket, name: &str) {
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                let name = name.to_owned();
                // A client that has gone is no error.
                thread::spawn(move || serve(&socket, name));
            }
            Err(error) if error.kind() == ErrorKind::InvalidInput => return,
            // A connection that was reset before it was accepted.
            Err(_) => {}
        }
    }
}

fn serve(mut socket: &Socket, server: String) -> io::Result<()> {
    let getpeername = address(socket.peer_addr()?)?;
    let served = Served {
        server,
        original_dst: original_dst(socket, getpeername).map_err(|error| error.to_string()),
        getpeername,
        getsockname: address(socket.local_addr()?)?,
    };
    let mut line = serde_json::to_vec(&served)?;
    line.push(b'\n');
    socket.write_all(&line)?;
    io::copy(&mut &*socket, &mut socket)?;
    Ok(())
}

/// What `SO_ORIGINAL_DST` says, asked as the peer's family demands.
pub(crate) fn original_dst(socket: &Socket, peer: SocketAddr) -> io::Result<SocketAddr> {
    address(if peer.ip().to_canonical().is_ipv4() {
        socket.original_dst_v4()?
    } else {
        socket.original_dst_v6()?
    })
}

fn address(address: socket2::SockAddr) -> io::Result<SocketAddr> {
    address
        .as_socket()
        .ok_or_else(|| io::Error::other("neither IPv4 nor IPv6"))
}

/// A client's connection to a server that speaks as [`Server`] does.
#[derive(Debug)]
pub struct Conversation {
    stream: BufReader<Socket>,
    /// What the server saw.
    pub served: Served,
}

impl Conversation {
    /// Connects the socket and reads what the server saw.
    ///
    /// # Errors
    ///
    /// If connect() fails, or the server says nothing (`UnexpectedEof`).
    pub fn begin(socket: Socket, to: SocketAddr) -> io::Result<Self> {
        // Bounds connect(), too.
        socket.set_write_timeout(Some(LIMIT))?;
        socket.set_read_timeout(Some(LIMIT))?;
        socket.connect(&to.into())?;
        let mut stream = BufReader::new(socket);
        let mut line = Vec::new();
        stream.read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let served = serde_json::from_slice(&line)?;
        Ok(Self { stream, served })
    }

    /// The client's socket.
    pub fn socket(&self) -> &Socket {
        self.stream.get_ref()
    }

    /// Sends some bytes and reads them back.
    ///
    /// # Errors
    ///
    /// If they don't come back.
    pub fn echo(&mut self) -> Result<()> {
        let sent = [0x5a; 4096];
        self.stream
            .get_mut()
            .write_all(&sent)
            .context("send bytes to be echoed")?;
        let mut echo = [0; 4096];
        self.stream
            .read_exact(&mut echo)
            .context("read echoed bytes")?;
        ensure!(echo == sent, "other bytes were echoed");
        Ok(())
    }
}

/// The process's own side: makes the sockets that standard input asks for.
///
/// # Errors
///
/// If standard input is not a socket that takes descriptors.
pub fn run() -> Result<()> {
    let channel = io::stdin();
    let mut request = [0; REQUEST_LEN];
    loop {
        match nix::unistd::read(&channel, &mut request).context("read a request")? {
            0 => return Ok(()),
            length => ensure!(length == REQUEST_LEN, "{length} bytes are no request"),
        }
        let number =
            |at: usize| i32::from_ne_bytes([0, 1, 2, 3].map(|byte| request[4 * at + byte]));
        let made = Socket::new(number(0).into(), number(1).into(), Some(number(2).into()));
        let (errno, fds): (i32, Vec<RawFd>) = match &made {
            Ok(socket) => (0, vec![socket.as_raw_fd()]),
            Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
        };
        let rights = [ControlMessage::ScmRights(&fds)];
        let messages = if fds.is_empty() { &[] } else { &rights[..] };
        sendmsg::<()>(
            channel.as_raw_fd(),
            &[IoSlice::new(&errno.to_ne_bytes())],
            messages,
            MsgFlags::empty(),
            None,
        )
        .context("send a socket")?;
    }
}

/// An errno, or 0 and a descriptor.
fn receive(channel: RawFd) -> Result<(i32, Option<OwnedFd>)> {
    let mut errno = [0; 4];
    let mut parts = [IoSliceMut::new(&mut errno)];
    let mut space = cmsg_space!(RawFd);
    let message = recvmsg::<()>(
        channel,
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    ensure!(message.bytes == 4, "the process has ended");
    let fd = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok((i32::from_ne_bytes(errno), fd))
}
