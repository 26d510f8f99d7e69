//! Throwaway pods, each with a peer on the other end of its cable.

use std::{
    ffi::OsStr,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::process::CommandExt,
    process::Command,
};

use anyhow::Result;
use nix::{
    sched::{CloneFlags, setns},
    sys::{prctl, signal::Signal},
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};
use serde::{Deserialize, Serialize};

use crate::{cgroup::Cgroup, command::unique_name, netns::Netns};

/// The pod's IPv4 address.
pub const POD_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
/// The pod's IPv6 address.
pub const POD_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 2));
/// The peer's IPv4 address.
pub const PEER_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
/// The peer's IPv6 address.
pub const PEER_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 1));

/// Which of the two hosts something is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// The pod, in its network namespace and its cgroup.
    Pod,
    /// The host at the other end of the pod's cable.
    Peer,
}

/// Whose a process or socket is. It has no supplementary groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// The real, effective and saved uid.
    pub uid: u32,
    /// The real, effective and saved gid.
    pub gid: u32,
}

impl Credentials {
    /// Root's.
    pub const ROOT: Self = Self { uid: 0, gid: 0 };
    /// The proxy's.
    pub const PROXY: Self = Self {
        uid: 1337,
        gid: 1337,
    };
}

/// A network namespace and a cgroup, as a pod has them, and the network
/// namespace of a peer. A cable joins the two:
///
/// ```text
/// pod  eth0 10.77.0.2/24 fd00:77::2/64 ---- peer  eth0 10.77.0.1/24 fd00:77::1/64
/// ```
///
/// All is removed when dropped. Nothing of the machine's own network is touched.
#[derive(Debug)]
pub struct Pod {
    cgroup: Cgroup,
    netns: Netns,
    peer: Netns,
}

impl Pod {
    /// Makes a pod and its peer.
    ///
    /// # Errors
    ///
    /// If a namespace, the cable or the cgroup can't be made.
    pub fn new() -> Result<Self> {
        Self::below("")
    }

    /// The same, with its cgroup in another one.
    ///
    /// # Errors
    ///
    /// If a namespace, the cable or the cgroup can't be made.
    pub fn below(cgroup: &str) -> Result<Self> {
        let name = unique_name("interceptor-pod");
        let cgroup = Cgroup::new(&format!("{cgroup}/{name}"))?;
        Self::of(&name, cgroup)
    }

    /// The same, with the cgroup that the kubelet makes for a pod with this uid.
    ///
    /// # Errors
    ///
    /// If a namespace, the cable or the cgroup can't be made.
    pub fn of_kubernetes(uid: &str) -> Result<Self> {
        Self::of(&unique_name("interceptor-pod"), Cgroup::of_kubernetes(uid)?)
    }

    fn of(name: &str, cgroup: Cgroup) -> Result<Self> {
        let pod = Self {
            cgroup,
            netns: Netns::new(name)?,
            peer: Netns::new(&format!("{name}-peer"))?,
        };
        for netns in [&pod.netns, &pod.peer] {
            // No duplicate detection: IPv6 addresses work at once.
            netns.sysctl("ipv6/conf/default/accept_dad", "0")?;
        }
        pod.netns.ip(&format!(
            "link add eth0 type veth peer name eth0 netns {}",
            pod.peer.name()
        ))?;
        for (netns, v4, v6) in [(&pod.netns, POD_V4, POD_V6), (&pod.peer, PEER_V4, PEER_V6)] {
            netns.ip(&format!("addr add {v4}/24 dev eth0"))?;
            netns.ip(&format!("addr add {v6}/64 dev eth0"))?;
            netns.ip("link set eth0 up")?;
        }
        pod.netns.ip(&format!("route add default via {PEER_V4}"))?;
        pod.netns
            .ip(&format!("-6 route add default via {PEER_V6}"))?;
        Ok(pod)
    }

    /// The pod's name, unique on this machine.
    pub fn name(&self) -> &str {
        self.netns.name()
    }

    /// The pod's network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The peer's network namespace.
    pub fn peer(&self) -> &Netns {
        &self.peer
    }

    /// The pod's cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A command that will run on one of the hosts, with these credentials.
    /// It is killed when the thread that starts it ends.
    ///
    /// # Errors
    ///
    /// If the namespace or the cgroup is gone.
    pub fn command(
        &self,
        host: Host,
        credentials: Credentials,
        program: impl AsRef<OsStr>,
    ) -> Result<Command> {
        let (netns, mut cgroup) = match host {
            Host::Pod => (self.netns.open()?, Some(self.cgroup.open_procs()?)),
            Host::Peer => (self.peer.open()?, None),
        };
        let mut command = Command::new(program);
        command.process_group(0);
        let enter = move || -> io::Result<()> {
            if let Some(procs) = &mut cgroup {
                procs.write_all(b"0")?;
            }
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            if credentials != Credentials::ROOT {
                let (uid, gid) = (
                    Uid::from_raw(credentials.uid),
                    Gid::from_raw(credentials.gid),
                );
                setgroups(&[])?;
                setresgid(gid, gid, gid)?;
                setresuid(uid, uid, uid)?;
            }
            // Last: a change of credentials clears it.
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            Ok(())
        };
        // SAFETY: between fork and exec only system calls are made, on files
        // opened before; nothing allocates or takes a lock.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }
}
