//! The agent's own side of [`calls`](super::calls): makes single system calls.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::SocketAddr,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixSocketAddr, UnixDatagram},
    },
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types};
use nix::{
    cmsg_space,
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg},
};
use socket2::{SockAddr, Socket};

use super::{
    Outcome,
    calls::{Answer, CALL_LIMIT, Call, Operation, UNTOUCHED, Value},
    lock,
    worker::{as_actor, converse, error_name, local_address},
};
use crate::command::wait_until;

/// The open sockets, each by the id of the request that made it.
#[derive(Clone, Default)]
pub(super) struct Sockets(Arc<Mutex<HashMap<u64, Arc<Socket>>>>);

impl Sockets {
    /// Makes a call. Its error is an answer; what keeps it from being made is
    /// an error of this function.
    pub(super) fn make(&self, id: u64, call: Call) -> Result<Answer> {
        let Call {
            actor,
            socket,
            operation,
        } = call;
        let opened = match operation {
            Operation::Open {
                domain,
                kind,
                protocol,
            } => as_actor(actor, || {
                Socket::new(domain.into(), kind.into(), Some(protocol.into()))
            })?,
            Operation::Accept => {
                let listener = self.get(socket)?;
                as_actor(actor, || listener.accept().map(|(socket, _)| socket))?
            }
            Operation::Take(name) => Ok(as_actor(actor, || take(&name))??),
            Operation::Close => {
                lock(&self.0).remove(&socket);
                return Ok(Ok(Value::Ok));
            }
            operation => {
                let socket = self.get(socket)?;
                let result = as_actor(actor, || perform(&socket, operation))??;
                return Ok(result.map_err(|error| errno_name(&error)));
            }
        };
        Ok(match opened {
            Ok(socket) => {
                socket.set_read_timeout(Some(CALL_LIMIT))?;
                // Bounds connect(), too.
                socket.set_write_timeout(Some(CALL_LIMIT))?;
                lock(&self.0).insert(id, Arc::new(socket));
                Ok(Value::Ok)
            }
            Err(error) => Err(errno_name(&error)),
        })
    }

    fn get(&self, id: u64) -> Result<Arc<Socket>> {
        lock(&self.0).get(&id).cloned().context("no such socket")
    }
}

fn perform(socket: &Socket, operation: Operation) -> Result<io::Result<Value>> {
    let done = |result: io::Result<()>| Ok(result.map(|()| Value::Ok));
    match operation {
        Operation::Give(name) => done(Ok(give(socket, &name)?)),
        Operation::Bind(address) => done(socket.bind(&address.into())),
        Operation::Listen => done(socket.listen(128)),
        Operation::Connect(to) => done(socket.connect(&to.into())),
        Operation::ConnectByRing(to) => done(connect_by_ring(socket, to)?),
        Operation::Disconnect => done(disconnect(socket)),
        Operation::SetBlocking(blocking) => done(socket.set_nonblocking(!blocking)),
        Operation::AwaitWritable => done(await_event(socket, PollFlags::POLLOUT)),
        Operation::AwaitReadable => done(await_event(socket, PollFlags::POLLIN)),
        Operation::Send { bytes, to, flags } => {
            let sent = match to {
                Some(to) => socket.send_to_with_flags(&bytes, &to.into(), flags),
                None => socket.send_with_flags(&bytes, flags),
            };
            done(sent.and_then(|sent| {
                if sent == bytes.len() {
                    Ok(())
                } else {
                    Err(ErrorKind::WriteZero.into())
                }
            }))
        }
        Operation::Receive => Ok(receive(socket)),
        Operation::SetOption { level, name, value } => {
            done(set_option(socket, level, name, &value))
        }
        Operation::GetOption { level, name, room } => Ok(get_option(socket, level, name, room)),
        Operation::LocalName => Ok(local_name(socket)),
        Operation::PeerName => Ok(socket.peer_addr().and_then(name)),
        Operation::Converse { sent, length } => {
            // At once: a server that closes takes it away.
            let getpeername = socket
                .peer_addr()
                .and_then(name)
                .map_err(|error| error_name(&error))
                .and_then(|value| match value {
                    Value::Name(name) => Ok(name),
                    other => Err(other.to_string()),
                });
            let served = converse(socket, CALL_LIMIT, sent, length);
            Ok(Ok(Value::Conversed(Outcome::Connected {
                getsockname: local_address(socket)?,
                getpeername,
                served: served.map_err(|error| error_name(&error)),
            })))
        }
        Operation::Open { .. } | Operation::Accept | Operation::Take(_) | Operation::Close => {
            bail!("not a call on a socket alone")
        }
    }
}

fn local_name(socket: &Socket) -> io::Result<Value> {
    socket.local_addr().and_then(name)
}

fn name(address: SockAddr) -> io::Result<Value> {
    address
        .as_socket()
        .map(Value::Name)
        .ok_or_else(|| io::Error::other(format!("address family {}", address.family())))
}

fn connect_by_ring(socket: &Socket, to: SocketAddr) -> Result<io::Result<()>> {
    let mut ring = IoUring::new(1).context(
        "set up io_uring: if the kernel has it switched off, `sysctl kernel.io_uring_disabled=0`",
    )?;
    let to = SockAddr::from(to);
    let connect = opcode::Connect::new(types::Fd(socket.as_raw_fd()), to.as_ptr().cast(), to.len());
    // SAFETY: the socket and the address live until the ring is dropped, which
    // waits for what is under way.
    unsafe { ring.submission().push(&connect.build()) }.context("submit to io_uring")?;
    let limit = types::Timespec::from(CALL_LIMIT);
    match ring
        .submitter()
        .submit_with_args(1, &types::SubmitArgs::new().timespec(&limit))
    {
        Err(error) if error.raw_os_error() == Some(libc::ETIME) => return Ok(Err(error)),
        result => result.context("wait for io_uring")?,
    };
    let result = ring
        .completion()
        .next()
        .context("io_uring has no completion")?
        .result();
    Ok(match result {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    })
}

fn disconnect(socket: &Socket) -> io::Result<()> {
    // Its family, too, is 0: AF_UNSPEC.
    let nowhere = [0u8; size_of::<libc::sockaddr_in6>()];
    // SAFETY: an address of the length given.
    check(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            nowhere.as_ptr().cast(),
            length(&nowhere)?,
        )
    })
}

fn await_event(socket: &Socket, events: PollFlags) -> io::Result<()> {
    let mut sockets = [PollFd::new(socket.as_fd(), events)];
    match poll(
        &mut sockets,
        PollTimeout::try_from(CALL_LIMIT).unwrap_or(PollTimeout::MAX),
    )? {
        0 => Err(Errno::ETIME.into()),
        _ => Ok(()),
    }
}

fn receive(socket: &Socket) -> io::Result<Value> {
    let mut room = [MaybeUninit::uninit(); 65536];
    let (length, from) = socket.recv_from(&mut room)?;
    // SAFETY: the kernel has written that many bytes.
    let bytes = room[..length]
        .iter()
        .map(|byte| unsafe { byte.assume_init() });
    Ok(Value::Received {
        bytes: bytes.collect(),
        from: from.as_socket(),
    })
}

fn set_option(socket: &Socket, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel only reads the value, of the length given.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            length(value)?,
        )
    })
}

fn get_option(socket: &Socket, level: i32, name: i32, room: u32) -> io::Result<Value> {
    let mut buffer = vec![UNTOUCHED; room as usize];
    let mut length = room;
    // SAFETY: a buffer of the length given.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            buffer.as_mut_ptr().cast(),
            &raw mut length,
        )
    })?;
    Ok(Value::Option { length, buffer })
}

fn length(bytes: &[u8]) -> io::Result<libc::socklen_t> {
    bytes.len().try_into().map_err(io::Error::other)
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sends the socket to whoever has bound this abstract name.
fn give(socket: &Socket, name: &str) -> Result<()> {
    let sender = UnixDatagram::unbound()?;
    let to = UnixAddr::new_abstract(name.as_bytes())?;
    let fds = [socket.as_raw_fd()];
    wait_until("somebody takes the socket", CALL_LIMIT, || {
        match sendmsg(
            sender.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::empty(),
            Some(&to),
        ) {
            Ok(_) => Ok(Some(())),
            Err(Errno::ECONNREFUSED) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    })
}

/// Receives the socket that somebody gives to this abstract name.
fn take(name: &str) -> Result<Socket> {
    let receiver = UnixDatagram::bind_addr(&UnixSocketAddr::from_abstract_name(name)?)?;
    receiver.set_read_timeout(Some(CALL_LIMIT))?;
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let mut room = cmsg_space!([i32; 1]);
    let message = recvmsg::<()>(
        receiver.as_raw_fd(),
        &mut buffers,
        Some(&mut room),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let fd = message
        .cmsgs()?
        .find_map(|control| match control {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        })
        .context("a message without a socket")?;
    // SAFETY: the message has made this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// The errno's name.
fn errno_name(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => format!("{:?}", Errno::from_raw(errno)),
        None => error.to_string(),
    }
}
