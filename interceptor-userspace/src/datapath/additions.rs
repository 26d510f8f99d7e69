//! What attaching adds to the pod's network namespace, as the mesh's own tool does,
//! and takes back when the pod is detached; never what was there before.

use std::{fs, io, net::Ipv6Addr, path::PathBuf};

use interceptor_common::pod::added;

use super::routes::{self, Tproxy};
use crate::{
    Error, Result,
    pod::netns::Netns,
    settings::{Family, Settings},
};

/// The rules of TPROXY, by family.
const RULES: [(u32, Family); 2] = [(added::RULE_V4, Family::V4), (added::RULE_V6, Family::V6)];
/// The routes of TPROXY, by family.
const ROUTES: [(u32, Family); 2] = [(added::ROUTE_V4, Family::V4), (added::ROUTE_V6, Family::V6)];

/// What TPROXY needs of the kernel's settings, below `/proc/sys/net`: that answers
/// to what the proxy sends from its client's address have its mark, too, and find
/// the route back. The mesh's chains do that with conntrack.
///
/// `tcp_fwmark_accept` is for what a listener and the sockets that it accepts send
/// (Linux 3.16); `fwmark_reflect` for resets, which have no socket (Linux 3.16).
const SYSCTLS: [(u32, &str); 3] = [
    (added::TCP_FWMARK_ACCEPT, "ipv4/tcp_fwmark_accept"),
    (added::FWMARK_REFLECT_V4, "ipv4/fwmark_reflect"),
    (added::FWMARK_REFLECT_V6, "ipv6/fwmark_reflect"),
];

/// All that is there for TPROXY only.
const FOR_TPROXY: u32 = !(added::PASSTHROUGH_V6 | added::PROXY_ROUTE_V6);

/// What of all that these settings need is missing: bits of [`added`].
pub(crate) fn missing(netns: &Netns, settings: &Settings) -> Result<u32> {
    let mut bits = 0;
    // Also where IPv6 has no chains yet: they may come with a change.
    if !routes::has_passthrough(netns, passthrough_v6())? {
        bits |= added::PASSTHROUGH_V6;
    }
    if !routes::has_others_proxy_route(netns)? {
        bits |= added::PROXY_ROUTE_V6;
    }
    Ok(bits | missing_for_tproxy(netns, settings)?)
}

/// The same, of what TPROXY needs.
pub(crate) fn missing_for_tproxy(netns: &Netns, settings: &Settings) -> Result<u32> {
    let mut bits = 0;
    let Some(tproxy) = Tproxy::of(settings) else {
        return Ok(bits);
    };
    for ((rule, family), (route, _)) in RULES.into_iter().zip(ROUTES) {
        let (has_rule, has_route) = routes::has_tproxy(netns, tproxy, family)?;
        if !has_rule {
            bits |= rule;
        }
        if !has_route {
            bits |= route;
        }
    }
    for (bit, name) in SYSCTLS {
        if read_sysctl(netns, name)?.is_some_and(|value| value.trim() == "0") {
            bits |= bit;
        }
    }
    Ok(bits)
}

/// What was added, and is removed again unless it is kept.
pub(crate) struct Additions<'a> {
    netns: &'a Netns,
    settings: &'a Settings,
    bits: u32,
}

impl<'a> Additions<'a> {
    /// Adds what is [`missing`].
    pub(crate) fn add(netns: &'a Netns, settings: &'a Settings, missing: u32) -> Result<Self> {
        // What an error leaves half done is taken back.
        let mut done = Self {
            netns,
            settings,
            bits: 0,
        };
        let mut add = |bit, work: &dyn Fn() -> Result<bool>| -> Result<()> {
            if missing & bit != 0 && work()? {
                done.bits |= bit;
            }
            Ok(())
        };
        add(added::PASSTHROUGH_V6, &|| {
            routes::add_passthrough(netns, passthrough_v6())
        })?;
        add(added::PROXY_ROUTE_V6, &|| routes::add_proxy_route(netns))?;
        if let Some(tproxy) = Tproxy::of(settings) {
            for (bit, family) in ROUTES {
                add(bit, &|| routes::add_route(netns, tproxy, family))?;
            }
            for (bit, family) in RULES {
                add(bit, &|| routes::add_rule(netns, tproxy, family))?;
            }
        }
        for (bit, name) in SYSCTLS {
            add(bit, &|| write_sysctl(netns, name, "1").map(|()| true))?;
        }
        Ok(done)
    }

    /// Bits of [`added`].
    pub(crate) const fn bits(&self) -> u32 {
        self.bits
    }

    pub(crate) fn keep(mut self) {
        self.bits = 0;
    }
}

impl Drop for Additions<'_> {
    fn drop(&mut self) {
        // The error that brought us here is the one to report.
        let _: Result<()> = remove(self.netns, self.settings, self.bits);
    }
}

/// Removes what was added for these settings: bits of [`added`]. The route of the
/// proxy's IPv6 addresses stays while connections need it; attaching the pod once more
/// makes it ours again.
pub(crate) fn remove(netns: &Netns, settings: &Settings, bits: u32) -> Result<()> {
    if bits & added::PASSTHROUGH_V6 != 0 {
        routes::remove_passthrough(netns, passthrough_v6())?;
    }
    if bits & added::PROXY_ROUTE_V6 != 0 {
        routes::remove_proxy_route(netns)?;
    }
    for (bit, name) in SYSCTLS {
        if bits & bit != 0 {
            write_sysctl(netns, name, "0")?;
        }
    }
    if let Some(tproxy) = Tproxy::of(settings) {
        for (bit, family) in RULES {
            if bits & bit != 0 {
                routes::remove_rule(netns, tproxy, family)?;
            }
        }
        for (bit, family) in ROUTES {
            if bits & bit != 0 {
                routes::remove_route(netns, tproxy, family)?;
            }
        }
    }
    Ok(())
}

/// What of `bits` the settings no longer need.
pub(crate) fn needless(settings: &Settings, bits: u32) -> u32 {
    if Tproxy::of(settings).is_some() {
        0
    } else {
        bits & FOR_TPROXY
    }
}

fn passthrough_v6() -> Ipv6Addr {
    match Family::V6.passthrough() {
        std::net::IpAddr::V6(address) => address,
        std::net::IpAddr::V4(_) => unreachable!("of the family"),
    }
}

fn sysctl(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(name)
}

/// The value of a setting of the namespace's; `None` if the kernel has none such.
fn read_sysctl(netns: &Netns, name: &str) -> Result<Option<String>> {
    let path = sysctl(name);
    netns.enter(|| match fs::read_to_string(&path) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::system(format!("reading {}", path.display()))(error)),
    })
}

fn write_sysctl(netns: &Netns, name: &str, value: &str) -> Result<()> {
    let path = sysctl(name);
    netns.enter(|| {
        fs::write(&path, value).map_err(Error::system(format!(
            "writing {value} to {}",
            path.display()
        )))
    })
}
