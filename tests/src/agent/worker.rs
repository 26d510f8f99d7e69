//! The agent's own side: does what the lines on standard input ask for.

use std::{
    collections::HashMap,
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    net::{Ipv6Addr, Shutdown, SocketAddr},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};
use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use super::{Connect, Listen, Numbered, Outcome, Reply, Request, Served, lock};
use crate::pod::Credentials;

type Listeners = Arc<Mutex<HashMap<u64, Vec<Listener>>>>;

/// A listening socket and the thread that accepts from it.
struct Listener {
    socket: Arc<Socket>,
    accepting: JoinHandle<()>,
}

/// Serves requests until standard input ends.
///
/// # Errors
///
/// If a line is no request.
pub fn run() -> Result<()> {
    let listeners = Listeners::default();
    for line in io::stdin().lines() {
        let line = line.context("read a request")?;
        let Numbered { id, body } =
            serde_json::from_str(&line).with_context(|| format!("parse the request {line}"))?;
        let listeners = Arc::clone(&listeners);
        thread::spawn(move || {
            let reply = serve(id, body, &listeners).map_err(|error| format!("{error:#}"));
            // Fails only when nobody reads: the end is near.
            let _ = answer(&Numbered { id, body: reply });
        });
    }
    Ok(())
}

fn answer(reply: &Numbered<Result<Reply, String>>) -> Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    // One write, under standard output's own lock: lines stay whole.
    io::stdout().write_all(&line)?;
    Ok(())
}

fn serve(id: u64, request: Request, listeners: &Listeners) -> Result<Reply> {
    match request {
        Request::Listen(request) => {
            let opened = listen(&request)?;
            lock(listeners).insert(id, opened);
            Ok(Reply::Done)
        }
        Request::Close(id) => {
            let closed = lock(listeners).remove(&id).context("no such listener")?;
            for Listener { socket, accepting } in closed {
                // Ends accept(); the socket closes with its last owner.
                socket.shutdown(Shutdown::Both).context("shut down")?;
                accepting.join().ok().context("the listener panicked")?;
            }
            Ok(Reply::Done)
        }
        Request::Connect(request) => connect(&request).map(Reply::Connected),
    }
}

/// Opens all sockets before any of them accepts.
fn listen(request: &Listen) -> Result<Vec<Listener>> {
    let open = || -> Result<Vec<Socket>> {
        let mut sockets = Vec::new();
        for address in &request.addresses {
            for _ in 0..request.sockets {
                sockets.push(
                    open_listener(request, *address)
                        .with_context(|| format!("listen on {address}"))?,
                );
            }
        }
        Ok(sockets)
    };
    let sockets = as_owner(request.owner, open)??;
    Ok(sockets
        .into_iter()
        .map(|socket| {
            let socket = Arc::new(socket);
            let accepting = thread::spawn({
                let (socket, name) = (Arc::clone(&socket), request.name.clone());
                move || accept_loop(&socket, &name)
            });
            Listener { socket, accepting }
        })
        .collect())
}

fn open_listener(request: &Listen, address: SocketAddr) -> io::Result<Socket> {
    let socket = tcp_socket(address)?;
    if address.ip() == Ipv6Addr::UNSPECIFIED {
        socket.set_only_v6(request.v6only)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(request.sockets > 1)?;
    socket.bind(&address.into())?;
    socket.listen(request.backlog)?;
    Ok(socket)
}

/// Ends when the socket is shut down.
fn accept_loop(listener: &Socket, name: &str) {
    loop {
        match listener.accept() {
            Ok((socket, peer)) => {
                let Some(served) = peer
                    .as_socket()
                    .and_then(|peer| look(name, &socket, peer).ok())
                else {
                    continue;
                };
                thread::spawn(move || tell_and_echo(&socket, &served));
            }
            Err(error) if error.kind() == ErrorKind::InvalidInput => return,
            // A connection that was reset before it was accepted.
            Err(_) => {}
        }
    }
}

fn look(name: &str, socket: &Socket, peer: SocketAddr) -> Result<Served> {
    let original_dst = if peer.ip().to_canonical().is_ipv4() {
        socket.original_dst_v4()
    } else {
        socket.original_dst_v6()
    };
    Ok(Served {
        server: name.to_owned(),
        original_dst: original_dst
            .map_err(|error| error_name(&error))
            .and_then(|address| address.as_socket().ok_or_else(|| "no address".to_owned())),
        getpeername: peer,
        getsockname: local_address(socket)?,
    })
}

/// The client may go at any time: that is no error here.
fn tell_and_echo(mut socket: &Socket, served: &Served) {
    let Ok(mut line) = serde_json::to_vec(served) else {
        return;
    };
    line.push(b'\n');
    let _ = socket
        .write_all(&line)
        .and_then(|()| io::copy(&mut &*socket, &mut socket));
}

fn connect(request: &Connect) -> Result<Outcome> {
    let opened = as_owner(request.owner, || open_connection(request))?;
    let (socket, getpeername) = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok(Outcome::Failed(error_name(&error))),
    };
    let getsockname = local_address(&socket)?;
    Ok(Outcome::Connected {
        getsockname,
        getpeername,
        served: converse(&socket, request).map_err(|error| error_name(&error)),
    })
}

/// Also asks for the peer's name, at once: a server that closes takes it away.
fn open_connection(request: &Connect) -> io::Result<(Socket, Result<SocketAddr, String>)> {
    let socket = tcp_socket(request.to)?;
    if let Some(address) = request.bind {
        socket.bind(&address.into())?;
    }
    let to = request.to.into();
    if request.nonblocking {
        socket.connect_timeout(&to, request.timeout)?;
    } else {
        // Bounds connect(), too.
        socket.set_write_timeout(Some(request.timeout))?;
        socket.connect(&to)?;
    }
    let peer = socket
        .peer_addr()
        .map_err(|error| error_name(&error))
        .and_then(|address| address.as_socket().ok_or_else(|| "no address".to_owned()));
    Ok((socket, peer))
}

/// Sends the payload, and reads the server's line and the echo.
fn converse(socket: &Socket, request: &Connect) -> io::Result<Served> {
    socket.set_read_timeout(Some(request.timeout))?;
    let payload: Vec<u8> = (0..=u8::MAX).cycle().take(request.payload).collect();
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut writer = socket;
            writer.write_all(&payload)?;
            socket.shutdown(Shutdown::Write)
        });
        let mut reader = BufReader::new(socket);
        let mut line = Vec::new();
        let mut echo = Vec::new();
        reader.read_until(b'\n', &mut line)?;
        reader.read_to_end(&mut echo)?;
        if line.is_empty() {
            return Err(io::Error::other("CLOSED"));
        }
        let served = serde_json::from_slice(&line)?;
        sending
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("panic")))?;
        if echo != payload {
            return Err(io::Error::other(format!(
                "echo of {} bytes for {} sent",
                echo.len(),
                payload.len()
            )));
        }
        Ok(served)
    })
}

fn tcp_socket(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )
}

fn local_address(socket: &Socket) -> Result<SocketAddr> {
    socket
        .local_addr()
        .context("getsockname")?
        .as_socket()
        .context("an address that is neither IPv4 nor IPv6")
}

/// `REFUSED`, `TIMEOUT`, or the errno's name.
fn error_name(error: &io::Error) -> String {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ECONNREFUSED) => "REFUSED".to_owned(),
        // A blocking connect() that SO_SNDTIMEO bounds ends with EINPROGRESS.
        Some(Errno::ETIMEDOUT | Errno::EINPROGRESS | Errno::EAGAIN) => "TIMEOUT".to_owned(),
        Some(errno) => format!("{errno:?}"),
        None if error.kind() == ErrorKind::TimedOut => "TIMEOUT".to_owned(),
        None => error.to_string(),
    }
}

/// Runs `f` in a thread of its own that has these credentials.
fn as_owner<T: Send + 'static>(owner: Credentials, f: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(move || {
                become_owner(owner).with_context(|| format!("become {owner:?}"))?;
                Ok(f())
            })
            .join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("panic as {owner:?}")))
    })
}

/// Changes the credentials of the calling thread alone.
fn become_owner(owner: Credentials) -> io::Result<()> {
    let Credentials { uid, gid } = owner;
    // The C library's functions of these names change every thread.
    // SAFETY: these calls take numbers, and for no groups a null list.
    let results = unsafe {
        [
            libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()),
            libc::syscall(libc::SYS_setresgid, gid, gid, gid),
            libc::syscall(libc::SYS_setresuid, uid, uid, uid),
        ]
    };
    if results == [0; 3] {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
