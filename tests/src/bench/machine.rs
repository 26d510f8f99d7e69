//! The machine on which it was measured.

use std::{collections::BTreeMap, fs, process::Command, thread};

use serde::Serialize;

use crate::command::run;

/// What the numbers depend on.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) memory_gib: f64,
    pub(crate) kernel: String,
    pub(crate) virtual_machine: bool,
    pub(crate) clock: String,
    /// What the kernel says of each of the CPU's weaknesses that it does
    /// something about.
    pub(crate) mitigations: BTreeMap<String, String>,
    pub(crate) iptables: String,
    /// How many tasks wanted a CPU, in the minute before: more than 0 disturbs.
    pub(crate) load: String,
}

impl Machine {
    /// This one, as far as it tells.
    pub(crate) fn this() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let line = |key: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(key));
            let value = line.and_then(|line| Some(line.split_once(':')?.1.trim()));
            value.unwrap_or_default().to_owned()
        };
        let memory = read("/proc/meminfo");
        let kilobytes = memory.split_whitespace().nth(1).unwrap_or_default();
        Self {
            cpu: line("model name"),
            cpus: thread::available_parallelism().map_or(0, usize::from),
            memory_gib: (kilobytes.parse().unwrap_or(0.0) / f64::from(1 << 20_u32)).round(),
            kernel: read("/proc/sys/kernel/osrelease"),
            virtual_machine: line("flags").split(' ').any(|flag| flag == "hypervisor"),
            clock: read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            mitigations: mitigations(),
            iptables: run(Command::new("iptables-nft").arg("--version"))
                .unwrap_or_default()
                .trim()
                .to_owned(),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
        }
    }
}

fn mitigations() -> BTreeMap<String, String> {
    let directory = fs::read_dir("/sys/devices/system/cpu/vulnerabilities");
    directory
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, read(&entry.path().display().to_string()))
        })
        .filter(|(_, state)| state.starts_with("Mitigation"))
        .collect()
}

/// A file's text; nothing if it can't be read.
fn read(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim_end().to_owned()
}
