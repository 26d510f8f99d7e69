//! What came out, for people and for programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::{
    attach::Attach,
    capacity::Capacity,
    hooks::Hook,
    machine::Machine,
    mode::{Mode, Path},
    rounds::Data,
    stats::{Spread, Verdict, quantile},
};

/// All results.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) measures: Vec<Measure>,
    pub(crate) hooks: Vec<Hooks>,
    pub(crate) capacity: Vec<Capacity>,
    pub(crate) attach: Vec<Attach>,
    /// Bytes of each process that can run for long.
    pub(crate) resident: BTreeMap<&'static str, f64>,
    pub(crate) not_measured: Vec<&'static str>,
}

/// A measure of a scenario, in all modes.
#[derive(Debug, Serialize)]
pub(crate) struct Measure {
    /// A path, or a real proxy.
    pub(crate) scenario: &'static str,
    pub(crate) measure: &'static str,
    /// What differs from 1 by no more is noise: as far as the ratio of direct
    /// to direct may be from 1.
    pub(crate) noise: f64,
    pub(crate) modes: Vec<Row>,
}

/// A mode's part of a measure.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) mode: String,
    /// The median of all rounds, in the measure's own unit.
    pub(crate) value: f64,
    /// To `direct` of the same round.
    pub(crate) ratio: Spread,
    /// Whether the ratio differs from 1 by more than noise.
    pub(crate) verdict: Verdict,
}

/// A mode's hooks on a path.
#[derive(Debug, Serialize)]
pub(crate) struct Hooks {
    pub(crate) mode: String,
    pub(crate) path: String,
    pub(crate) hooks: Vec<Hook>,
    pub(crate) ns_per_connection: f64,
}

impl Hooks {
    /// Those that were called.
    pub(crate) fn called(&self) -> impl Iterator<Item = &Hook> {
        self.hooks
            .iter()
            .filter(|hook| hook.calls_per_connection > 0.0)
    }
}

impl Report {
    /// Compares each mode with `direct`, round by round.
    pub(crate) fn new(machine: Machine, data: &Data) -> Self {
        let measures = data.measures().map(|(scenario, measure, modes)| {
            let direct = modes.iter().find(|(mode, _)| *mode == Mode::Direct);
            let ratio = |series: &[f64]| {
                let direct = direct.map_or(&[][..], |(_, series)| series);
                let ratios: Vec<f64> = series.iter().zip(direct).map(|(x, d)| x / d).collect();
                Spread::of(&ratios)
            };
            let noise = modes
                .iter()
                .find(|(mode, _)| *mode == Mode::DirectAgain)
                .map_or(f64::INFINITY, |(_, series)| {
                    ratio(series).distance_from_one()
                });
            let rows = modes.iter().map(|(mode, series)| {
                let ratio = ratio(series);
                Row {
                    mode: mode.to_string(),
                    value: quantile(series, 0.5),
                    verdict: ratio.verdict(noise),
                    ratio,
                }
            });
            Measure {
                scenario,
                measure,
                noise,
                modes: rows.collect(),
            }
        });
        Self {
            machine,
            measures: measures.collect(),
            hooks: Vec::new(),
            capacity: Vec::new(),
            attach: Vec::new(),
            resident: BTreeMap::new(),
            not_measured: vec![
                "client and proxy on different CPUs: waking a CPU takes longer than a connection",
                "kernel memory of iptables and of connection tracking",
                "other kernels, and machines that aren't virtual",
            ],
        }
    }

    /// Adds what a mode's hooks do on a path.
    pub(crate) fn add_hooks(&mut self, mode: Mode, path: Path, hooks: Vec<Hook>) {
        self.hooks.push(Hooks {
            mode: mode.to_string(),
            path: path.to_string(),
            ns_per_connection: hooks
                .iter()
                .map(|hook| hook.calls_per_connection * hook.ns_per_call)
                .sum(),
            hooks,
        });
    }

    /// The scenarios that were measured.
    pub(crate) fn scenarios(&self) -> BTreeSet<&'static str> {
        self.measures
            .iter()
            .map(|measure| measure.scenario)
            .collect()
    }

    /// The ratios by `<scenario>.<measure>.<mode>`, and `<scenario>.<measure>.noise`:
    /// by how much a ratio must differ from 1 to mean anything.
    pub(crate) fn ratios(&self) -> BTreeMap<String, f64> {
        let mut ratios = BTreeMap::new();
        for Measure {
            scenario,
            measure,
            noise,
            modes,
        } in &self.measures
        {
            for row in modes.iter().filter(|row| row.mode != "direct") {
                let key = format!("{scenario}.{measure}.{}", row.mode);
                ratios.insert(key, rounded(row.ratio.median));
            }
            ratios.insert(format!("{scenario}.{measure}.noise"), rounded(*noise));
        }
        ratios
    }
}

fn rounded(ratio: f64) -> f64 {
    (ratio * 1e4).round() / 1e4
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = new_table(&[
            "SCENARIO",
            "MEASURE",
            "MODE",
            "VALUE",
            "RATIO",
            "95 %",
            "QUARTILES",
            "NOISE",
            "ROUNDS",
            "",
        ]);
        for measure in &self.measures {
            for row in &measure.modes {
                let Spread {
                    median,
                    quartiles: [q1, q3],
                    confidence: [low, high],
                    rounds,
                } = row.ratio;
                table.add_row([
                    measure.scenario.to_owned(),
                    measure.measure.to_owned(),
                    row.mode.clone(),
                    format!("{:.0}", row.value),
                    format!("{median:.3}"),
                    format!("{low:.3}-{high:.3}"),
                    format!("{q1:.3}-{q3:.3}"),
                    format!("{:.3}", measure.noise),
                    rounds.to_string(),
                    row.verdict.remark().to_owned(),
                ]);
            }
        }
        writeln!(f, "{}", table.trim_fmt())?;
        let mut table = new_table(&["MODE", "PATH", "HOOK", "CALLS", "NS/CALL", "NS"]);
        for hooks in &self.hooks {
            for hook in hooks.called() {
                table.add_row([
                    hooks.mode.clone(),
                    hooks.path.clone(),
                    hook.program.clone(),
                    format!("{:.2}", hook.calls_per_connection),
                    format!("{:.0}", hook.ns_per_call),
                    format!("{:.0}", hook.calls_per_connection * hook.ns_per_call),
                ]);
            }
            table.add_row([
                hooks.mode.clone(),
                hooks.path.clone(),
                "all".to_owned(),
                String::new(),
                String::new(),
                format!("{:.0}", hooks.ns_per_connection),
            ]);
        }
        writeln!(f, "\n{}", table.trim_fmt())?;
        if !self.capacity.is_empty() {
            let mut table = new_table(&["MODE", "PORTS", "DESTINATIONS", "OPEN", "THEN"]);
            for capacity in &self.capacity {
                table.add_row([
                    capacity.mode.clone(),
                    capacity.ports.to_string(),
                    capacity.destinations.to_string(),
                    capacity.open.to_string(),
                    capacity
                        .failure
                        .clone()
                        .unwrap_or_else(|| "no more were tried".to_owned()),
                ]);
            }
            writeln!(f, "\n{}", table.trim_fmt())?;
        }
        let mut table = new_table(&["MODE", "PODS", "ATTACH P50", "P99", "KERNEL MEMORY"]);
        for attach in &self.attach {
            table.add_row([
                attach.mode.clone(),
                attach.pods.to_string(),
                format!("{:.1} ms", attach.p50_ms),
                format!("{:.1} ms", attach.p99_ms),
                attach.bytes_per_pod.map_or_else(
                    || "-".to_owned(),
                    |bytes| format!("{:.0} KiB", bytes / 1024.0),
                ),
            ]);
        }
        writeln!(f, "\n{}", table.trim_fmt())?;
        for (process, bytes) in &self.resident {
            writeln!(
                f,
                "\n{process}: {:.1} MiB resident",
                bytes / f64::from(1 << 20_u32)
            )?;
        }
        writeln!(f, "\nNo process of Interceptor's has to run.")?;
        writeln!(f, "\nNot measured:")?;
        for what in &self.not_measured {
            writeln!(f, "- {what}")?;
        }
        Ok(())
    }
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Left);
    }
    table
}
