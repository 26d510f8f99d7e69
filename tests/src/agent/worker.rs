//! The agent's own side: does what the lines on standard input ask for.

use std::{
    collections::HashMap,
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    net::{Ipv6Addr, Shutdown, SocketAddr},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    unistd::{setfsgid, setfsuid},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Connect, Listen, Means, Numbered, Outcome, Reply, Request, Served,
    calls::{Actor, payload},
    lock,
    sockets::Sockets,
};
use crate::{pod::Credentials, proxies::canonical};

/// What outlives a request, each by the id of the request that made it.
#[derive(Clone, Default)]
struct State {
    listeners: Arc<Mutex<HashMap<u64, Vec<Listener>>>>,
    sockets: Sockets,
}

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
    let state = State::default();
    for line in io::stdin().lines() {
        let line = line.context("read a request")?;
        let Numbered { id, body } =
            serde_json::from_str(&line).with_context(|| format!("parse the request {line}"))?;
        let state = state.clone();
        thread::spawn(move || {
            let reply = serve(id, body, &state).map_err(|error| format!("{error:#}"));
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

fn serve(id: u64, request: Request, state: &State) -> Result<Reply> {
    match request {
        Request::Listen(request) => {
            let opened = listen(&request)?;
            lock(&state.listeners).insert(id, opened);
            Ok(Reply::Done)
        }
        Request::Close(id) => {
            let closed = lock(&state.listeners)
                .remove(&id)
                .context("no such listener")?;
            for Listener { socket, accepting } in closed {
                // Ends accept(); the socket closes with its last owner. (One of
                // UDP isn't connected, but its reader ends.)
                match socket.shutdown(Shutdown::Both) {
                    Err(error) if error.kind() != ErrorKind::NotConnected => {
                        return Err(error).context("shut down");
                    }
                    _ => {}
                }
                accepting.join().ok().context("the listener panicked")?;
            }
            Ok(Reply::Done)
        }
        Request::Connect(request) => connect(&request).map(Reply::Connected),
        Request::Call(call) => state.sockets.make(id, call).map(Reply::Answered),
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
    let sockets = as_actor(request.owner, open)??;
    Ok(sockets
        .into_iter()
        .map(|socket| {
            let socket = Arc::new(socket);
            let accepting = thread::spawn({
                let (socket, name) = (Arc::clone(&socket), request.name.clone());
                let datagrams = request.datagrams;
                move || {
                    if datagrams {
                        answer_loop(&socket, &name);
                    } else {
                        accept_loop(&socket, &name);
                    }
                }
            });
            Listener { socket, accepting }
        })
        .collect())
}

fn open_listener(request: &Listen, address: SocketAddr) -> io::Result<Socket> {
    let socket = if request.datagrams {
        udp_socket(address)?
    } else {
        tcp_socket(address)?
    };
    if address.ip() == Ipv6Addr::UNSPECIFIED {
        socket.set_only_v6(request.v6only)?;
    }
    if request.transparent {
        set_transparent(&socket, address)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(request.sockets > 1)?;
    socket.bind(&address.into())?;
    if !request.datagrams {
        socket.listen(request.backlog)?;
    }
    Ok(socket)
}

fn set_transparent(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    let (level, name) = if address.is_ipv4() {
        (libc::SOL_IP, libc::IP_TRANSPARENT)
    } else {
        (libc::SOL_IPV6, libc::IPV6_TRANSPARENT)
    };
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads a number of the length given.
    let result = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(socket),
            level,
            name,
            (&raw const on).cast(),
            4,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Answers each datagram with what it looked like. Ends when the socket is shut
/// down.
fn answer_loop(socket: &Socket, name: &str) {
    let mut room = [std::mem::MaybeUninit::uninit(); 64];
    loop {
        match socket.recv_from(&mut room) {
            // Shut down.
            Ok((0, _)) => return,
            Ok((_, from)) => {
                let Some(peer) = from.as_socket() else {
                    continue;
                };
                let Ok(local) = local_address(socket) else {
                    continue;
                };
                let served = Served {
                    server: name.to_owned(),
                    original_dst: Err("-".to_owned()),
                    getpeername: canonical(peer),
                    getsockname: canonical(local),
                };
                if let Ok(line) = serde_json::to_vec(&served) {
                    let _ = socket.send_to(&line, &from);
                }
            }
            // An earlier answer that found nobody.
            Err(_) => {}
        }
    }
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
        getpeername: canonical(peer),
        getsockname: canonical(local_address(socket)?),
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
    if request.means != Means::Tcp {
        let asked = as_actor(request.owner, || ask(request))?;
        return Ok(asked.unwrap_or_else(|error| Outcome::Failed(error_name(&error))));
    }
    let opened = as_actor(request.owner, || open_connection(request))?;
    let (socket, getpeername) = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok(Outcome::Failed(error_name(&error))),
    };
    let getsockname = local_address(&socket)?;
    let served = match &getpeername {
        Err(error) if error == "ECONNRESET" => Err(error.clone()),
        _ => converse(&socket, request.timeout, 0, request.payload)
            .map_err(|error| error_name(&error)),
    };
    Ok(Outcome::Connected {
        getsockname,
        getpeername,
        served,
    })
}

/// Sends a datagram and waits for the answer.
fn ask(request: &Connect) -> io::Result<Outcome> {
    let socket = udp_socket(request.to)?;
    if let Some(address) = request.bind {
        socket.bind(&address.into())?;
    }
    socket.set_read_timeout(Some(request.timeout))?;
    let to = request.to.into();
    let mut peer = None;
    if request.means == Means::ConnectedDatagram {
        socket.connect(&to)?;
        peer = Some(
            socket
                .peer_addr()
                .map_err(|error| error_name(&error))
                .and_then(|address| address.as_socket().ok_or_else(|| "no address".to_owned())),
        );
        socket.send(b"?")?;
    } else {
        socket.send_to(b"?", &to)?;
    }
    let getsockname = local_address(&socket).map_err(io::Error::other)?;
    let mut room = [std::mem::MaybeUninit::uninit(); 2048];
    let (length, from) = match socket.recv_from(&mut room) {
        Ok(answer) => answer,
        Err(error) => {
            return Ok(Outcome::Connected {
                getsockname,
                getpeername: peer.unwrap_or_else(|| Err("-".to_owned())),
                served: Err(error_name(&error)),
            });
        }
    };
    let line: Vec<u8> = room[..length]
        .iter()
        // SAFETY: the kernel has written that many bytes.
        .map(|byte| unsafe { byte.assume_init() })
        .collect();
    let from = from.as_socket().ok_or_else(|| "no address".to_owned());
    let getpeername = match peer {
        Some(peer) if peer != from => Err(format!("peer {peer:?}, answer from {from:?}")),
        Some(peer) => peer,
        None => from,
    };
    Ok(Outcome::Connected {
        getsockname,
        getpeername,
        served: serde_json::from_slice(&line).map_err(|error| error.to_string()),
    })
}

/// Also asks for the peer's name, at once: a server that closes takes it away.
fn open_connection(request: &Connect) -> io::Result<(Socket, Result<SocketAddr, String>)> {
    let socket = tcp_socket(request.to)?;
    if let Some(mark) = request.mark {
        set_transparent(&socket, request.to)?;
        socket.set_mark(mark)?;
    }
    if let Some(address) = request.bind {
        socket.bind(&address.into())?;
    }
    let to = request.to.into();
    if request.nonblocking {
        match socket.connect_timeout(&to, request.timeout) {
            // It was established, or the error were ECONNREFUSED.
            Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => {
                return Ok((socket, Err(error_name(&error))));
            }
            connected => connected?,
        }
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

/// Sends the payload but for what is `sent`, and reads the server's line and
/// the echo.
pub(super) fn converse(
    socket: &Socket,
    limit: Duration,
    sent: usize,
    length: usize,
) -> io::Result<Served> {
    socket.set_read_timeout(Some(limit))?;
    let payload = payload(length);
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut writer = socket;
            writer.write_all(&payload[sent..])?;
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

fn udp_socket(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )
}

pub(super) fn local_address(socket: &Socket) -> Result<SocketAddr> {
    socket
        .local_addr()
        .context("getsockname")?
        .as_socket()
        .context("an address that is neither IPv4 nor IPv6")
}

/// `REFUSED`, `TIMEOUT`, or the errno's name.
pub(super) fn error_name(error: &io::Error) -> String {
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
pub(super) fn as_actor<T: Send>(
    actor: impl Into<Actor>,
    f: impl FnOnce() -> T + Send,
) -> Result<T> {
    let actor = actor.into();
    thread::scope(|scope| {
        scope
            .spawn(move || {
                become_actor(actor).with_context(|| format!("become {actor:?}"))?;
                Ok(f())
            })
            .join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("panic as {actor:?}")))
    })
}

/// Changes the credentials of the calling thread alone.
fn become_actor(actor: Actor) -> io::Result<()> {
    let Actor {
        real,
        effective,
        filesystem,
    } = actor;
    let set = |number: libc::c_long, real: u32, effective: u32| {
        // The C library's functions of these names change every thread.
        // SAFETY: these calls take numbers; no groups may be a null list.
        match unsafe { libc::syscall(number, real, effective, effective) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: as above.
    let no_groups = unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()) };
    if no_groups != 0 {
        return Err(io::Error::last_os_error());
    }
    set(libc::SYS_setresgid, real.gid, effective.gid)?;
    // Before the uid: who isn't root may choose few others. (A thread's own in
    // the C library, too.)
    setfsgid(filesystem.gid.into());
    set(libc::SYS_setresuid, real.uid, effective.uid)?;
    setfsuid(filesystem.uid.into());
    // They report no failure, but what the ids were; the invalid id sets none.
    let invalid = u32::MAX;
    let now = Credentials {
        uid: setfsuid(invalid.into()).as_raw(),
        gid: setfsgid(invalid.into()).as_raw(),
    };
    if now == filesystem {
        Ok(())
    } else {
        Err(io::Error::other(format!("filesystem ids are {now:?}")))
    }
}
