//! What is compared: the two ways of intercepting a pod's connections.

use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{
    cases::Family,
    command::{run, workspace_binary},
    iptables::{self, Flavour},
    pod::Pod,
};

/// A way to intercept a pod's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interception {
    /// The chains of live iptables.
    Iptables(Flavour),
    /// Interceptor.
    Interceptor,
}

/// Interception that is in force in a pod until this is dropped. (Chains go
/// with the pod's network namespace.)
#[derive(Debug)]
pub struct Installed {
    attached: Option<String>,
}

impl Interception {
    /// Starts to intercept the pod's connections.
    ///
    /// # Errors
    ///
    /// If iptables or `interceptor` fails.
    pub fn install(self, pod: &Pod) -> Result<Installed> {
        let attached = match self {
            Self::Iptables(flavour) => {
                iptables::install(pod, flavour)?;
                None
            }
            Self::Interceptor => {
                let netns = pod.netns().path();
                run(interceptor()?
                    .args(["attach", "--pod", pod.name()])
                    .arg("--cgroup")
                    .arg(pod.cgroup().path())
                    .arg("--netns")
                    .arg(netns))?;
                Some(pod.name().to_owned())
            }
        };
        Ok(Installed { attached })
    }
}

/// A rule of the chains `ISTIO_OUTPUT` and `ISTIO_INBOUND`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// Its chain's name.
    pub chain: String,
    /// Its number in the chain, from 1.
    pub number: u32,
    /// What happens to a connection that it matches.
    pub target: String,
    /// How many connections it has decided.
    #[serde(skip)]
    pub hits: u64,
}

/// A chain, as `interceptor chains -o json` prints it.
#[derive(Deserialize)]
struct ChainView {
    chain: String,
    rules: Vec<RuleView>,
}

#[derive(Deserialize)]
struct RuleView {
    number: u32,
    target: String,
    hits: u64,
}

impl Interception {
    /// The pod's rules with their counters, as they are now.
    ///
    /// # Errors
    ///
    /// If they can't be had.
    pub fn rules(self, pod: &Pod, family: Family) -> Result<Vec<Rule>> {
        let flavour = match self {
            Self::Iptables(flavour) => flavour,
            Self::Interceptor => return interceptor_rules(pod),
        };
        let text = iptables::save(pod, flavour, family)?;
        let mut rules: Vec<Rule> = Vec::new();
        // `[packets:bytes] -A CHAIN ... -j TARGET ...`, of which a connection
        // has one packet here.
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let &[
                counters,
                "-A",
                chain @ ("ISTIO_OUTPUT" | "ISTIO_INBOUND"),
                ref rest @ ..,
            ] = words.as_slice()
            else {
                continue;
            };
            let target = rest.iter().skip_while(|word| **word != "-j").nth(1);
            let hits = counters
                .strip_prefix('[')
                .and_then(|counters| counters.split(':').next()?.parse().ok());
            let in_chain = rules.iter().filter(|rule| rule.chain == chain).count();
            rules.push(Rule {
                chain: chain.to_owned(),
                number: u32::try_from(in_chain)? + 1,
                target: (*target.with_context(|| format!("no target: {line}"))?).to_owned(),
                hits: hits.with_context(|| format!("no counters: {line}"))?,
            });
        }
        Ok(rules)
    }
}

fn interceptor_rules(pod: &Pod) -> Result<Vec<Rule>> {
    let json = run(interceptor()?.args(["chains", "--pod", pod.name(), "-o", "json"]))?;
    let chains: Vec<ChainView> =
        serde_json::from_str(&json).with_context(|| format!("`interceptor chains`: {json}"))?;
    Ok(chains
        .into_iter()
        .flat_map(|ChainView { chain, rules }| {
            rules.into_iter().map(move |rule| Rule {
                chain: chain.clone(),
                number: rule.number,
                target: rule.target,
                hits: rule.hits,
            })
        })
        .collect())
}

/// The rule that decided a client's connection, by the counters before and
/// after it. A proxy that it was redirected to has made one of its own
/// meanwhile, which returned.
pub fn decider(before: &[Rule], after: &[Rule]) -> Option<Rule> {
    let risen = || {
        before
            .iter()
            .zip(after)
            .filter(|(before, after)| after.hits > before.hits)
            .map(|(_, after)| after)
    };
    risen()
        .find(|rule| rule.target != "RETURN")
        .or_else(|| risen().next())
        .cloned()
}

impl Drop for Installed {
    #[expect(clippy::print_stderr, reason = "nothing else can be told from drop")]
    fn drop(&mut self) {
        let Some(pod) = &self.attached else {
            return;
        };
        let detached =
            interceptor().and_then(|mut command| run(command.args(["detach", "--pod", pod])));
        if let Err(error) = detached {
            eprintln!("pod {pod} stays attached: {error:#}");
        }
    }
}

/// The `interceptor` command.
///
/// # Errors
///
/// If it isn't built.
pub fn interceptor() -> Result<Command> {
    Ok(Command::new(workspace_binary(
        "interceptor",
        "INTERCEPTOR_BIN",
    )?))
}
