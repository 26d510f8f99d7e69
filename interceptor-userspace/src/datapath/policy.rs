//! A pod's settings in its maps: written when it is attached, and changed at
//! once while it is.
//!
//! There is room for two [`GENERATIONS`]. A change is written beside what is in
//! force; then one word says that it is in force now. Every program reads that
//! word once, so that a connection meets the old settings or the new, never
//! some of both.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::maps::{Array, LpmTrie, MapData, lpm_trie::Key};
use interceptor_common::{
    chains::Chain,
    config::{self, GENERATIONS, PrefixKey},
    counters::{MAX_COUNTERS, rule_index},
    pod::Attachment,
};

use super::{
    additions::{self, Additions},
    attach::{attach_dns, need_root},
    bpf,
    kernel_types::Offsets,
    object::{Object, raise_locked_memory},
    pins::{Pins, map_pin},
    plain::Plain,
    routes,
    view::Opened,
};
use crate::{
    Error, Result,
    pod::{PodName, netns::Netns, user_namespace},
    settings::{Compiled, Family, Mode, Place, PrefixTable, Settings},
};

/// How many more rules than it has a pod's `ISTIO_OUTPUT` can get and have them
/// counted, too.
const SPARE_COUNTERS: u32 = 64;

type PrefixMap<T> = LpmTrie<T, Plain<PrefixKey>, u32>;

/// How many counters a pod with these settings needs.
pub(crate) fn counters(settings: &Settings) -> u32 {
    let rules = Family::ALL
        .map(|family| settings.rules(Chain::Output, family).len())
        .into_iter()
        .max()
        .and_then(|rules| u32::try_from(rules).ok())
        .unwrap_or_default();
    rule_index(Chain::Output, rules + SPARE_COUNTERS + 1, true).min(MAX_COUNTERS)
}

/// Where the pod is, as far as its settings ask.
pub(crate) fn place(settings: &Settings, netns: &Netns) -> Result<Place> {
    let interfaces = if settings.excluded_interfaces.is_empty() {
        Vec::new()
    } else {
        if !Offsets::of_running_kernel()?.has_ingress_ifindex {
            return Err(Error::setting(
                "exclude-interfaces",
                settings.excluded_interfaces.join(","),
                "need Linux 5.17 or later, which tells the programs where connections arrive",
            ));
        }
        routes::interfaces(netns)?
    };
    let (uids, gids) = user_namespace::id_maps(netns)?;
    Ok(Place {
        interfaces,
        uids,
        gids,
    })
}

/// The pin of what people wrote as a generation's settings.
fn declared(directory: &Path, generation: u32) -> PathBuf {
    map_pin(directory, &format!("DECLARED{generation}"))
}

/// What people wrote as a generation's settings.
pub(crate) fn read_declared(directory: &Path, generation: u32) -> Result<Settings, String> {
    let path = declared(directory, generation);
    let text = bpf::pinned_text(&path).map_err(|error| format!("maps/DECLARED: {error}"))?;
    serde_json::from_str(&text).map_err(|error| format!("maps/DECLARED: {error}"))
}

fn write_declared(directory: &Path, generation: u32, settings: &Settings) -> Result<()> {
    let path = declared(directory, generation);
    let failed = || Error::system(format!("pinning {}", path.display()));
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed()(error)),
        _ => {}
    }
    let text = serde_json::to_string(settings).map_err(|error| failed()(error.into()))?;
    bpf::pin_text(&text, &path).map_err(failed())
}

/// Writes the first generation of a pod that is being attached. Its maps are
/// pinned in `directory`.
pub(crate) fn write_first(
    object: &mut Object,
    directory: &Path,
    settings: &Settings,
    place: &Place,
) -> Result<()> {
    let compiled = settings.compile(place, 0)?;
    write_prefixes(&mut object.map_mut("PREFIXES")?, 0, &compiled.prefixes)?;
    write_settings(&mut object.map_mut("SETTINGS")?, &compiled.settings)?;
    write_declared(directory, 0, settings)
}

fn write_settings<T>(
    map: &mut Array<T, Plain<config::Settings>>,
    settings: &config::Settings,
) -> Result<()>
where
    T: std::borrow::Borrow<MapData> + std::borrow::BorrowMut<MapData>,
{
    map.set(settings.generation, Plain(*settings), 0)
        .map_err(Error::map("writing", "SETTINGS"))
}

/// Makes the map hold these prefixes of a generation and no others of it.
fn write_prefixes<T>(map: &mut PrefixMap<T>, generation: u32, table: &PrefixTable) -> Result<()>
where
    T: std::borrow::Borrow<MapData> + std::borrow::BorrowMut<MapData>,
{
    let present: Vec<Key<Plain<PrefixKey>>> = map
        .keys()
        .collect::<Result<_, _>>()
        .map_err(Error::map("reading", "PREFIXES"))?;
    for key in present {
        if u32::from(key.data().0.generation) == generation {
            map.remove(&key)
                .map_err(Error::map("writing", "PREFIXES"))?;
        }
    }
    for entry in &table.0 {
        let bits = u32::from(entry.bits);
        let key = PrefixKey::new(generation, entry.version, entry.list, entry.key);
        map.insert(
            &Key::new(PrefixKey::BITS_BEFORE + bits, Plain(key)),
            entry.rule,
            0,
        )
        .map_err(Error::map("writing", "PREFIXES"))?;
    }
    Ok(())
}

/// The generation that is in force.
pub(crate) fn generation(opened: &Opened) -> Result<u32> {
    let map: Array<MapData, u32> = opened.map("GENERATION")?;
    map.get(&0, 0).map_err(Error::map("reading", "GENERATION"))
}

/// What [`set`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The new settings are in force.
    Made,
    /// They were in force already.
    None,
}

/// Changes an attached pod's settings at once. Connections that are set up keep
/// what they have.
///
/// # Errors
///
/// If the pod isn't attached, or the new settings can't be; the old ones stay in
/// force then.
pub fn set(pins: &Pins, pod: &PodName, settings: &Settings) -> Result<Change> {
    need_root()?;
    let _lock = pins.lock()?;
    let opened = Opened::of(pins, pod)?;
    opened.check()?;
    settings.check()?;
    change_to(&opened, settings)
}

/// Puts settings in force for an attached pod.
pub(crate) fn change_to(opened: &Opened, settings: &Settings) -> Result<Change> {
    let old = &opened.settings;
    for (name, old, new) in [
        ("outbound-port", old.outbound_port, settings.outbound_port),
        ("inbound-port", old.inbound_port, settings.inbound_port),
        ("dns-port", old.dns_port, settings.dns_port),
    ] {
        if old != new {
            return Err(Error::setting(
                name,
                new,
                format!("can't be changed from {old} while the pod is attached: detach it first"),
            ));
        }
    }
    if (old.mode, settings.mode) == (Mode::Tproxy, Mode::Tproxy)
        && (old.tproxy_mark, old.tproxy_table) != (settings.tproxy_mark, settings.tproxy_table)
    {
        return Err(Error::setting(
            "mode",
            "TPROXY",
            format!(
                "has mark {} and table {}, which can't be changed to {} and {} while the pod is \
                 attached: detach it first",
                old.tproxy_mark, old.tproxy_table, settings.tproxy_mark, settings.tproxy_table
            ),
        ));
    }
    let netns = opened.netns()?;
    let place = place(settings, &netns)?;
    let next = (generation(opened)? + 1) % GENERATIONS;
    let Compiled {
        settings: compiled,
        prefixes,
    } = settings.compile(&place, next)?;
    let same = config::Settings {
        generation: opened.compiled.generation,
        ..compiled
    };
    // Remembered first: what a kill leaves is taken back with the pod.
    let missing = additions::missing_for_tproxy(&netns, settings)?;
    write_added(opened, opened.attachment.added | missing)?;
    let additions = Additions::add(&netns, settings, missing)?;
    // Interfaces may have come and gone.
    if settings == old && opened.compiled == same && place.interfaces.is_empty() {
        additions.keep();
        return Ok(Change::None);
    }
    if settings.dns.is_on() {
        attach_dns(opened, &netns)?;
    }
    raise_locked_memory();
    // A program that still reads what a change before the last one left is done
    // before that is written over.
    bpf::wait_for_programs().map_err(Error::system("waiting for running programs"))?;
    let mut map: PrefixMap<MapData> = opened.map("PREFIXES")?;
    write_prefixes(&mut map, next, &prefixes)?;
    let mut map: Array<MapData, Plain<config::Settings>> = opened.map("SETTINGS")?;
    write_settings(&mut map, &compiled)?;
    write_declared(&opened.directory, next, settings)?;
    let mut map: Array<MapData, u32> = opened.map("GENERATION")?;
    map.set(0, next, 0)
        .map_err(Error::map("writing", "GENERATION"))?;
    additions.keep();
    let needless = additions::needless(settings, opened.attachment.added);
    additions::remove(&netns, old, needless)?;
    write_added(opened, (opened.attachment.added | missing) & !needless)?;
    Ok(Change::Made)
}

/// Remembers what was added to the network namespace.
fn write_added(opened: &Opened, added: u32) -> Result<()> {
    let attachment = Attachment {
        added,
        ..opened.attachment
    };
    let mut map: Array<MapData, Plain<Attachment>> = opened.map("ATTACHMENT")?;
    map.set(0, Plain(attachment), 0)
        .map_err(Error::map("writing", "ATTACHMENT"))
}
