//! `cargo xtask setup`: installs what is missing, and says nothing if nothing is.

use std::{env, fs, path::Path};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};

use crate::process::{find, is_root};

mod apt;
mod envoy;
mod linker;
pub(crate) mod python;
pub(crate) mod toolchain;

/// What a command can need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// To build the kernel programs: the toolchain and the linker.
    Kernel,
    /// Clippy for the kernel programs.
    Clippy,
    /// `ip`, of iproute2.
    Ip,
    /// iptables and ip6tables, legacy and nft.
    Iptables,
    /// `bpftool`.
    Bpftool,
    /// HAProxy.
    Haproxy,
    /// Envoy.
    Envoy,
    /// wrk and sockperf, which load the real proxies of the benchmark.
    LoadGenerators,
    /// Virtual machines: QEMU, and what makes guests of packages.
    Qemu,
    /// Podman and what its pods need: a runtime, CNI plugins, an image's programs.
    Podman,
    /// Helm's engine and Kubernetes' schemas.
    Charts,
    /// `systemd-analyze`.
    Systemd,
    /// The file system for what the kernel keeps.
    Bpffs,
}

/// For the tests in pods.
pub(crate) const PODS: &[Need] = &[
    Need::Kernel,
    Need::Ip,
    Need::Iptables,
    Need::Bpftool,
    Need::Haproxy,
    Need::Envoy,
    Need::Bpffs,
];

/// For everything.
pub(crate) const ALL: &[Need] = &[
    Need::Kernel,
    Need::Clippy,
    Need::Ip,
    Need::Iptables,
    Need::Bpftool,
    Need::Haproxy,
    Need::Envoy,
    Need::LoadGenerators,
    Need::Qemu,
    Need::Podman,
    Need::Charts,
    Need::Systemd,
    Need::Bpffs,
];

/// Installs what is missing of these.
///
/// # Errors
///
/// If that isn't possible here; the error has all that is still missing, and
/// what to do about each.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let mut missing = Vec::new();
    for need in needs {
        if let Err(error) = need.ensure() {
            missing.push(format!("- {error:#}"));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!("this machine lacks:\n{}", missing.join("\n"))
}

impl Need {
    fn ensure(self) -> Result<()> {
        match self {
            Self::Kernel => {
                let compiler = toolchain::ensure()
                    .context("a Rust toolchain with the source of core, for the kernel programs")?;
                linker::ensure(compiler.llvm).context("bpf-linker, which links the kernel programs")
            }
            Self::Clippy => {
                toolchain::ensure_clippy().context("clippy for the kernel programs' toolchain")
            }
            Self::Ip => programs(&["ip"], "iproute2"),
            Self::Iptables => programs(
                &[
                    "iptables-legacy-restore",
                    "iptables-nft-restore",
                    "ip6tables-legacy-restore",
                    "ip6tables-nft-restore",
                ],
                "iptables",
            ),
            Self::Bpftool => programs(&["bpftool"], "bpftool"),
            Self::Haproxy if env::var_os("INTERCEPTOR_HAPROXY").is_some() => Ok(()),
            Self::Haproxy => programs(&["haproxy"], "haproxy"),
            Self::Envoy => envoy::ensure().context("Envoy"),
            Self::LoadGenerators => {
                programs(&["wrk"], "wrk")?;
                programs(&["sockperf"], "sockperf")
            }
            Self::Qemu => qemu(),
            Self::Podman => podman(),
            Self::Charts => python::ensure_charts()
                .context("Helm's engine and Kubernetes' schemas, to check the chart with"),
            Self::Systemd => programs(&["systemd-analyze"], "systemd"),
            Self::Bpffs => bpffs().context("a bpf file system at /sys/fs/bpf"),
        }
    }
}

fn qemu() -> Result<()> {
    if find("qemu-system-x86_64").is_none() {
        // The versions of their common files must agree.
        apt::install_with_sibling("qemu-system-x86", "qemu-utils")
            .context("`qemu-system-x86_64`")?;
    }
    programs(&["busybox"], "busybox-static")?;
    programs(&["setpriv"], "util-linux")?;
    programs(&["strip"], "binutils")?;
    programs(&["gzip"], "gzip")?;
    programs(&["lz4"], "lz4")?;
    programs(&["xz"], "xz-utils")?;
    programs(&["zstd"], "zstd")
}

fn podman() -> Result<()> {
    programs(&["podman"], "podman")?;
    programs(&["runc"], "runc")?;
    programs(&["busybox"], "busybox-static")?;
    let plugins = ["/usr/lib/cni/ptp", "/opt/cni/bin/ptp"];
    if plugins.iter().any(|path| Path::new(path).is_file()) {
        return Ok(());
    }
    apt::install(&["containernetworking-plugins"]).context("the CNI plugin `ptp`")
}

/// Installs Debian's package if not all of its programs are there.
fn programs(names: &[&str], package: &str) -> Result<()> {
    let missing = || names.iter().copied().find(|name| find(name).is_none());
    let Some(name) = missing() else {
        return Ok(());
    };
    apt::install(&[package]).with_context(|| format!("`{name}`"))?;
    match missing() {
        None => Ok(()),
        Some(name) => bail!("`{name}`: the package {package} doesn't have it"),
    }
}

fn bpffs() -> Result<()> {
    const PATH: &str = "/sys/fs/bpf";
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    if is_mounted(&mounts, PATH, "bpf") {
        return Ok(());
    }
    if !is_root() {
        bail!("run: sudo mount -t bpf bpf {PATH}");
    }
    eprintln!("setup: mounting {PATH}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("bpf"),
        Path::new(PATH),
        Some("bpf"),
        flags,
        Some("mode=700"),
    )
    .with_context(|| format!("mount {PATH}"))
}

/// Whether a file system of the kind is what one sees at the path.
fn is_mounted(mounts: &str, path: &str, kind: &str) -> bool {
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            (fields.next()? == path).then(|| fields.next())?
        })
        .next_back()
        == Some(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_mount_is_what_one_sees() {
        let mounts = "sysfs /sys sysfs rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n";
        assert!(is_mounted(mounts, "/sys/fs/bpf", "bpf"));
        assert!(!is_mounted(mounts, "/sys/fs", "bpf"));
        let hidden = format!("{mounts}tmpfs /sys/fs/bpf tmpfs rw 0 0\n");
        assert!(!is_mounted(&hidden, "/sys/fs/bpf", "bpf"));
    }

    #[test]
    fn everything_is_more_than_what_the_pods_need() {
        assert!(PODS.iter().all(|need| ALL.contains(need)));
    }
}
