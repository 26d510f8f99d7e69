//! What happens in the pods' network namespaces, heard over one socket.
//!
//! The kernel sends the notices of every namespace that has a number here
//! (`NETLINK_LISTEN_ALL_NSID`, Linux 4.2; it takes `CAP_NET_BROADCAST`). Nothing
//! of a pod's namespace is held open for it: the namespace ends when its pod does,
//! and of that there is a notice, too.

use std::{
    collections::BTreeSet,
    io, mem,
    os::fd::{AsFd as _, AsRawFd as _},
    sync::mpsc::Sender,
    thread,
    time::Duration,
};

use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        nsid::{NsidAttribute, NsidMessage},
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use super::pods::Message;
use crate::{Error, Result, pod::netns::Netns};

/// The number of a network namespace, seen from the daemon's own.
pub(crate) type NamespaceNumber = i32;

/// What has happened.
#[derive(Debug)]
pub(crate) enum Notice {
    /// Interfaces, addresses, routes or rules of these have changed.
    Changed(BTreeSet<NamespaceNumber>),
    /// These are gone.
    Gone(BTreeSet<NamespaceNumber>),
    /// More than the kernel could tell.
    Overrun,
}

/// Of the control message with the number (linux/netlink.h).
const NETLINK_LISTEN_ALL_NSID: libc::c_int = 8;

/// How long notices are gathered: they come in swarms.
const GATHER: Duration = Duration::from_millis(20);

/// The most notices that are gathered before they are handed on.
const SWARM: usize = 4096;

/// Gives numbers to network namespaces.
pub(crate) struct Numbers(Socket);

impl Numbers {
    /// Opens a socket for it.
    pub(crate) fn new() -> Result<Self> {
        let failed = || Error::system("opening a netlink socket");
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed())?;
        socket.bind_auto().map_err(failed())?;
        Ok(Self(socket))
    }

    /// The namespace's number; it gets one if it has none. It goes with the
    /// namespace.
    pub(crate) fn of(&self, netns: &Netns) -> Result<NamespaceNumber> {
        self.get_or_give(netns).map_err(Error::system(format!(
            "numbering the network namespace {}",
            netns.given()
        )))
    }

    fn get_or_give(&self, netns: &Netns) -> io::Result<NamespaceNumber> {
        if let Some(number) = self.get(netns)? {
            return Ok(number);
        }
        let mut message = about(netns);
        message.attributes.push(NsidAttribute::Id(-1));
        match self.ask(RouteNetlinkMessage::NewNsId(message), NLM_F_ACK) {
            // Somebody else was faster.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            result => drop(result?),
        }
        self.get(netns)?
            .ok_or_else(|| io::Error::other("the kernel gives it no number"))
    }

    fn get(&self, netns: &Netns) -> io::Result<Option<NamespaceNumber>> {
        let answer = self.ask(RouteNetlinkMessage::GetNsId(about(netns)), 0)?;
        Ok(number_in(&answer).filter(|number| *number >= 0))
    }

    fn ask(
        &self,
        question: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<NetlinkPayload<RouteNetlinkMessage>> {
        let mut message = NetlinkMessage::from(question);
        message.header.flags = NLM_F_REQUEST | flags;
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.0.send_to(&buffer, &SocketAddr::new(0, 0), 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
            .map_err(io::Error::other)?;
        match answer.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            payload => Ok(payload),
        }
    }
}

fn about(netns: &Netns) -> NsidMessage {
    let mut message = NsidMessage::default();
    let fd = netns.as_fd().as_raw_fd().cast_unsigned();
    message.attributes.push(NsidAttribute::Fd(fd));
    message
}

fn number_in(payload: &NetlinkPayload<RouteNetlinkMessage>) -> Option<NamespaceNumber> {
    let NetlinkPayload::InnerMessage(
        RouteNetlinkMessage::NewNsId(message) | RouteNetlinkMessage::DelNsId(message),
    ) = payload
    else {
        return None;
    };
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NsidAttribute::Id(number) => Some(*number),
            _ => None,
        })
}

/// Hands on what happens in namespaces that have a number, from here on.
///
/// # Errors
///
/// If the kernel doesn't tell.
pub(crate) fn watch(messages: Sender<Message>) -> Result<()> {
    let socket = listening().map_err(Error::system(
        "listening for what happens in network namespaces (which CAP_NET_BROADCAST allows)",
    ))?;
    thread::Builder::new()
        .name("namespaces".to_owned())
        .spawn(move || {
            loop {
                let notices = gather(&socket);
                for notice in notices {
                    if messages.send(Message::Notice(notice)).is_err() {
                        return;
                    }
                }
            }
        })
        .map(drop)
        .map_err(Error::system("starting a thread"))
}

fn listening() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.set_listen_all_namespaces(true)?;
    for group in [
        libc::RTNLGRP_LINK,
        libc::RTNLGRP_IPV4_IFADDR,
        libc::RTNLGRP_IPV4_ROUTE,
        libc::RTNLGRP_IPV4_RULE,
        libc::RTNLGRP_IPV6_IFADDR,
        libc::RTNLGRP_IPV6_ROUTE,
        libc::RTNLGRP_IPV6_RULE,
        libc::RTNLGRP_NSID,
    ] {
        socket.add_membership(group)?;
    }
    Ok(socket)
}

/// Waits for a notice, and gathers those that come with it.
fn gather(socket: &Socket) -> Vec<Notice> {
    let (mut changed, mut gone) = (BTreeSet::new(), BTreeSet::new());
    let mut buffer = vec![0; 1 << 16];
    let mut flags = 0;
    for _ in 0..SWARM {
        match receive(socket, &mut buffer, flags) {
            Ok((length, from)) => {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&buffer[..length]);
                match (message.map(|message| message.payload), from) {
                    // This one is about the daemon's own list of numbers.
                    (
                        Ok(payload @ NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNsId(_))),
                        None,
                    ) => gone.extend(number_in(&payload)),
                    (_, Some(number)) => drop(changed.insert(number)),
                    // What happens in the daemon's own namespace.
                    (_, None) => {}
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                if error.raw_os_error() != Some(libc::ENOBUFS) {
                    tracing::warn!(%error, "notices of network namespaces are lost");
                    thread::sleep(Duration::from_secs(1));
                }
                return vec![Notice::Overrun];
            }
        }
        if flags == 0 && !(changed.is_empty() && gone.is_empty()) {
            thread::sleep(GATHER);
            flags = libc::MSG_DONTWAIT;
        }
    }
    changed.retain(|number| !gone.contains(number));
    let mut notices = Vec::new();
    if !gone.is_empty() {
        notices.push(Notice::Gone(gone));
    }
    if !changed.is_empty() {
        notices.push(Notice::Changed(changed));
    }
    notices
}

/// Receives a notice, and the number of the namespace that it is from; none if
/// that is the daemon's own.
fn receive(
    socket: &Socket,
    buffer: &mut [u8],
    flags: libc::c_int,
) -> io::Result<(usize, Option<NamespaceNumber>)> {
    // Aligned for a header, and with room for one number.
    let mut control = [0u64; 8];
    let mut parts = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zero is a valid value of this plain struct.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut parts;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the header points to buffers of the lengths given, which outlive it.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has filled in the control messages, which these walk.
    let number = unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        loop {
            let Some(this) = header.as_ref() else {
                break None;
            };
            if (this.cmsg_level, this.cmsg_type) == (libc::SOL_NETLINK, NETLINK_LISTEN_ALL_NSID) {
                break Some(libc::CMSG_DATA(header).cast::<i32>().read_unaligned());
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    };
    Ok((length, number))
}
