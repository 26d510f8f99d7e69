//! Calls of bpf(2): what the suites ask of the kernel itself.

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use anyhow::{Context, Result};
use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_link_info, bpf_map_info, bpf_prog_info};

use crate::command::wait_until;

/// How long the kernel may take to free what nobody holds any more: it waits
/// for RCU grace periods and frees from a queue.
const FREED_WITHIN: std::time::Duration = std::time::Duration::from_secs(20);

/// A kind of object of which the kernel keeps a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Programs.
    Program,
    /// Maps.
    Map,
    /// Links.
    Link,
}

/// An object on one of the kernel's lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id(pub Kind, pub u32);

impl Id {
    /// Opens the object; an error (`ENOENT`) if it is gone.
    ///
    /// # Errors
    ///
    /// If it can't be opened.
    pub fn open(self) -> io::Result<OwnedFd> {
        let command = match self.0 {
            Kind::Program => bpf_cmd::BPF_PROG_GET_FD_BY_ID,
            Kind::Map => bpf_cmd::BPF_MAP_GET_FD_BY_ID,
            Kind::Link => bpf_cmd::BPF_LINK_GET_FD_BY_ID,
        };
        let mut attr = zeroed();
        attr.__bindgen_anon_6.__bindgen_anon_1.start_id = self.1;
        bpf_fd(command, &mut attr)
    }

    fn exists(self) -> Result<bool> {
        match self.open() {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("open {self:?}")),
        }
    }
}

/// All objects of a kind, whoever's they are.
///
/// # Errors
///
/// If the kernel doesn't tell.
pub fn list(kind: Kind) -> Result<Vec<Id>> {
    let command = match kind {
        Kind::Program => bpf_cmd::BPF_PROG_GET_NEXT_ID,
        Kind::Map => bpf_cmd::BPF_MAP_GET_NEXT_ID,
        Kind::Link => bpf_cmd::BPF_LINK_GET_NEXT_ID,
    };
    let mut ids = Vec::new();
    let mut attr = zeroed();
    loop {
        match bpf(command, &mut attr) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(ids),
            result => result.with_context(|| format!("list the kernel's objects ({kind:?})"))?,
        };
        // SAFETY: the union's member that this command writes.
        let id = unsafe { attr.__bindgen_anon_6.next_id };
        ids.push(Id(kind, id));
        attr.__bindgen_anon_6.__bindgen_anon_1.start_id = id;
    }
}

/// The maps that a program uses.
///
/// # Errors
///
/// If the program is gone.
pub fn maps_of(program: u32) -> Result<Vec<Id>> {
    let mut ids = [0u32; 64];
    let fd = Id(Kind::Program, program).open()?;
    let info = program_info(fd.as_fd(), &mut ids)?;
    Ok(ids[..info.nr_map_ids as usize]
        .iter()
        .map(|id| Id(Kind::Map, *id))
        .collect())
}

/// The first 15 bytes of a program's or a map's name, which may be empty.
///
/// # Errors
///
/// If it is gone, or is a link, which has none.
pub fn name(id: Id) -> io::Result<String> {
    let fd = id.open()?;
    let name = match id.0 {
        Kind::Program => program_info(fd.as_fd(), &mut [0; 64])?.name,
        Kind::Map => map_info(fd.as_fd())?.name,
        Kind::Link => return Err(io::Error::other("a link has no name")),
    };
    // A `char` has a sign on some machines.
    let bytes = name.map(|byte| byte.to_ne_bytes()[0]);
    let name = CStr::from_bytes_until_nul(&bytes).map_err(io::Error::other)?;
    Ok(name.to_string_lossy().into_owned())
}

/// The kernel's digest of a program's instructions.
///
/// # Errors
///
/// If the program is gone.
pub fn digest_of(program: u32) -> io::Result<[u8; 8]> {
    let fd = Id(Kind::Program, program).open()?;
    Ok(program_info(fd.as_fd(), &mut [0; 64])?.tag)
}

/// The program that a link attaches.
///
/// # Errors
///
/// If the link is gone.
pub fn program_of(link: u32) -> io::Result<Id> {
    let fd = Id(Kind::Link, link).open()?;
    Ok(Id(Kind::Program, link_info(fd.as_fd())?.prog_id))
}

/// The link that is pinned at a path.
///
/// # Errors
///
/// If none is.
pub fn pinned_link(path: &Path) -> io::Result<Id> {
    let link = open_pin(path)?;
    Ok(Id(Kind::Link, link_info(link.as_fd())?.id))
}

/// The map that is pinned at a path.
///
/// # Errors
///
/// If none is.
pub fn pinned_map(path: &Path) -> io::Result<Id> {
    let map = open_pin(path)?;
    Ok(Id(Kind::Map, map_info(map.as_fd())?.id))
}

/// Opens what is pinned at a path.
///
/// # Errors
///
/// If nothing is, or this process may not.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed();
    attr.__bindgen_anon_4.pathname = path.as_ptr().addr() as u64;
    bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// Detaches what a link attaches (`BPF_LINK_DETACH`).
///
/// # Errors
///
/// If it can't be.
pub fn detach(link: &OwnedFd) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_detach.link_fd = number(link.as_fd());
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

fn link_info(link: BorrowedFd<'_>) -> io::Result<bpf_link_info> {
    // SAFETY: all zero is a valid value of this plain struct.
    let mut info: bpf_link_info = unsafe { std::mem::zeroed() };
    get_info(link, &mut info)?;
    Ok(info)
}

fn map_info(map: BorrowedFd<'_>) -> io::Result<bpf_map_info> {
    // SAFETY: all zero is a valid value of this plain struct.
    let mut info: bpf_map_info = unsafe { std::mem::zeroed() };
    get_info(map, &mut info)?;
    Ok(info)
}

/// What the kernel says of a program; the ids of its maps go to `map_ids`.
pub(crate) fn program_info(
    program: BorrowedFd<'_>,
    map_ids: &mut [u32; 64],
) -> io::Result<bpf_prog_info> {
    // SAFETY: all zero is a valid value of this plain struct.
    let mut info: bpf_prog_info = unsafe { std::mem::zeroed() };
    info.map_ids = map_ids.as_mut_ptr().addr() as u64;
    info.nr_map_ids = 64;
    get_info(program, &mut info)?;
    Ok(info)
}

fn get_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = zeroed();
    attr.info.bpf_fd = number(object);
    #[expect(clippy::cast_possible_truncation, reason = "a small struct")]
    {
        attr.info.info_len = size_of::<T>() as u32;
    }
    attr.info.info = std::ptr::from_mut(info).addr() as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// Changes the first element of a pinned array, which has this size.
///
/// # Errors
///
/// If there is no such map.
pub fn change_first(pin: &Path, size: usize, change: impl FnOnce(&mut [u8])) -> Result<()> {
    let map = open_pin(pin).with_context(|| format!("open the map {}", pin.display()))?;
    // The kernel rounds a value's size up when it copies.
    let (key, mut value) = (0u32, vec![0; size.next_multiple_of(8)]);
    let mut attr = zeroed();
    attr.__bindgen_anon_2.map_fd = number(map.as_fd());
    attr.__bindgen_anon_2.key = (&raw const key).addr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr().addr() as u64;
    bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr).context("read the map")?;
    change(&mut value);
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).context("write the map")?;
    Ok(())
}

/// Waits until none of these objects exists any more.
///
/// # Errors
///
/// If some still do after a while: the error names them.
pub fn wait_until_gone(objects: &[Id]) -> Result<()> {
    let mut left = objects.to_vec();
    wait_until("the kernel frees the objects", FREED_WITHIN, || {
        let mut still = Vec::new();
        for id in &left {
            if id.exists()? {
                still.push(*id);
            }
        }
        left = still;
        Ok(left.is_empty().then_some(()))
    })
    .with_context(|| format!("still there: {left:?}"))
}

/// Calls bpf(2).
pub(crate) fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: the attributes are of the size given; what they point to lives
    // as long as the callers' locals.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_int,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        i32::try_from(result).map_err(io::Error::other)
    }
}

/// Calls bpf(2) for a command that returns a new descriptor.
pub(crate) fn bpf_fd(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn zeroed() -> bpf_attr {
    // SAFETY: all zero is what the kernel expects of fields that aren't set.
    unsafe { std::mem::zeroed() }
}

pub(crate) fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}
