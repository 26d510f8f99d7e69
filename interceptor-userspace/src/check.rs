//! Whether this machine can run Interceptor, and what stands in its way. Changes
//! nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use nix::{
    sys::resource::{RLIM_INFINITY, Resource, getrlimit},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use serde::Serialize;

use crate::{
    Error,
    datapath::{self, ForeignProgram, ProgramSize},
    error::in_one_line,
    pod::{
        cgroup::{self, Cgroup},
        netns::Netns,
    },
};

/// How one check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// All is well.
    Pass,
    /// It works, but not as one might expect.
    Warn,
    /// Attaching a pod will fail, or its traffic will not be intercepted.
    Fail,
}

/// One check.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it went.
    pub outcome: Outcome,
    /// What was found.
    pub found: String,
    /// What to do about it, unless it passed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// What a kernel program costs, where that was looked at.
    #[serde(flatten)]
    pub size: Option<ProgramSize>,
}

impl Check {
    fn pass(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            outcome: Outcome::Pass,
            found: found.into(),
            fix: None,
            size: None,
        }
    }

    fn not(
        outcome: Outcome,
        name: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            name: name.into(),
            outcome,
            found: found.into(),
            fix: Some(fix.into()),
            size: None,
        }
    }

    fn from_support(
        name: String,
        supported: Result<bool, String>,
        since: &str,
        otherwise: Outcome,
    ) -> Self {
        match supported {
            Ok(true) => Self::pass(name, "supported"),
            Ok(false) => Self::not(
                otherwise,
                name,
                "not supported by this kernel",
                format!("use Linux {since} or later"),
            ),
            Err(error) => Self::not(
                Outcome::Fail,
                name,
                format!("can't tell: {error}"),
                "run the check as root",
            ),
        }
    }
}

/// Checks the machine and, if given, what is in the way of one pod.
pub fn check(cgroup: Option<&Cgroup>, netns: Option<&Netns>) -> Vec<Check> {
    let mut checks = vec![capabilities(), cgroup_v2(), bpffs(), btf(), memlock()];
    checks.extend(programs());
    checks.extend(maps());
    checks.extend(helpers());
    checks.extend(object());
    checks.extend(neighbours(cgroup));
    if let Some(netns) = netns {
        checks.push(chains(netns));
    }
    checks
}

/// The capabilities that attaching needs, by their numbers (linux/capability.h).
/// `CAP_BPF` and `CAP_PERFMON` are parts of `CAP_SYS_ADMIN`.
const CAPABILITIES: [(&str, u32); 3] = [
    ("CAP_NET_ADMIN", 12),
    // To take listeners that are older than the attachment from their processes.
    ("CAP_SYS_PTRACE", 19),
    ("CAP_SYS_ADMIN", 21),
];

fn capabilities() -> Check {
    let name = "capabilities";
    let effective = procfs::process::Process::myself()
        .and_then(|process| process.status())
        .map_or(0, |status| status.capeff);
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(_, number)| effective & (1 << number) == 0)
        .map(|(name, _)| *name)
        .collect();
    if missing.is_empty() {
        Check::pass(name, CAPABILITIES.map(|(name, _)| name).join(", "))
    } else {
        Check::not(
            Outcome::Fail,
            name,
            format!("without {}", missing.join(", ")),
            "run as root, or give these capabilities",
        )
    }
}

fn cgroup_v2() -> Check {
    let name = "cgroup v2";
    match cgroup::mount_point() {
        Some(path) => Check::pass(name, format!("mounted at {}", path.display())),
        None => Check::not(
            Outcome::Fail,
            name,
            "not mounted",
            "mount it: mount -t cgroup2 none /sys/fs/cgroup (hybrid: /sys/fs/cgroup/unified)",
        ),
    }
}

fn bpffs() -> Check {
    let (name, path) = ("BPF file system", "/sys/fs/bpf");
    if statfs(path).is_ok_and(|info| info.filesystem_type() == BPF_FS_MAGIC) {
        Check::pass(name, format!("mounted at {path}"))
    } else {
        Check::not(
            Outcome::Warn,
            name,
            format!("not mounted at {path}"),
            format!("attach mounts it; to do it yourself: mount -t bpf bpf {path}"),
        )
    }
}

fn btf() -> Check {
    let name = "BTF";
    match datapath::check_kernel_types() {
        Ok(()) => Check::pass(name, "has every field of the kernel that the programs read"),
        Err(error) => Check::not(
            Outcome::Fail,
            name,
            in_one_line(&error),
            "use a kernel with CONFIG_DEBUG_INFO_BTF",
        ),
    }
}

fn memlock() -> Check {
    let name = "locked memory";
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((_, hard)) if hard == RLIM_INFINITY => Check::pass(name, "unlimited"),
        Ok((_, hard)) => Check::pass(
            name,
            format!(
                "{} KiB; it counts only on kernels before 5.11, where the programs' own check \
                 below fails if it is too little",
                hard / 1024
            ),
        ),
        Err(errno) => Check::not(Outcome::Warn, name, errno.to_string(), "see `ulimit -l`"),
    }
}

fn programs() -> impl Iterator<Item = Check> {
    [
        (ProgramType::CgroupSockAddr, "5.8"),
        (ProgramType::SockOps, "5.8"),
        (ProgramType::CgroupSockopt, "5.8"),
        (ProgramType::SkLookup, "5.9"),
    ]
    .into_iter()
    .map(|(kind, since)| {
        Check::from_support(
            format!("program type {kind:?}"),
            is_program_supported(kind).map_err(|error| in_one_line(&error)),
            since,
            Outcome::Fail,
        )
    })
}

fn maps() -> impl Iterator<Item = Check> {
    [
        (MapType::Array, "3.19"),
        (MapType::Hash, "3.19"),
        (MapType::PerCpuArray, "4.6"),
        (MapType::LpmTrie, "4.11"),
        (MapType::SockMap, "4.14"),
        (MapType::SkStorage, "5.2"),
        (MapType::RingBuf, "5.8"),
    ]
    .into_iter()
    .map(|(kind, since)| {
        Check::from_support(
            format!("map type {kind:?}"),
            is_map_supported(kind).map_err(|error| in_one_line(&error)),
            since,
            Outcome::Fail,
        )
    })
}

fn helpers() -> impl Iterator<Item = Check> {
    [
        (
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_bind,
            "4.17",
            Outcome::Fail,
        ),
        (
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_sk_storage_get,
            "5.8",
            Outcome::Fail,
        ),
        (
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_skc_to_tcp_sock,
            "5.9",
            Outcome::Fail,
        ),
        (
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_set_retval,
            "5.18",
            Outcome::Warn,
        ),
        (
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_probe_read_kernel,
            "5.8",
            Outcome::Fail,
        ),
        (
            ProgramType::SockOps,
            BpfHelper::BPF_FUNC_sk_storage_get,
            "5.8",
            Outcome::Fail,
        ),
        (
            ProgramType::SockOps,
            BpfHelper::BPF_FUNC_skc_to_tcp_sock,
            "5.9",
            Outcome::Fail,
        ),
        (
            ProgramType::SockOps,
            BpfHelper::BPF_FUNC_sock_map_update,
            "4.14",
            Outcome::Fail,
        ),
        (
            ProgramType::CgroupSockopt,
            BpfHelper::BPF_FUNC_sk_storage_get,
            "5.8",
            Outcome::Fail,
        ),
        (
            ProgramType::CgroupSockopt,
            BpfHelper::BPF_FUNC_probe_read_kernel,
            "5.8",
            Outcome::Fail,
        ),
        (
            ProgramType::SkLookup,
            BpfHelper::BPF_FUNC_sk_assign,
            "5.9",
            Outcome::Fail,
        ),
        (
            ProgramType::SkLookup,
            BpfHelper::BPF_FUNC_probe_read_kernel,
            "5.9",
            Outcome::Fail,
        ),
    ]
    .into_iter()
    .map(|(program, helper, since, otherwise)| {
        let mut check = Check::from_support(
            format!(
                "{} in {program:?}",
                format!("{helper:?}").replace("BPF_FUNC_", "bpf_")
            ),
            is_helper_supported(program, helper).map_err(|error| in_one_line(&error)),
            since,
            otherwise,
        );
        if helper == BpfHelper::BPF_FUNC_set_retval && check.outcome == Outcome::Warn {
            "not supported by this kernel: a connect() that is refused for want of memory fails \
             with EPERM, not ECONNREFUSED"
                .clone_into(&mut check.found);
        }
        check
    })
}

/// Loads the programs with their maps at full size, attaches nothing, and
/// lets them go.
fn object() -> Vec<Check> {
    let name = "kernel programs";
    match datapath::load_only() {
        Ok(sizes) => sizes
            .into_iter()
            .map(|size| Check {
                size: Some(size),
                ..Check::pass(
                    format!("program {}", size.program),
                    match size.verified_instructions {
                        Some(instructions) => format!(
                            "accepted: {instructions} instructions verified, {} bytes of machine \
                             code",
                            size.machine_code_bytes
                        ),
                        None => format!(
                            "accepted: {} bytes of machine code",
                            size.machine_code_bytes
                        ),
                    },
                )
            })
            .collect(),
        Err(error) => vec![Check::not(
            Outcome::Fail,
            name,
            in_one_line(&error)
                .lines()
                .next()
                .unwrap_or_default()
                .to_owned(),
            "if it is ENOMEM or EPERM on a kernel before 5.11: ulimit -l unlimited",
        )],
    }
}

/// Programs of others on the hooks that we use.
fn neighbours(pod: Option<&Cgroup>) -> Vec<Check> {
    let root = cgroup::mount_point().and_then(|path| Cgroup::open(&path).ok());
    let cgroups: Vec<Cgroup> = match pod {
        Some(pod) => pod.with_ancestors().collect(),
        None => root.into_iter().collect(),
    };
    let mut checks = Vec::new();
    for cgroup in &cgroups {
        for foreign in datapath::foreign_programs(cgroup) {
            checks.push(neighbour(cgroup.path(), &foreign));
        }
    }
    if checks.is_empty() {
        checks.push(Check::pass(
            "other programs",
            match pod {
                Some(pod) => format!(
                    "none on the hooks that Interceptor uses, from {} up to the root",
                    pod.path().display()
                ),
                None => "none on the root cgroup's hooks that Interceptor uses".to_owned(),
            },
        ));
    }
    checks
}

fn neighbour(cgroup: &Path, foreign: &ForeignProgram) -> Check {
    let name = format!("{} on {}", foreign.hook, cgroup.display());
    let found = format!(
        "program {} `{}`{}",
        foreign.id,
        foreign.name,
        owners(foreign.id)
    );
    if foreign.exclusive {
        Check::not(
            Outcome::Fail,
            name,
            format!("{found}, which admits no other below it"),
            "detach it, or have its owner attach it with BPF_F_ALLOW_MULTI",
        )
    } else if foreign.hook.starts_with("connect") {
        Check::not(
            Outcome::Warn,
            name,
            format!("{found}: perhaps a node-wide socket load balancer"),
            "it runs after Interceptor's and sees the proxy's address where a connection is \
             redirected; for direct ones nothing changes. If services stop resolving in pods, let it \
             skip 127.0.0.0/8",
        )
    } else {
        Check::pass(name, format!("{found}; both run"))
    }
}

/// Who holds a program: the processes with a descriptor of it, in words.
fn owners(id: u32) -> String {
    let wanted = format!("prog_id:\t{id}\n");
    let mut names: Vec<String> = procfs::process::all_processes()
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|process| {
            fs::read_dir(format!("/proc/{}/fdinfo", process.pid()))
                .into_iter()
                .flatten()
                .filter_map(Result::ok)
                .any(|entry| {
                    fs::read_to_string(entry.path()).is_ok_and(|info| info.contains(&wanted))
                })
        })
        .filter_map(|process| Some(format!("{} ({})", process.stat().ok()?.comm, process.pid())))
        .collect();
    names.sort();
    if names.is_empty() {
        " (held by no process)".to_owned()
    } else {
        format!(" of {}", names.join(", "))
    }
}

/// The mesh's own chains in the pod, which would redirect a second time.
fn chains(netns: &Netns) -> Check {
    let name = format!("iptables in {}", netns.given());
    let mut asked = Vec::new();
    for program in [
        "iptables-legacy-save",
        "iptables-nft-save",
        "ip6tables-legacy-save",
        "ip6tables-nft-save",
    ] {
        let Some(program) = find_program(program) else {
            continue;
        };
        let listing = netns.enter(|| {
            Command::new(&program)
                .output()
                .map_err(Error::system(format!("running {}", program.display())))
        });
        let Ok(listing) = listing else { continue };
        asked.push(program.display().to_string());
        let text = String::from_utf8_lossy(&listing.stdout);
        if let Some(line) = text.lines().find(|line| line.contains("ISTIO_")) {
            return Check::not(
                Outcome::Fail,
                name,
                format!("the mesh's chains are there: `{line}`"),
                "remove them (istio-iptables --cleanup-only, or restart the pod without its init \
                 container): connections would be redirected twice",
            );
        }
    }
    if asked.is_empty() {
        Check::not(
            Outcome::Warn,
            name,
            "no iptables-save on this machine to look with",
            "install iptables to have this looked at",
        )
    } else {
        Check::pass(name, "none of the mesh's chains")
    }
}

fn find_program(name: &str) -> Option<PathBuf> {
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn support_that_is_missing_names_the_kernel_that_has_it() {
        let check = Check::from_support("x".to_owned(), Ok(false), "5.9", Outcome::Fail);
        assert_eq!(check.outcome, Outcome::Fail);
        assert_eq!(check.fix.as_deref(), Some("use Linux 5.9 or later"));
        let check = Check::from_support("x".to_owned(), Ok(true), "5.9", Outcome::Fail);
        assert_eq!((check.outcome, check.fix), (Outcome::Pass, None));
    }
}
