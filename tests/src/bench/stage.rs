//! A pod for each mode, with its workers.

use std::{
    net::{Ipv6Addr, SocketAddr},
    process::Command,
};

use anyhow::{Context as _, Result};
use socket2::Socket;

use super::{
    mode::{Mode, Path},
    pair::Pair,
    worker::Worker,
};
use crate::{
    cli::Cli,
    command::run,
    inside::Inside,
    netns::Netns,
    pod::{Credentials, Host, Pod},
};

/// A pod in which connections are intercepted in one way, with the workers. All
/// goes when it is dropped, in this order.
pub(crate) struct Stage {
    outbound: Worker,
    outbound_v6: Worker,
    inbound: Worker,
    pair: Pair,
    listener: Socket,
    cli: Option<Cli>,
    pod: Pod,
    /// How connections are intercepted.
    pub(crate) mode: Mode,
}

impl Stage {
    /// Makes pods and starts workers on a CPU.
    pub(crate) fn new(mode: Mode, cpu: usize) -> Result<Self> {
        let pod = Pod::new()?;
        let cli = mode.install(&pod)?;
        let proxy = Inside::start(&pod, Host::Pod, Credentials::PROXY)?;
        let listen = |port| proxy.listen(([0, 0, 0, 0], port).into());
        let start =
            |host, listener| Worker::start(&pod, host, Some(listener), mode.intercepts(), cpu);
        let listener = listen(15001)?;
        let outbound = start(Host::Pod, &listener)?;
        let any_v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 15001));
        let (listener_v6, listener_inbound) = (proxy.listen(any_v6)?, listen(15006)?);
        let outbound_v6 = start(Host::Pod, &listener_v6)?;
        let inbound = start(Host::Peer, &listener_inbound)?;
        Ok(Self {
            outbound,
            outbound_v6,
            inbound,
            pair: Pair::new(mode, cpu)?,
            listener,
            cli,
            pod,
            mode,
        })
    }

    /// The worker of a path.
    pub(crate) fn worker(&mut self, path: Path) -> &mut Worker {
        match path {
            Path::Outbound => &mut self.outbound,
            Path::OutboundV6 => &mut self.outbound_v6,
            Path::Inbound => &mut self.inbound,
            Path::Pair => self.pair.client(),
        }
    }

    /// One more client of the pod's, that shares the proxy's listener.
    pub(crate) fn another_worker(&self, cpu: usize) -> Result<Worker> {
        let intercepts = self.mode.intercepts();
        Worker::start(&self.pod, Host::Pod, Some(&self.listener), intercepts, cpu)
    }

    /// The pod.
    pub(crate) fn pod(&self) -> &Pod {
        &self.pod
    }

    /// What attached the pod, if it is Interceptor's.
    pub(crate) fn cli(&self) -> Option<&Cli> {
        self.cli.as_ref()
    }

    /// Ends what remains of connections in `TIME_WAIT`.
    pub(crate) fn flush(&self) -> Result<()> {
        flush(self.pod.netns())?;
        flush(self.pod.peer())
    }
}

/// Ends what remains of a network namespace's connections in `TIME_WAIT`.
pub(crate) fn flush(netns: &Netns) -> Result<()> {
    netns.enter(|| {
        run(Command::new("ss").args(["-K", "-H", "-t", "-n", "state", "time-wait"]))
            .context("end connections in TIME_WAIT (the kernel needs CONFIG_INET_DIAG_DESTROY)")
            .map(drop)
    })
}
