//! Single system calls on sockets that an agent makes: with these a test can
//! use a socket in any way that a program can.

use std::{fmt, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Agent, Outcome, REPLY_LIMIT, Reply, Request};
use crate::pod::Credentials;

/// How long any call may block.
pub const CALL_LIMIT: Duration = Duration::from_secs(3);

/// What a buffer holds that the kernel has not written to.
pub const UNTOUCHED: u8 = 0xa5;

/// The credentials of the thread that makes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// Real uid and gid.
    pub real: Credentials,
    /// Effective and saved uid and gid.
    pub effective: Credentials,
    /// The uid and gid that a file gets which the thread opens.
    pub filesystem: Credentials,
}

impl From<Credentials> for Actor {
    fn from(all: Credentials) -> Self {
        Self {
            real: all,
            effective: all,
            filesystem: all,
        }
    }
}

/// A system call, or a few that belong together.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// socket(): a new socket, whose calls block for [`CALL_LIMIT`] at most.
    Open {
        /// The address family.
        domain: i32,
        /// The type.
        kind: i32,
        /// The protocol.
        protocol: i32,
    },
    /// accept(): a new socket.
    Accept,
    /// Receives a socket that another process [gives](Operation::Give) to this
    /// name (an abstract one): a new socket.
    Take(String),
    /// Gives the socket to a process that waits for it.
    Give(String),
    /// bind().
    Bind(SocketAddr),
    /// listen().
    Listen,
    /// connect().
    Connect(SocketAddr),
    /// `IORING_OP_CONNECT`.
    ConnectByRing(SocketAddr),
    /// connect() to `AF_UNSPEC`.
    Disconnect,
    /// Makes the calls after it block, or not.
    SetBlocking(bool),
    /// Waits until the socket is writable or has failed.
    AwaitWritable,
    /// Waits until the socket is readable or has failed.
    AwaitReadable,
    /// send() or sendto().
    Send {
        /// What to send.
        bytes: Vec<u8>,
        /// Where to.
        to: Option<SocketAddr>,
        /// As `MSG_FASTOPEN`.
        flags: i32,
    },
    /// recvfrom().
    Receive,
    /// setsockopt().
    SetOption {
        /// The level.
        level: i32,
        /// The option.
        name: i32,
        /// Its value.
        value: Vec<u8>,
    },
    /// getsockopt() with a buffer of `room` bytes [`UNTOUCHED`].
    GetOption {
        /// The level.
        level: i32,
        /// The option.
        name: i32,
        /// The length of the buffer.
        room: u32,
    },
    /// getsockname().
    LocalName,
    /// getpeername().
    PeerName,
    /// Reads what a server of [`Listen`](super::Listen) says and sends it a
    /// payload to echo, of whose beginning some bytes are sent already.
    Converse {
        /// How many bytes are sent already: the first of [`payload`].
        sent: usize,
        /// How many bytes the payload has.
        length: usize,
    },
    /// close().
    Close,
}

/// The bytes that servers are to echo.
pub fn payload(length: usize) -> Vec<u8> {
    (0..=u8::MAX).cycle().take(length).collect()
}

/// A call to be made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    /// By whom.
    pub actor: Actor,
    /// On which socket: the id of the call that made it.
    pub socket: u64,
    /// What to call.
    pub operation: Operation,
}

/// What a call that succeeded returned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// Nothing but success.
    Ok,
    /// An address.
    Name(SocketAddr),
    /// The buffer of getsockopt(), and the length that it returned.
    Option {
        /// The length.
        length: u32,
        /// The whole buffer.
        buffer: Vec<u8>,
    },
    /// What was received, and from whom if the kernel says so.
    Received {
        /// The bytes.
        bytes: Vec<u8>,
        /// The sender.
        from: Option<SocketAddr>,
    },
    /// How the conversation with the server went.
    Conversed(Outcome),
}

/// What a call returned, or the errno's name.
pub type Answer = Result<Value, String>;

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::Name(name) => name.fmt(f),
            Self::Option { length, buffer } => {
                write!(f, "length {length}, ")?;
                write_bytes(f, buffer)
            }
            Self::Received { bytes, from } => {
                if let Some(from) = from {
                    write!(f, "from {from}, ")?;
                }
                write_bytes(f, bytes)
            }
            Self::Conversed(outcome) => write!(f, "{outcome:?}"),
        }
    }
}

/// In hexadecimal, with the number of [`UNTOUCHED`] bytes at the end.
fn write_bytes(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    let written = bytes
        .iter()
        .rposition(|byte| *byte != UNTOUCHED)
        .map_or(0, |last| last + 1);
    for byte in &bytes[..written] {
        write!(f, "{byte:02x}")?;
    }
    match bytes.len() - written {
        0 => Ok(()),
        rest => write!(f, " + {rest} untouched"),
    }
}

/// A socket of an agent; closed when dropped.
#[derive(Debug)]
pub struct RemoteSocket<'a> {
    agent: &'a Agent,
    id: u64,
    actor: Actor,
}

impl Agent {
    /// Opens a socket: its calls are made with the actor's credentials.
    ///
    /// # Errors
    ///
    /// If the agent fails; the inner error is that of socket().
    pub fn open(
        &self,
        actor: impl Into<Actor>,
        domain: i32,
        kind: i32,
        protocol: i32,
    ) -> Result<Result<RemoteSocket<'_>, String>> {
        self.new_socket(
            actor.into(),
            0,
            Operation::Open {
                domain,
                kind,
                protocol,
            },
        )
    }

    /// Waits for a socket that another process gives to this name.
    ///
    /// # Errors
    ///
    /// If the agent fails or no socket comes.
    pub fn take(&self, actor: impl Into<Actor>, name: &str) -> Result<RemoteSocket<'_>> {
        match self.new_socket(actor.into(), 0, Operation::Take(name.to_owned()))? {
            Ok(socket) => Ok(socket),
            Err(errno) => bail!("receive a socket: {errno}"),
        }
    }

    fn new_socket(
        &self,
        actor: Actor,
        socket: u64,
        operation: Operation,
    ) -> Result<Result<RemoteSocket<'_>, String>> {
        let (id, answer) = self.call(Call {
            actor,
            socket,
            operation,
        })?;
        Ok(answer.map(|_| RemoteSocket {
            agent: self,
            id,
            actor,
        }))
    }

    fn call(&self, call: Call) -> Result<(u64, Answer)> {
        let what = format!("{call:?}");
        let (id, reply) = self.send(Request::Call(call))?;
        match Self::receive(&reply, REPLY_LIMIT + CALL_LIMIT * 2).context(what)? {
            Reply::Answered(answer) => Ok((id, answer)),
            other => bail!("unexpected reply {other:?}"),
        }
    }
}

impl<'a> RemoteSocket<'a> {
    /// Has the socket's further calls made by someone else.
    pub fn pass_to(&mut self, actor: impl Into<Actor>) {
        self.actor = actor.into();
    }

    /// Makes a call that makes no new socket.
    ///
    /// # Errors
    ///
    /// If the agent fails.
    pub fn call(&self, operation: Operation) -> Result<Answer> {
        let (_, answer) = self.agent.call(Call {
            actor: self.actor,
            socket: self.id,
            operation,
        })?;
        Ok(answer)
    }

    /// Makes a call that must succeed.
    ///
    /// # Errors
    ///
    /// If it fails.
    pub fn must(&self, operation: Operation) -> Result<Value> {
        let what = format!("{operation:?}");
        match self.call(operation)? {
            Ok(value) => Ok(value),
            Err(errno) => bail!("{what}: {errno}"),
        }
    }

    /// Accepts a connection.
    ///
    /// # Errors
    ///
    /// If none comes.
    pub fn accept(&self) -> Result<RemoteSocket<'a>> {
        match self
            .agent
            .new_socket(self.actor, self.id, Operation::Accept)?
        {
            Ok(socket) => Ok(socket),
            Err(errno) => bail!("accept: {errno}"),
        }
    }

    /// Sets an option whose value is a number, or says why not.
    ///
    /// # Errors
    ///
    /// If the agent fails.
    pub fn set(&self, level: i32, name: i32, value: i32) -> Result<Answer> {
        self.call(Operation::SetOption {
            level,
            name,
            value: value.to_ne_bytes().to_vec(),
        })
    }

    /// Closes the socket with a reset.
    ///
    /// # Errors
    ///
    /// If it can't be told to.
    pub fn reset(self) -> Result<()> {
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        let value = [linger.l_onoff, linger.l_linger]
            .into_iter()
            .flat_map(i32::to_ne_bytes)
            .collect();
        self.must(Operation::SetOption {
            level: libc::SOL_SOCKET,
            name: libc::SO_LINGER,
            value,
        })?;
        // Dropping it closes it.
        Ok(())
    }
}

impl Drop for RemoteSocket<'_> {
    fn drop(&mut self) {
        // Closed already, or the agent has ended: either way it is closed.
        let _ = self.call(Operation::Close);
    }
}
