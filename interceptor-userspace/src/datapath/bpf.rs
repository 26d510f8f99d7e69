//! The calls of bpf(2) that aya has no objects for: programs without its loader,
//! links of every kind that we make, in one form, with their pins and what the
//! kernel says of them.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::{
    Function,
    generated::{
        BPF_NOEXIST, bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info,
        bpf_link_type::{BPF_LINK_TYPE_CGROUP, BPF_LINK_TYPE_NETNS},
        bpf_map_info, bpf_map_type, bpf_prog_info, bpf_prog_type,
    },
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
        bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr).map(Self)
    }

    /// Opens a pinned link.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        get_pinned(path).map(Self)
    }

    /// Pins the link at `path`.
    pub(crate) fn pin(&self, path: &Path) -> io::Result<()> {
        pin(self.0.as_fd(), path)
    }

    /// Puts `program` in the place of the one that is attached, at once
    /// (`BPF_LINK_UPDATE`, Linux 5.7).
    pub(crate) fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attr = zeroed_attr();
        attr.link_update.link_fd = fd_number(self.0.as_fd());
        attr.link_update.__bindgen_anon_1.new_prog_fd = fd_number(program);
        bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
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
        get_info(self.0.as_fd(), &mut info)?;
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

/// Opens what an iterator writes (`BPF_ITER_CREATE`, Linux 5.8): what it goes through
/// is that of this thread's network namespace, or `map`'s.
pub(crate) fn iterate(program: BorrowedFd<'_>, map: Option<BorrowedFd<'_>>) -> io::Result<File> {
    // The first member of `union bpf_iter_link_info`.
    let map_fd = map.map(fd_number);
    let mut attr = zeroed_attr();
    attr.link_create.__bindgen_anon_1.prog_fd = fd_number(program);
    attr.link_create.attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
    if let Some(map_fd) = &map_fd {
        // SAFETY: the union's member that iterators take.
        let given = unsafe { &mut attr.link_create.__bindgen_anon_3.__bindgen_anon_1 };
        given.iter_info = std::ptr::from_ref(map_fd).addr() as u64;
        given.iter_info_len = 4;
    }
    let link = bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)?;
    let mut attr = zeroed_attr();
    attr.iter_create.link_fd = fd_number(link.as_fd());
    bpf_fd(bpf_cmd::BPF_ITER_CREATE, &mut attr).map(File::from)
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
    bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// Loads a program's own types (`BPF_BTF_LOAD`).
pub(crate) fn load_types(types: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_7.btf = types.as_ptr().addr() as u64;
    attr.__bindgen_anon_7.btf_size = u32::try_from(types.len()).map_err(io::Error::other)?;
    bpf_fd(bpf_cmd::BPF_BTF_LOAD, &mut attr)
}

/// Writes the first element of a map (`BPF_MAP_UPDATE_ELEM`), which has the
/// size of `value`.
pub(crate) fn write_first(map: BorrowedFd<'_>, value: &[u8]) -> io::Result<()> {
    let mut attr = element(map, &0, value.as_ptr().addr());
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Keeps user space from writing to a map (`BPF_MAP_FREEZE`), so that the
/// verifier takes what is in it for constants.
pub(crate) fn freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = fd_number(map);
    bpf(bpf_cmd::BPF_MAP_FREEZE, &mut attr).map(drop)
}

/// A program to load.
pub(crate) struct NewProgram<'a> {
    pub(crate) name: &'a str,
    pub(crate) program_type: bpf_prog_type,
    pub(crate) attach_type: bpf_attach_type,
    pub(crate) license: &'a CStr,
    /// Its instructions and what is known of them.
    pub(crate) function: &'a Function,
    /// The types that the function's information refers to.
    pub(crate) types: BorrowedFd<'a>,
    /// The number of the kernel's type that an iterator is for; 0 for other programs.
    pub(crate) attach_type_number: u32,
}

/// Loads a program (`BPF_PROG_LOAD`).
///
/// # Errors
///
/// The kernel's answer, with the verifier's log: the program is loaded once more
/// for it, because writing it takes time.
pub(crate) fn load_program(program: &NewProgram<'_>) -> Result<OwnedFd, (io::Error, String)> {
    let NewProgram { function, .. } = program;
    let functions = function.func_info.func_info_bytes();
    let lines = function.line_info.line_info_bytes();
    let mut attr = zeroed_attr();
    // SAFETY: the union's member that the command takes.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    for (to, from) in load.prog_name[..15].iter_mut().zip(program.name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    load.prog_type = program.program_type as u32;
    load.expected_attach_type = program.attach_type as u32;
    load.license = program.license.as_ptr().addr() as u64;
    load.insns = function.instructions.as_ptr().addr() as u64;
    load.prog_btf_fd = fd_number(program.types);
    load.attach_btf_id = program.attach_type_number;
    #[expect(clippy::cast_possible_truncation, reason = "a small object")]
    {
        load.insn_cnt = function.instructions.len() as u32;
        load.func_info = functions.as_ptr().addr() as u64;
        load.func_info_cnt = function.func_info.len() as u32;
        load.func_info_rec_size = function.func_info_rec_size as u32;
        load.line_info = lines.as_ptr().addr() as u64;
        load.line_info_cnt = function.line_info.len() as u32;
        load.line_info_rec_size = function.line_info_rec_size as u32;
    }
    bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr).map_err(|error| {
        let mut log = vec![0u8; 1 << 20];
        // SAFETY: as above.
        let load = unsafe { &mut attr.__bindgen_anon_3 };
        load.log_level = 1;
        load.log_buf = log.as_mut_ptr().addr() as u64;
        load.log_size = 1 << 20;
        // Fails as it did before; the log is what is wanted.
        let _: io::Result<OwnedFd> = bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr);
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default();
        (error, log.to_string_lossy().into_owned())
    })
}

/// Opens a program by the kernel's number of it (`BPF_PROG_GET_FD_BY_ID`).
pub(crate) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    bpf_fd(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr)
}

/// What the kernel says of a program (`BPF_OBJ_GET_INFO_BY_FD`).
pub(crate) fn program_info(program: BorrowedFd<'_>) -> io::Result<bpf_prog_info> {
    // SAFETY: all zero is a valid value of this plain struct.
    let mut info: bpf_prog_info = unsafe { std::mem::zeroed() };
    get_info(program, &mut info)?;
    Ok(info)
}

/// Has the kernel fill in what it says of an object.
fn get_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = zeroed_attr();
    attr.info.bpf_fd = fd_number(object);
    #[expect(clippy::cast_possible_truncation, reason = "a small struct")]
    {
        attr.info.info_len = size_of::<T>() as u32;
    }
    attr.info.info = std::ptr::from_mut(info).addr() as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// A call of bpf(2) that returns a new descriptor.
fn bpf_fd(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
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

/// The cookie of a socket in a socket map (`BPF_MAP_LOOKUP_ELEM`; aya reads no
/// values from socket maps).
pub(crate) fn socket_cookie(map: BorrowedFd<'_>, key: u32) -> Option<u64> {
    let mut cookie = 0u64;
    let mut attr = element(map, &key, (&raw mut cookie).addr());
    bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr).ok()?;
    Some(cookie)
}

/// Puts a socket into a free place of a socket map (`BPF_MAP_UPDATE_ELEM`).
///
/// # Errors
///
/// `EEXIST` if the place is taken, `EOPNOTSUPP` if a socket map can't hold such
/// a socket.
pub(crate) fn insert_socket(
    map: BorrowedFd<'_>,
    key: u32,
    socket: BorrowedFd<'_>,
) -> io::Result<()> {
    let value = u64::from(fd_number(socket));
    let mut attr = element(map, &key, (&raw const value).addr());
    attr.__bindgen_anon_2.flags = u64::from(BPF_NOEXIST);
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// An element of a map, with where its value is or shall be.
fn element(map: BorrowedFd<'_>, key: &u32, value: usize) -> bpf_attr {
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = fd_number(map);
    attr.__bindgen_anon_2.key = std::ptr::from_ref(key).addr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value as u64;
    attr
}

/// Makes an array of one element, of `value_size` bytes or of maps like `of`
/// (`BPF_MAP_CREATE`).
pub(crate) fn new_array(value_size: u32, of: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let map_type = if of.is_some() {
        bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS
    } else {
        bpf_map_type::BPF_MAP_TYPE_ARRAY
    };
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_1.map_type = map_type as u32;
    attr.__bindgen_anon_1.key_size = 4;
    attr.__bindgen_anon_1.value_size = value_size;
    attr.__bindgen_anon_1.max_entries = 1;
    attr.__bindgen_anon_1.inner_map_fd = of.map_or(0, fd_number);
    bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr)
}

/// Pins a map with `text` as its only value at `path`: what people wrote, which
/// no program reads.
pub(crate) fn pin_text(text: &str, path: &Path) -> io::Result<()> {
    let map = new_array(u32::try_from(text.len()).map_err(io::Error::other)?, None)?;
    write_first(map.as_fd(), text.as_bytes())?;
    pin(map.as_fd(), path)
}

/// The text of a map that [`pin_text`] pinned.
pub(crate) fn pinned_text(path: &Path) -> io::Result<String> {
    let map = get_pinned(path)?;
    // SAFETY: all zero is a valid value of this plain struct.
    let mut info: bpf_map_info = unsafe { std::mem::zeroed() };
    get_info(map.as_fd(), &mut info)?;
    if (info.type_, info.key_size) != (bpf_map_type::BPF_MAP_TYPE_ARRAY as u32, 4) {
        return Err(io::Error::other("not a map of Interceptor's"));
    }
    // The kernel rounds a value's size up when it copies.
    let mut value = vec![0u8; (info.value_size as usize).next_multiple_of(8)];
    let mut attr = element(map.as_fd(), &0, value.as_mut_ptr().addr());
    bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr)?;
    value.truncate(info.value_size as usize);
    String::from_utf8(value).map_err(io::Error::other)
}

/// Waits until no program that runs now is still running.
///
/// The kernel itself waits so, for a grace period of RCU, when user space has
/// changed an element of a map of maps (`maybe_wait_bpf_programs`, Linux 4.20);
/// under RCU it runs every program that is attached here. membarrier(2) would do,
/// too, but not on a kernel with `nohz_full` processors.
pub(crate) fn wait_for_programs() -> io::Result<()> {
    let inner = new_array(4, None)?;
    let outer = new_array(4, Some(inner.as_fd()))?;
    write_first(outer.as_fd(), &fd_number(inner.as_fd()).to_ne_bytes())
}
