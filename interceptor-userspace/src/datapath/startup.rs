//! What becomes of connections until the proxy begins to listen.

use std::{
    io, mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _},
    thread,
    time::{Duration, Instant},
};

use aya::maps::MapData;
use clap::ValueEnum;
use interceptor_common::listeners::ProxyPort;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    attach::need_root,
    bpf::{insert_socket, socket_cookie},
    pins::Pins,
    view::Opened,
};
use crate::{
    Error, Result,
    pod::{PodName, netns::Netns},
};

/// What becomes of a pod's captured connections until its proxy begins to listen. Once
/// it has, those that it doesn't take are refused, whatever this says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UntilProxyListens {
    /// They are refused.
    #[default]
    Refuse,
    /// They wait, for no longer than the hold limit: then they are refused.
    Hold,
    /// They go past the proxy.
    Pass,
}

/// How long the kernel may take for a connection of the holding listener with itself.
const LIMIT: Duration = Duration::from_secs(1);

/// Holds a pod's captured connections, until it is dropped or a listener of the proxy
/// takes them: their SYNs are dropped, and TCP sends them again after a second, and so on
/// (`tcp_syn_linear_timeouts`, Linux 6.5).
///
/// The kernel drops the SYNs that a listener has no room for, without a word. The last
/// place of each of the proxy's ports is for such a one; a program can neither drop a
/// SYN nor keep a listener without a process.
#[derive(Debug)]
pub struct Holding {
    /// Closing it takes it out of the map.
    _full: Socket,
    listeners: MapData,
}

impl Holding {
    /// Whether a port of the proxy has no listener yet.
    pub fn is_needed(&self) -> bool {
        [ProxyPort::Outbound, ProxyPort::Inbound]
            .into_iter()
            .any(|port| {
                (port.first_slot()..port.holding_slot())
                    .all(|slot| socket_cookie(self.listeners.fd().as_fd(), slot).is_none())
            })
    }
}

/// Begins to hold an attached pod's captured connections, where its proxy doesn't listen.
///
/// # Errors
///
/// If the pod isn't attached, its network namespace lets nobody listen on `lo`, or it is
/// held already.
pub fn hold(pins: &Pins, pod: &PodName, netns: &Netns) -> Result<Holding> {
    need_root()?;
    let opened = Opened::of(pins, pod)?;
    let listeners = opened.open_map("LISTENERS")?;
    let failed = || Error::system(format!("holding connections of {pod}"));
    let full = netns.enter(|| full_listener().map_err(failed()))?;
    for port in ProxyPort::ALL {
        insert_socket(listeners.fd().as_fd(), port.holding_slot(), full.as_fd())
            .map_err(failed())?;
    }
    Ok(Holding {
        _full: full,
        listeners,
    })
}

/// A listener on a port that nobody is told, with no room for another connection.
fn full_listener() -> io::Result<Socket> {
    // With 0 the kernel would warn in its log of a flood of SYNs.
    const BACKLOG: i32 = 1;
    let (socket, any) = match Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)))
        }
        // No IPv6 here.
        Err(_) => (
            Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?,
            (Ipv4Addr::UNSPECIFIED, 0).into(),
        ),
    };
    socket.bind(&any.into())?;
    socket.listen(BACKLOG)?;
    let port = socket
        .local_addr()?
        .as_socket()
        .ok_or(io::ErrorKind::Unsupported)?
        .port();
    // It is full when it has more than its backlog.
    for _ in 0..=BACKLOG {
        TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, port).into(), LIMIT)?;
    }
    let start = Instant::now();
    while accept_queue(&socket)? <= BACKLOG.unsigned_abs() {
        if start.elapsed() > LIMIT {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(socket)
}

/// How many connections wait to be accepted. `tcpi_unacked` of a listener says it, since
/// Linux 2.6.
fn accept_queue(socket: &Socket) -> io::Result<u32> {
    // SAFETY: plain numbers, of which each may be zero.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes no more than `length` bytes of `info`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.tcpi_unacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_listener_answers_nobody() {
        let socket = full_listener().unwrap();
        let port = socket.local_addr().unwrap().as_socket().unwrap().port();
        for address in [
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            (Ipv6Addr::LOCALHOST, port).into(),
        ] {
            let error =
                TcpStream::connect_timeout(&address, Duration::from_millis(100)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{address}: {error}");
        }
    }
}
