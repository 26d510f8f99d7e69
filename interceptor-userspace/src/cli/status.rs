//! `interceptor status`.

use anyhow::bail;
use interceptor_userspace::{
    api::{Answer, Request},
    datapath::{Pins, PodView, UntilProxyListens},
    pod::PodName,
    settings::{Cidrs, Dns, Ports},
};

use super::{Output, node};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this pod.
    #[arg(long, value_name = "NAME")]
    pod: Option<PodName>,

    #[command(flatten)]
    node: node::Node,
}

pub(crate) fn run(args: Args, pins: &Pins, output: Output) -> anyhow::Result<()> {
    let mut views = Vec::new();
    let request = Request::View { pod: args.pod };
    args.node.ask(pins, &request, |answer| {
        views.push(match answer {
            Answer::View(view) => Ok(view),
            Answer::NoView { pod, error } => Err((pod, error)),
            answer => return Err(node::unexpected(&answer)),
        });
        Ok(())
    })?;
    match output {
        Output::Json => super::print_json(
            &views
                .iter()
                .map(|view| match view {
                    Ok(view) => serde_json::to_value(view),
                    Err((pod, error)) => Ok(serde_json::json!({
                        "pod": pod,
                        "error": error,
                    })),
                })
                .collect::<Result<Vec<_>, _>>()?,
        )?,
        Output::Text if views.is_empty() => {
            super::print(format!(
                "no pod is attached below {}",
                pins.root().display()
            ))?;
        }
        Output::Text => {
            for (index, view) in views.iter().enumerate() {
                if index > 0 {
                    super::print("")?;
                }
                if let Ok(view) = view {
                    print_view(view)?;
                }
            }
        }
    }
    let broken: Vec<&str> = views
        .iter()
        .filter_map(|view| view.as_ref().err().map(|(_, error)| error.as_str()))
        .collect();
    if !broken.is_empty() {
        bail!("{}", broken.join("\n"));
    }
    Ok(())
}

fn print_view(view: &PodView) -> anyhow::Result<()> {
    let mut table = super::table(&["pod", &view.pod]);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row(
        "cgroup",
        match &view.cgroup {
            Some(path) => path.display().to_string(),
            None => format!("{} (gone)", view.cgroup_id),
        },
    );
    row("network namespace", format!("net:[{}]", view.netns_inode));
    let settings = &view.settings;
    row(
        "proxy",
        format!(
            "uid {}, gid {}, outbound port {}, inbound port {}",
            list(&settings.proxy_uids),
            list(&settings.proxy_gids),
            settings.outbound_port,
            settings.inbound_port
        ),
    );
    row(
        "captured inbound",
        match &settings.inbound_ports {
            _ if !settings.captures() => "nothing (mode NONE)".to_owned(),
            Ports::All => format!("all but {}", list(&settings.excluded_inbound_ports)),
            Ports::List(ports) => list(ports),
        },
    );
    row(
        "captured outbound",
        match &settings.outbound_cidrs {
            _ if !settings.captures() => "nothing (mode NONE)".to_owned(),
            Cidrs::All => "all".to_owned(),
            Cidrs::List(cidrs) => list(cidrs),
        },
    );
    for (name, values) in [
        ("outbound ports captured", list(&settings.outbound_ports)),
        (
            "outbound ports left alone",
            list(&settings.excluded_outbound_ports),
        ),
        (
            "outbound CIDRs left alone",
            list(&settings.excluded_outbound_cidrs),
        ),
        ("interfaces left alone", list(&settings.excluded_interfaces)),
        (
            "DNS captured",
            match &settings.dns {
                Dns::Off => list::<String>(&[]),
                Dns::Servers(servers) => list(servers),
                Dns::All => "all".to_owned(),
            },
        ),
    ] {
        if values != NONE {
            row(name, values);
        }
    }
    row(
        "proxy's listeners",
        format!(
            "{} outbound, {} inbound{}",
            view.listeners.outbound,
            view.listeners.inbound,
            match view.until_proxy_listens {
                _ if view.listeners.inbound > 0 => "",
                UntilProxyListens::Refuse =>
                    " (arriving connections are refused until the proxy listens)",
                UntilProxyListens::Hold =>
                    " (arriving connections are held until the proxy listens)",
                UntilProxyListens::Pass =>
                    " (arriving connections go past the proxy until it listens)",
            }
        ),
    );
    row("handshakes in flight", view.handshakes.to_string());
    row(
        "destinations",
        format!("{} with a number", view.numbered_destinations),
    );
    row("routes known", view.routes.to_string());
    if view.refusal != "ECONNREFUSED" {
        row(
            "connects without memory",
            format!(
                "fail with {} (this kernel has no bpf_set_retval)",
                view.refusal
            ),
        );
    }
    row(
        "programs",
        view.links
            .iter()
            .map(|link| format!("{} ({})", link.program, link.program_id))
            .collect::<Vec<_>>()
            .join(", "),
    );
    row("pins", view.pins.display().to_string());
    for event in view.events.iter().filter(|event| event.count > 0) {
        row(&event.event, event.count.to_string());
    }
    super::print(table.trim_fmt())
}

const NONE: &str = "none";

fn list<T: ToString>(items: &[T]) -> String {
    if items.is_empty() {
        return NONE.to_owned();
    }
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}
