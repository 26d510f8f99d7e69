//! A pod's annotations: the settings that the mesh's users write on pods.

use std::collections::BTreeMap;

use super::{
    Dns, PortRange, Profile, Settings, check_interfaces, items, port_list,
    refuse_virtual_interfaces,
};
use crate::{Error, Result};

/// The inbound ports that the CNI plugin never captures.
pub(super) const CNI_EXCLUDED_INBOUND: [u16; 3] = [15020, 15021, 15090];

/// The inbound ports that the injector never has captured.
const INJECTED_EXCLUDED_INBOUND: [u16; 2] = [15090, 15021];

const TRAFFIC: &str = "traffic.sidecar.istio.io/";
const MODE: &str = "sidecar.istio.io/interceptionMode";
const STATUS_PORT: &str = "status.sidecar.istio.io/port";
const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";

/// Whether an annotation is one that [`annotated`] reads.
pub(crate) fn is_read(key: &str) -> bool {
    key.starts_with(TRAFFIC) || [MODE, STATUS_PORT, VIRTUAL_INTERFACES].contains(&key)
}

/// Settings with those of a pod's annotations over them. Annotations of other
/// kinds are somebody else's; a misspelt one of ours is an error.
///
/// The port of the proxy's status server (`status.sidecar.istio.io/port`, 15020
/// unless it says otherwise; 0 for none) is never captured under the injector's
/// defaults, as its templates have it.
///
/// # Errors
///
/// If a value can't be.
pub fn annotated(
    profile: Profile,
    base: Settings,
    annotations: &BTreeMap<String, String>,
) -> Result<Settings> {
    let mut settings = base;
    let mut excluded_inbound: Option<Vec<PortRange>> = None;
    let mut status_port = None;
    for (key, value) in annotations {
        let in_value = |error: Error| Error::setting(key, value, error);
        if let Some(name) = key.strip_prefix(TRAFFIC) {
            match name {
                "includeInboundPorts" => {
                    settings.inbound_ports = value.parse().map_err(in_value)?;
                }
                "excludeInboundPorts" => {
                    excluded_inbound = Some(port_list(value).map_err(in_value)?);
                }
                "includeOutboundPorts" => {
                    settings.outbound_ports = port_list(value).map_err(in_value)?;
                }
                "excludeOutboundPorts" => {
                    settings.excluded_outbound_ports = port_list(value).map_err(in_value)?;
                }
                "includeOutboundIPRanges" => {
                    settings.outbound_cidrs = value.parse().map_err(in_value)?;
                }
                "excludeOutboundIPRanges" => {
                    settings.excluded_outbound_cidrs = super::cidr_list(value).map_err(in_value)?;
                }
                "excludeInterfaces" => {
                    let names: Vec<String> = items(value).map(str::to_owned).collect();
                    check_interfaces(&names).map_err(in_value)?;
                    settings.excluded_interfaces = names;
                }
                "kubevirtInterfaces" => refuse_virtual_interfaces(value)?,
                _ => {
                    return Err(Error::setting(
                        key,
                        value,
                        "is an annotation that nobody knows: look for a misspelling",
                    ));
                }
            }
        } else if key == MODE {
            settings.mode = value.parse().map_err(in_value)?;
        } else if key == STATUS_PORT {
            status_port = Some(value.parse::<u16>().map_err(|_| {
                Error::setting(key, value, "is no port: give a number from 0 to 65535")
            })?);
        } else if key == VIRTUAL_INTERFACES {
            refuse_virtual_interfaces(value)?;
        }
    }
    match profile {
        Profile::Cni => {
            let given = excluded_inbound.unwrap_or_default();
            settings.excluded_inbound_ports = with(given, &CNI_EXCLUDED_INBOUND);
            if settings.dns.is_on() {
                settings.dns = Dns::All;
            }
            for id in settings
                .proxy_uids
                .iter_mut()
                .chain(&mut settings.proxy_gids)
            {
                if *id == 0 {
                    *id = 1337;
                }
            }
        }
        Profile::Injected => {
            let given = excluded_inbound.unwrap_or_default();
            let status: Vec<u16> = match status_port.unwrap_or(15020) {
                0 => Vec::new(),
                port => vec![port],
            };
            let mut ports = with(Vec::new(), &INJECTED_EXCLUDED_INBOUND);
            ports.extend(given);
            settings.excluded_inbound_ports = with(ports, &status);
        }
        Profile::Default => {
            if let Some(given) = excluded_inbound {
                settings.excluded_inbound_ports = given;
            }
        }
    }
    settings.check()?;
    Ok(settings)
}

fn with(mut given: Vec<PortRange>, always: &[u16]) -> Vec<PortRange> {
    given.extend(always.iter().copied().map(PortRange::from));
    given
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::settings::{Cidrs, Mode, Ports};

    fn of(profile: Profile, pairs: &[(&str, &str)]) -> Result<Settings> {
        let annotations = pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        annotated(profile, Settings::of(profile), &annotations)
    }

    #[test]
    fn none_change_nothing() {
        for profile in [Profile::Default, Profile::Injected, Profile::Cni] {
            let settings = of(profile, &[("app.kubernetes.io/name", "web")]).unwrap();
            assert_eq!(settings, Settings::of(profile));
        }
    }

    #[test]
    fn all_are_read() {
        let settings = of(
            Profile::Cni,
            &[
                (
                    "traffic.sidecar.istio.io/includeInboundPorts",
                    "80,8000-8010",
                ),
                ("traffic.sidecar.istio.io/excludeInboundPorts", "81"),
                ("traffic.sidecar.istio.io/includeOutboundPorts", "9000"),
                ("traffic.sidecar.istio.io/excludeOutboundPorts", "25"),
                (
                    "traffic.sidecar.istio.io/includeOutboundIPRanges",
                    "10.0.0.0/8",
                ),
                (
                    "traffic.sidecar.istio.io/excludeOutboundIPRanges",
                    "10.1.0.0/16,fd00::/8",
                ),
                ("traffic.sidecar.istio.io/excludeInterfaces", "eth1,net+"),
                ("traffic.sidecar.istio.io/kubevirtInterfaces", ""),
                ("sidecar.istio.io/interceptionMode", "TPROXY"),
            ],
        )
        .unwrap();
        assert_eq!(
            settings.inbound_ports,
            "80,8000-8010".parse::<Ports>().unwrap()
        );
        assert_eq!(
            settings.excluded_inbound_ports,
            port_list("81,15020,15021,15090").unwrap()
        );
        assert_eq!(settings.outbound_ports, port_list("9000").unwrap());
        assert_eq!(settings.excluded_outbound_ports, port_list("25").unwrap());
        assert_eq!(
            settings.outbound_cidrs,
            "10.0.0.0/8".parse::<Cidrs>().unwrap()
        );
        assert_eq!(settings.excluded_outbound_cidrs.len(), 2);
        assert_eq!(settings.excluded_interfaces, ["eth1", "net+"]);
        assert_eq!(settings.mode, Mode::Tproxy);
    }

    #[test]
    fn the_status_port_is_left_alone() {
        let settings = of(Profile::Injected, &[(STATUS_PORT, "16020")]).unwrap();
        assert_eq!(
            settings.excluded_inbound_ports,
            port_list("15090,15021,16020").unwrap()
        );
    }

    #[test]
    fn what_can_not_be_is_refused() {
        for (key, value) in [
            ("traffic.sidecar.istio.io/excludeInboundPorts", "eighty"),
            (
                "traffic.sidecar.istio.io/includeOutboundIPRanges",
                "10.0.0.0/33",
            ),
            ("traffic.sidecar.istio.io/excludeInboundPort", "80"),
            ("traffic.sidecar.istio.io/kubevirtInterfaces", "net1"),
            ("istio.io/reroute-virtual-interfaces", "net1"),
            ("sidecar.istio.io/interceptionMode", "BOTH"),
            ("status.sidecar.istio.io/port", "x"),
        ] {
            let error = of(Profile::Default, &[(key, value)])
                .unwrap_err()
                .to_string();
            let named = error.contains(value);
            assert!(named, "{key}: {error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_they_say_is_read_or_refused_by_name(
            key in prop::sample::select(&[
                "traffic.sidecar.istio.io/includeInboundPorts",
                "traffic.sidecar.istio.io/excludeInboundPorts",
                "traffic.sidecar.istio.io/includeOutboundPorts",
                "traffic.sidecar.istio.io/excludeOutboundPorts",
                "traffic.sidecar.istio.io/includeOutboundIPRanges",
                "traffic.sidecar.istio.io/excludeOutboundIPRanges",
                "traffic.sidecar.istio.io/excludeInterfaces",
                "traffic.sidecar.istio.io/kubevirtInterfaces",
                "traffic.sidecar.istio.io/other",
                MODE, STATUS_PORT, VIRTUAL_INTERFACES,
            ][..]),
            value in prop_oneof![".{0,80}", "[0-9a-f:./,* -]{0,80}"],
        ) {
            if let Err(error) = of(Profile::Cni, &[(key, &value)]) {
                let error = error.to_string();
                prop_assert!(error.contains(&value), "{}: {}", key, error);
            }
        }
    }
}
