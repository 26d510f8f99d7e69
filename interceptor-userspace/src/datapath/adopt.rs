//! What is done to a pod that is attached already, perhaps by an earlier version:
//! whose it is, newer programs, another cgroup. Its maps, and with them its
//! connections, stay.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::maps::{Array, MapData};
use interceptor_common::pod::Attachment;

use super::{
    attach::need_root,
    bpf::{self, Link, LinkTarget},
    object::{DNS_LINKS, Hook, LINKS, Loading, LogLevel, Maps, Object, all_hooks},
    pins::{NOTE, Pins, link_pin, map_pin},
    plain::Plain,
    view::Opened,
};
use crate::{
    Error, Result,
    pod::{PodName, cgroup::Cgroup, netns::NetnsId},
    settings::Settings,
};

/// What is known of an attached pod.
#[derive(Debug)]
pub struct Inspected {
    /// The number of the cgroup that it is attached to.
    pub cgroup_id: u64,
    /// Its network namespace.
    pub netns: NetnsId,
    /// Its settings.
    pub settings: Settings,
    /// What who attached it wants to find again.
    pub note: Option<String>,
    /// Whether its cgroup or its network namespace is gone, and the programs with
    /// it.
    pub gone: bool,
}

/// Looks at an attached pod, after checking that all of it is there and ours.
///
/// # Errors
///
/// If the pod isn't attached, or its pins aren't whole or not of this version's
/// layout.
pub fn inspect(pins: &Pins, pod: &PodName) -> Result<Inspected> {
    let opened = Opened::of(pins, pod)?;
    opened.check()?;
    let mut gone = false;
    for hook in attached_hooks(&opened) {
        let info = open_link(&opened, hook)?
            .info()
            .map_err(|error| opened.damaged(format!("links/{}: {error}", hook.program)))?;
        gone |= matches!(info.target, LinkTarget::Cgroup(0) | LinkTarget::Netns(0));
    }
    let note = map_pin(&opened.directory, NOTE);
    let note = note
        .exists()
        .then(|| bpf::pinned_text(&note))
        .transpose()
        .map_err(|error| opened.damaged(format!("maps/{NOTE}: {error}")))?;
    Ok(Inspected {
        cgroup_id: opened.attachment.cgroup_id,
        netns: opened.netns_id(),
        settings: opened.settings,
        note,
        gone,
    })
}

/// The programs of this version, each told from others by the kernel's digest of
/// its instructions.
#[derive(Debug)]
pub struct Version(BTreeMap<&'static str, [u8; 8]>);

impl Version {
    /// Loads them, attached to nothing, to have their digests.
    ///
    /// # Errors
    ///
    /// If the kernel doesn't accept them.
    pub fn of_this_program() -> Result<Self> {
        let object = Object::load(Loading::NOWHERE, all_hooks())?;
        let digests = all_hooks()
            .map(|hook| {
                bpf::program_info(object.program(hook).as_fd())
                    .map(|info| (hook.program, info.tag))
                    .map_err(Error::system(format!("asking about {}", hook.program)))
            })
            .collect::<Result<_>>()?;
        Ok(Self(digests))
    }
}

/// Puts this version's programs in the place of a pod's, each at once, unless
/// they are the same. The first connection after that meets the new ones; what
/// the old ones remembered, the new ones find. How many were replaced.
///
/// # Errors
///
/// If the pod's state isn't of this version's layout, or a program can't be
/// loaded or replaced: the pod is intercepted still, by old programs or by some
/// of each, which do the same.
pub fn upgrade(pins: &Pins, pod: &PodName, version: &Version) -> Result<usize> {
    need_root()?;
    let _lock = pins.lock()?;
    let opened = Opened::of(pins, pod)?;
    finish_moving(&opened)?;
    let links = opened.check()?;
    let old: Vec<&Hook> = attached_hooks(&opened)
        .filter(|hook| {
            links
                .iter()
                .find(|link| link.program == hook.program)
                .and_then(|link| bpf::program_by_id(link.program_id).ok())
                .and_then(|program| bpf::program_info(program.as_fd()).ok())
                .is_none_or(|info| version.0.get(hook.program) != Some(&info.tag))
        })
        .collect();
    replace(&opened, &old, false)?;
    Ok(old.len())
}

/// Moves a pod's programs to `cgroup`, which must lie below the one that they are
/// attached to. No connection is without them, and none meets them twice.
///
/// # Errors
///
/// If a program can't be loaded or attached; the pod stays intercepted where it
/// was.
pub fn move_to(pins: &Pins, pod: &PodName, cgroup: &Cgroup) -> Result<()> {
    need_root()?;
    let _lock = pins.lock()?;
    let opened = Opened::of(pins, pod)?;
    finish_moving(&opened)?;
    opened.check()?;
    if opened.attachment.cgroup_id == cgroup.id() {
        return Ok(());
    }
    // From here on, what runs on the cgroup above leaves alone what the same
    // program has decided on the one below.
    let on_cgroup: Vec<&Hook> = attached_hooks(&opened)
        .filter(|hook| !hook.to_netns())
        .collect();
    replace(&opened, &on_cgroup, true)?;
    let moved = attach_below(&opened, &on_cgroup, cgroup).and_then(|()| {
        let mut attachments: Array<MapData, Plain<Attachment>> = opened.map("ATTACHMENT")?;
        let attachment = Attachment {
            cgroup_id: cgroup.id(),
            ..opened.attachment
        };
        attachments
            .set(0, Plain(attachment), 0)
            .map_err(Error::map("writing", "ATTACHMENT"))
    });
    // Forward if all are attached below, back if not.
    let finished = Opened::of(pins, pod).and_then(|opened| finish_moving(&opened));
    moved.and(finished)
}

/// Attaches the hooks' programs to `cgroup`, too, under pins of their own.
fn attach_below(opened: &Opened, hooks: &[&'static Hook], cgroup: &Cgroup) -> Result<()> {
    let object = load(opened, hooks, false)?;
    for hook in hooks {
        let path = moving_pin(&opened.directory, hook);
        object
            .attach_to_cgroup(hook, cgroup)?
            .pin(&path)
            .map_err(Error::system(format!("pinning {}", path.display())))?;
    }
    Ok(())
}

/// The pin of a link while a pod is moved. No program has this name.
pub(crate) fn moving_pin(directory: &Path, hook: &Hook) -> PathBuf {
    link_pin(directory, &format!("{}+below", hook.program))
}

/// Finishes a move that was interrupted: forward if the attachment says that it
/// is done, back if not.
fn finish_moving(opened: &Opened) -> Result<()> {
    let below: Vec<(&Hook, Link)> = attached_hooks(opened)
        .filter_map(|hook| Some((hook, Link::open(&moving_pin(&opened.directory, hook)).ok()?)))
        .collect();
    let mut back = false;
    for (hook, link) in &below {
        let from = moving_pin(&opened.directory, hook);
        let to = link_pin(&opened.directory, hook.program);
        let failed = || Error::system(format!("moving the link {}", to.display()));
        let target = link.info().map_err(failed())?.target;
        if target == LinkTarget::Cgroup(opened.attachment.cgroup_id) {
            let above = Link::open(&to).map_err(failed())?;
            above.detach().map_err(failed())?;
            fs::rename(&from, &to).map_err(failed())?;
        } else {
            link.detach().map_err(failed())?;
            fs::remove_file(&from).map_err(failed())?;
            back = true;
        }
    }
    if back {
        let hooks: Vec<&Hook> = below.iter().map(|(hook, _)| *hook).collect();
        replace(opened, &hooks, false)?;
    }
    Ok(())
}

/// Loads programs for a pod that is attached.
fn load(opened: &Opened, hooks: &[&'static Hook], after_another: bool) -> Result<Object> {
    Object::load(
        Loading {
            netns: opened.netns_id(),
            log_level: LogLevel::from_number(opened.attachment.log_level),
            maps: Maps::Pinned(&opened.directory),
            after_another,
            may_pass: opened.passes()?,
        },
        hooks.iter().copied(),
    )
}

/// Puts new programs in the place of the hooks' own.
fn replace(opened: &Opened, hooks: &[&'static Hook], after_another: bool) -> Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    let object = load(opened, hooks, after_another)?;
    for hook in hooks {
        open_link(opened, hook)?
            .update(object.program(hook).as_fd())
            .or_else(|error| match error.raw_os_error() {
                // Its cgroup or network namespace is gone: nothing runs any more.
                Some(libc::ENOLINK) => Ok(()),
                _ => Err(error),
            })
            .map_err(Error::system(format!(
                "replacing the program {} of {}",
                hook.program,
                opened.directory.display()
            )))?;
    }
    Ok(())
}

fn attached_hooks(opened: &Opened) -> impl Iterator<Item = &'static Hook> {
    let dns = DNS_LINKS.iter().filter(|hook| opened.has_link(hook));
    LINKS.iter().chain(dns)
}

fn open_link(opened: &Opened, hook: &Hook) -> Result<Link> {
    Link::open(&link_pin(&opened.directory, hook.program))
        .map_err(|error: io::Error| opened.damaged(format!("links/{}: {error}", hook.program)))
}
