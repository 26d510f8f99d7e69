//! A pod's steady traffic, both ways and in both families, judged connection by
//! connection while something is done to the pod.

use std::{
    collections::VecDeque,
    io::ErrorKind,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};

use crate::{
    inside::{Conversation, Inside},
    pod::{Credentials, Host, Pod},
    world::{APP, Way, check_served},
};

/// Between two connections.
const REST: Duration = Duration::from_millis(2);

/// How many connections are kept and used, and how many come and go before the
/// oldest of them is replaced.
const LONG_LIVED: usize = 6;
const REPLACED_AFTER: usize = 100;

/// Examples that an error shows.
const EXAMPLES: usize = 8;

/// What becomes of a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Expected {
    /// The proxy serves it, and knows where it was meant to go.
    Intercepted,
    /// Its own server serves it.
    LeftAlone,
    /// One or the other, or it is refused: the pod is being attached or detached, when
    /// none should have a socket yet, or any more.
    Between,
}

impl Expected {
    const ALL: [Self; 3] = [Self::Intercepted, Self::LeftAlone, Self::Between];
}

/// How the connections went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// The proxy served so many, as it should.
    pub intercepted: usize,
    /// So many went to their own server, when they should or might.
    pub left_alone: usize,
    /// So many were refused, while they might be.
    pub refused: usize,
    /// How often one of the long-lived ones was used.
    pub echoes: usize,
    /// Failed or misdirected: each is one too many.
    pub wrong: Vec<String>,
}

impl Tally {
    /// None failed and none was misdirected.
    ///
    /// # Errors
    ///
    /// If one was, or nothing was tried.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.wrong.is_empty(),
            "{} failed or misdirected, such as {:#?}",
            self.wrong.len(),
            &self.wrong[..self.wrong.len().min(EXAMPLES)]
        );
        ensure!(self.intercepted > 0 && self.echoes > 0, "{self:?}");
        Ok(())
    }
}

/// What is expected, and which of the test's words that is: a connection during which
/// something else was said is judged as one in between.
#[derive(Debug)]
struct Word(AtomicU64);

impl Word {
    fn say(&self, expected: Expected) {
        let count = self.0.load(Ordering::SeqCst) >> 2;
        self.0
            .store((count + 1) << 2 | expected as u64, Ordering::SeqCst);
    }

    fn hear(&self) -> (u64, Expected) {
        let word = self.0.load(Ordering::SeqCst);
        let [intercepted, left_alone, between] = Expected::ALL;
        let expected = match word & 3 {
            0 => intercepted,
            1 => left_alone,
            _ => between,
        };
        (word, expected)
    }
}

#[derive(Debug)]
struct Shared {
    word: Word,
    stop: AtomicBool,
}

/// The traffic of a pod. It ends when this is dropped.
#[derive(Debug)]
pub struct Traffic {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<Tally>>>,
}

impl Traffic {
    /// Starts it. The pod and its peer have servers as in a
    /// [`World`](crate::world::World).
    ///
    /// # Errors
    ///
    /// If no process can be started in the pod.
    pub fn start(pod: &Pod, expected: Expected) -> Result<Self> {
        let clients = [
            Inside::start(pod, Host::Pod, APP)?,
            Inside::start(pod, Host::Peer, Credentials::ROOT)?,
        ];
        let shared = Arc::new(Shared {
            word: Word(AtomicU64::new(expected as u64)),
            stop: AtomicBool::new(false),
        });
        let theirs = Arc::clone(&shared);
        Ok(Self {
            shared,
            thread: Some(thread::spawn(move || run(&clients, &theirs))),
        })
    }

    /// Says what is to become of connections from now on.
    pub fn expect(&self, expected: Expected) {
        self.shared.word.say(expected);
    }

    /// Ends it.
    ///
    /// # Errors
    ///
    /// If no sockets could be made any more.
    pub fn stop(mut self) -> Result<Tally> {
        self.shared.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("it has been stopped")?;
        thread
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the traffic panicked")))
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // Who drops it has an error already.
            let _ = thread.join();
        }
    }
}

fn run([app, peer]: &[Inside; 2], shared: &Shared) -> Result<Tally> {
    let ways = Way::BOTH.map(|way| way.destinations().map(|to| (way, to)));
    let mut next = ways.as_flattened().iter().cycle();
    let mut tally = Tally::default();
    let mut kept: VecDeque<Conversation> = VecDeque::new();
    let mut made: usize = 0;
    while !shared.stop.load(Ordering::SeqCst) {
        let (way, to) = *next.next().context("an empty cycle")?;
        let client = match way {
            Way::Out => app,
            Way::In => peer,
        };
        let (word, said) = shared.word.hear();
        let connected = client.connect(to)?;
        let expected = match shared.word.hear() {
            (now, _) if now != word => Expected::Between,
            _ => said,
        };
        made += 1;
        match connected {
            Ok(conversation) if check_served(way, &conversation, to).is_ok() => {
                if expected == Expected::LeftAlone {
                    let served = &conversation.served;
                    tally
                        .wrong
                        .push(format!("{way:?} to {to}, {said:?}: {served:?}"));
                } else {
                    tally.intercepted += 1;
                    if kept.len() < LONG_LIVED || made.is_multiple_of(REPLACED_AFTER) {
                        kept.push_back(conversation);
                    }
                    if kept.len() > LONG_LIVED {
                        kept.pop_front();
                    }
                }
            }
            Ok(conversation)
                if conversation.served.server == way.server()
                    && expected != Expected::Intercepted =>
            {
                tally.left_alone += 1;
            }
            Err(error)
                if error.kind() == ErrorKind::ConnectionRefused
                    && expected == Expected::Between =>
            {
                tally.refused += 1;
            }
            Ok(conversation) => {
                let served = &conversation.served;
                tally
                    .wrong
                    .push(format!("{way:?} to {to}, {said:?}: {served:?}"));
            }
            Err(error) => tally
                .wrong
                .push(format!("{way:?} to {to}, {said:?}: {error}")),
        }
        if let Some(mut conversation) = kept.pop_front() {
            // Those that live long live through everything.
            match conversation.echo() {
                Ok(()) => {
                    tally.echoes += 1;
                    kept.push_back(conversation);
                }
                Err(error) => tally
                    .wrong
                    .push(format!("a connection that was open, {said:?}: {error:#}")),
            }
        }
        thread::sleep(REST);
    }
    Ok(tally)
}
