//! Rounds: each measures everything once in every mode, one mode right after
//! the other, in an order that changes. So modes are compared under the same
//! conditions, whatever else the machine is doing.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Context as _, Result};

use super::{
    load::{Close, Targets},
    mode::{Mode, Path},
    signals,
    stage::Stage,
    worker::{Job, Measured},
};

/// A measure's values, one of each round.
pub(crate) type Series = Vec<f64>;

/// What was measured.
#[derive(Debug, Default)]
pub(crate) struct Data {
    series: BTreeMap<(&'static str, &'static str), Vec<(Mode, Series)>>,
}

impl Data {
    /// Adds what a round has measured of a scenario (a path, or a real proxy).
    pub(crate) fn add(
        &mut self,
        scenario: &'static str,
        measure: &'static str,
        mode: Mode,
        value: f64,
    ) {
        let modes = self.series.entry((scenario, measure)).or_default();
        match modes.iter_mut().find(|(of, _)| *of == mode) {
            Some((_, series)) => series.push(value),
            None => modes.push((mode, vec![value])),
        }
    }

    /// All measures, and for each the modes with their values.
    pub(crate) fn measures(
        &self,
    ) -> impl Iterator<Item = (&'static str, &'static str, &[(Mode, Series)])> {
        self.series
            .iter()
            .map(|((scenario, measure), modes)| (*scenario, *measure, modes.as_slice()))
    }
}

/// A measure of what a job took.
type Value = fn(&Measured) -> f64;

/// A job that every mode does in a round.
struct Step {
    job: fn(Path, Mode) -> Job,
    /// On which paths.
    paths: &'static [Path],
    /// In each how-manieth round, because it takes long.
    every: usize,
    /// What is to be done before.
    before: Before,
    /// Which measures come out of it.
    measures: &'static [(&'static str, Value)],
}

/// What happens before a job, and isn't measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    /// Ends what is left in `TIME_WAIT`.
    Flush,
    /// Has that many connections be in `TIME_WAIT`.
    Fill(u32),
}

/// Of the 28,232 ports to connect from, as the kernel has it by default. It
/// first tries each second one: when none of these is left, every connect()
/// to the same destination looks at 14,116 ports in vain.
const TIME_WAITS: u32 = 12_000;

/// Where the same process is client and proxy.
const ONE_POD: &[Path] = &[Path::Outbound, Path::Inbound];
/// The same, over IPv6 too.
const BOTH_FAMILIES: &[Path] = &[Path::Outbound, Path::OutboundV6, Path::Inbound];

const STEPS: &[Step] = &[
    Step {
        job: |path, mode| connections(path.targets(mode), Close::Rst, 2000),
        paths: BOTH_FAMILIES,
        every: 1,
        before: Before::Nothing,
        measures: &[
            ("connect_p50", |m| m.p50_ns),
            ("connect_p99", |m| m.p99_ns),
            ("connect_close_rst", |m| m.unit_ns),
        ],
    },
    Step {
        job: |path, mode| connections(path.targets(mode), Close::Fin, 2000),
        paths: BOTH_FAMILIES,
        every: 1,
        before: Before::Flush,
        measures: &[("connect_close_fin", |m| m.unit_ns)],
    },
    Step {
        job: |path, mode| connections(path.targets(mode), Close::Fin, 1000),
        paths: ONE_POD,
        every: 8,
        before: Before::Fill(TIME_WAITS),
        measures: &[("connect_close_fin_timewait", |m| m.unit_ns)],
    },
    Step {
        job: |path, mode| connections(path.many_targets(mode), Close::Rst, 2000),
        paths: &[Path::Outbound],
        every: 1,
        before: Before::Nothing,
        measures: &[("connect_close_rst_many", |m| m.unit_ns)],
    },
    Step {
        job: |path, mode| Job::Connections {
            to: path.targets(mode),
            close: Close::Rst,
            request: true,
            count: if path == Path::Pair { 500 } else { 2000 },
        },
        paths: &[Path::Outbound, Path::Inbound, Path::Pair],
        every: 1,
        before: Before::Nothing,
        measures: &[("connect_request_close", |m| m.unit_ns)],
    },
    // Long, because the machine's time has a resolution of 10 ms.
    Step {
        job: |path, mode| connections(path.targets(mode), Close::Rst, 20_000),
        paths: ONE_POD,
        every: 8,
        before: Before::Nothing,
        measures: &[
            ("cpu_per_connection", |m| m.cpu_ns),
            ("machine_per_connection", |m| {
                m.machine_ns / f64::from(m.units)
            }),
        ],
    },
    Step {
        job: |path, mode| Job::Rate {
            to: path.targets(mode),
            count: 2000,
        },
        paths: ONE_POD,
        every: 2,
        before: Before::Nothing,
        measures: &[("connections_per_second", |m| 1e9 / m.unit_ns)],
    },
    Step {
        job: |path, mode| Job::RoundTrips {
            to: path.targets(mode),
            count: if path == Path::Pair { 1000 } else { 4000 },
        },
        paths: &[Path::Outbound, Path::Inbound, Path::Pair],
        every: 1,
        before: Before::Nothing,
        measures: &[("established_round_trip", |m| m.unit_ns)],
    },
    Step {
        job: |path, mode| Job::Bulk {
            to: path.targets(mode),
            mebibytes: if path == Path::Pair { 16 } else { 128 },
        },
        paths: &[Path::Outbound, Path::Inbound, Path::Pair],
        every: 1,
        before: Before::Nothing,
        measures: &[("established_mib_per_second", |m| 1e9 / m.unit_ns)],
    },
    Step {
        job: |path, mode| Job::Bulk {
            to: path.targets(mode),
            mebibytes: 512,
        },
        paths: ONE_POD,
        every: 8,
        before: Before::Nothing,
        measures: &[
            ("cpu_per_gib", |m| m.cpu_ns * 1024.0),
            ("machine_per_gib", |m| m.machine_ns * 2.0),
        ],
    },
];

fn connections(to: Targets, close: Close, count: u32) -> Job {
    Job::Connections {
        to,
        close,
        request: false,
        count,
    }
}

/// Makes rounds until the time is up or there are enough.
#[expect(clippy::print_stderr, reason = "progress")]
pub(crate) fn run(stages: &mut [Stage], most: usize, until: Instant) -> Result<Data> {
    let mut data = Data::default();
    let mut said = Instant::now();
    for round in 0..most {
        if Instant::now() > until {
            break;
        }
        if said.elapsed().as_secs() >= 5 {
            said = Instant::now();
            eprintln!("bench: round {}", round + 1);
        }
        for path in Path::ALL {
            for step in STEPS
                .iter()
                .filter(|step| round % step.every == 0 && step.paths.contains(&path))
            {
                for turn in 0..stages.len() {
                    signals::check()?;
                    let stage = &mut stages[whose_turn(turn, round, stages.len())];
                    let mode = stage.mode;
                    let measured = step
                        .run(path, stage)
                        .with_context(|| format!("{path}, {mode}"))?;
                    for (name, value) in step.measures {
                        data.add(path.name(), name, mode, value(&measured));
                    }
                }
            }
        }
    }
    Ok(data)
}

/// Which of so many modes has a turn in a round. Each mode comes first in its
/// turn, and each comes before each other as often as after it.
pub(crate) const fn whose_turn(turn: usize, round: usize, modes: usize) -> usize {
    let turn = if round.is_multiple_of(2) {
        turn
    } else {
        modes - 1 - turn
    };
    (turn + round / 2) % modes
}

impl Step {
    fn run(&self, path: Path, stage: &mut Stage) -> Result<Measured> {
        let mode = stage.mode;
        if self.before != Before::Nothing {
            stage.flush()?;
        }
        if let Before::Fill(count) = self.before {
            stage.worker(path).run(Job::Connections {
                to: path.targets(mode),
                close: Close::Fin,
                request: false,
                count,
            })?;
        }
        stage.worker(path).run((self.job)(path, mode))
    }
}
