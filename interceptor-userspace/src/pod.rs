//! What a pod is: a name, a cgroup and a network namespace.

pub mod cgroup;
pub(crate) mod listeners;
pub mod netns;
pub(crate) mod user_namespace;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The name under which a pod's pins lie.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct PodName(String);

impl TryFrom<String> for PodName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl FromStr for PodName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let valid = (1..=128).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        if valid {
            Ok(Self(name.to_owned()))
        } else {
            Err(Error::PodName {
                name: name.to_owned(),
            })
        }
    }
}

impl AsRef<str> for PodName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_directory() {
        for name in ["a", "web-0", "8f2c_A", &"x".repeat(128)] {
            assert_eq!(name.parse::<PodName>().unwrap().as_ref(), name);
        }
        for name in [
            "",
            "a/b",
            "..",
            ".",
            "a.b",
            "a b",
            "a+b",
            "ü",
            &"x".repeat(129),
        ] {
            assert!(name.parse::<PodName>().is_err(), "{name}");
        }
    }
}
