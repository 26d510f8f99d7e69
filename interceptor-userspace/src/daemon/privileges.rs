//! What the daemon may do: it gives up all else before it starts to listen.
//!
//! Landlock isn't used: a process under it may look at no process that isn't under
//! it too (the kernel's `hook_ptrace_access_check`), and the daemon has to find the
//! network namespaces and listeners of pods' processes.

use std::collections::{BTreeMap, HashSet};

use caps::{CapSet, Capability};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use tracing::warn;

use crate::{Error, Result};

/// The capabilities that the daemon keeps, and what for. docs/OPERATIONS.md has the
/// same list. `CAP_BPF` and `CAP_PERFMON` are parts of `CAP_SYS_ADMIN`, without which
/// no network namespace can be entered.
pub const CAPABILITIES: [(Capability, &str); 5] = [
    (
        Capability::CAP_SYS_ADMIN,
        "load programs and enter pods' network namespaces",
    ),
    (
        Capability::CAP_NET_ADMIN,
        "add ::6 to pods' lo, and number their network namespaces",
    ),
    (
        Capability::CAP_NET_BROADCAST,
        "hear of changes in pods' network namespaces",
    ),
    (
        Capability::CAP_SYS_PTRACE,
        "find network namespaces by processes, and take listeners from them",
    ),
    (
        Capability::CAP_DAC_READ_SEARCH,
        "look at the descriptors of other users' processes",
    ),
];

/// Gives up every capability but [`CAPABILITIES`], and every system call that the
/// daemon has no use for. For this thread and those that it starts: to be called
/// before there are others.
///
/// # Errors
///
/// If a capability is missing that the daemon needs.
pub(crate) fn reduce() -> Result<()> {
    let failed =
        |error: &dyn ToString| Error::system("giving up capabilities")(io_error(error.to_string()));
    let has = caps::read(None, CapSet::Permitted).map_err(|error| failed(&error))?;
    let needed: HashSet<Capability> = CAPABILITIES.iter().map(|(needed, _)| *needed).collect();
    if let Some((missing, what_for)) = CAPABILITIES
        .iter()
        .find(|(needed, _)| !has.contains(needed))
    {
        return Err(Error::setting(
            "capabilities",
            missing,
            format!(
                "is missing, which the daemon needs to {what_for}: run it as root, or with all that docs/OPERATIONS.md lists"
            ),
        ));
    }
    for set in [CapSet::Ambient, CapSet::Inheritable] {
        caps::clear(None, set).map_err(|error| failed(&error))?;
    }
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &needed).map_err(|error| failed(&error))?;
    }
    if let Err(error) = forbid() {
        warn!(error, "without seccomp");
    }
    Ok(())
}

fn io_error(text: String) -> std::io::Error {
    std::io::Error::other(text)
}

/// System calls that the daemon never makes, and that one who got hold of it would
/// want: they fail with `EPERM`. No list of those that it does make, because the
/// C library and the kernel add to them.
const FORBIDDEN: [libc::c_long; 43] = [
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_chroot,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

fn forbid() -> Result<(), String> {
    let rules: BTreeMap<i64, _> = FORBIDDEN.iter().map(|call| (*call, Vec::new())).collect();
    let architecture = std::env::consts::ARCH
        .try_into()
        .map_err(|error: seccompiler::BackendError| error.to_string())?;
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, architecture)
        .map_err(|error| error.to_string())?;
    let program: BpfProgram = filter
        .try_into()
        .map_err(|error: seccompiler::BackendError| error.to_string())?;
    // Sets no_new_privs, too.
    seccompiler::apply_filter(&program).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_deployed_grants_exactly_these() {
        let mut names: Vec<String> = CAPABILITIES
            .iter()
            .map(|(capability, _)| capability.to_string())
            .collect();
        names.sort();
        let unit = include_str!("../../../deploy/systemd/interceptor.service");
        let line = format!("\nCapabilityBoundingSet={}\n", names.join(" "));
        assert!(unit.contains(&line), "the unit lacks {line}");
        // Kubernetes names them without the prefix.
        let names = names.join(", ").replace("CAP_", "");
        let manifests = include_str!("../../../deploy/kubernetes.yaml");
        assert!(
            manifests.contains(&format!("add: [{names}]\n")),
            "the manifests don't add {names}"
        );
    }
}
