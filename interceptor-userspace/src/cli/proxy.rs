//! `interceptor proxy`: the embedded transparent TCP proxy.

use std::{
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use interceptor_userspace::proxy::{Config, Connection, Direction, Error, Event, Proxy};
use nix::errno::Errno;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::Output;

/// Log lines that may wait for a slow reader of stdout; more are dropped and counted.
const PENDING_LINES: usize = 65_536;

/// How long the last log lines may take to be written at the end.
const FLUSH: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Redirected connections are forwarded to their original destination, as the kernel's SO_ORIGINAL_DST \
gives it; one that has none is reset. Run the proxy as the user whose connections the rules exempt, \
or its own would be redirected to itself.

A line on stderr says when it listens. Each connection is one line on stdout at its end. SIGINT or \
SIGTERM stops it: no more connections are accepted, and live ones are reset after 5 seconds.")]
pub(crate) struct Args {
    /// Port that connections leaving the pod are redirected to
    #[arg(long, value_name = "PORT", default_value_t = 15001, value_parser = clap::value_parser!(u16).range(1..))]
    outbound_port: u16,

    /// Port that connections entering the pod are redirected to
    #[arg(long, value_name = "PORT", default_value_t = 15006, value_parser = clap::value_parser!(u16).range(1..))]
    inbound_port: u16,

    /// IP address to listen on with both ports; may be given several times
    ///
    /// The IPv6 wildcard takes IPv6 connections only, and is left out when there is no IPv6.
    #[arg(long, value_name = "IP", default_values = ["0.0.0.0", "::"])]
    bind: Vec<IpAddr>,

    /// Source address of the connections that carry inbound IPv4 traffic to the application
    ///
    /// The rules know by it that the traffic has already been through the proxy.
    #[arg(long, value_name = "IP", default_value = "127.0.0.6")]
    passthrough_v4: Ipv4Addr,

    /// Source address of the connections that carry inbound IPv6 traffic to the application
    ///
    /// It must be an address of the loopback device: ip -6 address add ::6/128 dev lo
    #[arg(long, value_name = "IP", default_value = "::6")]
    passthrough_v6: Ipv6Addr,
}

/// Runs the proxy until SIGINT or SIGTERM.
pub(crate) fn run(args: Args, output: Output) -> anyhow::Result<()> {
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the tokio runtime")?;
    let result = runtime.block_on(serve(args, output));
    // The writer may hang for ever on a stdout that nobody reads.
    runtime.shutdown_background();
    result
}

async fn serve(args: Args, output: Output) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;

    let config = Config {
        outbound_port: args.outbound_port,
        inbound_port: args.inbound_port,
        bind: args.bind,
        passthrough_v4: args.passthrough_v4,
        passthrough_v6: args.passthrough_v6,
    };
    let proxy = Proxy::bind(&config).map_err(with_fix)?;
    if let Some(error) = proxy.without_ipv6() {
        eprintln!("no IPv6 here ({error}): IPv4 only");
    }
    let addresses: Vec<_> = proxy.addresses().map(|a| a.to_string()).collect();
    eprintln!("listening on {}", addresses.join(" "));

    let stop = CancellationToken::new();
    tokio::spawn({
        let stop = stop.clone();
        async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            stop.cancel();
        }
    });

    let (sender, receiver) = mpsc::channel(PENDING_LINES);
    let dropped = Arc::new(AtomicU64::new(0));
    let writer = tokio::task::spawn_blocking({
        let dropped = Arc::clone(&dropped);
        move || write_events(receiver, output, &dropped)
    });
    proxy
        .run(stop, move |event| {
            // Connections never wait for whoever reads the log.
            if sender.try_send(event).is_err() {
                dropped.fetch_add(1, Ordering::Relaxed);
            }
        })
        .await;
    // Past the limit the rest is given up.
    let _ = timeout(FLUSH, writer).await;
    Ok(())
}

/// Writes a line for each event, whole and at once. A closed stdout or stderr is no reason to stop.
fn write_events(mut events: mpsc::Receiver<Event>, output: Output, dropped: &AtomicU64) {
    while let Some(event) = events.blocking_recv() {
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(io::stderr(), "stdout is read too slowly: {lost} lines lost");
        }
        match event {
            Event::Ended(connection) => {
                let mut stdout = io::stdout().lock();
                let _ = stdout
                    .write_all(line(&connection, output).as_bytes())
                    .and_then(|()| stdout.flush());
            }
            Event::AcceptFailed { listener, error } => {
                let _ = writeln!(io::stderr(), "accept on {listener}: {error}");
            }
        }
    }
}

fn line(connection: &Connection, output: Output) -> String {
    match output {
        Output::Text => format!("{connection}\n"),
        Output::Json => {
            let mut line = serde_json::to_string(connection)
                .expect("addresses, numbers and strings always become JSON");
            line.push('\n');
            line
        }
    }
}

/// Adds what to do about it to an error that the user can mend.
fn with_fix(error: Error) -> anyhow::Error {
    let Error::Listen {
        direction,
        address,
        source,
    } = &error
    else {
        return error.into();
    };
    let port_option = match direction {
        Direction::Outbound => "--outbound-port",
        Direction::Inbound => "--inbound-port",
    };
    let fix = match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EADDRINUSE) => format!(
            "stop what listens there (ss -ltnp 'sport = :{}' shows it) or choose another {port_option}",
            address.port()
        ),
        Some(Errno::EADDRNOTAVAIL) => {
            "this network namespace doesn't have the address, choose another --bind".to_owned()
        }
        Some(Errno::EACCES) => {
            format!("low ports take CAP_NET_BIND_SERVICE, choose another {port_option}")
        }
        _ => return error.into(),
    };
    anyhow!("{error}: {source}; {fix}")
}

/// Raises the soft limit of open descriptors to the hard one: each connection takes two. Best
/// effort: without it, fewer connections fit.
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid rlimit that outlives both calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}
