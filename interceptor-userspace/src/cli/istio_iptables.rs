//! `interceptor istio-iptables`: the mesh's own tool's flags and environment
//! variables, so that an init container's command works with another program.

use std::{
    env, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use interceptor_userspace::{
    Error,
    datapath::{self, LogLevel, Pins, Request},
    pod::{PodName, cgroup, cgroup::Cgroup, netns::Netns},
    settings::{
        self, Dns, Family, Settings, cidr_list, items, port_list, refuse_virtual_interfaces,
    },
    validation::validate,
};

use super::Output;

/// What the mesh's tool exits with if the check fails.
const VALIDATION_FAILED: u8 = 126;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The flags and variables are those of the mesh's istio-iptables; --pod and --cgroup are Interceptor's \
own. An init container without its host's cgroup tree needs --cgroup.")]
pub(crate) struct Args {
    /// The proxy's port for outbound connections.
    #[arg(short = 'p', long, env = "ENVOY_PORT", default_value_t = 15001)]
    envoy_port: u16,
    /// The proxy's port for inbound connections.
    #[arg(
        short = 'z',
        long,
        env = "INBOUND_CAPTURE_PORT",
        default_value_t = 15006
    )]
    inbound_capture_port: u16,
    /// The port for tunnels, never captured inbound.
    #[arg(
        short = 'e',
        long,
        env = "INBOUND_TUNNEL_PORT",
        default_value_t = 15008
    )]
    inbound_tunnel_port: u16,
    /// Uids of the proxy; the uid of ENVOY_USER, or 1337, if empty.
    #[arg(short = 'u', long, env = "PROXY_UID", default_value = "")]
    proxy_uid: String,
    /// Gids of the proxy; the same as its uids if empty.
    #[arg(short = 'g', long, env = "PROXY_GID", default_value = "")]
    proxy_gid: String,
    /// REDIRECT, TPROXY or NONE.
    #[arg(
        short = 'm',
        long,
        env = "ISTIO_INBOUND_INTERCEPTION_MODE",
        default_value = ""
    )]
    istio_inbound_interception_mode: String,
    /// Inbound ports to capture, or `*`; none if empty.
    #[arg(short = 'b', long, env = "ISTIO_INBOUND_PORTS", default_value = "")]
    istio_inbound_ports: String,
    /// Inbound ports not to capture if all others are.
    #[arg(
        short = 'd',
        long,
        env = "ISTIO_LOCAL_EXCLUDE_PORTS",
        default_value = ""
    )]
    istio_local_exclude_ports: String,
    /// Outbound CIDRs to capture, or `*`; none if empty.
    #[arg(short = 'i', long, env = "ISTIO_SERVICE_CIDR", default_value = "")]
    istio_service_cidr: String,
    /// Outbound CIDRs not to capture.
    #[arg(
        short = 'x',
        long,
        env = "ISTIO_SERVICE_EXCLUDE_CIDR",
        default_value = ""
    )]
    istio_service_exclude_cidr: String,
    /// Outbound ports to capture whatever the CIDR.
    #[arg(short = 'q', long, env = "ISTIO_OUTBOUND_PORTS", default_value = "")]
    istio_outbound_ports: String,
    /// Outbound ports not to capture.
    #[arg(
        short = 'o',
        long,
        env = "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE",
        default_value = ""
    )]
    istio_local_outbound_ports_exclude: String,
    /// Interfaces to leave alone.
    #[arg(
        short = 'c',
        long,
        env = "ISTIO_EXCLUDE_INTERFACES",
        default_value = ""
    )]
    istio_exclude_interfaces: String,
    /// Virtual interfaces: not supported, and refused.
    #[arg(short = 'k', long, env = "KUBE_VIRT_INTERFACES", default_value = "")]
    kube_virt_interfaces: String,
    /// The mark of TPROXY.
    #[arg(
        short = 't',
        long,
        env = "ISTIO_INBOUND_TPROXY_MARK",
        default_value_t = 1337
    )]
    istio_inbound_tproxy_mark: u32,
    /// The routing table of TPROXY.
    #[arg(
        short = 'r',
        long,
        env = "ISTIO_INBOUND_TPROXY_ROUTE_TABLE",
        default_value_t = 133
    )]
    istio_inbound_tproxy_route_table: u32,
    /// Print what would be done, and the equivalent chains; change nothing.
    #[arg(short = 'n', long, env = "DRY_RUN", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    dry_run: bool,
    /// Capture DNS.
    #[arg(long, env = "REDIRECT_DNS", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    redirect_dns: Option<bool>,
    /// Capture DNS to all servers, not only to those of resolv.conf.
    #[arg(long, env = "CAPTURE_ALL_DNS", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    capture_all_dns: bool,
    /// Drop invalid packets: there are none without conntrack.
    #[arg(long, env = "DROP_INVALID", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    drop_invalid: Option<bool>,
    /// Capture both families, whichever the pod's first address is of.
    #[arg(long, env = "DUAL_STACK", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    dual_stack: Option<bool>,
    /// Only detach.
    #[arg(long, env = "CLEANUP_ONLY", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    cleanup_only: bool,
    /// Change a pod that is attached with other settings.
    #[arg(long, env = "RECONCILE", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    reconcile: bool,
    /// Detach first whatever is attached.
    #[arg(long, env = "FORCE_APPLY", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    force_apply: bool,
    /// Attach nothing.
    #[arg(long, env = "SKIP_RULE_APPLY", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    skip_rule_apply: bool,
    /// Check that the proxy's connections to its own pod come to it; exit with 126 if not.
    #[arg(long, env = "RUN_VALIDATION", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    run_validation: bool,
    /// The port that the check dials.
    #[arg(long, env = "IPTABLES_PROBE_PORT", default_value_t = 15002)]
    iptables_probe_port: u16,
    /// How long the check may take: 5s, 500ms.
    #[arg(long, env = "PROBE_TIMEOUT", default_value = "5s", value_parser = duration)]
    probe_timeout: Duration,
    /// The pod's network namespace; this process's own if empty.
    #[arg(long, env = "NETWORK_NAMESPACE", default_value = "")]
    network_namespace: String,

    // Over the one of every other command, whose short form is taken here.
    #[arg(long, hide = true)]
    output: Option<Output>,

    /// The name for the pod; by its network namespace if not given.
    #[arg(long, value_name = "NAME", env = "INTERCEPTOR_POD")]
    pod: Option<PodName>,
    /// The pod's cgroup; the one above this process's own if not given.
    #[arg(long, value_name = "PATH", env = "INTERCEPTOR_CGROUP")]
    cgroup: Option<PathBuf>,
}

/// Reads `5s`, `500ms` or `1m`, as Go writes durations.
fn duration(text: &str) -> Result<Duration, String> {
    let invalid = || format!("`{text}` is no duration: give 5s, 500ms or 1m");
    let (number, unit) = text
        .find(|c: char| !c.is_ascii_digit())
        .map(|at| text.split_at(at))
        .ok_or_else(invalid)?;
    let number: u64 = number.parse().map_err(|_| invalid())?;
    let milliseconds = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => None,
    };
    milliseconds.map(Duration::from_millis).ok_or_else(invalid)
}

pub(crate) fn run(args: &Args, pins: &Pins) -> ExitCode {
    match apply(args, pins) {
        Err(error) if error.is::<ValidationFailed>() => {
            super::exit_code(Err(error));
            ExitCode::from(VALIDATION_FAILED)
        }
        result => super::exit_code(result),
    }
}

/// The check failed.
#[derive(Debug)]
struct ValidationFailed(Error);

impl std::fmt::Display for ValidationFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("validation failed: the pod is not ready for the mesh")
    }
}

impl std::error::Error for ValidationFailed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

fn apply(args: &Args, pins: &Pins) -> anyhow::Result<()> {
    if args.output == Some(Output::Json) {
        bail!("--output json: this command prints what the mesh's own tool would: text");
    }
    let netns = match args.network_namespace.as_str() {
        "" => Netns::open("/proc/self/ns/net")?,
        path => Netns::open(path)?,
    };
    let settings = settings(args, &netns)?;
    let pod = match &args.pod {
        Some(pod) => pod.clone(),
        None => format!("netns-{}", netns.id().inode).parse()?,
    };
    if args.dry_run {
        return dry_run(args, &settings, &pod);
    }
    if args.cleanup_only || args.force_apply {
        match datapath::detach(pins, &pod) {
            Err(Error::NotAttached { .. }) => {}
            result => result?,
        }
    }
    if args.cleanup_only {
        return Ok(());
    }
    if !args.skip_rule_apply {
        let cgroup = match &args.cgroup {
            Some(path) => Cgroup::open(path)?,
            None => Cgroup::open(&own_pods_cgroup()?)?,
        };
        let in_container = args.network_namespace.is_empty() && !in_initial_pid_namespace();
        if in_container && cgroup.is_root() {
            bail!(
                "{} is the root cgroup: give the pod's own with --cgroup",
                cgroup.path().display()
            );
        }
        let request = Request {
            pod: &pod,
            cgroup: &cgroup,
            netns: &netns,
            settings: &settings,
            log_level: LogLevel::Off,
            // There, process 1 is the pod's own and says nothing of the machine.
            allow_host: in_container,
            note: None,
            pass_at_start: false,
        };
        match datapath::attach(pins, &request) {
            Err(Error::AttachedOtherwise {
                what: "settings", ..
            }) if args.reconcile => {
                datapath::set(pins, &pod, &settings)?;
                super::print(format!("changed {pod}"))?;
            }
            result => {
                result.with_context(|| format!("the pod {pod} is not attached"))?;
                super::print(format!("attached {pod}"))?;
            }
        }
    }
    if args.run_validation {
        validate(
            &settings,
            &netns,
            args.iptables_probe_port,
            args.probe_timeout,
        )
        .map_err(ValidationFailed)?;
        super::print("validated: the proxy is told where connections were going")?;
    }
    Ok(())
}

fn settings(args: &Args, netns: &Netns) -> anyhow::Result<Settings> {
    let ids = |name: &str, text: &str| -> anyhow::Result<Vec<u32>> {
        super::settings::id_list(text).map_err(|error| anyhow!("{name}: {error}"))
    };
    let variable = |name: &str| env::var(name).unwrap_or_default();
    let proxy_uid = match args.proxy_uid.as_str() {
        "" => envoy_user(&variable("ENVOY_USER")).to_string(),
        given => given.to_owned(),
    };
    let proxy_gid = match args.proxy_gid.as_str() {
        "" => proxy_uid.clone(),
        given => given.to_owned(),
    };
    refuse_virtual_interfaces(&args.kube_virt_interfaces)?;
    let is_set = |name: &str| variable(name) == "true";
    let redirect_dns = args
        .redirect_dns
        .unwrap_or_else(|| is_set("ISTIO_META_DNS_CAPTURE"));
    let dual_stack = args
        .dual_stack
        .unwrap_or_else(|| is_set("ISTIO_AGENT_DUAL_STACK"));
    let mut settings = Settings {
        outbound_port: args.envoy_port,
        inbound_port: args.inbound_capture_port,
        tunnel_port: Some(args.inbound_tunnel_port),
        proxy_uids: ids("--proxy-uid", &proxy_uid)?,
        proxy_gids: ids("--proxy-gid", &proxy_gid)?,
        mode: args.istio_inbound_interception_mode.parse()?,
        inbound_ports: args.istio_inbound_ports.parse()?,
        excluded_inbound_ports: port_list(&args.istio_local_exclude_ports)?,
        outbound_cidrs: args.istio_service_cidr.parse()?,
        excluded_outbound_cidrs: cidr_list(&args.istio_service_exclude_cidr)?,
        outbound_ports: port_list(&args.istio_outbound_ports)?,
        excluded_outbound_ports: port_list(&args.istio_local_outbound_ports_exclude)?,
        excluded_interfaces: items(&args.istio_exclude_interfaces)
            .map(str::to_owned)
            .collect(),
        owner_groups: settings::owner_groups(
            &variable("ISTIO_OUTBOUND_OWNER_GROUPS"),
            &variable("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE"),
        )?,
        dns: match (redirect_dns, args.capture_all_dns) {
            (false, _) => Dns::Off,
            (true, true) => Dns::All,
            (true, false) => {
                Dns::Servers(super::settings::resolv_conf().map_err(anyhow::Error::msg)?)
            }
        },
        ipv6: datapath::has_ipv6(netns, dual_stack)?,
        drop_invalid: args.drop_invalid.unwrap_or_else(|| is_set("INVALID_DROP")),
        tproxy_mark: args.istio_inbound_tproxy_mark,
        tproxy_table: args.istio_inbound_tproxy_route_table,
        ..Settings::tool()
    };
    let loopback = variable("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR");
    if !loopback.is_empty() {
        settings.loopback_cidr = loopback.parse().with_context(|| {
            format!("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: `{loopback}` is no IPv4 CIDR")
        })?;
    }
    settings.check()?;
    Ok(settings)
}

/// Whether process 1 is the machine's, by the inode that the initial PID namespace
/// always has (`PROC_PID_INIT_INO`).
fn in_initial_pid_namespace() -> bool {
    const INITIAL: u64 = 0xefff_fffc;
    fs::metadata("/proc/self/ns/pid").is_ok_and(|metadata| metadata.ino() == INITIAL)
}

/// The uid of the proxy's user, if there is one of this name.
fn envoy_user(name: &str) -> u32 {
    let name = if name.is_empty() { "istio-proxy" } else { name };
    match nix::unistd::User::from_name(name) {
        Ok(Some(user)) => user.uid.as_raw(),
        _ => 1337,
    }
}

/// The cgroup of this process's pod: the one above its container's.
fn own_pods_cgroup() -> anyhow::Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
    let own = text
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .context("this process is in no cgroup of version 2: give --cgroup")?;
    let mount = cgroup::mount_point().context("no cgroup v2 tree is mounted: give --cgroup")?;
    match Path::new(own).parent() {
        Some(above) if above != Path::new("/") => {
            Ok(mount.join(above.strip_prefix("/").unwrap_or(above)))
        }
        _ => bail!(
            "this process's cgroup is {own}, as in a cgroup namespace of its own, which hides the \
             pod's: mount the host's tree and give --cgroup"
        ),
    }
}

fn dry_run(args: &Args, settings: &Settings, pod: &PodName) -> anyhow::Result<()> {
    if args.cleanup_only {
        return super::print(format!("# would detach {pod}"));
    }
    super::print(format!("# would attach {pod} with these settings:"))?;
    for line in serde_json::to_string_pretty(settings)?.lines() {
        super::print(format!("#   {line}"))?;
    }
    for (family, tool) in [
        (Family::V4, "iptables-restore"),
        (Family::V6, "ip6tables-restore"),
    ] {
        super::print(format!("# the equivalent chains, for {tool}:"))?;
        let chains = settings.iptables_restore(family);
        if chains.is_empty() {
            super::print("# none")?;
        } else {
            super::print(chains.trim_end())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read() {
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        for text in ["", "5", "s", "5h", "-5s", "99999999999999999999s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
