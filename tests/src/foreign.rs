//! Kernel programs of other people, beside which Interceptor must work: a few
//! instructions each, loaded without a compiler.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use anyhow::{Context, Result};
use aya_obj::generated::{
    bpf_attach_type::{self, *},
    bpf_cmd,
    bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_SOCKMAP},
    bpf_prog_type::*,
};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

use crate::bpf::{bpf, bpf_fd, number, open_pin, zeroed};

/// Where a program is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// connect() with an `AF_INET` socket.
    Connect4,
    /// TCP's socket operations.
    SockOps,
    /// getsockopt().
    Getsockopt,
    /// getpeername() with an `AF_INET` socket.
    Getpeername4,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Connect4,
        Self::SockOps,
        Self::Getsockopt,
        Self::Getpeername4,
    ];

    const fn types(self) -> (u32, bpf_attach_type) {
        match self {
            Self::Connect4 => (
                BPF_PROG_TYPE_CGROUP_SOCK_ADDR as u32,
                BPF_CGROUP_INET4_CONNECT,
            ),
            Self::SockOps => (BPF_PROG_TYPE_SOCK_OPS as u32, BPF_CGROUP_SOCK_OPS),
            Self::Getsockopt => (BPF_PROG_TYPE_CGROUP_SOCKOPT as u32, BPF_CGROUP_GETSOCKOPT),
            Self::Getpeername4 => (
                BPF_PROG_TYPE_CGROUP_SOCK_ADDR as u32,
                BPF_CGROUP_INET4_GETPEERNAME,
            ),
        }
    }
}

/// How a program is attached to a cgroup, as in `BPF_PROG_ATTACH`'s flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Sharing {
    /// It admits no other program on the cgroup or below it.
    Exclusive = 0,
    /// It runs together with others.
    Multi = 2,
}

/// Puts a program that lets all pass in the place of that of a pinned link.
///
/// # Errors
///
/// If the link can't be opened, or the kernel refuses the program.
pub fn replace_program(link: &Path, hook: Hook) -> Result<()> {
    let (program_type, attach_type) = hook.types();
    let program = load("passes", program_type, attach_type, &[set(0, 1), exit()])
        .with_context(|| format!("load a program for {hook:?}"))?;
    let link = open_pin(link).with_context(|| format!("open the link {}", link.display()))?;
    let mut attr = zeroed();
    attr.link_update.link_fd = number(link.as_fd());
    attr.link_update.__bindgen_anon_1.new_prog_fd = number(program.as_fd());
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).context("replace the link's program")?;
    Ok(())
}

/// A program on a cgroup that counts its calls and lets all pass. Detached when
/// dropped.
#[derive(Debug)]
pub struct Counter {
    program: OwnedFd,
    count: OwnedFd,
    cgroup: OwnedFd,
    attach_type: bpf_attach_type,
}

impl Counter {
    /// Loads one under a name and attaches it to a cgroup.
    ///
    /// # Errors
    ///
    /// If the kernel refuses it.
    pub fn attach(
        name: &str,
        hook: Hook,
        cgroup: impl Into<OwnedFd>,
        how: Sharing,
    ) -> Result<Self> {
        let (program_type, attach_type) = hook.types();
        let count = create_map(BPF_MAP_TYPE_ARRAY as u32)?;
        // count[0] += 1; return 1;
        let instructions = [
            store_zero(),
            copy(2, 10),
            add(2, -4),
            load_map(1, count.as_fd())[0],
            load_map(1, count.as_fd())[1],
            call(MAP_LOOKUP_ELEM),
            jump_if_zero(0, 2),
            set(1, 1),
            atomic_add(0, 1),
            set(0, 1),
            exit(),
        ];
        let program = load(name, program_type, attach_type, &instructions)
            .with_context(|| format!("load a program for {hook:?}"))?;
        let cgroup = cgroup.into();
        let mut attr = zeroed();
        attr.__bindgen_anon_5.__bindgen_anon_1.target_fd = number(cgroup.as_fd());
        attr.__bindgen_anon_5.attach_bpf_fd = number(program.as_fd());
        attr.__bindgen_anon_5.attach_type = attach_type as u32;
        attr.__bindgen_anon_5.attach_flags = how as u32;
        bpf(bpf_cmd::BPF_PROG_ATTACH, &mut attr)
            .with_context(|| format!("attach a program for {hook:?}, {how:?}"))?;
        Ok(Self {
            program,
            count,
            cgroup,
            attach_type,
        })
    }

    /// How often it was called.
    ///
    /// # Errors
    ///
    /// If the map can't be read.
    pub fn calls(&self) -> Result<u64> {
        let (key, mut value) = (0u32, 0u64);
        let mut attr = zeroed();
        attr.__bindgen_anon_2.map_fd = number(self.count.as_fd());
        attr.__bindgen_anon_2.key = (&raw const key).addr() as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = (&raw mut value).addr() as u64;
        bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr).context("read a counter")?;
        Ok(value)
    }
}

impl Drop for Counter {
    #[expect(clippy::print_stderr, reason = "nothing else can be told from drop")]
    fn drop(&mut self) {
        let mut attr = zeroed();
        attr.__bindgen_anon_5.__bindgen_anon_1.target_fd = number(self.cgroup.as_fd());
        attr.__bindgen_anon_5.attach_bpf_fd = number(self.program.as_fd());
        attr.__bindgen_anon_5.attach_type = self.attach_type as u32;
        if let Err(error) = bpf(bpf_cmd::BPF_PROG_DETACH, &mut attr) {
            eprintln!("a foreign program stays attached: {error}");
        }
    }
}

/// A program on a network namespace that gives every connection to one port to
/// one listener. Detached when dropped.
#[derive(Debug)]
pub struct Steering {
    _link: OwnedFd,
    _program: OwnedFd,
    _listeners: OwnedFd,
}

impl Steering {
    /// Steers connections to `port` to `listener`.
    ///
    /// # Errors
    ///
    /// If the kernel refuses it.
    pub fn attach(netns: impl AsFd, port: u16, listener: impl AsFd) -> Result<Self> {
        let listeners = create_map(BPF_MAP_TYPE_SOCKMAP as u32)?;
        let (key, value) = (0u32, u64::from(number(listener.as_fd())));
        let mut attr = zeroed();
        attr.__bindgen_anon_2.map_fd = number(listeners.as_fd());
        attr.__bindgen_anon_2.key = (&raw const key).addr() as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = (&raw const value).addr() as u64;
        bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).context("put a listener into a map")?;

        const LOCAL_PORT: i16 = 60;
        let instructions = [
            copy(6, 1),
            read_word(2, 6, LOCAL_PORT),
            jump_unless(2, i32::from(port), 14),
            store_zero(),
            copy(2, 10),
            add(2, -4),
            load_map(1, listeners.as_fd())[0],
            load_map(1, listeners.as_fd())[1],
            call(MAP_LOOKUP_ELEM),
            jump_if_zero(0, 7),
            copy(7, 0),
            copy(1, 6),
            copy(2, 7),
            set(3, 0),
            call(SK_ASSIGN),
            copy(1, 7),
            call(SK_RELEASE),
            set(0, 1),
            exit(),
        ];
        let program = load(
            "foreign_lookup",
            BPF_PROG_TYPE_SK_LOOKUP as u32,
            BPF_SK_LOOKUP,
            &instructions,
        )
        .context("load a program for sk_lookup")?;
        let mut attr = zeroed();
        attr.link_create.__bindgen_anon_1.prog_fd = number(program.as_fd());
        attr.link_create.__bindgen_anon_2.target_fd = number(netns.as_fd());
        attr.link_create.attach_type = BPF_SK_LOOKUP as u32;
        let link = bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
            .context("attach a program for sk_lookup")?;
        Ok(Self {
            _link: link,
            _program: program,
            _listeners: listeners,
        })
    }
}

/// One element, with a 4 byte key and an 8 byte value.
fn create_map(kind: u32) -> Result<OwnedFd> {
    raise_locked_memory().context("raise the limit of locked memory")?;
    let mut attr = zeroed();
    attr.__bindgen_anon_1.map_type = kind;
    attr.__bindgen_anon_1.key_size = 4;
    attr.__bindgen_anon_1.value_size = 8;
    attr.__bindgen_anon_1.max_entries = 1;
    bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr).context("create a map")
}

fn load(
    name: &str,
    program_type: u32,
    attach_type: bpf_attach_type,
    instructions: &[u64],
) -> io::Result<OwnedFd> {
    raise_locked_memory()?;
    let mut attr = zeroed();
    attr.__bindgen_anon_3.prog_type = program_type;
    attr.__bindgen_anon_3.expected_attach_type = match attach_type {
        // This type of program has none.
        BPF_CGROUP_SOCK_OPS => 0,
        other => other as u32,
    };
    attr.__bindgen_anon_3.insns = instructions.as_ptr().addr() as u64;
    attr.__bindgen_anon_3.insn_cnt = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    attr.__bindgen_anon_3.license = c"GPL".as_ptr().addr() as u64;
    // SAFETY: the union's member that this command reads.
    let place = unsafe { &mut attr.__bindgen_anon_3.prog_name };
    for (place, byte) in place.iter_mut().take(15).zip(name.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

/// Before Linux 5.11 maps and programs count as locked memory.
fn raise_locked_memory() -> io::Result<()> {
    let resource = Resource::RLIMIT_MEMLOCK;
    setrlimit(resource, RLIM_INFINITY, RLIM_INFINITY).or_else(|_| {
        let (_, most) = getrlimit(resource)?;
        setrlimit(resource, most, most)
    })?;
    Ok(())
}

// Instructions (linux/bpf.h): code, registers, offset, number.

const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

const fn instruction(code: u8, destination: u8, source: u8, offset: i16, number: i32) -> u64 {
    let offset = offset.to_ne_bytes();
    let number = number.to_ne_bytes();
    u64::from_ne_bytes([
        code,
        if cfg!(target_endian = "little") {
            source << 4 | destination
        } else {
            destination << 4 | source
        },
        offset[0],
        offset[1],
        number[0],
        number[1],
        number[2],
        number[3],
    ])
}

const fn set(destination: u8, number: i32) -> u64 {
    instruction(0xb7, destination, 0, 0, number)
}

const fn copy(destination: u8, source: u8) -> u64 {
    instruction(0xbf, destination, source, 0, 0)
}

const fn add(destination: u8, number: i32) -> u64 {
    instruction(0x07, destination, 0, 0, number)
}

/// A zero word on top of the stack.
const fn store_zero() -> u64 {
    instruction(0x62, 10, 0, -4, 0)
}

const fn read_word(destination: u8, source: u8, offset: i16) -> u64 {
    instruction(0x61, destination, source, offset, 0)
}

/// Adds `source` to the 8 bytes that `destination` points to.
const fn atomic_add(destination: u8, source: u8) -> u64 {
    instruction(0xdb, destination, source, 0, 0)
}

fn load_map(destination: u8, map: BorrowedFd<'_>) -> [u64; 2] {
    const PSEUDO_MAP_FD: u8 = 1;
    [
        instruction(
            0x18,
            destination,
            PSEUDO_MAP_FD,
            0,
            number(map).cast_signed(),
        ),
        0,
    ]
}

const fn call(helper: i32) -> u64 {
    instruction(0x85, 0, 0, 0, helper)
}

const fn jump_if_zero(register: u8, over: i16) -> u64 {
    instruction(0x15, register, 0, over, 0)
}

const fn jump_unless(register: u8, number: i32, over: i16) -> u64 {
    instruction(0x55, register, 0, over, number)
}

const fn exit() -> u64 {
    instruction(0x95, 0, 0, 0, 0)
}
