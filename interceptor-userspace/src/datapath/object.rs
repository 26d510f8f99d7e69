//! The kernel object: embedded in this binary, loaded once per pod.

use std::{os::fd::AsFd as _, path::Path};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Map, MapError},
    programs::{Program, ProgramError, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};
use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_GETSOCKOPT, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME,
    BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_SOCK_OPS,
    BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_RECVMSG,
    BPF_CGROUP_UDP6_SENDMSG, BPF_SK_LOOKUP,
};

use interceptor_common::counters::MAX_COUNTERS;
use serde::Serialize;

use super::{bpf::Link, kernel_types::Offsets, pins::map_pin};
use crate::{
    Error, Result,
    pod::{
        cgroup::Cgroup,
        netns::{Netns, NetnsId},
    },
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/interceptor-ebpf"));

/// The maps that are pinned, by their names.
pub(crate) const MAPS: [&str; 10] = [
    "ASKED",
    "ATTACHMENT",
    "COUNTERS",
    "GENERATION",
    "HANDSHAKES",
    "LISTENERS",
    "ORIGINS",
    "PREFIXES",
    "ROUTES",
    "SETTINGS",
];

/// A program and where it is attached.
#[derive(Debug)]
pub(crate) struct Hook {
    /// The name of the program and of its link's pin.
    pub(crate) program: &'static str,
    attach_type: bpf_attach_type,
    to_netns: bool,
}

const fn cgroup_hook(program: &'static str, attach_type: bpf_attach_type) -> Hook {
    Hook {
        program,
        attach_type,
        to_netns: false,
    }
}

/// The programs, in the order in which they are attached: connections are
/// redirected when all that they need is there. Detaching goes the other way.
pub(crate) const LINKS: [Hook; 7] = [
    cgroup_hook("sock_ops", BPF_CGROUP_SOCK_OPS),
    Hook {
        program: "find_listener",
        attach_type: BPF_SK_LOOKUP,
        to_netns: true,
    },
    cgroup_hook("getsockopt", BPF_CGROUP_GETSOCKOPT),
    cgroup_hook("getpeername4", BPF_CGROUP_INET4_GETPEERNAME),
    cgroup_hook("getpeername6", BPF_CGROUP_INET6_GETPEERNAME),
    cgroup_hook("connect4", BPF_CGROUP_INET4_CONNECT),
    cgroup_hook("connect6", BPF_CGROUP_INET6_CONNECT),
];

/// The programs for DNS over UDP, which only pods that capture DNS have.
pub(crate) const DNS_LINKS: [Hook; 6] = [
    cgroup_hook("udp_recvmsg4", BPF_CGROUP_UDP4_RECVMSG),
    cgroup_hook("udp_recvmsg6", BPF_CGROUP_UDP6_RECVMSG),
    cgroup_hook("udp_sendmsg4", BPF_CGROUP_UDP4_SENDMSG),
    cgroup_hook("udp_sendmsg6", BPF_CGROUP_UDP6_SENDMSG),
    cgroup_hook("udp_connect4", BPF_CGROUP_INET4_CONNECT),
    cgroup_hook("udp_connect6", BPF_CGROUP_INET6_CONNECT),
];

/// The iterator program that finds listeners older than the attachment.
const LISTENER_ITERATOR: &str = "register_listeners";

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

/// The object of one pod, in the kernel but attached to nothing.
#[derive(Debug)]
pub(crate) struct Object(Ebpf);

impl Object {
    /// Loads the programs for `hooks`, and the iterator, and creates their maps.
    pub(crate) fn load<'a>(
        netns: NetnsId,
        log_level: LogLevel,
        maps: Maps<'_>,
        hooks: impl Iterator<Item = &'a Hook>,
    ) -> Result<Self> {
        let offsets = Offsets::of_running_kernel()?;
        let btf = Btf::from_sys_fs().map_err(|error| Error::Load(error.into()))?;
        let level = log_level as u8;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "an unsigned int in the kernel"
        )]
        let netns_inode = netns.inode as u32;
        let has_set_retval = u8::from(has_set_retval());
        let has_ingress_ifindex = u8::from(has_ingress_ifindex());
        let mut loader = EbpfLoader::new();
        loader
            .btf(Some(&btf))
            .override_global("NETNS_INODE", &netns_inode, true)
            .override_global("HAS_SET_RETVAL", &has_set_retval, true)
            .override_global("HAS_INGRESS_IFINDEX", &has_ingress_ifindex, true)
            .override_global("AYA_LOG_LEVEL", &level, true);
        match maps {
            Maps::New { counters } => {
                loader.map_max_entries("COUNTERS", counters);
            }
            Maps::Pinned(directory) => {
                for name in MAPS {
                    loader.map_pin_path(name, map_pin(directory, name));
                }
            }
        }
        for (global, offset) in offsets.iter() {
            loader.override_global(global, offset, true);
        }
        if log_level == LogLevel::Off {
            // Nobody writes to it: the least that a ring buffer can have.
            loader.map_max_entries(LOGS, page_size());
        }
        let mut object = Self(loader.load(OBJECT)?);
        for program in names(hooks) {
            object
                .load_program(program, &btf)
                .map_err(|error| Error::Program {
                    program,
                    source: Box::new(error),
                })?;
        }
        Ok(object)
    }

    fn load_program(&mut self, name: &str, btf: &Btf) -> Result<(), ProgramError> {
        match self.0.program_mut(name).expect("it is in the object") {
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSockopt(program) => program.load(),
            Program::SockOps(program) => program.load(),
            Program::SkLookup(program) => program.load(),
            Program::Iter(program) => program.load("tcp", btf),
            _ => unreachable!("the object has no other programs"),
        }
    }

    /// A map, by its name.
    pub(crate) fn map(&self, name: &str) -> &Map {
        self.0.map(name).expect("it is in the object")
    }

    /// A map, to write to it.
    pub(crate) fn map_mut<'a, T: TryFrom<&'a mut Map, Error = MapError>>(
        &'a mut self,
        name: &'static str,
    ) -> Result<T> {
        self.0
            .map_mut(name)
            .expect("it is in the object")
            .try_into()
            .map_err(Error::map("opening", name))
    }

    /// Attaches one program.
    pub(crate) fn attach(&self, hook: &Hook, cgroup: &Cgroup, netns: &Netns) -> Result<Link> {
        let program = self
            .0
            .program(hook.program)
            .expect("it is in the object")
            .fd()
            .map_err(|error| Error::Program {
                program: hook.program,
                source: Box::new(error),
            })?;
        let (target, name) = if hook.to_netns {
            (
                netns.as_fd(),
                format!("the network namespace {}", netns.given()),
            )
        } else {
            (
                cgroup.as_fd(),
                format!("the cgroup {}", cgroup.path().display()),
            )
        };
        Link::create(program.as_fd(), target, hook.attach_type).map_err(|error| {
            if !hook.to_netns && error.raw_os_error() == Some(libc::EPERM) {
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

    /// Registers the proxy's listeners that exist already.
    pub(crate) fn register_listeners(&mut self, netns: &Netns) -> Result<()> {
        let Some(Program::Iter(iterator)) = self.0.program_mut(LISTENER_ITERATOR) else {
            unreachable!("it is in the object")
        };
        let failed = |error: ProgramError| Error::Program {
            program: LISTENER_ITERATOR,
            source: Box::new(error),
        };
        let link = iterator.attach().map_err(failed)?;
        let link = iterator.take_link(link).map_err(failed)?;
        // The iterator walks the namespace of the thread that opens it.
        netns.enter(|| {
            let operation = "looking for listeners with a BPF iterator";
            let mut file = link
                .into_file()
                .map_err(|error| Error::system(operation)(std::io::Error::other(error)))?;
            std::io::copy(&mut file, &mut std::io::sink())
                .map(drop)
                .map_err(Error::system(operation))
        })
    }
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
        .filter(|hook| !hook.to_netns)
        .filter_map(|hook| {
            let (ids, exclusive) =
                super::bpf::attached_programs(cgroup.as_fd(), hook.attach_type).ok()?;
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
    let nowhere = NetnsId {
        device: 0,
        inode: 0,
    };
    let object = Object::load(
        nowhere,
        LogLevel::Trace,
        Maps::New {
            counters: MAX_COUNTERS,
        },
        all_hooks(),
    )?;
    names(all_hooks())
        .map(|name| {
            let info = object
                .0
                .program(name)
                .expect("it is in the object")
                .info()
                .map_err(|error| Error::Program {
                    program: name,
                    source: Box::new(error),
                })?;
            Ok(ProgramSize {
                program: name,
                verified_instructions: info.verified_instruction_count(),
                machine_code_bytes: info.size_jitted(),
            })
        })
        .collect()
}

/// The names of the hooks' programs and of the iterator.
fn names<'a>(hooks: impl Iterator<Item = &'a Hook>) -> impl Iterator<Item = &'static str> {
    hooks.map(|hook| hook.program).chain([LISTENER_ITERATOR])
}

/// All hooks.
fn all_hooks() -> impl Iterator<Item = &'static Hook> {
    LINKS.iter().chain(&DNS_LINKS)
}

/// Who keeps others from attaching to `cgroup`: the exclusive programs on it
/// and above it.
fn exclusive_owners(cgroup: &Cgroup, attach_type: bpf_attach_type) -> Vec<String> {
    cgroup
        .with_ancestors()
        .filter_map(|cgroup| {
            let (programs, exclusive) =
                super::bpf::attached_programs(cgroup.as_fd(), attach_type).ok()?;
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

/// Whether connect programs can say with which error connect() fails.
fn has_set_retval() -> bool {
    is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)
        .unwrap_or(false)
}

/// Whether sk_lookup programs are told which interface a connection arrives by
/// (Linux 5.17).
pub(crate) fn has_ingress_ifindex() -> bool {
    let Ok(system) = nix::sys::utsname::uname() else {
        return false;
    };
    let mut numbers = system
        .release()
        .to_str()
        .unwrap_or_default()
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(5), Some(17))
}

fn page_size() -> u32 {
    // SAFETY: asks for a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u32::try_from(size).unwrap_or(4096)
}
