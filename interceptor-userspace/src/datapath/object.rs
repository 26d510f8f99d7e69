//! The kernel object: embedded in this binary, loaded once per pod.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
    thread,
};

use aya::{
    EbpfError,
    maps::{Map, MapData, MapError},
    programs::{ProgramError, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};
use aya_obj::{
    EbpfSectionKind, VerifierLog,
    generated::{
        bpf_attach_type::{
            self, BPF_CGROUP_GETSOCKOPT, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME,
            BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_SOCK_OPS,
            BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_RECVMSG,
            BPF_CGROUP_UDP6_SENDMSG, BPF_SK_LOOKUP, BPF_TRACE_ITER,
        },
        bpf_prog_type::{
            self, BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_PROG_TYPE_CGROUP_SOCKOPT,
            BPF_PROG_TYPE_SK_LOOKUP, BPF_PROG_TYPE_SOCK_OPS, BPF_PROG_TYPE_TRACING,
        },
    },
};

use interceptor_common::counters::MAX_COUNTERS;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use serde::Serialize;

use super::{
    bpf::{self, Link, NewProgram},
    kernel_types::Offsets,
    pins::map_pin,
};
use crate::{
    Error, Result,
    pod::{
        cgroup::Cgroup,
        netns::{Netns, NetnsId},
    },
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/interceptor-ebpf"));

/// The maps that are pinned, by their names.
pub(crate) const MAPS: [&str; 12] = [
    "ASKED",
    "ATTACHMENT",
    "COUNTERS",
    "DESTINATIONS",
    "GENERATION",
    "HANDSHAKES",
    "LISTENERS",
    "ORIGINS",
    "PASSING",
    "PREFIXES",
    "ROUTES",
    "SETTINGS",
];

/// A program and where it is attached.
#[derive(Debug)]
pub(crate) struct Hook {
    /// The name of the program and of its link's pin.
    pub(crate) program: &'static str,
    program_type: bpf_prog_type,
    attach_type: bpf_attach_type,
}

impl Hook {
    /// Whether it is attached to the network namespace; if not, to the cgroup.
    pub(crate) fn to_netns(&self) -> bool {
        self.attach_type as u32 == BPF_SK_LOOKUP as u32
    }

    /// Whether it is attached to nothing, and runs when its output is read.
    fn is_iterator(&self) -> bool {
        self.attach_type as u32 == BPF_TRACE_ITER as u32
    }
}

const fn hook(
    program: &'static str,
    program_type: bpf_prog_type,
    attach_type: bpf_attach_type,
) -> Hook {
    Hook {
        program,
        program_type,
        attach_type,
    }
}

/// The programs, in the order in which they are attached: connections are
/// redirected when all that they and the proxy need is there. Detaching goes the other way.
#[rustfmt::skip]
pub(crate) static LINKS: [Hook; 7] = [
    hook("sock_ops", BPF_PROG_TYPE_SOCK_OPS, BPF_CGROUP_SOCK_OPS),
    hook("getsockopt", BPF_PROG_TYPE_CGROUP_SOCKOPT, BPF_CGROUP_GETSOCKOPT),
    hook("getpeername4", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_GETPEERNAME),
    hook("getpeername6", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET6_GETPEERNAME),
    hook("find_listener", BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP),
    hook("connect4", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_CONNECT),
    hook("connect6", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET6_CONNECT),
];

/// The programs for DNS over UDP, which only pods that capture DNS have.
#[rustfmt::skip]
pub(crate) static DNS_LINKS: [Hook; 6] = [
    hook("udp_recvmsg4", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_UDP4_RECVMSG),
    hook("udp_recvmsg6", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_UDP6_RECVMSG),
    hook("udp_sendmsg4", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_UDP4_SENDMSG),
    hook("udp_sendmsg6", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_UDP6_SENDMSG),
    hook("udp_connect4", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_CONNECT),
    hook("udp_connect6", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET6_CONNECT),
];

/// The programs that tell of live connections, loaded when they are asked for.
#[rustfmt::skip]
pub(crate) static ITERATORS: [Hook; 2] = [
    hook("redirected", BPF_PROG_TYPE_TRACING, BPF_TRACE_ITER),
    hook("connected", BPF_PROG_TYPE_TRACING, BPF_TRACE_ITER),
];

/// aya-log's map.
const LOGS: &str = "AYA_LOGS";

/// What the kernel programs log. What is below the level is removed from the
/// programs when they are loaded, and costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum LogLevel {
    /// Nothing.
    #[default]
    Off = 0,
    /// What must not happen.
    Error = 1,
    /// Connections refused, listeners not registered.
    Warn = 2,
    /// Listeners too.
    Info = 3,
    /// Every decision too.
    Debug = 4,
    /// All there is.
    Trace = 5,
}

impl LogLevel {
    /// The level of this number.
    pub(crate) fn from_number(number: u64) -> Self {
        [
            Self::Off,
            Self::Error,
            Self::Warn,
            Self::Info,
            Self::Debug,
            Self::Trace,
        ]
        .into_iter()
        .find(|level| u64::from(*level as u8) == number)
        .unwrap_or_default()
    }
}

/// Where an object's maps come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Maps<'a> {
    /// They are made.
    New {
        /// How many counters there shall be.
        counters: u32,
    },
    /// They are those pinned in a pod's directory.
    Pinned(&'a Path),
}

/// Whose programs are loaded, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loading<'a> {
    /// The pod's network namespace.
    pub(crate) netns: NetnsId,
    /// What they log.
    pub(crate) log_level: LogLevel,
    /// Where their maps come from.
    pub(crate) maps: Maps<'a>,
    /// Whether the same programs run before these, on a cgroup below.
    pub(crate) after_another: bool,
    /// Whether connections may pass until the proxy listens.
    pub(crate) may_pass: bool,
}

impl Loading<'_> {
    /// For no pod.
    pub(crate) const NOWHERE: Self = Self {
        netns: NetnsId {
            device: 0,
            inode: 0,
        },
        log_level: LogLevel::Trace,
        maps: Maps::New {
            counters: MAX_COUNTERS,
        },
        after_another: false,
        may_pass: true,
    };
}

/// The object of one pod, in the kernel but attached to nothing.
#[derive(Debug)]
pub(crate) struct Object {
    maps: BTreeMap<String, Map>,
    programs: BTreeMap<&'static str, OwnedFd>,
}

impl Object {
    /// Loads the programs for `hooks` and creates their maps.
    ///
    /// By the library's parts: its loader as a whole would parse all types of
    /// the kernel, which takes longer than everything else.
    pub(crate) fn load<'a>(
        loading: Loading<'_>,
        hooks: impl Iterator<Item = &'a Hook>,
    ) -> Result<Self> {
        raise_locked_memory();
        let hooks: Vec<_> = hooks.collect();
        let offsets = if hooks.iter().any(|hook| hook.is_iterator()) {
            Offsets::for_iterators()
        } else {
            Offsets::of_running_kernel()
        }?;
        let mut object = aya_obj::Object::parse(OBJECT).map_err(EbpfError::from)?;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "an unsigned int in the kernel"
        )]
        let netns_inode = loading.netns.inode as u32;
        let mut globals = vec![
            ("NETNS_INODE", netns_inode.to_ne_bytes().to_vec()),
            ("HAS_SET_RETVAL", vec![u8::from(has_set_retval())]),
            (
                "HAS_INGRESS_IFINDEX",
                vec![u8::from(offsets.has_ingress_ifindex)],
            ),
            ("PAGE_SIZE", page_size().to_ne_bytes().to_vec()),
            ("AYA_LOG_LEVEL", vec![loading.log_level as u8]),
            ("AFTER_ANOTHER", vec![u8::from(loading.after_another)]),
            ("MAY_PASS", vec![u8::from(loading.may_pass)]),
        ];
        globals.extend(
            offsets
                .iter()
                .map(|(global, offset)| (*global, offset.to_ne_bytes().to_vec())),
        );
        let globals = globals
            .iter()
            .map(|(name, value)| (*name, (&value[..], true)));
        object
            .patch_map_data(globals.collect())
            .map_err(EbpfError::from)?;
        let types = load_types(&mut object)?;
        let maps = make_maps(&mut object, loading.log_level, loading.maps, &types)?;
        let programs = load_programs(&object, &hooks, &types, offsets)?;
        Ok(Self { maps, programs })
    }

    /// A map, by its name.
    pub(crate) fn map(&self, name: &str) -> &Map {
        self.maps.get(name).expect("it is in the object")
    }

    /// The map of the proxy's listeners. (aya's own type for it takes only
    /// values that user space can't read.)
    pub(crate) fn listeners(&self) -> BorrowedFd<'_> {
        match self.map("LISTENERS") {
            Map::SockMap(data) => data.fd().as_fd(),
            _ => unreachable!("it is a socket map"),
        }
    }

    /// A map, to write to it.
    pub(crate) fn map_mut<'a, T: TryFrom<&'a mut Map, Error = MapError>>(
        &'a mut self,
        name: &'static str,
    ) -> Result<T> {
        self.maps
            .get_mut(name)
            .expect("it is in the object")
            .try_into()
            .map_err(Error::map("opening", name))
    }

    /// A program, by its hook.
    pub(crate) fn program(&self, hook: &Hook) -> &OwnedFd {
        &self.programs[hook.program]
    }

    /// Attaches one program.
    pub(crate) fn attach(&self, hook: &Hook, cgroup: &Cgroup, netns: &Netns) -> Result<Link> {
        if !hook.to_netns() {
            return self.attach_to_cgroup(hook, cgroup);
        }
        let program = self.program(hook).as_fd();
        Link::create(program, netns.as_fd(), hook.attach_type).map_err(Error::system(format!(
            "attaching {} to the network namespace {}",
            hook.program,
            netns.given()
        )))
    }

    /// Attaches one program that belongs on a cgroup.
    pub(crate) fn attach_to_cgroup(&self, hook: &Hook, cgroup: &Cgroup) -> Result<Link> {
        let program = self.program(hook).as_fd();
        Link::create(program, cgroup.as_fd(), hook.attach_type).map_err(|error| {
            let name = format!("the cgroup {}", cgroup.path().display());
            // BPF_CGROUP_MAX_PROGS, 64 since Linux 4.15.
            if error.raw_os_error() == Some(libc::E2BIG) {
                return Error::TooManyPrograms {
                    program: hook.program,
                    target: name,
                };
            }
            if error.raw_os_error() == Some(libc::EPERM) {
                let owners = exclusive_owners(cgroup, hook.attach_type);
                if !owners.is_empty() {
                    return Error::Exclusive {
                        program: hook.program,
                        target: name,
                        owners: owners.join(", "),
                    };
                }
            }
            Error::system(format!("attaching {} to {name}", hook.program))(error)
        })
    }
}

/// Loads the object's own types, which describe its maps and functions.
fn load_types(object: &mut aya_obj::Object) -> Result<OwnedFd> {
    let features = aya::features().btf();
    let types = features
        .and_then(|features| object.fixup_and_sanitize_btf(features).transpose())
        .transpose()
        .map_err(EbpfError::from)?
        .map(aya_obj::btf::Btf::to_bytes)
        .unwrap_or_default();
    bpf::load_types(&types).map_err(Error::system("loading the programs' own types"))
}

/// Creates the maps, or opens those that are pinned, and tells the programs of
/// them.
fn make_maps(
    object: &mut aya_obj::Object,
    log_level: LogLevel,
    from: Maps<'_>,
    types: &OwnedFd,
) -> Result<BTreeMap<String, Map>> {
    let mut maps = Vec::new();
    for (name, mut definition) in object.maps.drain() {
        if let Maps::New { counters } = from
            && name == "COUNTERS"
        {
            definition.set_max_entries(counters);
        }
        let map = match from {
            Maps::Pinned(directory) if MAPS.contains(&name.as_str()) => {
                MapData::from_pin(map_pin(directory, &name))
            }
            // Nobody writes to it, and a ring buffer takes four pages at least.
            _ if name == LOGS && log_level == LogLevel::Off => bpf::new_array(4, None)
                .map_err(Error::system("making a map"))
                .map(MapData::from_fd)?,
            _ => MapData::create(definition.clone(), &name, Some(types.as_fd())),
        }
        .map_err(EbpfError::from)?;
        let failed = |error| Error::system(format!("filling the map {name}"))(error);
        if !definition.data().is_empty() {
            bpf::write_first(map.fd().as_fd(), definition.data()).map_err(failed)?;
        }
        if definition.section_kind() == EbpfSectionKind::Rodata {
            bpf::freeze(map.fd().as_fd()).map_err(failed)?;
        }
        maps.push((name, definition, map));
    }
    let sections = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    object
        .relocate_maps(
            maps.iter().map(|(name, definition, map)| {
                (name.as_str(), map.fd().as_fd().as_raw_fd(), definition)
            }),
            &sections,
        )
        .and_then(|()| object.relocate_calls(&sections))
        .map_err(EbpfError::from)?;
    maps.into_iter()
        .map(|(name, _, map)| {
            let map = Map::from_map_data(map).map_err(EbpfError::from)?;
            Ok((name, map))
        })
        .collect()
}

/// Loads all programs at once: they take the kernel's verifier the most time,
/// and it verifies on each CPU.
fn load_programs(
    object: &aya_obj::Object,
    hooks: &[&Hook],
    types: &OwnedFd,
    offsets: &Offsets,
) -> Result<BTreeMap<&'static str, OwnedFd>> {
    thread::scope(|scope| {
        let loading: Vec<_> = hooks
            .iter()
            .map(|hook| {
                let load = move || load_program(object, hook, types, offsets);
                (hook.program, scope.spawn(load))
            })
            .collect();
        loading
            .into_iter()
            .map(|(name, thread)| Ok((name, thread.join().expect("it doesn't panic")?)))
            .collect()
    })
}

fn load_program(
    object: &aya_obj::Object,
    hook: &Hook,
    types: &OwnedFd,
    offsets: &Offsets,
) -> Result<OwnedFd> {
    let program = &object.programs[hook.program];
    let function = &object.functions[&program.function_key()];
    bpf::load_program(&NewProgram {
        name: hook.program,
        program_type: hook.program_type,
        attach_type: hook.attach_type,
        license: &program.license,
        function,
        types: types.as_fd(),
        attach_type_number: offsets.iterator(hook.program),
    })
    .map_err(|(io_error, log)| Error::Program {
        program: hook.program,
        source: Box::new(ProgramError::LoadError {
            io_error,
            verifier_log: VerifierLog::new(log),
        }),
    })
}

/// A program of someone else's on a hook that we use.
#[derive(Debug)]
pub struct ForeignProgram {
    /// The kernel's number of it.
    pub id: u32,
    /// Its name, perhaps empty.
    pub name: String,
    /// Our name of the hook.
    pub hook: &'static str,
    /// Whether it was attached so that it admits no other.
    pub exclusive: bool,
}

/// The programs attached to `cgroup` itself on the hooks that we use, but for
/// our own.
pub fn foreign_programs(cgroup: &Cgroup) -> Vec<ForeignProgram> {
    let dns_alone = DNS_LINKS.iter().filter(|hook| {
        LINKS
            .iter()
            .all(|link| link.attach_type != hook.attach_type)
    });
    LINKS
        .iter()
        .chain(dns_alone)
        .filter(|hook| !hook.to_netns())
        .filter_map(|hook| {
            let (ids, exclusive) = bpf::attached_programs(cgroup.as_fd(), hook.attach_type).ok()?;
            Some(ids.into_iter().map(move |id| ForeignProgram {
                id,
                name: program_name(id).unwrap_or_default(),
                hook: hook.program,
                exclusive,
            }))
        })
        .flatten()
        .filter(|foreign| all_hooks().all(|hook| hook.program != foreign.name))
        .collect()
}

/// Whether the running kernel tells of all its types that the programs need.
///
/// # Errors
///
/// If it doesn't.
pub fn check_kernel_types() -> Result<()> {
    Offsets::of_running_kernel().map(drop)
}

/// What a program costs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ProgramSize {
    /// Its name.
    pub program: &'static str,
    /// How many instructions the verifier walked, which bounds how long it may
    /// run; none before Linux 5.16, which doesn't say.
    pub verified_instructions: Option<u32>,
    /// How many bytes of machine code it is.
    pub machine_code_bytes: u32,
}

/// Loads everything for no pod and at its largest, with all logging; attaches
/// nothing, and lets it go: whether the kernel accepts it, and at what cost.
///
/// # Errors
///
/// If the kernel doesn't accept it.
pub fn load_only() -> Result<Vec<ProgramSize>> {
    let hooks = || all_hooks().chain(&ITERATORS);
    let object = Object::load(Loading::NOWHERE, hooks())?;
    hooks()
        .map(|hook| {
            let info = bpf::program_info(object.program(hook).as_fd())
                .map_err(Error::system(format!("asking about {}", hook.program)))?;
            Ok(ProgramSize {
                program: hook.program,
                verified_instructions: Some(info.verified_insns).filter(|count| *count > 0),
                machine_code_bytes: info.jited_prog_len,
            })
        })
        .collect()
}

/// All hooks, in the order in which they are attached.
pub(crate) fn all_hooks() -> impl DoubleEndedIterator<Item = &'static Hook> {
    LINKS.iter().chain(&DNS_LINKS)
}

/// Who keeps others from attaching to `cgroup`: the exclusive programs on it
/// and above it.
fn exclusive_owners(cgroup: &Cgroup, attach_type: bpf_attach_type) -> Vec<String> {
    cgroup
        .with_ancestors()
        .filter_map(|cgroup| {
            let (programs, exclusive) = bpf::attached_programs(cgroup.as_fd(), attach_type).ok()?;
            exclusive.then(|| {
                let names: Vec<_> = programs
                    .into_iter()
                    .map(|id| match program_name(id) {
                        Some(name) => format!("`{name}` (program {id})"),
                        None => format!("program {id}"),
                    })
                    .collect();
                format!("{} on {}", names.join(" and "), cgroup.path().display())
            })
        })
        .collect()
}

fn program_name(id: u32) -> Option<String> {
    aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .find(|program| program.id() == id)?
        .name_as_str()
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
}

/// Lets this process lock as much memory as it may: before Linux 5.11 maps and
/// programs count as locked.
pub(crate) fn raise_locked_memory() {
    let resource = Resource::RLIMIT_MEMLOCK;
    let Ok((_, most)) = getrlimit(resource) else {
        return;
    };
    // Where it is too little, loading fails and says so.
    let _ = setrlimit(resource, RLIM_INFINITY, RLIM_INFINITY)
        .or_else(|_| setrlimit(resource, most, most));
}

/// Whether connect programs can say with which error connect() fails
/// (`bpf_set_retval`, Linux 5.18).
pub(crate) fn has_set_retval() -> bool {
    is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)
        .unwrap_or(false)
}

fn page_size() -> u32 {
    // SAFETY: asks for a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u32::try_from(size).unwrap_or(4096)
}
