//! The workspace's programs for guests: the very ones that the machine's own
//! tests run, without what is for debuggers.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    compile::HOST,
    process::{cargo, command, output, shown},
};

/// What cargo built, and what of it guests get.
pub(super) struct Programs {
    binaries: Vec<(String, PathBuf)>,
    suites: Vec<(String, PathBuf)>,
    stripped: TempDir,
}

/// Builds these programs, and these suites with the programs of their package.
///
/// # Errors
///
/// If the build fails.
pub(super) fn build(programs: &[&str], suites: &[String]) -> Result<Programs> {
    let programs = programs.iter().flat_map(|program| ["--bin", program]);
    let mut messages = built(cargo(&["build"]).args(HOST).args(programs))?;
    if !suites.is_empty() {
        let suites = suites.iter().flat_map(|suite| ["--test", suite]);
        messages += &built(cargo(&["test", "--no-run"]).args(HOST).args(suites))?;
    }
    let artifacts = |kind: &str| -> Vec<(String, PathBuf)> {
        let lines = messages.lines();
        lines.filter_map(|line| artifact(line, kind)).collect()
    };
    let programs = Programs {
        binaries: artifacts("bin"),
        suites: artifacts("test"),
        stripped: tempfile::tempdir().context("make a temporary directory")?,
    };
    for (source, stripped) in programs.all() {
        output(
            command("strip")
                .arg("--strip-debug")
                .arg("-o")
                .args([stripped.as_path(), source]),
        )?;
    }
    Ok(programs)
}

/// Runs a build, and returns what it says to programs.
fn built(command: &mut Command) -> Result<String> {
    let output = command
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start {}", shown(command)))?;
    // What is wrong it has said to people.
    ensure!(
        output.status.success(),
        "{}: {}",
        shown(command),
        output.status
    );
    String::from_utf8(output.stdout).context("read what cargo says")
}

/// The name and the path of a program that a line of cargo's speaks of.
fn artifact(line: &str, kind: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    let target = &message["target"];
    (target["kind"][0] == kind).then_some(())?;
    Some((
        target["name"].as_str()?.to_owned(),
        message["executable"].as_str()?.into(),
    ))
}

impl Programs {
    /// The path of a program.
    ///
    /// # Errors
    ///
    /// If there is none of this name.
    pub(super) fn binary(&self, name: &str) -> Result<&Path> {
        self.binaries
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, path)| path.as_path())
            .with_context(|| format!("cargo built no program {name}"))
    }

    /// The suites' names and paths.
    pub(super) fn suites(&self) -> &[(String, PathBuf)] {
        &self.suites
    }

    /// The path of each, and the path of what a guest gets instead.
    pub(super) fn all(&self) -> impl Iterator<Item = (&Path, PathBuf)> {
        let all = self.binaries.iter().chain(&self.suites);
        all.filter_map(|(_, path)| {
            let stripped = self.stripped.path().join(path.file_name()?);
            Some((path.as_path(), stripped))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_says_where_the_programs_are() {
        let line = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"cases"},"executable":"/t/deps/cases-1"}"#;
        let expected = ("cases".to_owned(), PathBuf::from("/t/deps/cases-1"));
        assert_eq!(artifact(line, "test"), Some(expected));
        assert_eq!(artifact(line, "bin"), None);
        let library = r#"{"target":{"kind":["lib"],"name":"x"},"executable":null}"#;
        assert_eq!(artifact(library, "lib"), None);
        assert_eq!(artifact("no json", "bin"), None);
    }
}
