//! What came out, for people and for programs.

use std::{collections::BTreeMap, fmt};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::{
    hooks::Hook,
    mode::{Mode, Path},
    rounds::Data,
    stats::{Spread, quantile},
};

/// All results.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    measures: Vec<Measure>,
    hooks: Vec<Hooks>,
    /// Bytes of kernel memory per pod.
    memory_per_pod: BTreeMap<String, f64>,
}

/// A measure on a path, in all modes.
#[derive(Debug, Serialize)]
struct Measure {
    path: String,
    measure: &'static str,
    /// What differs from 1 by no more is noise: as far as the ratio of direct
    /// to direct may be from 1.
    noise: f64,
    modes: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    mode: String,
    /// The median of all rounds, in the measure's own unit.
    value: f64,
    /// To `direct` of the same round.
    ratio: Spread,
    /// Whether the ratio differs from 1 by more than noise.
    differs: bool,
}

#[derive(Debug, Serialize)]
struct Hooks {
    mode: String,
    path: String,
    hooks: Vec<Hook>,
    ns_per_connection: f64,
}

impl Report {
    /// Compares each mode with `direct`, round by round.
    pub(crate) fn new(data: &Data) -> Self {
        let measures = data.measures().map(|(path, measure, modes)| {
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
                    differs: ratio.differs(noise),
                    ratio,
                }
            });
            Measure {
                path: path.to_string(),
                measure,
                noise,
                modes: rows.collect(),
            }
        });
        Self {
            measures: measures.collect(),
            hooks: Vec::new(),
            memory_per_pod: BTreeMap::new(),
        }
    }

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

    pub(crate) fn add_memory(&mut self, mode: Mode, bytes: f64) {
        self.memory_per_pod.insert(mode.to_string(), bytes);
    }

    /// The ratios by `<path>.<measure>.<mode>`, and `<path>.<measure>.noise`:
    /// by how much a ratio must differ from 1 to mean anything.
    pub(crate) fn ratios(&self) -> BTreeMap<String, f64> {
        let mut ratios = BTreeMap::new();
        for Measure {
            path,
            measure,
            noise,
            modes,
        } in &self.measures
        {
            for row in modes.iter().filter(|row| row.mode != "direct") {
                let key = format!("{path}.{measure}.{}", row.mode);
                ratios.insert(key, rounded(row.ratio.median));
            }
            ratios.insert(format!("{path}.{measure}.noise"), rounded(*noise));
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
            "PATH",
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
                    measure.path.clone(),
                    measure.measure.to_owned(),
                    row.mode.clone(),
                    format!("{:.0}", row.value),
                    format!("{median:.3}"),
                    format!("{low:.3}-{high:.3}"),
                    format!("{q1:.3}-{q3:.3}"),
                    format!("{:.3}", measure.noise),
                    rounds.to_string(),
                    if row.differs { "" } else { "none" }.to_owned(),
                ]);
            }
        }
        writeln!(f, "{}", table.trim_fmt())?;
        let mut table = new_table(&["MODE", "PATH", "HOOK", "CALLS", "NS/CALL", "NS"]);
        for hooks in &self.hooks {
            for hook in hooks
                .hooks
                .iter()
                .filter(|hook| hook.calls_per_connection > 0.0)
            {
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
        for (mode, bytes) in &self.memory_per_pod {
            writeln!(
                f,
                "\n{mode}: {:.0} KiB of kernel memory per pod",
                bytes / 1024.0
            )?;
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
