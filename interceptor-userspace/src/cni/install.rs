//! Installs the plugin on a node and removes it: its program, and its entry in the
//! network configuration that the container runtime reads first.
//!
//! A file is replaced whole or not at all: written beside its place, flushed to the
//! disk, renamed. The program comes before the entry and goes after it. Whatever step
//! is the last before a crash, runtimes find a configuration that works, and the next
//! run completes what this one began.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde::Serialize;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::{
    POD_ANNOTATIONS,
    conflist::{self, TYPE},
};

/// Where Kubernetes' runtimes look for network configurations.
pub const DEFAULT_CONFIGURATION: &str = "/etc/cni/net.d";

/// Where Kubernetes' runtimes look for plugins.
pub const DEFAULT_PROGRAMS: &str = "/opt/cni/bin";

/// How the names of files begin that are not complete yet. Runtimes read none without
/// an extension.
const INCOMPLETE: &str = ".interceptor-cni-";

/// A node's directories.
#[derive(Clone, Debug)]
pub struct Node {
    /// Of network configurations.
    pub configuration: PathBuf,
    /// Of plugins.
    pub programs: PathBuf,
}

/// The settings of the plugin's entry.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where the daemon listens.
    pub socket: PathBuf,
    /// Whether pods may start while no daemon answers.
    pub pass: bool,
}

/// What a run found and did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// The plugin's program.
    pub program: PathBuf,
    /// Whether it was written or removed.
    pub program_changed: bool,
    /// The network configurations that have the entry, or had it.
    pub configurations: Vec<PathBuf>,
    /// Whether they were changed.
    pub configurations_changed: bool,
}

impl Changes {
    /// Whether something wasn't as it is now.
    pub const fn any(&self) -> bool {
        self.program_changed || self.configurations_changed
    }
}

/// Why the plugin isn't installed, or not removed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file couldn't be read or written.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is no network configuration.
    #[error(
        "no network configuration in {directory}: install the cluster's network first; it is the \
         one that ours is chained to"
    )]
    NoConfiguration {
        /// Where runtimes look for one.
        directory: PathBuf,
    },
    /// A network configuration to which no plugin can be chained.
    #[error("{path}: {problem}")]
    Configuration {
        /// The file.
        path: PathBuf,
        /// Why not, and what to do.
        problem: String,
    },
}

type Result<T> = std::result::Result<T, InstallError>;

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::File {
        operation,
        path,
        source,
    }
}

impl Node {
    /// Installs the program `plugin` and adds the entry to the network configuration that
    /// runtimes read first. What is as it should be isn't touched.
    ///
    /// # Errors
    ///
    /// If there is no such configuration, it isn't a list, or a file can't be written.
    pub fn install(&self, plugin: &Path, entry: &Entry) -> Result<Changes> {
        self.remove_incomplete()?;
        let (path, text) = self.first_configuration()?;
        let changed = conflist::with_entry(&text, &entry.json()).map_err(|problem| {
            InstallError::Configuration {
                path: path.clone(),
                problem,
            }
        })?;
        let program = self.program();
        let wanted = fs::read(plugin).map_err(failed("reading", plugin))?;
        let program_changed = !is_program(&program, &wanted);
        if program_changed {
            replace(&program, &wanted, 0o755)?;
        }
        if let Some(text) = &changed {
            let mode = mode(&path)?;
            replace(&path, text.as_bytes(), mode)?;
        }
        Ok(Changes {
            program,
            program_changed,
            configurations: vec![path],
            configurations_changed: changed.is_some(),
        })
    }

    /// Removes the entry from every network configuration, then the program. What
    /// isn't there is no error.
    ///
    /// # Errors
    ///
    /// If a file can't be read, written or removed.
    pub fn uninstall(&self) -> Result<Changes> {
        self.remove_incomplete()?;
        let mut configurations = Vec::new();
        for path in self.configurations()? {
            let Some(text) = read(&path)? else { continue };
            // One that isn't a list has no entry of ours.
            if let Ok(Some(text)) = conflist::without_entry(&text) {
                let mode = mode(&path)?;
                replace(&path, text.as_bytes(), mode)?;
                configurations.push(path);
            }
        }
        let program = self.program();
        let program_changed = match fs::remove_file(&program) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(failed("removing", &program)(error)),
        };
        Ok(Changes {
            program,
            program_changed,
            configurations_changed: !configurations.is_empty(),
            configurations,
        })
    }

    fn program(&self) -> PathBuf {
        self.programs.join(TYPE)
    }

    /// What runtimes take for network configurations, in the order in which they do.
    fn configurations(&self) -> Result<Vec<PathBuf>> {
        let directory = &self.configuration;
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("reading", directory)(error)),
        };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed("reading", directory))?.path();
            let is_one = path.extension().is_some_and(|extension| {
                ["conf", "conflist", "json"].iter().any(|e| extension == *e)
            });
            if is_one {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }

    /// The one that runtimes take, and its text.
    fn first_configuration(&self) -> Result<(PathBuf, String)> {
        let mut paths = self.configurations()?.into_iter();
        let none = || InstallError::NoConfiguration {
            directory: self.configuration.clone(),
        };
        let path = paths.next().ok_or_else(none)?;
        if path
            .extension()
            .is_none_or(|extension| extension != "conflist")
        {
            return Err(InstallError::Configuration {
                path,
                problem: "the container runtime reads this file first, and it has one plugin, to \
                          which none can be chained: make it a list (`.conflist`)"
                    .to_owned(),
            });
        }
        match read(&path)? {
            Some(text) => Ok((path, text)),
            // It was removed meanwhile.
            None => Err(none()),
        }
    }

    /// Removes what a run that crashed has left.
    fn remove_incomplete(&self) -> Result<()> {
        for directory in [&self.configuration, &self.programs] {
            let Ok(entries) = fs::read_dir(directory) else {
                // The step that needs it says what is wrong.
                continue;
            };
            for entry in entries.filter_map(io::Result::ok) {
                let path = entry.path();
                if entry.file_name().to_string_lossy().starts_with(INCOMPLETE) {
                    fs::remove_file(&path).map_err(failed("removing", &path))?;
                }
            }
        }
        Ok(())
    }
}

impl Entry {
    fn json(&self) -> Value {
        json!({
            "type": TYPE,
            "socket": self.socket,
            "on_error": if self.pass { "pass" } else { "fail" },
            "capabilities": { POD_ANNOTATIONS: true },
        })
    }
}

/// Reads a file that may be gone.
fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("reading", path)(error)),
    }
}

fn mode(path: &Path) -> Result<u32> {
    let metadata = fs::metadata(path).map_err(failed("reading", path))?;
    Ok(metadata.permissions().mode() & 0o7777)
}

fn is_program(path: &Path, wanted: &[u8]) -> bool {
    fs::read(path).is_ok_and(|content| content == wanted)
        && fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o111 == 0o111)
}

/// Replaces a file: after a crash it is the old one or the new one, whole.
fn replace(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let write = || -> io::Result<()> {
        let mut file = NamedTempFile::with_prefix_in(INCOMPLETE, directory)?;
        io::Write::write_all(&mut file, content)?;
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(mode))?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(failed("writing", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use tempfile::TempDir;

    use super::*;

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}]}"#;

    struct Fixture {
        _directory: TempDir,
        node: Node,
        plugin: PathBuf,
    }

    fn fixture() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let node = Node {
            configuration: directory.path().join("net.d"),
            programs: directory.path().join("bin"),
        };
        fs::create_dir(&node.configuration).unwrap();
        fs::create_dir(&node.programs).unwrap();
        let plugin = directory.path().join("interceptor-cni");
        fs::write(&plugin, "program 1").unwrap();
        Fixture {
            _directory: directory,
            node,
            plugin,
        }
    }

    impl Fixture {
        fn install(&self) -> Result<Changes> {
            self.node.install(
                &self.plugin,
                &Entry {
                    socket: "/run/s".into(),
                    pass: false,
                },
            )
        }

        fn write(&self, name: &str, text: &str) -> PathBuf {
            let path = self.node.configuration.join(name);
            fs::write(&path, text).unwrap();
            path
        }

        fn files(&self) -> Vec<String> {
            let mut names: Vec<String> = [&self.node.configuration, &self.node.programs]
                .into_iter()
                .flat_map(|directory| fs::read_dir(directory).unwrap())
                .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
                .collect();
            names.sort();
            names
        }
    }

    #[test]
    fn installing_twice_is_installing_once_and_uninstalling_leaves_nothing() {
        let fixture = fixture();
        let path = fixture.write("10-net.conflist", LIST);
        let other = fixture.write("20-other.conflist", LIST);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let changes = fixture.install().unwrap();
        assert!(changes.program_changed && changes.configurations_changed);
        assert_eq!(changes.configurations, std::slice::from_ref(&path));
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.contains(r#""on_error":"fail""#) && text.contains("/run/s"),
            "{text}"
        );
        assert_eq!(fs::read_to_string(&other).unwrap(), LIST);
        assert_eq!(mode(&path).unwrap(), 0o640);
        let program = fixture.node.program();
        assert_eq!(mode(&program).unwrap(), 0o755);

        let inode = fs::metadata(&path).unwrap().ino();
        assert!(!fixture.install().unwrap().any());
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);

        let changes = fixture.node.uninstall().unwrap();
        assert!(changes.program_changed && changes.configurations_changed);
        assert_eq!(fs::read_to_string(&path).unwrap(), LIST);
        assert_eq!(fixture.files(), ["10-net.conflist", "20-other.conflist"]);
        assert!(!fixture.node.uninstall().unwrap().any());
    }

    #[test]
    fn what_changed_meanwhile_is_put_right() {
        let fixture = fixture();
        let path = fixture.write("10-net.conflist", LIST);
        fixture.install().unwrap();
        // The network rewrites its file; a release brings another program.
        fs::write(&path, LIST).unwrap();
        let changes = fixture.install().unwrap();
        assert!(changes.configurations_changed && !changes.program_changed);
        fs::write(&fixture.plugin, "program 2").unwrap();
        let changes = fixture.install().unwrap();
        assert!(!changes.configurations_changed && changes.program_changed);
        assert_eq!(
            fs::read_to_string(fixture.node.program()).unwrap(),
            "program 2"
        );
        // Another network comes first.
        let first = fixture.write("05-net.conflist", LIST);
        assert_eq!(fixture.install().unwrap().configurations, [first]);
        assert_eq!(fixture.node.uninstall().unwrap().configurations.len(), 2);
    }

    #[test]
    fn what_a_crash_leaves_is_completed_or_removed() {
        let fixture = fixture();
        fixture.write("10-net.conflist", LIST);
        // While a file was written: each of the two, half.
        fixture.write(".interceptor-cni-abc", "{\"cniVer");
        fs::write(fixture.node.programs.join(".interceptor-cni-x"), "prog").unwrap();
        // After the program, before the entry.
        fs::write(fixture.node.program(), "program 1").unwrap();
        fixture.install().unwrap();
        assert_eq!(fixture.files(), ["10-net.conflist", "interceptor-cni"]);
        // After the entry was removed, before the program was.
        fixture.write("10-net.conflist", LIST);
        assert!(fixture.node.uninstall().unwrap().program_changed);
        assert_eq!(fixture.files(), ["10-net.conflist"]);
    }

    #[test]
    fn nothing_is_written_if_something_is_wrong() {
        let fixture = fixture();
        let error = fixture.install().unwrap_err().to_string();
        assert!(error.contains("no network configuration in"), "{error}");
        let path = fixture.write("10-net.conf", r#"{"type":"ptp"}"#);
        fixture.write("20-net.conflist", LIST);
        let error = fixture.install().unwrap_err().to_string();
        assert!(error.contains("make it a list"), "{error}");
        fs::remove_file(path).unwrap();
        fixture.write("05-net.conflist", "{");
        let error = fixture.install().unwrap_err().to_string();
        assert!(error.contains("no list of CNI plugins"), "{error}");
        assert_eq!(fixture.files(), ["05-net.conflist", "20-net.conflist"]);

        fixture.write("05-net.conflist", LIST);
        fs::remove_dir(&fixture.node.programs).unwrap();
        let error = fixture.install().unwrap_err().to_string();
        assert!(
            error.starts_with("writing") && error.contains("bin/interceptor-cni"),
            "{error}"
        );
        assert_eq!(
            fs::read_to_string(fixture.node.configuration.join("05-net.conflist")).unwrap(),
            LIST
        );
    }
}
