//! The archive that is a guest's root file system.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use cpio::newc::{Builder, trailer};

use super::{modules::Modules, programs::Programs};
use crate::process::{command, find};

/// Programs of the machine's that the harness starts.
const COMMANDS: [&str; 11] = [
    "ip",
    "ss",
    "setpriv",
    "iptables-legacy-restore",
    "iptables-legacy-save",
    "iptables-nft-restore",
    "iptables-nft-save",
    "ip6tables-legacy-restore",
    "ip6tables-legacy-save",
    "ip6tables-nft-restore",
    "ip6tables-nft-save",
];

/// Programs of the machine's that a guest has if the machine does.
const MORE_COMMANDS: [&str; 2] = ["bpftool", "nft"];

/// Where iptables loads its extensions from.
const EXTENSIONS: [&str; 3] = [
    "/usr/lib/x86_64-linux-gnu/xtables",
    "/usr/lib64/xtables",
    "/usr/lib/xtables",
];

/// Directories that nothing else makes.
const DIRECTORIES: [&str; 8] = [
    "/bin", "/dev", "/etc", "/proc", "/run", "/sys", "/tmp", "/var",
];

/// Where the modules are in a guest.
pub(super) const MODULES: &str = "/modules";

/// Writes the archive. The workspace's programs have the same paths in a guest
/// as on the machine, so that they find each other.
///
/// # Errors
///
/// If a file is missing.
pub(super) fn write(path: &Path, programs: &Programs, modules: &Modules, init: &str) -> Result<()> {
    let file = File::create(path).with_context(|| format!("make {}", path.display()))?;
    let mut archive = Archive {
        output: BufWriter::new(file),
        known: BTreeSet::new(),
    };
    for directory in DIRECTORIES {
        archive.directory(Path::new(directory))?;
    }
    archive.file(Path::new("/init"), 0o755, init.as_bytes())?;
    let busybox = find("busybox").context("no busybox on PATH")?;
    archive.program("/bin/busybox".as_ref(), &busybox)?;
    for name in COMMANDS {
        let path = find(name).with_context(|| format!("no {name} on PATH"))?;
        archive.program(&path, &path)?;
    }
    for path in MORE_COMMANDS.into_iter().filter_map(find) {
        archive.program(&path, &path)?;
    }
    for directory in EXTENSIONS.map(Path::new).into_iter().filter(|d| d.is_dir()) {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            archive.program(&path, &path)?;
        }
    }
    for (path, stripped) in programs.all() {
        archive.program(path, &stripped)?;
    }
    for (name, content) in &modules.load {
        let path = Path::new(MODULES).join(format!("{name}.ko"));
        archive.file(&path, 0o644, content)?;
    }
    let mut output = trailer(archive.output)?;
    output.flush()?;
    Ok(())
}

/// An archive that is being written.
struct Archive {
    output: BufWriter<File>,
    /// What is in it already.
    known: BTreeSet<PathBuf>,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

impl Archive {
    /// Adds a directory and those above it.
    fn directory(&mut self, path: &Path) -> Result<()> {
        if let Some(above) = path.parent() {
            self.directory(above)?;
            self.entry(path, DIRECTORY | 0o755, &[])?;
        }
        Ok(())
    }

    /// Adds a file, and the directories above it.
    fn file(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        if let Some(above) = path.parent() {
            self.directory(above)?;
        }
        self.entry(path, REGULAR | mode, content)
    }

    /// Adds a program or a library, and the libraries that it is linked with.
    fn program(&mut self, path: &Path, source: &Path) -> Result<()> {
        if self.known.contains(path) {
            return Ok(());
        }
        let content = fs::read(source).with_context(|| format!("read {}", source.display()))?;
        self.file(path, 0o755, &content)?;
        // It fails for what is linked statically.
        let linked = command("ldd")
            .arg(source)
            .output()
            .context("start ldd, which finds a program's libraries")?;
        for library in libraries(&String::from_utf8_lossy(&linked.stdout)) {
            if !self.known.contains(library) {
                let content =
                    fs::read(library).with_context(|| format!("read {}", library.display()))?;
                self.file(library, 0o755, &content)?;
            }
        }
        Ok(())
    }

    /// Adds an entry, unless the archive has it.
    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        if !self.known.insert(path.to_owned()) {
            return Ok(());
        }
        let name = path.strip_prefix("/").unwrap_or(path);
        let name = name.to_str().context("a path that isn't UTF-8")?;
        let size = u32::try_from(content.len()).context("a file of 4 GiB")?;
        let number = u32::try_from(self.known.len())?;
        let mut writer = Builder::new(name)
            .ino(number)
            .mode(mode)
            .nlink(1)
            .write(&mut self.output, size);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
}

/// The paths in what ldd prints.
fn libraries(ldd: &str) -> impl Iterator<Item = &Path> {
    ldd.lines().filter_map(|line| {
        let path = line.split_whitespace().find(|word| word.starts_with('/'))?;
        // `/a/b.so (0x7f..)`; an error starts with a path and a colon.
        (line.ends_with(')') && !path.ends_with(':')).then(|| Path::new(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_that_ldd_found() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffc)\n\
                   \tlibmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f1b)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x00007f1b)\n";
        let found: Vec<&Path> = libraries(ldd).collect();
        assert_eq!(
            found,
            [
                Path::new("/lib/x86_64-linux-gnu/libmnl.so.0"),
                Path::new("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert_eq!(libraries("\tstatically linked\n").count(), 0);
    }
}
