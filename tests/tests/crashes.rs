//! The daemon killed at random moments of everything that it does to a pod, and
//! replaced by another build of it and back, while pods' connections come and go.
//!
//! The other build is of the same source, with a later version; its kernel programs
//! are compiled by other options, so that they are others. `cargo xtask test` makes it.
#![expect(clippy::print_stdout, reason = "says what was hit, and by which seed")]

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use interceptor_tests::{
    bpf::{self, Id, Kind},
    cgroup::Cgroup,
    cli::{Cli, run_json},
    command::{run, unique_name, wait_until, workspace_binary},
    daemon::{Daemon, LIMIT, cni},
    inside::Server,
    pod::Pod,
    traffic::{Expected, Traffic},
    world::{EVERYWHERE, World, objects},
};
use interceptor_userspace::api::{self, Answer, PodState, Request};
use proptest::{
    prelude::RngExt as _,
    test_runner::{RngAlgorithm, TestRng},
};
use serde_json::Value;

/// How often the daemon is killed, in all. The environment variable `CRASHES` says
/// otherwise.
const KILLS: usize = 100;

/// How often an operation is done undisturbed, to learn how long it takes.
const MEASURED: usize = 3;

/// What the daemon is killed at, in the order of a pod's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    /// CNI's ADD attaches the pod to the cgroup in which its own will be made.
    Attach,
    /// The runtime makes the pod's cgroup, and the pod is moved to it.
    Move,
    /// A daemon starts and takes over pods whose programs are its own.
    Adopt,
    /// A daemon of another build starts and replaces programs.
    Upgrade,
    /// CNI's DEL.
    Detach,
}

impl Operation {
    const ALL: [Self; 5] = [
        Self::Attach,
        Self::Move,
        Self::Adopt,
        Self::Upgrade,
        Self::Detach,
    ];
}

/// What a kill has left of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Left {
    Nothing,
    Half,
    All,
}

/// One test at a time: all of the kernel's objects are counted.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The kernel's objects of ours that have come since a moment, whoever holds them.
struct Census {
    before: BTreeSet<Id>,
    names: BTreeSet<String>,
}

impl Census {
    fn all() -> Result<BTreeSet<Id>> {
        let mut all = BTreeSet::new();
        for kind in [Kind::Program, Kind::Map, Kind::Link] {
            all.extend(bpf::list(kind)?);
        }
        Ok(all)
    }

    /// Whose names count is told by `names`.
    fn since(before: BTreeSet<Id>, names: BTreeSet<String>) -> Self {
        Self { before, names }
    }

    fn is_ours(&self, id: Id) -> bool {
        // One that is gone by now is nobody's.
        let program = match id {
            Id(Kind::Link, link) => bpf::program_of(link).unwrap_or(id),
            other => other,
        };
        bpf::name(program).is_ok_and(|name| self.names.contains(&name))
    }

    fn now(&self) -> Result<BTreeSet<Id>> {
        let mut now = Self::all()?;
        now.retain(|id| !self.before.contains(id) && self.is_ours(*id));
        Ok(now)
    }
}

/// The objects of an attached pod that have names, and those that its pins alone hold.
fn objects_of(cli: &Cli, pod: &str) -> Result<BTreeSet<Id>> {
    let mut all: BTreeSet<Id> = objects(cli, pod)?.into_iter().collect();
    for entry in fs::read_dir(cli.pins().join(pod).join("maps"))? {
        all.insert(bpf::pinned_map(&entry?.path())?);
    }
    Ok(all)
}

/// The links of all pods: each pin's path, its link and the link's program.
fn links_of(cli: &Cli) -> Result<Links> {
    let mut links = Links::new();
    for pod in cli.directories()? {
        let directory = cli.pins().join(pod).join("links");
        if !directory.exists() {
            continue;
        }
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let link = bpf::pinned_link(&path)?;
            links.insert(path, (link, bpf::program_of(link.1)?));
        }
    }
    Ok(links)
}

type Links = BTreeMap<PathBuf, (Id, Id)>;

/// The names of the pins below a pod's directory. One of the two with the settings'
/// text comes with the first change.
fn pins_of(cli: &Cli, pod: &str) -> Result<BTreeSet<String>> {
    let mut pins = BTreeSet::new();
    for part in ["links", "maps"] {
        for entry in fs::read_dir(cli.pins().join(pod).join(part))? {
            let name = entry?.file_name();
            let name = name.to_string_lossy();
            let name = name.strip_suffix(['0', '1']).unwrap_or(&name);
            pins.insert(format!("{part}/{name}"));
        }
    }
    Ok(pins)
}

/// A node with two pods: one that a file tells of, which stays attached, and a guest
/// that CNI tells of.
struct Node {
    traffic: [Traffic; 2],
    _proxies: [Vec<Server>; 2],
    daemon: Daemon,
    steady: World,
    guest: World,
    _parent: Cgroup,
    other: PathBuf,
    /// Whether the other build runs.
    newer: bool,
    /// How many of the pods' programs the builds don't have in common.
    differing: usize,
    /// How often the guest came, for its container's name.
    guests: u32,
    census: Census,
    /// What is pinned for a pod.
    pins: BTreeSet<String>,
}

impl Node {
    fn new() -> Result<Self> {
        let other = workspace_binary("interceptor-next", "INTERCEPTOR_NEXT")
            .context("the other build: `cargo xtask test daemon` makes it")?;
        let parent_name = unique_name("interceptor-parent");
        let parent = Cgroup::new(&parent_name)?;
        let (steady, guest) = (World::new()?, World::of(Pod::below(&parent_name)?)?);
        let proxies = [
            steady.start_proxy(&EVERYWHERE)?,
            guest.start_proxy(&EVERYWHERE)?,
        ];
        let before = Census::all()?;
        let settings = format!("select = 'all'\ncgroup-parent = '/{parent_name}'");
        let daemon = Daemon::start(&steady.cli, &settings)?;
        daemon.write_pod(&steady.pod)?;
        daemon.wait_for(steady.name(), PodState::Attached)?;

        let mut names = BTreeSet::new();
        for id in objects_of(&steady.cli, steady.name())? {
            if id.0 != Kind::Link {
                names.insert(bpf::name(id)?);
            }
        }
        // The note, which is as nameless as others'.
        names.remove("");
        let pins = pins_of(&steady.cli, steady.name())?;
        let traffic = [
            Traffic::start(&steady.pod, Expected::Intercepted)?,
            Traffic::start(&guest.pod, Expected::LeftAlone)?,
        ];
        Ok(Self {
            traffic,
            _proxies: proxies,
            daemon,
            steady,
            guest,
            _parent: parent,
            other,
            newer: false,
            differing: 0,
            guests: 0,
            census: Census::since(before, names),
            pins,
        })
    }

    fn cli(&self) -> &Cli {
        &self.steady.cli
    }

    fn guest_id(&self) -> String {
        format!("c0ffee{:04}", self.guests)
    }

    /// The name of the guest's pins.
    fn guest_name(&self) -> String {
        format!("default_web_{}", self.guest_id())
    }

    /// The cgroup that the runtime makes for the guest's container.
    fn container(&self) -> PathBuf {
        let name = format!("libpod-{}", self.guest_id());
        self.guest.pod.cgroup().path().join(name)
    }

    fn add(&self) -> Request {
        Request::CniAdd(cni(&self.guest_id(), &self.guest.pod))
    }

    fn del(&self) -> Request {
        Request::CniDel(cni(&self.guest_id(), &self.guest.pod).attachment)
    }

    fn wait_until_moved(&self) -> Result<()> {
        let own = Some(self.guest.pod.cgroup().path());
        wait_until("the guest is moved", LIMIT, || {
            let pod = self.daemon.pod(&self.guest_name())?;
            let cgroup = pod.and_then(|pod| pod.cgroup);
            Ok((cgroup.as_deref() == own).then_some(()))
        })
        .with_context(|| self.daemon.log())
    }

    fn guest_traffic(&self) -> &Traffic {
        &self.traffic[1]
    }

    /// Begins an operation; it goes on by itself, but for those that ask.
    fn begin(&mut self, operation: Operation) -> Result<()> {
        match operation {
            Operation::Attach | Operation::Detach => {
                self.guest_traffic().expect(Expected::Between);
            }
            Operation::Move => fs::create_dir(self.container())?,
            Operation::Adopt | Operation::Upgrade => {
                if operation == Operation::Upgrade {
                    self.newer = !self.newer;
                }
                self.start_soon()?;
            }
        }
        Ok(())
    }

    fn start_soon(&mut self) -> Result<()> {
        self.set_program();
        self.daemon.restart_soon(&self.steady.cli)
    }

    fn set_program(&mut self) {
        let other = self.newer.then_some(&*self.other);
        self.daemon.set_program(other);
    }

    /// Does an operation undisturbed; how long it takes.
    fn measure(&mut self, operation: Operation) -> Result<Duration> {
        let before = links_of(self.cli())?;
        if matches!(operation, Operation::Adopt | Operation::Upgrade) {
            self.daemon.kill()?;
        }
        let start = Instant::now();
        self.begin(operation)?;
        match operation {
            Operation::Attach => {
                let answer = self.daemon.ask(&self.add())?;
                ensure!(matches!(answer, Answer::Attached { .. }), "{answer:?}");
            }
            Operation::Move => self.wait_until_moved()?,
            Operation::Adopt | Operation::Upgrade => self.daemon.wait_until_ready()?,
            Operation::Detach => ensure!(self.daemon.ask(&self.del())? == Answer::Done),
        }
        let took = start.elapsed();
        if operation == Operation::Upgrade {
            self.differing = changed(&before, &links_of(self.cli())?);
            ensure!(self.differing > 0, "both builds have the same programs");
        }
        self.settle(operation)?;
        Ok(took)
    }

    /// Does an operation, and kills the daemon at this moment of it.
    fn kill(&mut self, operation: Operation, moment: Duration) -> Result<Left> {
        let asked = match operation {
            Operation::Attach => Some(self.add()),
            Operation::Detach => Some(self.del()),
            Operation::Move => None,
            Operation::Adopt | Operation::Upgrade => {
                self.daemon.kill()?;
                None
            }
        };
        let before = links_of(self.cli())?;
        let end = Instant::now() + moment;
        self.begin(operation)?;
        let socket = self.daemon.socket();
        thread::scope(|scope| {
            if let Some(request) = &asked {
                // It gets an answer, or the end of the conversation.
                scope.spawn(move || api::ask(&socket, request, LIMIT));
            }
            thread::sleep(end.saturating_duration_since(Instant::now()));
            self.daemon.kill()
        })?;
        self.left(operation, &before)
    }

    /// What is left of an operation, now that no daemon runs.
    fn left(&self, operation: Operation, before: &Links) -> Result<Left> {
        let directories = self.cli().directories()?;
        let guest = self.guest_name();
        let is_half = |name: &String| *name != guest && name.starts_with(&guest);
        if directories.iter().any(is_half) {
            return Ok(Left::Half);
        }
        let now = links_of(self.cli())?;
        let left = |is_all, is_nothing| match (is_all, is_nothing) {
            (true, _) => Left::All,
            (false, true) => Left::Nothing,
            (false, false) => Left::Half,
        };
        let is_whole = directories.contains(&guest);
        Ok(match operation {
            Operation::Attach => left(is_whole, !is_whole),
            Operation::Detach => left(!is_whole, is_whole),
            Operation::Move => {
                let is_below = |path: &Path| path.to_string_lossy().contains("+below");
                let directory = self.cli().pins().join(&guest).join("links");
                // The network namespace's link stays.
                let is_moved = now.iter().all(|(path, (link, _))| {
                    !is_below(path)
                        && (!path.starts_with(&directory)
                            || path.ends_with("find_listener")
                            || before.get(path).is_none_or(|(old, _)| old != link))
                });
                left(is_moved, now == *before)
            }
            Operation::Adopt => {
                ensure!(now == *before, "adopting changed something: {now:?}");
                Left::Nothing
            }
            Operation::Upgrade => {
                let changed = changed(before, &now);
                left(changed == self.differing, changed == 0)
            }
        })
    }

    /// Starts a daemon after one was killed: what it finds becomes whole or goes.
    fn recover(&mut self) -> Result<()> {
        self.start_soon()?;
        self.daemon.wait_until_ready()
    }

    /// Has the operation done, whatever became of it before.
    fn settle(&mut self, operation: Operation) -> Result<()> {
        match operation {
            Operation::Attach => {
                let answer = self.daemon.ask(&self.add())?;
                ensure!(matches!(answer, Answer::Attached { .. }), "{answer:?}");
                self.guest_traffic().expect(Expected::Intercepted);
            }
            Operation::Move => self.wait_until_moved()?,
            Operation::Adopt | Operation::Upgrade => {}
            Operation::Detach => {
                ensure!(self.daemon.ask(&self.del())? == Answer::Done);
                self.guest_traffic().expect(Expected::LeftAlone);
                let addresses = self.guest.pod.netns().ip("-6 addr show dev lo")?;
                ensure!(!addresses.contains("::6/128"), "::6 stays behind on lo");
                fs::remove_dir(self.container())?;
                self.guests += 1;
            }
        }
        Ok(())
    }

    /// Every pod is whole or absent: in the daemon's words, in those of its pins, and by
    /// what the kernel holds.
    fn check(&self) -> Result<()> {
        let mut directories = self.cli().directories()?;
        directories.retain(|name| name != "+daemon");
        directories.sort();
        let steady = self.steady.name().to_owned();
        let mut all = vec![self.guest_name(), steady.clone()];
        all.sort();
        ensure!(
            directories == all || directories == [steady],
            "pins of {directories:?}"
        );
        let names = |list: &Value, of: &dyn Fn(&Value) -> bool| -> Vec<String> {
            let pods = list.as_array().into_iter().flatten();
            pods.filter(|pod| of(pod))
                .filter_map(|pod| pod["pod"].as_str().map(str::to_owned))
                .collect()
        };
        let socket = self.daemon.socket();
        let pods = run_json(
            self.cli()
                .command()?
                .args(["pods", "-o", "json", "--socket"])
                .arg(socket),
        )?;
        ensure!(
            names(&pods, &|pod| pod["state"] == "attached") == directories,
            "pins of {directories:?}, but `interceptor pods`: {pods}"
        );
        let status = run_json(self.cli().command()?.args(["status", "-o", "json"]))?;
        ensure!(
            names(&status, &|pod| pod["error"].is_null()) == directories,
            "pins of {directories:?}, but `interceptor status`: {status}"
        );
        let mut expected = BTreeSet::new();
        for pod in &directories {
            let pins = pins_of(self.cli(), pod)?;
            ensure!(pins == self.pins, "{pod} has the pins {pins:?}");
            expected.extend(objects_of(self.cli(), pod)?);
        }
        expected.retain(|id| self.census.is_ours(*id));
        let mut now = BTreeSet::new();
        wait_until("the kernel has what the pods need", LIMIT, || {
            now = self.census.now()?;
            Ok((now == expected).then_some(()))
        })
        .with_context(|| {
            let [more, less] = [(&now, &expected), (&expected, &now)]
                .map(|(one, other)| one.difference(other).copied().collect::<Vec<_>>());
            format!("too much: {more:?}, too little: {less:?}")
        })
    }

    /// Ends the traffic, and says how it went.
    fn finish(self) -> Result<()> {
        let Self { traffic, .. } = self;
        let mut tallies = Vec::new();
        for traffic in traffic {
            tallies.push(traffic.stop()?);
        }
        for (pod, tally) in ["steady", "guest"].iter().zip(&tallies) {
            println!(
                "{pod}: {} intercepted, {} left alone, {} refused, {} echoes, {} wrong",
                tally.intercepted,
                tally.left_alone,
                tally.refused,
                tally.echoes,
                tally.wrong.len()
            );
        }
        for tally in &tallies {
            tally.check()?;
        }
        let [steady, _] = &tallies[..] else {
            bail!("two pods");
        };
        ensure!((steady.left_alone, steady.refused) == (0, 0), "{steady:?}");
        Ok(())
    }
}

/// How many links have another program.
fn changed(before: &Links, now: &Links) -> usize {
    let programs = now
        .iter()
        .filter(|(path, (_, program))| before.get(*path).is_none_or(|(_, other)| other != program));
    programs.count()
}

/// Numbers that are random, and the same again for the same seed.
fn random() -> Result<(u64, TestRng)> {
    let seed = match env::var("CRASH_SEED") {
        Ok(seed) => seed.parse().context("CRASH_SEED")?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    Ok((seed, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes)))
}

#[test]
fn killed_a_hundred_times_the_node_is_whole_and_no_connection_is_misdirected() -> Result<()> {
    let _alone = alone();
    let kills = match env::var("CRASHES") {
        Ok(number) => number.parse().context("CRASHES")?,
        Err(_) => KILLS,
    };
    let (seed, mut random) = random()?;
    println!("CRASH_SEED={seed}");
    let mut node = Node::new()?;
    let mut durations: BTreeMap<Operation, Vec<Duration>> = BTreeMap::new();
    for _ in 0..MEASURED {
        for operation in Operation::ALL {
            let took = node.measure(operation)?;
            durations.entry(operation).or_default().push(took);
            node.check().with_context(|| format!("{operation:?}"))?;
        }
    }
    let durations: BTreeMap<Operation, Duration> = durations
        .into_iter()
        .map(|(operation, mut took)| {
            took.sort();
            (operation, took[took.len() / 2])
        })
        .collect();

    let rounds = kills.div_ceil(Operation::ALL.len());
    // One moment in each part of the duration, the parts in random order.
    let mut parts = BTreeMap::new();
    for operation in Operation::ALL {
        let mut order: Vec<usize> = (0..rounds).collect();
        for at in (1..rounds).rev() {
            order.swap(at, random.random_range(0..=at));
        }
        parts.insert(operation, order);
    }
    let mut left: BTreeMap<(Operation, Left), usize> = BTreeMap::new();
    for _ in 0..rounds {
        for operation in Operation::ALL {
            let within: f64 = random.random_range(0.0..1.0);
            let part = parts.get_mut(&operation).and_then(Vec::pop);
            let part = part.context("one for each round")? as f64 + within;
            let moment = durations[&operation].mul_f64(part / rounds as f64);
            let context = || format!("{operation:?}, killed after {moment:?}, CRASH_SEED={seed}");
            let is = node.kill(operation, moment).with_context(context)?;
            *left.entry((operation, is)).or_default() += 1;
            // The next daemon may be of either build.
            if operation == Operation::Upgrade {
                node.newer = random.random();
            }
            node.recover().with_context(context)?;
            let check = |node: &Node| {
                let checked = node.check().with_context(context);
                checked.with_context(|| node.daemon.log())
            };
            if operation == Operation::Move {
                // It goes on with it at once.
                node.settle(operation).with_context(context)?;
                check(&node)?;
            } else {
                check(&node)?;
                node.settle(operation).with_context(context)?;
            }
        }
    }
    node.check()?;
    for operation in Operation::ALL {
        let count = |is| left.get(&(operation, is)).copied().unwrap_or_default();
        println!(
            "{operation:?} takes {:?}; killed {rounds} times, of which {} before anything was \
             done, {} half way, {} when all was done",
            durations[&operation],
            count(Left::Nothing),
            count(Left::Half),
            count(Left::All),
        );
    }
    // Else the moments were none of those that are meant.
    let half = left.keys().filter(|(_, left)| *left == Left::Half).count();
    ensure!(
        rounds < 10 || half > 1,
        "hardly an operation was cut off half way: {left:?}"
    );
    node.finish()
}

#[test]
fn another_build_takes_over_and_the_first_one_takes_back() -> Result<()> {
    let _alone = alone();
    let mut node = Node::new()?;
    node.measure(Operation::Attach)?;
    node.measure(Operation::Move)?;
    // State that the one has written and the other must read. (The steady pod's
    // settings are what its file says.)
    run(node
        .cli()
        .command()?
        .args(["set", &node.guest_name(), "--exclude-outbound-cidrs"])
        .arg("192.0.2.0/24"))?;
    let (links, version) = (links_of(node.cli())?, node.daemon.status()?.version);
    let maps = node.pinned_maps()?;
    let digests = digests(&links)?;
    let settings = node.settings(&node.cli().command()?)?;
    ensure!(settings.to_string().contains("192.0.2.0/24"), "{settings}");
    let mut hits = node.wait_for_more_than(0, &node.cli().command()?)?;

    for newer in [true, false, true, false] {
        node.daemon.stop()?;
        node.newer = newer;
        node.recover()?;
        let now = links_of(node.cli())?;
        let replaced = changed(&links, &now);
        let now_version = node.daemon.status()?.version;
        ensure!((now_version != version) == newer, "{now_version}");
        ensure!(
            now.iter()
                .zip(&links)
                .all(|(new, old)| new.0 == old.0 && new.1.0 == old.1.0),
            "other links than before: {now:?}"
        );
        ensure!(node.pinned_maps()? == maps, "other maps than before");
        let now_digests = self::digests(&now)?;
        if newer {
            ensure!(
                replaced > 0 && now_digests != digests,
                "nothing was replaced"
            );
        } else {
            ensure!(
                now_digests == digests,
                "programs of the other build are left"
            );
        }
        let (_, metrics) = node.daemon.http("/metrics")?;
        ensure!(
            metrics.contains("interceptor_pods_upgraded_total 2\n"),
            "not both pods: {metrics}"
        );
        node.check()?;
        // The one that runs reads what the other one wrote, and goes on counting.
        let command = node.own_command()?;
        let now_settings = node.settings(&command)?;
        ensure!(now_settings == settings, "{settings} became {now_settings}");
        hits = node.wait_for_more_than(hits, &command)?;
    }
    node.finish()
}

/// The digest of every link's program.
fn digests(links: &Links) -> Result<Vec<[u8; 8]>> {
    let programs = links.values().map(|(_, program)| program.1);
    Ok(programs
        .map(bpf::digest_of)
        .collect::<std::io::Result<_>>()?)
}

impl Node {
    /// The command of the build that runs.
    fn own_command(&self) -> Result<Command> {
        if !self.newer {
            return self.cli().command();
        }
        let mut command = Command::new(&self.other);
        command.arg("--pins").arg(self.cli().pins());
        Ok(command)
    }

    /// The pinned maps of both pods, but for those with the settings' text, which is
    /// written anew when a pod's surroundings are read.
    fn pinned_maps(&self) -> Result<BTreeSet<Id>> {
        let mut maps = BTreeSet::new();
        for pod in [self.steady.name(), &self.guest_name()] {
            for entry in fs::read_dir(self.cli().pins().join(pod).join("maps"))? {
                let path = entry?.path();
                if !path.to_string_lossy().contains("DECLARED") {
                    maps.insert(bpf::pinned_map(&path)?);
                }
            }
        }
        Ok(maps)
    }

    /// What a build of the command says are the settings of the guest.
    fn settings(&self, command: &Command) -> Result<Value> {
        let pod = ["status", "-o", "json", "--pod", &self.guest_name()];
        let status = run_json(again(command).args(pod))?;
        Ok(status[0]["settings"].clone())
    }

    /// Waits until a build of the command says that the guest's rules have decided more
    /// connections than so many.
    fn wait_for_more_than(&self, hits: u64, command: &Command) -> Result<u64> {
        wait_until(&format!("more than {hits} hits"), LIMIT, || {
            Ok(Some(self.hits(command)?).filter(|now| *now > hits))
        })
    }

    /// How many connections a build of the command says the guest's rules have
    /// decided.
    fn hits(&self, command: &Command) -> Result<u64> {
        let pod = ["chains", "-o", "json", "--pod", &self.guest_name()];
        let chains = run_json(again(command).args(pod))?;
        let chains = chains.as_array().context("no chains")?;
        let rules = chains.iter().filter_map(|chain| chain["rules"].as_array());
        Ok(rules
            .flatten()
            .filter_map(|rule| rule["hits"].as_u64())
            .sum())
    }
}

/// The same command once more.
fn again(command: &Command) -> Command {
    let mut again = Command::new(command.get_program());
    again.args(command.get_args());
    again
}
