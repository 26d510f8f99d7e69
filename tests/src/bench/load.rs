//! The measured loops, in a worker.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::fd::{FromRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::{
        resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit},
        time::TimeValLike as _,
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use socket2::{Protocol, SockAddr, Socket, Type};

use super::{
    stats::quantile,
    worker::{Job, Measured},
};

/// How many connections or round trips are timed at once. Parts that something
/// else interrupted are few enough not to move the median.
const PART: u32 = 20;

/// The size of a request and of a round trip's message.
const MESSAGE: usize = 64;

/// How long accept() may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long connect() may take where it may fail: less than after which a lost
/// packet is sent again.
const FIRST_TRY: Duration = Duration::from_millis(900);

/// How much is in flight at once on a bulk connection: less than the smallest
/// buffers hold, because the same thread writes and reads.
const BULK: usize = 64 << 10;

/// Where connections go.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Targets {
    /// The first destination.
    pub(crate) first: SocketAddr,
    /// How many: each has an address of its own, counted on from the first's.
    pub(crate) count: u32,
}

impl Targets {
    /// One destination.
    pub(crate) fn one(address: impl Into<IpAddr>, port: u16) -> Self {
        Self {
            first: SocketAddr::new(address.into(), port),
            count: 1,
        }
    }

    fn addresses(&self) -> Vec<SockAddr> {
        (0..self.count)
            .map(|n| {
                let ip: IpAddr = match self.first.ip() {
                    IpAddr::V4(first) => (first.to_bits() + n).to_be_bytes().into(),
                    IpAddr::V6(first) => (first.to_bits() + u128::from(n)).to_be_bytes().into(),
                };
                SocketAddr::new(ip, self.first.port()).into()
            })
            .collect()
    }
}

/// How the client ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Close {
    /// By a reset: `SO_LINGER` of 0. Nothing of the connection remains.
    Rst,
    /// Gracefully: the client's end remains in `TIME_WAIT`.
    Fin,
}

/// A client and the proxy that it reaches.
pub(crate) struct Load {
    listener: Option<Socket>,
    intercepted: bool,
    cpus: usize,
    kept: Vec<Connection>,
}

/// The client's end, and the proxy's if that is in this process.
struct Connection {
    client: Socket,
    accepted: Option<Socket>,
}

impl Load {
    /// Goes to its CPU; the listener's descriptor was inherited.
    pub(crate) fn new(listener: Option<i32>, intercepted: bool, cpu: usize) -> Result<Self> {
        let cpus = thread::available_parallelism()?.get();
        pin(cpu)?;
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        // SAFETY: who started this process opened it for this use alone.
        let listener: Option<Socket> =
            listener.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }.into());
        if let Some(listener) = &listener {
            // Bounds accept().
            listener.set_read_timeout(Some(PATIENCE))?;
        }
        Ok(Self {
            listener,
            intercepted,
            cpus,
            kept: Vec::new(),
        })
    }

    /// Does a job.
    pub(crate) fn run(&mut self, job: Job) -> Result<Measured> {
        let (cpu, machine) = (cpu_time()?, machine_time()?);
        let measured = match job {
            Job::Connections {
                to,
                close,
                request,
                count,
            } => self.connections(&to.addresses(), close, request, count)?,
            Job::Rate { to, count } => self.rate(&to.addresses(), count)?,
            Job::RoundTrips { to, count } => self.round_trips(&to.addresses(), count)?,
            Job::Bulk { to, mebibytes } => self.bulk(&to.addresses(), mebibytes)?,
            Job::Hold { to, limit } => self.hold(&to.addresses(), limit),
            Job::Release => self.release()?,
        };
        Ok(Measured {
            cpu_ns: (cpu_time()? - cpu) / f64::from(measured.units.max(1)),
            machine_ns: machine_time()? - machine,
            ..measured
        })
    }

    fn connections(
        &self,
        to: &[SockAddr],
        close: Close,
        request: bool,
        count: u32,
    ) -> Result<Measured> {
        let mut connects = Vec::with_capacity(count as usize);
        let mut destinations = to.iter().cycle();
        let parts = in_parts(count, || {
            let destination = destinations.next().context("no destination")?;
            let client = tcp_socket(destination)?;
            let before = Instant::now();
            client.connect(destination).context("connect")?;
            connects.push(nanoseconds(before.elapsed()));
            let accepted = self.accept(destination)?;
            let mut connection = Connection { client, accepted };
            if request {
                connection.round_trip()?;
            }
            connection.close(close)
        })?;
        Ok(summary(parts, connects))
    }

    fn connect(&self, to: &SockAddr) -> Result<Connection> {
        let client = tcp_socket(to)?;
        // Bounds connect(), too.
        client.set_write_timeout(Some(FIRST_TRY))?;
        match client.connect(to) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
                bail!("connect: the first packet is lost")
            }
            result => result.context("connect")?,
        }
        client.set_write_timeout(None)?;
        Ok(Connection {
            client,
            accepted: self.accept(to)?,
        })
    }

    /// Accepts and asks where the connection was meant to go, as a proxy does.
    fn accept(&self, destination: &SockAddr) -> Result<Option<Socket>> {
        let Some(listener) = &self.listener else {
            return Ok(None);
        };
        let (accepted, _) = listener.accept().context("accept")?;
        let origin = original_destination(&accepted, destination);
        if self.intercepted {
            let origin = origin.context("SO_ORIGINAL_DST")?.as_socket();
            let dialled = destination.as_socket();
            ensure!(
                origin == dialled,
                "SO_ORIGINAL_DST says {origin:?}, but the client dialled {dialled:?}",
            );
        }
        Ok(Some(accepted))
    }

    fn rate(&self, to: &[SockAddr], count: u32) -> Result<Measured> {
        let listener = self.listener.as_ref().context("a rate needs a listener")?;
        let start = Instant::now();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..self.cpus)
                .map(|cpu| scope.spawn(move || rate_on(cpu, listener, to, count)))
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("panic")))
        })?;
        let units = count * u32::try_from(self.cpus)?;
        Ok(Measured {
            unit_ns: nanoseconds(start.elapsed()) / f64::from(units),
            units,
            ..Measured::default()
        })
    }

    fn round_trips(&self, to: &[SockAddr], count: u32) -> Result<Measured> {
        let mut connection = self.connect(to.first().context("no destination")?)?;
        let mut trips = Vec::with_capacity(count as usize);
        let parts = in_parts(count, || {
            let before = Instant::now();
            connection.round_trip()?;
            trips.push(nanoseconds(before.elapsed()));
            Ok(())
        })?;
        connection.close(Close::Rst)?;
        Ok(summary(parts, trips))
    }

    fn bulk(&self, to: &[SockAddr], mebibytes: u32) -> Result<Measured> {
        let mut connection = self.connect(to.first().context("no destination")?)?;
        let mut buffer = vec![0x5a; BULK];
        let parts = (0..mebibytes)
            .map(|_| {
                let start = Instant::now();
                for _ in 0..(1 << 20) / BULK {
                    connection.transfer(&mut buffer)?;
                }
                Ok(nanoseconds(start.elapsed()))
            })
            .collect::<Result<Vec<_>>>()?;
        connection.close(Close::Rst)?;
        Ok(Measured {
            unit_ns: quantile(&parts, 0.5),
            units: mebibytes,
            ..Measured::default()
        })
    }

    fn hold(&mut self, to: &[SockAddr], limit: u32) -> Measured {
        let mut failure = None;
        for destination in to.iter().cycle().take(limit as usize) {
            match self.connect(destination) {
                Ok(connection) => self.kept.push(connection),
                Err(error) => {
                    failure = Some(format!("{error:#}"));
                    break;
                }
            }
        }
        Measured {
            units: u32::try_from(self.kept.len()).unwrap_or(u32::MAX),
            failure,
            ..Measured::default()
        }
    }

    fn release(&mut self) -> Result<Measured> {
        self.kept
            .drain(..)
            .try_for_each(|connection| connection.close(Close::Rst))?;
        Ok(Measured::default())
    }
}

impl Connection {
    /// A message to the proxy and back.
    fn round_trip(&mut self) -> Result<()> {
        let mut message = [0x5a; MESSAGE];
        self.client.write_all(&message).context("send")?;
        if let Some(accepted) = &mut self.accepted {
            accepted.read_exact(&mut message).context("read")?;
            accepted.write_all(&message).context("answer")?;
        }
        self.client.read_exact(&mut message).context("read")
    }

    /// Bytes to the proxy, that reads them; or to an echo, and back.
    fn transfer(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.client.write_all(buffer).context("send")?;
        let reader = self.accepted.as_mut().unwrap_or(&mut self.client);
        reader.read_exact(buffer).context("read")
    }

    fn close(self, close: Close) -> Result<()> {
        if close == Close::Rst {
            self.client.set_linger(Some(Duration::ZERO))?;
        }
        // The client first.
        drop(self.client);
        drop(self.accepted);
        Ok(())
    }
}

/// Does `f` so many times; returns what it took once, from each small part.
fn in_parts(count: u32, mut f: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    (0..count.div_ceil(PART))
        .map(|_| {
            let start = Instant::now();
            for _ in 0..PART {
                f()?;
            }
            Ok(nanoseconds(start.elapsed()) / f64::from(PART))
        })
        .collect()
}

fn summary(parts: Vec<f64>, singles: Vec<f64>) -> Measured {
    Measured {
        unit_ns: quantile(&parts, 0.5),
        p50_ns: quantile(&singles, 0.5),
        p99_ns: quantile(&singles, 0.99),
        units: u32::try_from(singles.len()).unwrap_or(u32::MAX),
        ..Measured::default()
    }
}

/// One thread's part of [`Job::Rate`].
fn rate_on(cpu: usize, listener: &Socket, to: &[SockAddr], count: u32) -> Result<()> {
    pin(cpu)?;
    for destination in to.iter().cycle().take(count as usize) {
        let client = tcp_socket(destination)?;
        client.connect(destination).context("connect")?;
        // Perhaps another thread's connection, and reset by now: the answer
        // isn't looked at.
        let (accepted, _) = listener.accept().context("accept")?;
        let _ = original_destination(&accepted, destination);
        client.set_linger(Some(Duration::ZERO))?;
    }
    Ok(())
}

fn tcp_socket(to: &SockAddr) -> Result<Socket> {
    let socket = Socket::new(to.domain(), Type::STREAM, Some(Protocol::TCP));
    socket.context("make a socket")
}

/// Asks as a proxy does: by its own socket's family, which is that of what the
/// client dialled.
fn original_destination(accepted: &Socket, dialled: &SockAddr) -> io::Result<SockAddr> {
    if dialled.is_ipv4() {
        accepted.original_dst_v4()
    } else {
        accepted.original_dst_v6()
    }
}

/// Has the calling thread run on this CPU only.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("go to CPU {cpu}"))
}

#[expect(clippy::cast_precision_loss, reason = "under 2^53 for 100 days")]
fn nanoseconds(duration: Duration) -> f64 {
    duration.as_nanos() as f64
}

/// This process's CPU time, in nanoseconds. The kernel's work for its packets
/// counts, because on the loopback device and a cable of the same machine it is
/// done where they are sent.
fn cpu_time() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let time = usage.user_time() + usage.system_time();
    #[expect(clippy::cast_precision_loss, reason = "under 2^53 for 285 years")]
    Ok(time.num_microseconds() as f64 * 1e3)
}

/// How long the machine's CPUs have been busy, whatever with, in nanoseconds.
fn machine_time() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    // user nice system idle iowait irq softirq steal
    let ticks = line
        .split_whitespace()
        .skip(1)
        .map(str::parse::<u32>)
        .enumerate()
        .filter(|(field, _)| ![3, 4].contains(field) && *field < 8)
        .try_fold(0.0, |sum, (_, ticks)| {
            ticks.map(|ticks| sum + f64::from(ticks))
        })
        .context("/proc/stat")?;
    // In the unit of USER_HZ, which is 100 everywhere.
    Ok(ticks * 1e7)
}
