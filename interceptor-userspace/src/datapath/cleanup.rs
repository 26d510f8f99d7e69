//! All that is pinned below a root, whole or not, and its removal.

use std::{fmt, io};

use serde::Serialize;

use super::{
    attach::{detach, need_root, remove_leftovers},
    inspect,
    pins::Pins,
};
use crate::{Result, pod::PodName};

/// Something of ours.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Whose it is.
    pub pod: PodName,
    /// What it is.
    pub state: FoundState,
}

/// What something of ours is.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FoundState {
    /// A pod that is attached.
    Attached,
    /// A pod that is attached, and whose cgroup or network namespace is gone.
    Gone,
    /// A pod whose pins aren't whole, or of another version's layout: why.
    Damaged(String),
    /// What was left half attached or half detached.
    Half,
}

impl fmt::Display for FoundState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attached => f.write_str("attached"),
            Self::Gone => f.write_str("attached to what is gone"),
            Self::Damaged(why) => write!(f, "damaged: {why}"),
            Self::Half => f.write_str("half attached or half detached"),
        }
    }
}

/// All of ours below the root.
///
/// # Errors
///
/// If it can't be read.
pub fn everything(pins: &Pins) -> Result<Vec<Found>> {
    need_root()?;
    let whole = pins.pods()?.into_iter().map(|pod| {
        let state = match inspect(pins, &pod) {
            Ok(found) if found.gone => FoundState::Gone,
            Ok(_) => FoundState::Attached,
            Err(error) => FoundState::Damaged(error.to_string()),
        };
        Found { pod, state }
    });
    let half = pins.leftovers()?.into_iter().map(|pod| Found {
        pod,
        state: FoundState::Half,
    });
    Ok(whole.chain(half).collect())
}

/// Removes something of ours.
///
/// # Errors
///
/// If it can't be removed.
pub fn remove(pins: &Pins, found: &Found) -> Result<()> {
    match found.state {
        FoundState::Half => {
            need_root()?;
            let _lock = pins.lock()?;
            remove_leftovers(pins, &found.pod)
        }
        _ => detach(pins, &found.pod),
    }
}

/// Removes the root, if nothing of ours is left in it and no daemon uses it.
///
/// # Errors
///
/// If it can't be locked.
pub fn remove_root(pins: &Pins) -> Result<()> {
    need_root()?;
    if !pins.root().exists() {
        return Ok(());
    }
    // The root goes with the lock.
    let _lock = pins.lock()?;
    // Left by a daemon that was killed.
    let _: io::Result<()> = std::fs::remove_dir(pins.daemon());
    Ok(())
}
