//! A pod's live connections, from the kernel's own lists: nothing is kept for them.

use std::{
    cell::RefCell,
    collections::HashSet,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    ops::ControlFlow,
    os::fd::AsFd as _,
};

use aya::maps::{HashMap, MapData, MapError};
use bytemuck::Zeroable as _;
use interceptor_common::{
    chains::{Chain, Decision, InboundFacts, OutputFacts, Owner, Verdict, inbound, output},
    config::stages,
    conn::{Address, DestinationNumber, Endpoint, LiveSocket, Role, TCP},
    routes::{LOOPBACK, Route, RouteKind},
};
use serde::{Deserialize, Serialize};

use super::{
    attach::need_root,
    bpf,
    explain::{LiveLists, LiveRoutes},
    object::{ITERATORS, Loading, LogLevel, Object},
    pins::Pins,
    plain::Plain,
    view::Opened,
};
use crate::{
    Error, Result,
    pod::{PodName, netns::Netns},
    settings::{ChainRule, Family},
};

/// A socket of a connection that goes through a pod's proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The pod's name.
    pub pod: String,
    /// Who makes it.
    pub direction: Direction,
    /// Which of the connection's two sockets it is.
    pub side: Side,
    /// The client's end.
    pub client: SocketAddr,
    /// The proxy's end.
    pub proxy: SocketAddr,
    /// Where the client meant to go.
    pub original_destination: SocketAddr,
    /// The state that TCP has it in, as `ss` has it.
    pub state: String,
    /// The uid of who opened it, as this machine numbers them; none if it was
    /// closed and only the kernel still has it.
    pub uid: Option<u32>,
    /// The gid, the same way.
    pub gid: Option<u32>,
    /// The rule that decides about such a connection now; none if that can't be told
    /// from this socket, or if the settings have changed so that none does.
    pub rule: Option<DecidedBy>,
}

/// Who makes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// A process of the pod.
    Outbound,
    /// Another host.
    Inbound,
}

/// Which socket of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The one that called connect().
    Client,
    /// The one that the proxy accepts.
    Proxy,
}

/// A rule that has decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecidedBy {
    /// Its chain.
    pub chain: String,
    /// Its number in the chain, from 1.
    pub number: u32,
    /// The rule in the words of iptables.
    pub text: String,
}

/// Tells of every live connection that goes through the proxy of `pod`, or of all
/// pods, one after the other, until `each` breaks. Sockets that come or go meanwhile
/// are told of or not.
///
/// The kernel lists 32 KiB at a time, and nothing more is held.
///
/// # Errors
///
/// If `pod` isn't attached; if the pins of a pod aren't whole, though the others are told
/// of; or if the kernel can't list sockets.
pub fn connections(
    pins: &Pins,
    pod: Option<&PodName>,
    mut each: impl FnMut(Connection) -> ControlFlow<()>,
) -> Result<()> {
    need_root()?;
    let pods = match pod {
        Some(pod) => vec![pod.clone()],
        None => pins.pods()?,
    };
    let mut opened = Vec::new();
    let mut failed = Ok(());
    for name in pods {
        match Opened::of(pins, &name) {
            Ok(pod) => opened.push((name, pod)),
            // Detached meanwhile.
            Err(Error::NotAttached { .. }) if pod.is_none() => {}
            Err(error) => failed = failed.and(Err(error)),
        }
    }
    if opened.is_empty() {
        return failed;
    }
    let iterators = Object::load(
        Loading {
            log_level: LogLevel::Off,
            ..Loading::NOWHERE
        },
        ITERATORS.iter(),
    )?;
    for (name, opened) in opened {
        let pod = Pod::new(name.to_string(), opened)?;
        if pod.tell(&iterators, &mut each)?.is_break() {
            break;
        }
    }
    failed
}

/// What is looked up for a pod's sockets.
struct Pod {
    name: String,
    opened: Opened,
    lists: LiveLists,
    routes: LiveRoutes,
    destinations: HashMap<MapData, u32, Plain<Endpoint>>,
    /// Both ends of sockets that remember an original destination, although the address
    /// that the application dialled has the number of another.
    dialled: RefCell<HashSet<(SocketAddr, SocketAddr)>>,
    rules: Vec<(Chain, Family, Vec<ChainRule>)>,
}

impl Pod {
    fn new(name: String, opened: Opened) -> Result<Self> {
        let rules = Chain::ALL
            .into_iter()
            .flat_map(|chain| Family::ALL.map(|family| (chain, family)))
            .map(|(chain, family)| (chain, family, opened.settings.rules(chain, family)))
            .collect();
        Ok(Self {
            name,
            lists: LiveLists::of(&opened)?,
            routes: LiveRoutes::of(&opened)?,
            destinations: opened.map("DESTINATIONS")?,
            dialled: RefCell::default(),
            rules,
            opened,
        })
    }

    fn tell(
        &self,
        iterators: &Object,
        each: &mut impl FnMut(Connection) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let failed = || Error::system("listing sockets");
        let [redirected, connected] = &ITERATORS;
        let origins = self.opened.open_map("ORIGINS")?;
        let redirected = bpf::iterate(
            iterators.program(redirected).as_fd(),
            Some(origins.fd().as_fd()),
        )
        .map_err(failed())?;
        if self
            .tell_all(redirected, Self::redirected, each)?
            .is_break()
        {
            return Ok(ControlFlow::Break(()));
        }
        // Nothing is connected in a namespace that is gone.
        let Some(netns) = Netns::find(self.opened.netns_id()) else {
            return Ok(ControlFlow::Continue(()));
        };
        let connected = iterators.program(connected).as_fd();
        let connected = netns.enter(|| bpf::iterate(connected, None).map_err(failed()))?;
        self.tell_all(connected, Self::connected, each)
    }

    fn tell_all(
        &self,
        sockets: File,
        connection: impl Fn(&Self, &LiveSocket) -> Result<Option<Connection>>,
        each: &mut impl FnMut(Connection) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        // The kernel gives as much at a time.
        let mut sockets = BufReader::with_capacity(1 << 15, sockets);
        while let Some(socket) = next(&mut sockets).map_err(Error::system("reading sockets"))? {
            if let Some(connection) = connection(self, &socket)?
                && each(connection).is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The connection of a socket that remembers an original destination.
    fn redirected(&self, socket: &LiveSocket) -> Result<Option<Connection>> {
        if self.number(socket).is_some() {
            self.dialled.borrow_mut().insert(ends(socket));
        }
        self.outbound(socket)
    }

    /// The connection of a socket that doesn't say whether it remembers anything: its
    /// original destination may have a number.
    fn connected(&self, socket: &LiveSocket) -> Result<Option<Connection>> {
        let Some((role, number)) = self.number(socket) else {
            return if socket.in_interface == 0 {
                Ok(None)
            } else {
                self.arrived(socket)
            };
        };
        if self.dialled.borrow().contains(&ends(socket)) {
            return Ok(None);
        }
        let original_destination = match self.destinations.get(&number.index(), 0) {
            Ok(destination) => destination.0,
            // One that remembers, and has come since those were asked for.
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(self.opened.damaged(error.to_string())),
        };
        self.outbound(&LiveSocket {
            original_destination,
            role: role as u32,
            ..*socket
        })
    }

    /// The number in the proxy's address of an outbound connection, and which end of it
    /// the socket is.
    fn number(&self, socket: &LiveSocket) -> Option<(Role, DestinationNumber)> {
        let settings = &self.opened.compiled;
        [
            (Role::Client, socket.remote),
            (Role::Accepted, socket.local),
        ]
        .into_iter()
        .filter(|(_, end)| {
            [
                settings.outbound_port,
                settings.inbound_port,
                settings.dns_port,
            ]
            .contains(&end.port)
        })
        .find_map(|(role, end)| Some((role, DestinationNumber::of(&end.address)?)))
    }

    /// The connection of a socket with its original destination.
    fn outbound(&self, socket: &LiveSocket) -> Result<Option<Connection>> {
        let (side, client, proxy) = match socket.role {
            role if role == Role::Client as u32 => (Side::Client, socket.local, socket.remote),
            role if role == Role::Accepted as u32 => (Side::Proxy, socket.remote, socket.local),
            // Others aren't redirected.
            _ => return Ok(None),
        };
        let owner = owner(socket);
        let rule = match owner {
            Some(owner) if side == Side::Client => self.output_rule(socket, owner)?,
            _ => None,
        };
        Ok(Some(Connection {
            pod: self.name.clone(),
            direction: Direction::Outbound,
            side,
            client: client.into(),
            proxy: proxy.into(),
            original_destination: socket.original_destination.into(),
            state: state(socket.state),
            uid: owner.map(|owner| owner.uid),
            gid: owner.map(|owner| owner.gid),
            rule,
        }))
    }

    /// The connection of a socket whose SYN has arrived, if it was given to the proxy.
    fn arrived(&self, socket: &LiveSocket) -> Result<Option<Connection>> {
        let destination = socket.local;
        let compiled = &self.opened.compiled;
        let family = compiled.family(&destination.address);
        // The proxy's to its own pod, from its client's address.
        let seems_from_elsewhere =
            family.has(stages::TPROXY) && socket.mark == compiled.tproxy_mark;
        let facts = InboundFacts {
            protocol: TCP,
            destination: destination.address,
            destination_port: destination.port,
            in_interface: socket.in_interface,
            from_inside: seems_from_elsewhere
                || is_local(self.routes.to(socket.remote.address)?.as_ref()),
        };
        let decision = inbound(compiled, &self.lists, &facts);
        if decision.verdict == Verdict::Direct {
            return Ok(None);
        }
        let owner = owner(socket);
        Ok(Some(Connection {
            pod: self.name.clone(),
            direction: Direction::Inbound,
            side: Side::Proxy,
            client: socket.remote.into(),
            proxy: destination.into(),
            original_destination: destination.into(),
            state: state(socket.state),
            uid: owner.map(|owner| owner.uid),
            gid: owner.map(|owner| owner.gid),
            rule: self.rule(decision, destination.address),
        }))
    }

    /// The rule that redirects what this client's socket asked for.
    fn output_rule(&self, socket: &LiveSocket, owner: Owner) -> Result<Option<DecidedBy>> {
        let destination = socket.original_destination;
        let route = self.routes.to(destination.address)?;
        let over_loopback = is_local(route.as_ref());
        let decision = output(
            &self.opened.compiled,
            &self.lists,
            &OutputFacts {
                protocol: TCP,
                source: socket.local.address,
                destination: destination.address,
                destination_port: destination.port,
                over_loopback,
                out_interface: match socket.bound_interface {
                    _ if over_loopback => LOOPBACK,
                    0 => route.map_or(0, |route| route.out_interface),
                    device => device,
                },
                owner,
                mark: socket.mark,
            },
        );
        if decision.verdict == Verdict::Direct {
            return Ok(None);
        }
        Ok(self.rule(decision, destination.address))
    }

    fn rule(&self, decision: Decision, destination: Address) -> Option<DecidedBy> {
        let of = if destination.is_v4() {
            Family::V4
        } else {
            Family::V6
        };
        let (_, _, rules) = self
            .rules
            .iter()
            .find(|(chain, family, _)| (*chain, *family) == (decision.chain, of))?;
        let text = rules
            .get(decision.rule.checked_sub(1)? as usize)?
            .to_string();
        Some(DecidedBy {
            chain: decision.chain.to_string(),
            number: decision.rule,
            text,
        })
    }
}

/// The next socket that an iterator tells of; none at the end.
fn next(sockets: &mut BufReader<File>) -> io::Result<Option<LiveSocket>> {
    loop {
        match sockets.fill_buf() {
            Ok([]) => return Ok(None),
            Ok(_) => break,
            // After many sockets of which there is nothing to tell, the kernel has
            // the reader ask again.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    let mut socket = LiveSocket::zeroed();
    sockets.read_exact(bytemuck::bytes_of_mut(&mut socket))?;
    Ok(Some(socket))
}

fn ends(socket: &LiveSocket) -> (SocketAddr, SocketAddr) {
    (socket.local.into(), socket.remote.into())
}

fn owner(socket: &LiveSocket) -> Option<Owner> {
    let owner = Owner {
        uid: socket.uid,
        gid: socket.gid,
    };
    (owner != Owner::NONE).then_some(owner)
}

const fn is_local(route: Option<&Route>) -> bool {
    matches!(route, Some(route) if route.is(RouteKind::Local))
}

/// The name of a state of TCP (`net/tcp_states.h`).
fn state(number: u32) -> String {
    match number {
        1 => "ESTAB",
        2 => "SYN-SENT",
        3 => "SYN-RECV",
        4 => "FIN-WAIT-1",
        5 => "FIN-WAIT-2",
        8 => "CLOSE-WAIT",
        9 => "LAST-ACK",
        11 => "CLOSING",
        _ => return number.to_string(),
    }
    .to_owned()
}
