//! The calls of bpf(2) that aya has no objects for: links of every kind that we
//! make, in one form, with their pins and what the kernel says of them.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type::BPF_LINK_TYPE_CGROUP,
    bpf_link_type::BPF_LINK_TYPE_NETNS, bpf_map_info, bpf_map_type,
};

/// A program attached to a cgroup or a network namespace, until this and every
/// pin of it are gone.
#[derive(Debug)]
pub(crate) struct Link(OwnedFd);

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkTarget {
    /// The number of a cgroup; 0 once that is gone.
    Cgroup(u64),
    /// The inode of a network namespace; 0 once that is gone.
    Netns(u64),
}

/// What the kernel says of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    pub(crate) id: u32,
    pub(crate) program_id: u32,
    pub(crate) target: LinkTarget,
}

impl Link {
    /// Attaches `program` to the cgroup or network namespace `target`
    /// (`BPF_LINK_CREATE`, Linux 5.7).
    ///
    /// No flags: on links the kernel itself allows several programs.
    pub(crate) fn create(
        program: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        attach_type: bpf_attach_type,
    ) -> io::Result<Self> {
        let mut attr = zeroed_attr();
        attr.link_create.__bindgen_anon_1.prog_fd = fd_number(program);
        attr.link_create.__bindgen_anon_2.target_fd = fd_number(target);
        attr.link_create.attach_type = attach_type as u32;
        let fd = bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr)?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Opens a pinned link.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        get_pinned(path).map(Self)
    }

    /// Pins the link at `path`.
    pub(crate) fn pin(&self, path: &Path) -> io::Result<()> {
        pin(self.0.as_fd(), path)
    }

    /// Detaches the program at once (`BPF_LINK_DETACH`, Linux 5.9). Without it,
    /// the kernel detaches some time after the last pin is gone.
    pub(crate) fn detach(&self) -> io::Result<()> {
        let mut attr = zeroed_attr();
        attr.link_detach.link_fd = fd_number(self.0.as_fd());
        bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
    }

    /// What the kernel says of the link.
    pub(crate) fn info(&self) -> io::Result<LinkInfo> {
        // SAFETY: all zero is a valid value of this plain struct.
        let mut info: bpf_link_info = unsafe { std::mem::zeroed() };
        let mut attr = zeroed_attr();
        attr.info.bpf_fd = fd_number(self.0.as_fd());
        #[expect(clippy::cast_possible_truncation, reason = "a small struct")]
        {
            attr.info.info_len = size_of::<bpf_link_info>() as u32;
        }
        attr.info.info = (&raw mut info).addr() as u64;
        bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
        // SAFETY: the union's member that the type names.
        let target = unsafe {
            match info.type_ {
                kind if kind == BPF_LINK_TYPE_CGROUP as u32 => {
                    LinkTarget::Cgroup(info.__bindgen_anon_1.cgroup.cgroup_id)
                }
                kind if kind == BPF_LINK_TYPE_NETNS as u32 => {
                    LinkTarget::Netns(u64::from(info.__bindgen_anon_1.netns.netns_ino))
                }
                kind => {
                    return Err(io::Error::other(format!("a link of another type ({kind})")));
                }
            }
        };
        Ok(LinkInfo {
            id: info.id,
            program_id: info.prog_id,
            target,
        })
    }
}

/// The programs attached to a cgroup itself for one hook, and whether they
/// exclude others below it (`BPF_PROG_QUERY`).
pub(crate) fn attached_programs(
    cgroup: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<(Vec<u32>, bool)> {
    const ALLOW_OVERRIDE: u32 = 1;
    const ALLOW_MULTI: u32 = 2;
    let mut ids = vec![0u32; 64];
    let mut attr = zeroed_attr();
    attr.query.__bindgen_anon_1.target_fd = fd_number(cgroup);
    attr.query.attach_type = attach_type as u32;
    attr.query.prog_ids = ids.as_mut_ptr().addr() as u64;
    attr.query.__bindgen_anon_2.prog_cnt = 64;
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: the kernel has filled in the count and the flags.
    let (count, flags) = unsafe {
        (
            attr.query.__bindgen_anon_2.prog_cnt,
            attr.query.attach_flags,
        )
    };
    ids.truncate(count as usize);
    let exclusive = !ids.is_empty() && flags & (ALLOW_OVERRIDE | ALLOW_MULTI) == 0;
    Ok((ids, exclusive))
}

fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr().addr() as u64;
    attr.__bindgen_anon_4.bpf_fd = fd_number(object);
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

fn get_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr().addr() as u64;
    let fd = bpf(bpf_cmd::BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: the attributes are of the size given; what they point to is the
    // callers' to keep alive.
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

fn zeroed_attr() -> bpf_attr {
    // SAFETY: all zero is what the kernel expects of fields that aren't set.
    unsafe { std::mem::zeroed() }
}

fn fd_number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Whether an element of a socket map is in use (`BPF_MAP_LOOKUP_ELEM`; aya
/// reads no values from socket maps).
pub(crate) fn has_element(map: &aya::maps::MapFd, key: u32) -> bool {
    let mut value = [0u8; 8];
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = fd_number(map.as_fd());
    attr.__bindgen_anon_2.key = (&raw const key).addr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr().addr() as u64;
    bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr).is_ok()
}

/// Pins a map with `text` as its only value at `path`: what people wrote, which
/// no program reads.
pub(crate) fn pin_text(text: &str, path: &Path) -> io::Result<()> {
    let value_size = u32::try_from(text.len()).map_err(io::Error::other)?;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_1.map_type = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    attr.__bindgen_anon_1.key_size = 4;
    attr.__bindgen_anon_1.value_size = value_size;
    attr.__bindgen_anon_1.max_entries = 1;
    let fd = bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let map = unsafe { OwnedFd::from_raw_fd(fd) };
    let key = 0u32;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = fd_number(map.as_fd());
    attr.__bindgen_anon_2.key = (&raw const key).addr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = text.as_ptr().addr() as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr)?;
    pin(map.as_fd(), path)
}

/// The text of a map that [`pin_text`] pinned.
pub(crate) fn pinned_text(path: &Path) -> io::Result<String> {
    let map = get_pinned(path)?;
    // SAFETY: all zero is a valid value of this plain struct.
    let mut info: bpf_map_info = unsafe { std::mem::zeroed() };
    let mut attr = zeroed_attr();
    attr.info.bpf_fd = fd_number(map.as_fd());
    #[expect(clippy::cast_possible_truncation, reason = "a small struct")]
    {
        attr.info.info_len = size_of::<bpf_map_info>() as u32;
    }
    attr.info.info = (&raw mut info).addr() as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    if (info.type_, info.key_size) != (bpf_map_type::BPF_MAP_TYPE_ARRAY as u32, 4) {
        return Err(io::Error::other("not a map of Interceptor's"));
    }
    // The kernel rounds a value's size up when it copies.
    let mut value = vec![0u8; (info.value_size as usize).next_multiple_of(8)];
    let key = 0u32;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = fd_number(map.as_fd());
    attr.__bindgen_anon_2.key = (&raw const key).addr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr().addr() as u64;
    bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr)?;
    value.truncate(info.value_size as usize);
    String::from_utf8(value).map_err(io::Error::other)
}

/// Waits until no program that runs now is still running.
///
/// `membarrier(MEMBARRIER_CMD_GLOBAL)` waits for a grace period of RCU, under
/// which the kernel runs every program that is attached here (Linux 4.3).
pub(crate) fn wait_for_programs() -> io::Result<()> {
    const GLOBAL: libc::c_int = 1;
    // SAFETY: takes numbers only.
    match unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
