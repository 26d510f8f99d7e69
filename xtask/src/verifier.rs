//! `cargo xtask verifier`: what the kernel programs cost each kernel's verifier,
//! and that it doesn't grow unnoticed.

use std::{collections::BTreeMap, fs, process::ExitCode};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{process::workspace, vm};

/// Below the workspace.
const RECORD: &str = "docs/verifier.json";

/// Against which kernels, and what to do with the result.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The kernels: versions (6.1), `newest` or `all`
    #[arg(value_name = "KERNELS", value_delimiter = ',', default_value = "all")]
    kernels: Vec<vm::Wanted>,
    /// Make the result the record
    #[arg(long)]
    write: bool,
}

/// By kernel, then by program.
type Costs = BTreeMap<String, BTreeMap<String, Cost>>;

/// What a program costs, at its largest: with all logging.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Cost {
    /// How many instructions the verifier walked; none before Linux 5.16, which
    /// doesn't say.
    verified_instructions: Option<u64>,
    machine_code_bytes: u64,
}

/// Loads every program on each kernel, prints what that costs, and fails if it
/// is more than a tenth above the record.
///
/// # Errors
///
/// If a kernel doesn't accept a program, or one can't be booted.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let measured: Costs = vm::outputs(&args.kernels, &["check", "-o", "json"])?
        .into_iter()
        .map(|(kernel, output)| {
            let costs = costs(&output).with_context(|| format!("kernel {kernel}"))?;
            Ok((kernel, costs))
        })
        .collect::<Result<_>>()?;
    let path = workspace().join(RECORD);
    if args.write {
        let mut record = read_record().unwrap_or_default();
        record.extend(measured.clone());
        let text = serde_json::to_string_pretty(&record).context("write JSON")? + "\n";
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    let record = read_record()?;
    println!("kernel  program             verified instructions  bytes of machine code");
    for (kernel, programs) in &measured {
        for (program, cost) in programs {
            let instructions = cost
                .verified_instructions
                .map_or_else(|| "not told".to_owned(), |number| number.to_string());
            println!(
                "{kernel:<6}  {program:<18}  {instructions:>21}  {:>21}",
                cost.machine_code_bytes
            );
        }
    }
    let differences = differences(&measured, &record);
    for difference in &differences {
        eprintln!("verifier: {difference}");
    }
    if differences.is_empty() {
        println!("verifier: nothing is more than a tenth above {RECORD}");
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "verifier: if this is what the change is worth, record it: cargo xtask verifier --write"
    );
    Ok(ExitCode::FAILURE)
}

fn read_record() -> Result<Costs> {
    let path = workspace().join(RECORD);
    let text = fs::read_to_string(&path).with_context(|| {
        format!(
            "read {}; `cargo xtask verifier --write` makes it",
            path.display()
        )
    })?;
    serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))
}

/// What `interceptor check -o json` says of the programs.
fn costs(output: &str) -> Result<BTreeMap<String, Cost>> {
    #[derive(Deserialize)]
    struct Check {
        program: Option<String>,
        #[serde(flatten)]
        cost: Option<Cost>,
    }
    // The kernel's own messages may come before it.
    let start = output.lines().position(|line| line == "[");
    let text: String = output.lines().skip(start.unwrap_or(0)).collect();
    let checks: Vec<Check> = serde_json::from_str(&text)
        .with_context(|| format!("what `interceptor check -o json` printed: {output}"))?;
    let costs: BTreeMap<_, _> = checks
        .into_iter()
        .filter_map(|check| Some((check.program?, check.cost?)))
        .collect();
    if costs.is_empty() {
        bail!("`interceptor check` told of no program");
    }
    Ok(costs)
}

/// The numbers of a version, to compare.
fn numbers(version: &str) -> Vec<u32> {
    version
        .split('.')
        .map_while(|number| number.parse().ok())
        .collect()
}

/// Programs that cost more than a tenth more than in the record, and those that
/// only one of the two has.
fn differences(measured: &Costs, record: &Costs) -> Vec<String> {
    let mut differences = Vec::new();
    for (kernel, programs) in measured {
        // A kernel that came out since is compared with the newest known.
        let newest = record.keys().max_by_key(|name| numbers(name));
        let recorded = record
            .get(kernel)
            .or_else(|| newest.and_then(|newest| record.get(newest)));
        let Some(recorded) = recorded else {
            differences.push(format!("{RECORD} is empty"));
            continue;
        };
        for (program, cost) in programs {
            let Some(before) = recorded.get(program) else {
                differences.push(format!("{program} on {kernel} is not in {RECORD}"));
                continue;
            };
            for (what, before, now) in [
                (
                    "verified instructions",
                    before.verified_instructions,
                    cost.verified_instructions,
                ),
                (
                    "bytes of machine code",
                    Some(before.machine_code_bytes),
                    Some(cost.machine_code_bytes),
                ),
            ] {
                if let (Some(before), Some(now)) = (before, now)
                    && now * 10 > before * 11
                {
                    differences.push(format!("{program} on {kernel}: {before} -> {now} {what}"));
                }
            }
        }
        for program in recorded.keys().filter(|name| !programs.contains_key(*name)) {
            differences.push(format!(
                "{program} on {kernel} is in {RECORD}, but no program"
            ));
        }
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs_of(program: &str, instructions: Option<u64>, bytes: u64) -> Costs {
        let cost = Cost {
            verified_instructions: instructions,
            machine_code_bytes: bytes,
        };
        let programs = BTreeMap::from([(program.to_owned(), cost)]);
        BTreeMap::from([("6.1".to_owned(), programs)])
    }

    #[test]
    fn what_grows_by_more_than_a_tenth_is_a_difference() {
        let record = costs_of("connect4", Some(1000), 100);
        let grown =
            |instructions, bytes| differences(&costs_of("connect4", instructions, bytes), &record);
        assert!(grown(Some(1100), 110).is_empty());
        assert!(grown(Some(1), 1).is_empty());
        assert_eq!(
            grown(Some(1101), 100),
            ["connect4 on 6.1: 1000 -> 1101 verified instructions"]
        );
        assert_eq!(
            grown(None, 111),
            ["connect4 on 6.1: 100 -> 111 bytes of machine code"]
        );
    }

    #[test]
    fn a_program_or_kernel_that_only_one_has_is_a_difference() {
        let record = costs_of("connect4", None, 100);
        assert_eq!(
            differences(&costs_of("connect6", None, 100), &record).len(),
            2
        );
        assert_eq!(differences(&record, &Costs::new()).len(), 1);
    }

    #[test]
    fn a_new_kernel_is_compared_with_the_newest_known() {
        let mut record = costs_of("connect4", None, 100);
        record.insert(
            "6.12".to_owned(),
            costs_of("connect4", None, 200)["6.1"].clone(),
        );
        let new = |bytes| {
            BTreeMap::from([(
                "7.4".to_owned(),
                costs_of("connect4", None, bytes)["6.1"].clone(),
            )])
        };
        assert!(differences(&new(220), &record).is_empty());
        assert_eq!(differences(&new(221), &record).len(), 1);
    }

    #[test]
    fn a_check_that_is_no_programs_counts_for_nothing() {
        let output = "[    1.2] a message\n[\n{\"name\": \"x\", \"outcome\": \"pass\"},\n\
            {\"name\": \"y\", \"program\": \"connect4\", \"verified_instructions\": null,\n\
            \"machine_code_bytes\": 7}\n]";
        let expected = Cost {
            verified_instructions: None,
            machine_code_bytes: 7,
        };
        assert_eq!(costs(output).unwrap()["connect4"], expected);
        assert!(costs("[]").is_err());
        assert!(costs("no JSON").is_err());
    }
}
