//! The library's errors: what was tried, on what, and why it failed.

use std::{io, path::PathBuf};

use crate::pod::PodName;

/// A result with the library's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error with its causes in one line; a cause that the text names already isn't
/// named again.
pub(crate) fn in_one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// What can go wrong. The texts name the fix where there is one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that can't be a directory below bpffs.
    #[error(
        "`{name}` can't be a pod's name: use 1 to 128 letters, digits, `-` and `_` \
         (bpffs reserves the dot)"
    )]
    PodName {
        /// The name given.
        name: String,
    },

    /// A setting that can't be.
    #[error("{name}: `{value}` {problem}")]
    Setting {
        /// What is set.
        name: String,
        /// To what.
        value: String,
        /// Why it can't be, and what to give instead.
        problem: String,
    },

    /// The caller lacks a privilege.
    #[error(
        "needs root (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_PTRACE): run it with sudo"
    )]
    NotRoot,

    /// A path that is no directory of the cgroup v2 tree.
    #[error("{path} is not a cgroup v2 directory{why}: name the pod's directory below {mount}")]
    NotCgroup2 {
        /// The path given.
        path: PathBuf,
        /// What it is instead.
        why: &'static str,
        /// Where cgroup v2 is mounted.
        mount: String,
    },

    /// The root of the cgroup tree.
    #[error(
        "{path} is the root cgroup, which holds every process of the machine: name the pod's \
         own, or say --allow-host if you mean it"
    )]
    RootCgroup {
        /// The path given.
        path: PathBuf,
    },

    /// A path or process that has no network namespace.
    #[error(
        "{given} is no network namespace: give a path such as /run/netns/NAME or /proc/PID/ns/net, \
         or the PID of one of the pod's processes"
    )]
    NotNetns {
        /// What was given.
        given: String,
        /// Why it could not be opened, if that is the reason.
        #[source]
        source: Option<io::Error>,
    },

    /// The network namespace of the machine itself.
    #[error(
        "{given} is the machine's own network namespace: name the pod's, or say --allow-host if \
         you mean it"
    )]
    HostNetns {
        /// What was given.
        given: String,
    },

    /// The kernel gives no type information.
    #[error(
        "the kernel has no BTF at /sys/kernel/btf/vmlinux, or it lacks {missing}: Interceptor \
         needs a kernel built with CONFIG_DEBUG_INFO_BTF"
    )]
    Btf {
        /// What was looked for.
        missing: String,
        /// Why it could not be read, if that is the reason.
        #[source]
        source: Option<io::Error>,
    },

    /// A program or map that the kernel refused.
    #[error("loading the kernel programs")]
    Load(#[from] aya::EbpfError),

    /// A program that the kernel refused.
    #[error("loading the program {program}")]
    Program {
        /// The program's name.
        program: &'static str,
        /// The kernel's answer, with the verifier's log.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },

    /// The programs could not be attached because another program excludes others.
    #[error(
        "attaching {program} to {target}: a program attached exclusively to the cgroup or one \
         above it admits no other ({owners}): detach it, or have it attached with \
         BPF_F_ALLOW_MULTI"
    )]
    Exclusive {
        /// Our program's name.
        program: &'static str,
        /// The cgroup.
        target: String,
        /// The programs on the way, with their cgroups.
        owners: String,
    },

    /// The cgroup has as many programs of this kind as the kernel takes.
    #[error(
        "attaching {program} to {target}: it has 64 programs of this kind, the most that the \
         kernel takes: pods that wait there for their own cgroup are moved when it appears: \
         try again"
    )]
    TooManyPrograms {
        /// Our program's name.
        program: &'static str,
        /// The cgroup.
        target: String,
    },

    /// A system call that failed.
    #[error("{operation}")]
    System {
        /// What was tried, and on what.
        operation: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },

    /// A map that could not be read or written.
    #[error("{operation} the map {map}")]
    Map {
        /// What was tried.
        operation: &'static str,
        /// The map's name.
        map: &'static str,
        /// The kernel's answer.
        #[source]
        source: Box<aya::maps::MapError>,
    },

    /// Netlink failed.
    #[error("{operation} through netlink")]
    Netlink {
        /// What was tried.
        operation: String,
        /// The kernel's answer.
        #[source]
        source: Box<rtnetlink::Error>,
    },

    /// More routes than the map holds.
    #[error("the pod has {given} routes, more than {most}")]
    TooManyRoutes {
        /// How many there are.
        given: usize,
        /// How many there may be.
        most: u32,
    },

    /// The Kubernetes API server refused, or could not be asked.
    #[error("{operation}: {}", kubernetes_words(error))]
    Kubernetes {
        /// What was tried.
        operation: String,
        /// The server's answer, or why there is none.
        error: Box<kube::Error>,
    },

    /// The Kubernetes API server answered what nobody can read.
    #[error("{operation}: the answer can't be read: {problem}")]
    KubernetesAnswer {
        /// What was tried.
        operation: String,
        /// What is wrong with it.
        problem: String,
    },

    /// The pod is attached in another way.
    #[error(
        "the pod {pod} is attached already with another {what}: run `interceptor detach --pod \
         {pod}` first"
    )]
    AttachedOtherwise {
        /// The pod's name.
        pod: PodName,
        /// What differs.
        what: &'static str,
    },

    /// Pins of which some are missing or not ours.
    #[error(
        "the pins of the pod {pod} below {path} are not whole ({missing}): run `interceptor \
         detach --pod {pod}`, then attach it again"
    )]
    Damaged {
        /// The pod's name.
        pod: PodName,
        /// Its directory.
        path: PathBuf,
        /// What is missing or wrong.
        missing: String,
    },

    /// No such pod.
    #[error(
        "no pod {pod} is attached ({path} doesn't exist): `interceptor status` lists those that are"
    )]
    NotAttached {
        /// The pod's name.
        pod: PodName,
        /// Its directory.
        path: PathBuf,
    },

    /// There is a daemon already.
    #[error(
        "a daemon looks after the pins below {root} already{}: stop it first, or name other \
         --pins", pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    DaemonRuns {
        /// Its process, if it can be seen.
        pid: Option<i32>,
        /// The root of the pins.
        root: PathBuf,
    },

    /// A pod that a version of Interceptor attached with whose state this one can
    /// do nothing.
    #[error(
        "the pod {pod} was attached by {} version of Interceptor (its layout is {found}, this \
         one's {ours}): {}", if found > ours { "a newer" } else { "an older" },
        if found > ours {
            "run that version again, or detach the pod and attach it with this one"
        } else {
            "detach it and attach it again, best while it is being replaced"
        }
    )]
    Layout {
        /// The pod's name.
        pod: PodName,
        /// The layout of its state.
        found: u32,
        /// The layout that this version reads.
        ours: u32,
    },

    /// The directory for pins can't be used.
    #[error("{path} is not on a BPF file system: mount one with `mount -t bpf bpf /sys/fs/bpf`")]
    NotBpffs {
        /// The directory.
        path: PathBuf,
    },
}

/// What the API server says, or why it says nothing, in one line.
fn kubernetes_words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => {
            // Somebody's page about an error, if it isn't the API's own word.
            let message: String = status.message.chars().take(300).collect();
            format!("{} {}: {message}", status.code, status.reason)
        }
        error => in_one_line(error),
    }
}

/// The server's reason or, if it wasn't reached, the kernel's.
fn kubernetes_cause(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return match &*status.reason {
            // The client's word for an answer that isn't the API's.
            "" | "Failed to parse error data" => status.code.to_string(),
            reason => reason.to_owned(),
        };
    }
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(errno) = cause
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error)
        {
            return format!("{:?}", nix::errno::Errno::from_raw(errno));
        }
        source = cause.source();
    }
    match error {
        kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) => "malformed",
        kube::Error::Auth(_) => "credentials",
        _ => "connection",
    }
    .to_owned()
}

impl Error {
    /// What kind of error it is, in one word, for counting: the name of the kernel's
    /// error, if it is one.
    pub(crate) fn cause(&self) -> String {
        let of = |source: &io::Error| {
            source.raw_os_error().map_or_else(
                || "io".to_owned(),
                |errno| format!("{:?}", nix::errno::Errno::from_raw(errno)),
            )
        };
        match self {
            Self::System { source, .. } => of(source),
            Self::NotNetns {
                source: Some(source),
                ..
            } => of(source),
            Self::PodName { .. } | Self::Setting { .. } => "setting".to_owned(),
            Self::NotRoot => "not_root".to_owned(),
            Self::NotCgroup2 { .. } | Self::RootCgroup { .. } => "cgroup".to_owned(),
            Self::NotNetns { source: None, .. } | Self::HostNetns { .. } => "netns".to_owned(),
            Self::Btf { .. } => "btf".to_owned(),
            Self::Load(_) | Self::Program { .. } => "verifier".to_owned(),
            Self::Exclusive { .. } => "exclusive".to_owned(),
            Self::TooManyPrograms { .. } => "too_many_programs".to_owned(),
            Self::Map { .. } => "map".to_owned(),
            Self::Netlink { .. } => "netlink".to_owned(),
            Self::TooManyRoutes { .. } => "routes".to_owned(),
            Self::Kubernetes { error, .. } => kubernetes_cause(error),
            Self::KubernetesAnswer { .. } => "malformed".to_owned(),
            Self::AttachedOtherwise { .. } => "attached_otherwise".to_owned(),
            Self::Damaged { .. } => "damaged".to_owned(),
            Self::Layout { .. } => "layout".to_owned(),
            Self::NotAttached { .. } => "not_attached".to_owned(),
            Self::DaemonRuns { .. } => "daemon_runs".to_owned(),
            Self::NotBpffs { .. } => "not_bpffs".to_owned(),
        }
    }

    /// A setting that can't be.
    pub(crate) fn setting(
        name: impl Into<String>,
        value: impl ToString,
        problem: impl ToString,
    ) -> Self {
        Self::Setting {
            name: name.into(),
            value: value.to_string(),
            problem: problem.to_string(),
        }
    }

    /// A failed system call.
    pub(crate) fn system(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System {
            operation: operation.into(),
            source,
        }
    }

    /// A failed access to a map.
    pub(crate) fn map(
        operation: &'static str,
        map: &'static str,
    ) -> impl FnOnce(aya::maps::MapError) -> Self {
        move |source| Self::Map {
            operation,
            map,
            source: Box::new(source),
        }
    }
}
