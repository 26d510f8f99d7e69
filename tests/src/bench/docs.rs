//! `docs/PERFORMANCE.md`, the plots, and the numbers as JSON.

use std::{fmt::Write as _, fs, path::Path as FilePath};

use anyhow::{Context as _, Result};

use super::{
    plot,
    report::{Measure, Report},
    stats::Verdict,
};

/// What this writes lies between these lines of the page; the rest stays.
const BEGIN: &str = "<!-- written by cargo xtask bench --write-docs -->";
const END: &str = "<!-- end of what is written by cargo xtask bench --write-docs -->";

/// The page before there is one.
const NEW_PAGE: &str = "\
# Performance

What it costs to intercept a pod's connections, compared with no interception.

<!-- written by cargo xtask bench --write-docs -->
<!-- end of what is written by cargo xtask bench --write-docs -->

## What was tried and did not help
";

/// Writes a plot for each path and the numbers into a directory.
pub(crate) fn write_results(report: &Report, directory: &FilePath) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    let results = directory.join("results.json");
    fs::write(&results, serde_json::to_string_pretty(report)? + "\n")
        .with_context(|| format!("write {}", results.display()))?;
    for scenario in report.scenarios() {
        let measures: Vec<&Measure> = report
            .measures
            .iter()
            .filter(|measure| measure.scenario == scenario)
            // What has too much noise for a picture is in the table.
            .filter(|measure| {
                !["connect_p99", "machine_per_connection", "machine_per_gib"]
                    .contains(&measure.measure)
            })
            .collect();
        plot::draw(
            &directory.join(format!("{scenario}.svg")),
            &format!("{scenario}: ratio to no interception"),
            &measures,
        )?;
    }
    Ok(())
}

/// Writes the page and, in a directory beside it, the results.
pub(crate) fn write(report: &Report, docs: &FilePath) -> Result<()> {
    write_results(report, &docs.join("performance"))?;
    let path = docs.join("PERFORMANCE.md");
    let page = fs::read_to_string(&path).unwrap_or_else(|_| NEW_PAGE.to_owned());
    let (before, rest) = page
        .split_once(BEGIN)
        .with_context(|| format!("{} has no line {BEGIN}", path.display()))?;
    let (_, after) = rest
        .split_once(END)
        .with_context(|| format!("{} has no line {END}", path.display()))?;
    let text = text(report)?;
    fs::write(&path, format!("{before}{BEGIN}\n{text}\n{END}{after}"))
        .with_context(|| format!("write {}", path.display()))
}

fn text(report: &Report) -> Result<String> {
    let mut text = String::new();
    let machine = &report.machine;
    writeln!(text, "\n## The machine\n")?;
    writeln!(
        text,
        "{} × {}, {} GiB, {}; Linux {}; clock {}; {}.",
        machine.cpus,
        machine.cpu,
        machine.memory_gib,
        if machine.virtual_machine {
            "a virtual machine"
        } else {
            "no virtual machine"
        },
        machine.kernel,
        machine.clock,
        machine.iptables,
    )?;
    writeln!(text, "Load before the run: {}.\n", machine.load)?;
    for (name, state) in &machine.mitigations {
        writeln!(text, "- {name}: {state}")?;
    }
    writeln!(
        text,
        "\n## How it is measured\n\n\
         `cargo xtask bench` as root; `--quick` takes under three minutes, `--full` adds what takes \
         long, and `--proxies` real proxies. `cargo xtask bench --full --proxies --write-docs`, on a machine that \
         does nothing else, wrote this page, the plots and \
         [all numbers](performance/results.json).\n\n\
         Each mode has pods of its own. A round measures everything once in every mode, one right \
         after the other, in an order that changes. A ratio is that of a mode to `direct` in the \
         same round; the table has the median of all rounds, the interval in which the true median \
         lies with a probability of 95 % (sign test), and the quartiles. `direct-again` is a second \
         pod without interception: how far its ratio may be from 1 is the noise, and a \
         difference that isn't surely greater is `none`.\n\n\
         - outbound: the pod's application to 15001. `direct` dials 127.0.0.1:15001, the others 10.77.0.1:8080.\n\
         - outbound-ipv6: the same over IPv6, [::1]:15001 and [fd00:77::1]:8080.\n\
         - inbound: the peer to 15006, over a cable. `direct` dials 10.77.0.2:15006, the others 10.77.0.2:8080.\n\
         - pair: an application, its proxy, another pod's proxy and that pod's application, all processes on one CPU.\n\
         - envoy, haproxy: real proxies with two threads, and an HTTP server at the peer. `direct` has the \
         proxy dialled, which is told the server's address; the others dial the server.\n\n\
         Outbound and inbound have the client and the proxy in one thread: it connects, accepts, \
         asks SO_ORIGINAL_DST, and closes. Nothing waits to be woken, so that the time is the work of \
         both sides and of the kernel, on one CPU; of small parts of 20 connections the median counts. \
         Each answer of SO_ORIGINAL_DST is checked.\n\n\
         | measure | of what |\n|---|---|\n\
         | connect_p50, connect_p99 | connect() alone, ns |\n\
         | connect_close_rst | socket, connect, accept, SO_ORIGINAL_DST, close by reset, ns |\n\
         | connect_close_rst_many | the same, to 1,000 destinations |\n\
         | connect_close_fin | the same with a graceful close by the client, up to 2,000 of its ports in TIME_WAIT, ns |\n\
         | connect_close_fin_timewait | the same, 12,000 to 13,000 of its 28,232 ports in TIME_WAIT |\n\
         | connect_request_close | with a request of 64 bytes and its answer, closed by reset, ns |\n\
         | connections_per_second | on all CPUs at once (more is better) |\n\
         | cpu_per_connection, cpu_per_gib | CPU time of client and proxy by getrusage, ns |\n\
         | machine_per_connection, machine_per_gib | the whole machine's, by /proc/stat, ns |\n\
         | established_round_trip | 64 bytes there and back, ns |\n\
         | established_mib_per_second | 64 KiB at a time (more is better) |\n\
         | wrk_requests_per_second, wrk_p99 | wrk with 16 connections that stay open (more is better; ns) |\n\
         | wrk_close_requests_per_second, wrk_close_p99 | the same with a connection for each request |\n\
         | sockperf_p50, sockperf_p99 | sockperf's ping-pong over TCP, half a round trip, ns |"
    )?;
    writeln!(text, "\n## Ratios")?;
    for scenario in report.scenarios() {
        let measures = report
            .measures
            .iter()
            .filter(|measure| measure.scenario == scenario);
        writeln!(
            text,
            "\n### {scenario}\n\n![{scenario}](performance/{scenario}.svg)\n\n\
             | measure | mode | median | ratio | 95 % | quartiles | noise | rounds |\n\
             |---|---|--:|--:|---|---|--:|--:|"
        )?;
        for measure in measures {
            for row in &measure.modes {
                let [low, high] = row.ratio.confidence;
                let [q1, q3] = row.ratio.quartiles;
                let ratio = if row.mode == "direct" {
                    "1".to_owned()
                } else if row.verdict == Verdict::Differs {
                    format!("**{:.3}**", row.ratio.median)
                } else {
                    format!("{:.3} ({})", row.ratio.median, row.verdict.remark())
                };
                writeln!(
                    text,
                    "| {} | {} | {:.0} | {ratio} | {low:.3}–{high:.3} | {q1:.3}–{q3:.3} | {:.3} | {} |",
                    measure.measure, row.mode, row.value, measure.noise, row.ratio.rounds
                )?;
            }
        }
    }
    writeln!(
        text,
        "\n## The hooks\n\nIn rounds of their own, with the kernel timing its programs, which itself \
         takes some 50 ns of each call.\n\n\
         | mode | path | hook | calls per connection | ns per call | ns per connection |\n\
         |---|---|---|--:|--:|--:|"
    )?;
    for hooks in &report.hooks {
        for hook in hooks.called() {
            writeln!(
                text,
                "| {} | {} | {} | {:.2} | {:.0} | {:.0} |",
                hooks.mode,
                hooks.path,
                hook.program,
                hook.calls_per_connection,
                hook.ns_per_call,
                hook.calls_per_connection * hook.ns_per_call
            )?;
        }
        writeln!(
            text,
            "| {} | {} | all | | | {:.0} |",
            hooks.mode, hooks.path, hooks.ns_per_connection
        )?;
    }
    writeln!(
        text,
        "\n## Connections at once\n\n\
         | mode | ports to connect from | destinations | open | then |\n|---|--:|--:|--:|---|"
    )?;
    for capacity in &report.capacity {
        writeln!(
            text,
            "| {} | {} | {} | {} | {} |",
            capacity.mode,
            capacity.ports,
            capacity.destinations,
            capacity.open,
            capacity.failure.as_deref().unwrap_or("no more were tried")
        )?;
    }
    writeln!(
        text,
        "\n## Attaching, and memory\n\n\
         The time is that of the whole command; of the daemon, which runs already, from CNI's ADD to\n\
         the answer. iptables: IPv4 and IPv6 chains, and the address ::6.\n\n\
         | mode | pods | p50, ms | p99, ms | kernel memory per pod |\n|---|--:|--:|--:|--:|"
    )?;
    for attach in &report.attach {
        let memory = attach.bytes_per_pod.map_or_else(
            || "-".to_owned(),
            |bytes| format!("{:.0} KiB", bytes / 1024.0),
        );
        writeln!(
            text,
            "| {} | {} | {:.1} | {:.1} | {memory} |",
            attach.mode, attach.pods, attach.p50_ms, attach.p99_ms
        )?;
    }
    writeln!(
        text,
        "\nNo process of Interceptor's has to run. Resident memory of those that can:\n"
    )?;
    for (process, bytes) in &report.resident {
        writeln!(
            text,
            "- `{process}`: {:.1} MiB",
            bytes / f64::from(1 << 20_u32)
        )?;
    }
    writeln!(text, "\n## Not measured\n")?;
    for what in &report.not_measured {
        writeln!(text, "- {what}")?;
    }
    Ok(text)
}
