//! iptables-save text as settings.
//!
//! The settings are read off the rules, then written as chains again: only if
//! these are the chains that were given, rule by rule, are the settings equal.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use ipnet::{IpNet, Ipv4Net};

use super::{Cidrs, Dns, Family, Mode, OwnerGroups, PortRange, Ports, Settings};

/// Why text has no equal settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoEqual {
    /// The number of the line, from 1; 0 if no line is to blame.
    pub line: usize,
    /// The line.
    pub text: String,
    /// What is wrong with it.
    pub why: String,
}

impl fmt::Display for NoEqual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            return f.write_str(&self.why);
        }
        write!(f, "line {}: {}: {}", self.line, self.text, self.why)
    }
}

impl std::error::Error for NoEqual {}

/// The kernel's own chains.
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// The longest text that is read, in bytes.
const LONGEST: usize = 1 << 20;

/// The settings that are equal to the chains in iptables-save and ip6tables-save
/// text, which may stand one after the other. IPv6 is not captured if there is
/// none of it.
///
/// # Errors
///
/// If there are none: names the first rule that has no equal, and why.
pub fn import(text: &str) -> Result<Settings, NoEqual> {
    if text.len() > LONGEST {
        return Err(blame_nothing(format!(
            "{} bytes are more than any pod's chains: give at most {LONGEST}",
            text.len()
        )));
    }
    let rulesets = parse(text)?;
    let mut read: Vec<(Family, Settings, &Rules)> = Vec::new();
    for rules in &rulesets {
        let family = rules.family();
        if read.iter().any(|(other, ..)| *other == family) {
            return Err(blame_nothing(format!("two texts of {family}")));
        }
        read.push((family, extract(rules, family)?, rules));
    }
    read.sort_by_key(|(family, ..)| *family == Family::V6);
    let Some((first, ..)) = read.first() else {
        return Err(blame_nothing("no tables: give what iptables-save prints"));
    };
    if *first == Family::V6 {
        return Err(blame_nothing("only IPv6: give the iptables-save text, too"));
    }
    let settings = merge(&read)?;
    settings
        .check()
        .map_err(|error| blame_nothing(error.to_string()))?;
    for (family, _, rules) in &read {
        compare(rules, &settings, *family)?;
    }
    Ok(settings)
}

fn blame_nothing(why: impl Into<String>) -> NoEqual {
    NoEqual {
        line: 0,
        text: String::new(),
        why: why.into(),
    }
}

/// A rule in a form in which equal rules are equal.
#[derive(Clone, Debug)]
struct Rule {
    line: usize,
    text: String,
    /// Sorted: `! -d 127.0.0.1/32`, `--dport 53`.
    conditions: Vec<String>,
    /// With its options, sorted.
    target: String,
}

impl Rule {
    fn blame(&self, why: impl Into<String>) -> NoEqual {
        NoEqual {
            line: self.line,
            text: self.text.clone(),
            why: why.into(),
        }
    }

    /// The value of a condition, if the rule has it once and not inverted.
    fn value(&self, option: &str) -> Option<&str> {
        self.conditions
            .iter()
            .find_map(|condition| condition.strip_prefix(option)?.strip_prefix(' '))
    }

    fn same(&self, other: &Self) -> bool {
        self.conditions == other.conditions && self.target == other.target
    }
}

/// The chains of one family, by table and name.
#[derive(Clone, Debug, Default)]
struct Rules(BTreeMap<(String, String), Vec<Rule>>);

impl Rules {
    fn chain(&self, table: &str, chain: &str) -> &[Rule] {
        self.0
            .get(&(table.to_owned(), chain.to_owned()))
            .map_or(&[], Vec::as_slice)
    }

    /// Whether packets come to the chain: it is the kernel's own, or a rule of one
    /// that they come to leads there.
    fn is_reached(&self, table: &str, chain: &str) -> bool {
        let mut reached: Vec<&str> = BUILT_IN.to_vec();
        let mut next = 0;
        while let Some(from) = reached.get(next).copied() {
            next += 1;
            for rule in self.chain(table, from) {
                let known = self
                    .0
                    .contains_key(&(table.to_owned(), rule.target.clone()));
                if known && !reached.contains(&rule.target.as_str()) {
                    reached.push(&rule.target);
                }
            }
        }
        reached.contains(&chain)
    }

    fn family(&self) -> Family {
        let is_v6 = |condition: &String| {
            ["-s ", "-d "].iter().any(|option| {
                condition
                    .trim_start_matches("! ")
                    .strip_prefix(option)
                    .is_some_and(|address| address.contains(':'))
            })
        };
        let v6 = self
            .0
            .values()
            .flatten()
            .any(|rule| rule.conditions.iter().any(is_v6));
        if v6 { Family::V6 } else { Family::V4 }
    }
}

/// Reads the text: a further table of a name begins the other family's.
fn parse(text: &str) -> Result<Vec<Rules>, NoEqual> {
    let mut rulesets = vec![(Rules::default(), Vec::<String>::new())];
    let mut table: Option<String> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let blame = |why: &str| NoEqual {
            line: number,
            text: line.chars().take(200).collect(),
            why: why.to_owned(),
        };
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('*') {
            if table.is_some() {
                return Err(blame("a table in a table"));
            }
            let name = name.trim().to_owned();
            if rulesets
                .last()
                .is_some_and(|(_, seen)| seen.contains(&name))
            {
                rulesets.push(Default::default());
            }
            if let Some((_, seen)) = rulesets.last_mut() {
                seen.push(name.clone());
            }
            table = Some(name);
            continue;
        }
        let Some(name) = &table else {
            return Err(blame("not in a table"));
        };
        if line == "COMMIT" {
            table = None;
            continue;
        }
        if let Some(declaration) = line.strip_prefix(':') {
            let mut words = declaration.split_whitespace();
            let (_chain, policy) = (words.next(), words.next());
            if !matches!(policy, Some("ACCEPT" | "-")) {
                return Err(blame("a policy other than ACCEPT"));
            }
            continue;
        }
        // Counters may stand before a rule.
        let rule = match line.strip_prefix('[') {
            Some(rest) => rest.split_once(']').map_or(rest, |(_, rule)| rule.trim()),
            None => line,
        };
        let Some(rule) = rule.strip_prefix("-A ") else {
            return Err(blame("neither a chain nor a rule"));
        };
        let words = words(rule).ok_or_else(|| blame("a quotation without its end"))?;
        let Some((chain, words)) = words.split_first() else {
            return Err(blame("no chain"));
        };
        let (conditions, target) = read_rule(words).map_err(|why| blame(&why))?;
        let rule = Rule {
            line: number,
            text: line.chars().take(200).collect(),
            conditions,
            target,
        };
        if let Some((rules, _)) = rulesets.last_mut() {
            rules
                .0
                .entry((name.clone(), chain.clone()))
                .or_default()
                .push(rule);
        }
    }
    if table.is_some() {
        return Err(blame_nothing("the text ends before COMMIT"));
    }
    Ok(rulesets
        .into_iter()
        .map(|(rules, _)| rules)
        .filter(|rules| !rules.0.is_empty())
        .collect())
}

/// Splits at spaces, but not in quotations.
fn words(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    let mut escaped = false;
    for c in line.chars() {
        match c {
            _ if escaped => {
                word.push(c);
                escaped = false;
            }
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    (!quoted).then_some(words)
}

/// A rule's conditions and its target.
fn read_rule(words: &[String]) -> Result<(Vec<String>, String), String> {
    let mut conditions = Vec::new();
    let mut words = words.iter().map(String::as_str).peekable();
    loop {
        let mut option = words.next().ok_or("no target")?;
        let inverted = option == "!";
        if inverted {
            option = words.next().ok_or("nothing after !")?;
        }
        if option == "-j" && !inverted {
            break;
        }
        let option = long_option(option)?;
        let value = words.next().ok_or("an option without its value")?;
        if option == "-m" || option == "--comment" {
            // Which match an option is of follows from its name.
            continue;
        }
        let value = normal_value(option, value);
        let condition = format!("{option} {value}");
        conditions.push(if inverted {
            format!("! {condition}")
        } else {
            condition
        });
    }
    conditions.sort();
    let name = words.next().ok_or("nothing after -j")?;
    let mut options = Vec::new();
    while let Some(option) = words.next() {
        let mut option = long_option(option)?.to_owned();
        let value = words.next_if(|word| !word.starts_with("--"));
        let value = value.map(|value| normal_value(&option, value));
        match (option.as_str(), value.as_deref()) {
            // What they are anyway.
            ("--on-ip", Some("0.0.0.0" | "::")) | ("--nfmask" | "--ctmask", Some("0xffffffff")) => {
                continue;
            }
            ("--to-port", _) => option = "--to-ports".to_owned(),
            ("--set-mark", _) => option = "--set-xmark".to_owned(),
            _ => {}
        }
        options.push(match value {
            Some(value) => format!("{option} {value}"),
            None => option,
        });
    }
    options.sort();
    options.insert(0, name.to_owned());
    Ok((conditions, options.join(" ")))
}

/// The name under which an option is compared.
fn long_option(option: &str) -> Result<&str, String> {
    Ok(match option {
        "--source" | "--src" => "-s",
        "--destination" | "--dst" => "-d",
        "--protocol" => "-p",
        "--in-interface" => "-i",
        "--out-interface" => "-o",
        "--match" => "-m",
        option if option.starts_with('-') => option,
        other => return Err(format!("{other} where an option is expected")),
    })
}

/// A value in a form in which equal values are equal.
fn normal_value(option: &str, value: &str) -> String {
    let number = |text: &str| -> Option<u32> {
        match text.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        }
    };
    match option {
        "-s" | "-d" => match cidr(value) {
            Some(cidr) => cidr.trunc().to_string(),
            None => value.to_owned(),
        },
        "--mark" | "--set-mark" | "--set-xmark" | "--tproxy-mark" | "--nfmask" | "--ctmask" => {
            let (value, mask) = value.split_once('/').unwrap_or((value, "0xffffffff"));
            match (number(value), number(mask)) {
                (Some(value), Some(u32::MAX)) => format!("{value:#x}"),
                (Some(value), Some(mask)) => format!("{value:#x}/{mask:#x}"),
                _ => value.to_owned(),
            }
        }
        _ => value.to_owned(),
    }
}

fn cidr(text: &str) -> Option<IpNet> {
    text.parse()
        .ok()
        .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// Reads the settings off the rules. Whether the rules are theirs shows later.
fn extract(rules: &Rules, family: Family) -> Result<Settings, NoEqual> {
    let mut settings = Settings {
        tunnel_port: None,
        proxy_uids: Vec::new(),
        proxy_gids: Vec::new(),
        ..Settings::tool()
    };
    let redirect = |chain: &str| -> Result<Option<u16>, NoEqual> {
        rules
            .chain("nat", chain)
            .first()
            .map(|rule| {
                rule.target
                    .strip_prefix("REDIRECT --to-ports ")
                    .and_then(|port| port.parse().ok())
                    .ok_or_else(|| rule.blame("not a REDIRECT to a port"))
            })
            .transpose()
    };
    if let Some(port) = redirect("ISTIO_REDIRECT")? {
        settings.outbound_port = port;
    }
    if let Some(port) = redirect("ISTIO_IN_REDIRECT")? {
        settings.inbound_port = port;
    }
    for rule in rules.chain("nat", "PREROUTING") {
        if let Some(name) = rule.value("-i") {
            if rule.target != "RETURN" {
                return Err(rule
                    .blame("captures the traffic of a virtual interface, which is not supported"));
            }
            settings.excluded_interfaces.push(name.to_owned());
        }
    }
    if !rules.chain("mangle", "ISTIO_TPROXY").is_empty() {
        settings.mode = Mode::Tproxy;
        for rule in rules.chain("mangle", "ISTIO_DIVERT") {
            if let Some(mark) = rule.target.strip_prefix("MARK --set-xmark 0x")
                && let Ok(mark) = u32::from_str_radix(mark, 16)
            {
                settings.tproxy_mark = mark;
            }
        }
    }
    settings.drop_invalid = !rules.chain("mangle", "ISTIO_DROP").is_empty();
    extract_inbound(rules, &mut settings)?;
    extract_output(rules, family, &mut settings)?;
    Ok(settings)
}

fn extract_inbound(rules: &Rules, settings: &mut Settings) -> Result<(), NoEqual> {
    let (table, target) = match settings.mode {
        Mode::Tproxy => ("mangle", "ISTIO_TPROXY"),
        Mode::Redirect | Mode::None => ("nat", "ISTIO_IN_REDIRECT"),
    };
    let mut captured = Vec::new();
    if !rules.is_reached(table, "ISTIO_INBOUND") {
        return Ok(());
    }
    for (index, rule) in rules.chain(table, "ISTIO_INBOUND").iter().enumerate() {
        let port = rule.value("--dport").map(|port| parsed(rule, port));
        match (rule.target.as_str(), port.transpose()?) {
            ("RETURN", Some(port)) => {
                let tunnel = PortRange::from(15008);
                if table == "nat" && index == 0 && port == tunnel {
                    settings.tunnel_port = Some(15008);
                } else {
                    settings.excluded_inbound_ports.push(port);
                }
            }
            (name, Some(port)) if name == target => captured.push(port),
            (name, None) if name == target => settings.inbound_ports = Ports::All,
            // Its place shows later whether it is as it should be.
            _ => {}
        }
    }
    if settings.inbound_ports != Ports::All {
        settings.inbound_ports = Ports::List(captured);
    }
    Ok(())
}

fn parsed<T: std::str::FromStr>(rule: &Rule, text: &str) -> Result<T, NoEqual> {
    text.parse()
        .map_err(|_| rule.blame(format!("{text} can't be read")))
}

fn extract_output(rules: &Rules, family: Family, settings: &mut Settings) -> Result<(), NoEqual> {
    let mut cidrs = Vec::new();
    let mut except = Vec::new();
    let all = rules.chain("nat", "ISTIO_OUTPUT");
    // Excluded groups come after the proxy's, whose rules look the same.
    let mut owners_are_over = all
        .iter()
        .all(|rule| rule.value("-o").is_none_or(|_| rule.value("-s").is_some()));
    let last_over_lo = all
        .iter()
        .rposition(|rule| rule.value("-o") == Some("lo") && rule.value("-s").is_none());
    let mut localhost_seen = false;
    for (index, rule) in all.iter().enumerate() {
        let is_return = rule.target == "RETURN";
        let owner = |option: &str| rule.value(option);
        if last_over_lo.is_none_or(|last| index > last + 1) {
            owners_are_over = true;
        }
        match rule.target.as_str() {
            "RETURN" if rule.value("-p") == Some("tcp") && rule.value("-o").is_none() => {
                if let Some(port) = rule.value("--dport") {
                    settings.excluded_outbound_ports.push(parsed(rule, port)?);
                }
            }
            "ISTIO_IN_REDIRECT" => {
                if let Some(localhost) = rule.value("! -d").and_then(cidr)
                    && let IpNet::V4(localhost) = localhost
                {
                    settings.loopback_cidr = localhost;
                }
                if let Some(port) = rule.value("! --dport") {
                    match parsed::<u16>(rule, port)? {
                        53 => {}
                        port => settings.tunnel_port = Some(port),
                    }
                }
                if let Some(ports) = rule.value("! --dports") {
                    let port = ports.strip_prefix("53,").unwrap_or(ports);
                    settings.tunnel_port = Some(parsed(rule, port)?);
                }
                if let Some(uid) = owner("--uid-owner") {
                    settings.proxy_uids.push(parsed(rule, uid)?);
                }
                if let Some(gid) = owner("--gid-owner") {
                    settings.proxy_gids.push(parsed(rule, gid)?);
                }
            }
            "ISTIO_OUTPUT_DNS" => settings.dns = extract_dns(rules, settings)?,
            "ISTIO_REDIRECT" => match (rule.value("--dport"), rule.value("-d")) {
                (Some(port), _) => settings.outbound_ports.push(parsed(rule, port)?),
                (None, Some(to)) => {
                    cidrs.push(cidr(to).ok_or_else(|| rule.blame(format!("{to} is no CIDR")))?);
                }
                (None, None) => settings.outbound_cidrs = Cidrs::All,
            },
            _ if is_return && rule.value("-d").is_some() => {
                let to = rule.value("-d").and_then(cidr);
                if !localhost_seen {
                    localhost_seen = true;
                    if let (Some(IpNet::V4(localhost)), true) = (to, family == Family::V4) {
                        settings.loopback_cidr = localhost;
                    }
                } else if let Some(to) = to {
                    settings.excluded_outbound_cidrs.push(to);
                }
            }
            _ if is_return && localhost_seen && rule.conditions.is_empty() => {
                // iptables-save leaves out what everything meets.
                settings
                    .excluded_outbound_cidrs
                    .push(family_default(family));
            }
            _ if is_return
                && rule
                    .conditions
                    .iter()
                    .all(|c| c.starts_with("! --gid-owner ")) =>
            {
                let groups = rule
                    .conditions
                    .iter()
                    .filter_map(|condition| condition.strip_prefix("! --gid-owner "))
                    .map(|gid| parsed(rule, gid))
                    .collect::<Result<Vec<u32>, _>>()?;
                if !groups.is_empty() {
                    settings.owner_groups = OwnerGroups::Only(groups);
                }
            }
            _ if is_return && owners_are_over && rule.value("-o").is_none() => {
                if let Some(gid) = owner("--gid-owner") {
                    except.push(parsed(rule, gid)?);
                }
            }
            _ => {}
        }
    }
    if !except.is_empty() {
        settings.owner_groups = OwnerGroups::Except(except);
    }
    if settings.outbound_cidrs != Cidrs::All {
        settings.outbound_cidrs = Cidrs::List(cidrs);
    }
    Ok(())
}

fn family_default(family: Family) -> IpNet {
    match family {
        Family::V4 => Ipv4Net::default().into(),
        Family::V6 => ipnet::Ipv6Net::default().into(),
    }
}

fn extract_dns(rules: &Rules, settings: &mut Settings) -> Result<Dns, NoEqual> {
    let mut servers = Vec::new();
    let mut all = false;
    for rule in rules.chain("nat", "ISTIO_OUTPUT_DNS") {
        if let Some(port) = rule.target.strip_prefix("REDIRECT --to-ports ") {
            settings.dns_port = parsed(rule, port)?;
        }
        match rule.value("-d").and_then(cidr) {
            _ if rule.value("-p") != Some("tcp") => {}
            Some(server) => servers.push(server.addr()),
            None => all = true,
        }
    }
    Ok(if all { Dns::All } else { Dns::Servers(servers) })
}

/// The settings of both families together.
fn merge(read: &[(Family, Settings, &Rules)]) -> Result<Settings, NoEqual> {
    let Some((_, v4, _)) = read.first() else {
        return Err(blame_nothing("no tables"));
    };
    let mut settings = Settings {
        ipv6: read.len() > 1,
        ..v4.clone()
    };
    let Some((_, v6, _)) = read.get(1) else {
        return Ok(settings);
    };
    settings
        .excluded_outbound_cidrs
        .extend(&v6.excluded_outbound_cidrs);
    match (&mut settings.outbound_cidrs, &v6.outbound_cidrs) {
        (Cidrs::List(list), Cidrs::List(more)) => list.extend(more),
        (Cidrs::All, Cidrs::All) => {}
        _ => {
            return Err(blame_nothing(
                "IPv4 and IPv6 differ: one captures all that is left, the other doesn't",
            ));
        }
    }
    settings.dns = match (&settings.dns, &v6.dns) {
        (Dns::Servers(list), Dns::Servers(more)) => Dns::Servers([&list[..], more].concat()),
        (Dns::Servers(list), Dns::Off) | (Dns::Off, Dns::Servers(list)) => {
            Dns::Servers(list.clone())
        }
        (Dns::Off, Dns::Off) => Dns::Off,
        (Dns::All, Dns::All) => Dns::All,
        _ => {
            return Err(blame_nothing(
                "IPv4 and IPv6 differ in which DNS they capture",
            ));
        }
    };
    Ok(settings)
}

/// Compares the chains that were given with those of the settings.
fn compare(given: &Rules, settings: &Settings, family: Family) -> Result<(), NoEqual> {
    let text = settings.iptables_restore(family);
    let expected = parse(&text)?.into_iter().next().unwrap_or_default();
    for ((table, chain), rules) in &given.0 {
        if !given.is_reached(table, chain) {
            continue;
        }
        let wanted = expected.chain(table, chain);
        for (index, rule) in rules.iter().enumerate() {
            let Some(wanted) = wanted.get(index) else {
                return Err(rule.blame(format!(
                    "the settings that come nearest have no rule {} in {chain} of {table}",
                    index + 1
                )));
            };
            if !rule.same(wanted) && !is_output_jump(rule, wanted) {
                return Err(rule.blame(format!(
                    "the settings that come nearest have `{}` here",
                    wanted.text
                )));
            }
        }
        if let Some(missing) = wanted.get(rules.len()) {
            return Err(blame_nothing(format!(
                "{chain} of {table} ends before `{}`, which the settings that come nearest have",
                missing.text
            )));
        }
    }
    // The raw table only keeps conntrack's entries apart.
    match expected.0.iter().find(|((table, chain), _)| {
        table != "raw" && given.chain(table, chain).is_empty() && chain != "ISTIO_INBOUND"
    }) {
        Some(((table, chain), _)) => Err(blame_nothing(format!(
            "{chain} of {table} is missing, which the settings that come nearest have"
        ))),
        None => Ok(()),
    }
}

/// The mesh's own tool leads all protocols to `ISTIO_OUTPUT`, where nothing
/// captures but TCP.
fn is_output_jump(given: &Rule, wanted: &Rule) -> bool {
    given.conditions.is_empty()
        && wanted.conditions == ["-p tcp"]
        && given.target == wanted.target
        && given.target == "ISTIO_OUTPUT"
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::settings::Profile;

    const SEED: &str = include_str!("../../../tests/oracle/seed-rules.v4");
    const SEED_V6: &str = include_str!("../../../tests/oracle/seed-rules.v6");

    #[test]
    fn the_seed_is_the_default() {
        assert_eq!(
            import(&format!("{SEED}{SEED_V6}")).unwrap(),
            Settings::default()
        );
        let v4_only = Settings {
            ipv6: false,
            ..Settings::default()
        };
        assert_eq!(import(SEED).unwrap(), v4_only);
    }

    #[test]
    fn what_is_written_is_read_again() {
        let many = Settings {
            excluded_outbound_ports: vec![25.into(), "8000-8010".parse().unwrap()],
            outbound_ports: vec![9000.into()],
            excluded_interfaces: vec!["eth1".to_owned()],
            owner_groups: OwnerGroups::Except(vec![7, 8]),
            dns: Dns::Servers(vec![
                "10.0.0.53".parse().unwrap(),
                "fd00::53".parse().unwrap(),
            ]),
            outbound_cidrs: "10.0.0.0/8,fd00::/8".parse().unwrap(),
            excluded_outbound_cidrs: vec!["10.1.0.0/16".parse().unwrap()],
            proxy_uids: vec![3, 4],
            ..Settings::tool()
        };
        let tproxy = Settings {
            mode: Mode::Tproxy,
            drop_invalid: true,
            inbound_ports: "80,443".parse().unwrap(),
            tunnel_port: Some(15008),
            ..Settings::of(Profile::Injected)
        };
        let only = Settings {
            owner_groups: OwnerGroups::Only(vec![7, 8]),
            dns: Dns::All,
            loopback_cidr: "127.0.0.0/8".parse().unwrap(),
            ..Settings::of(Profile::Cni)
        };
        for settings in [
            Settings::of(Profile::Default),
            Settings::of(Profile::Injected),
            Settings::of(Profile::Cni),
            Settings::tool(),
            many,
            tproxy,
            only,
        ] {
            let text = Family::ALL.map(|family| settings.iptables_restore(family));
            let mut read = import(&text.concat()).unwrap_or_else(|e| panic!("{e}\n{}", text[0]));
            if settings.mode == Mode::Tproxy {
                // Not an inbound rule, but in the owners' rules.
                read.excluded_inbound_ports
                    .clone_from(&settings.excluded_inbound_ports);
            }
            if read.excluded_inbound_ports.is_empty() && settings.inbound_ports != Ports::All {
                read.excluded_inbound_ports
                    .clone_from(&settings.excluded_inbound_ports);
            }
            assert_eq!(read, settings);
        }
    }

    #[test]
    fn the_first_rule_without_an_equal_is_named() {
        for (rule, instead, line) in [
            (
                "-A ISTIO_INBOUND -p tcp -m tcp --dport 15090 -j RETURN",
                "-A ISTIO_INBOUND -p tcp -m tcp --dport 15090 -j DROP",
                "--dport 15090 -j DROP",
            ),
            (
                "-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN",
                "-A ISTIO_OUTPUT -d 127.0.0.1/32 -m recent --name x -j RETURN",
                "recent",
            ),
            (
                "-A OUTPUT -p tcp -j ISTIO_OUTPUT",
                "-A OUTPUT -p tcp -j ISTIO_OUTPUT\n-A OUTPUT -p udp -j ACCEPT",
                "-p udp -j ACCEPT",
            ),
            (
                "-A PREROUTING -p tcp -j ISTIO_INBOUND",
                "-A PREROUTING -i net1 -j ISTIO_REDIRECT\n-A PREROUTING -p tcp -j ISTIO_INBOUND",
                "net1",
            ),
        ] {
            assert!(SEED.contains(rule), "{rule}");
            let error = import(&SEED.replace(rule, instead)).unwrap_err();
            assert!(error.line > 0 && error.text.contains(line), "{error}");
        }
        for text in [
            "",
            "*nat\n",
            "*nat\nCOMMIT\n",
            "x",
            "*filter\n:INPUT DROP [0:0]\nCOMMIT",
        ] {
            import(text).unwrap_err();
        }
    }

    /// Words of which rules are made, so that arbitrary text comes near to them.
    fn word() -> impl Strategy<Value = String> {
        prop_oneof![
            prop::sample::select(
                &[
                    "-A",
                    "ISTIO_OUTPUT",
                    "ISTIO_INBOUND",
                    "ISTIO_REDIRECT",
                    "PREROUTING",
                    "OUTPUT",
                    "-j",
                    "RETURN",
                    "REDIRECT",
                    "--to-ports",
                    "15001",
                    "-p",
                    "tcp",
                    "-m",
                    "owner",
                    "!",
                    "--uid-owner",
                    "1337",
                    "-d",
                    "127.0.0.1/32",
                    "-s",
                    "::/0",
                    "-o",
                    "lo",
                    "--dport",
                    "53",
                    "70000",
                    "\"",
                    "\\",
                    "*nat",
                    "*mangle",
                    "COMMIT",
                    ":X",
                    "[",
                    "]",
                    "\n",
                    "\n-A ISTIO_OUTPUT",
                    "\n*nat\n",
                    "\nCOMMIT\n",
                    "ISTIO_TPROXY",
                    "MARK",
                    "--set-xmark",
                    "0xffffffffff",
                    "--mark",
                    "1/2/3",
                    "--dports",
                    "53,",
                ][..]
            )
            .prop_map(str::to_owned),
            any::<String>(),
        ]
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(words in prop::collection::vec(word(), 0..200)) {
            let _: Result<_, _> = import(&words.join(" "));
        }

        #[test]
        fn no_change_of_the_seed_makes_it_panic(
            at in 0..SEED.len(),
            words in prop::collection::vec(word(), 0..5),
        ) {
            prop_assume!(SEED.is_char_boundary(at));
            let text = format!("{}{}{}", &SEED[..at], words.join(" "), &SEED[at..]);
            if let Ok(settings) = import(&text) {
                settings.check().unwrap();
            }
        }
    }

    #[test]
    fn it_does_not_run_away() {
        let start = std::time::Instant::now();
        let line = "-A ISTIO_OUTPUT -d 10.0.0.0/8 -j RETURN\n";
        let text = format!("*nat\n{}COMMIT\n", line.repeat(LONGEST / line.len() - 10));
        let _: Result<_, _> = import(&text);
        let _: Result<_, _> = import(&"x".repeat(LONGEST + 1));
        assert!(start.elapsed().as_secs() < 60);
    }
}
