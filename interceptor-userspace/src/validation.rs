//! The mesh's own acceptance check: a connection of the proxy's to its own pod
//! comes back to the proxy, which is told where it was going.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    Error, Result,
    pod::netns::Netns,
    settings::{Family, Settings},
};

/// Listens on the proxy's ports of localhost, connects from localhost to the
/// passthrough address, accepts, and asks for the original destination, whose
/// port must be the one dialled. The sockets are the proxy's, if this process may
/// make them so; it must be in the pod's cgroup.
///
/// # Errors
///
/// If the connection doesn't come to the proxy, or is told another destination.
pub fn validate(
    settings: &Settings,
    netns: &Netns,
    probe_port: u16,
    timeout: Duration,
) -> Result<()> {
    let uid = settings.proxy_uids.first().copied();
    let gid = settings.proxy_gids.first().copied();
    for family in Family::ALL {
        if !settings.has_chains(family) {
            continue;
        }
        netns.enter(|| {
            become_proxy(uid, gid)
                .and_then(|()| probe(settings, family, probe_port, timeout))
                .map_err(|error| {
                    Error::system(format!(
                        "{family}: a connection from localhost to {} port {probe_port} does not \
                         come to the proxy",
                        family.passthrough()
                    ))(error)
                })
        })?;
    }
    Ok(())
}

/// Makes the calling thread, and no other, the proxy's, if it is root's.
fn become_proxy(uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let set = |number: libc::c_long, id: Option<u32>| {
        let Some(id) = id else {
            return Ok(());
        };
        // The C library's functions of these names change every thread.
        // SAFETY: these calls take numbers.
        match unsafe { libc::syscall(number, id, id, id) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    set(libc::SYS_setresgid, gid)?;
    set(libc::SYS_setresuid, uid)
}

fn probe(
    settings: &Settings,
    family: Family,
    probe_port: u16,
    timeout: Duration,
) -> io::Result<()> {
    let localhost: IpAddr = match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    };
    let tcp = || {
        let domain = match family {
            Family::V4 => Domain::IPV4,
            Family::V6 => Domain::IPV6,
        };
        Socket::new(domain, Type::STREAM, Some(Protocol::TCP))
    };
    let mut listeners = Vec::new();
    for port in [settings.outbound_port, settings.inbound_port] {
        let listener = tcp()?;
        listener.set_reuse_address(true)?;
        listener.bind(&SocketAddr::new(localhost, port).into())?;
        listener.listen(8)?;
        listener.set_nonblocking(true)?;
        listeners.push(listener);
    }
    let client = tcp()?;
    client.bind(&SocketAddr::new(localhost, 0).into())?;
    let to = SocketAddr::new(family.passthrough(), probe_port);
    client.connect_timeout(&to.into(), timeout)?;
    let start = Instant::now();
    loop {
        for listener in &listeners {
            let accepted = match listener.accept() {
                Ok((accepted, _)) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            let destination = match family {
                Family::V4 => accepted.original_dst_v4(),
                Family::V6 => accepted.original_dst_v6(),
            }?;
            let port = destination.as_socket().map(|address| address.port());
            return if port == Some(probe_port) {
                Ok(())
            } else {
                Err(io::Error::other(format!(
                    "the original destination is {:?}",
                    destination.as_socket()
                )))
            };
        }
        if start.elapsed() > timeout {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(5));
    }
}
