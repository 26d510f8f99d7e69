//! Debian's packaged kernels, which are unpacked and never installed.
//!
//! apt has a state of its own here, so that the machine's sources stay as they
//! are; where the mirror is, it takes from those.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use super::{Wanted, kernel::Kernel};
use crate::process::{command, output, step};

/// The suites that have the kernels, the oldest first.
const SUITES: [Suite; 4] = [
    Suite {
        name: "bullseye-security",
        security: true,
    },
    Suite {
        name: "bookworm-security",
        security: true,
    },
    Suite {
        name: "trixie-security",
        security: true,
    },
    Suite {
        name: "trixie-backports",
        security: false,
    },
];

struct Suite {
    name: &'static str,
    /// It is in the archive of security updates.
    security: bool,
}

/// The newest kernel of a suite is what this one depends on. The cloud flavour
/// is small and has all that is needed.
const METAPACKAGE: &str = "linux-image-cloud-amd64";
const FLAVOUR: &str = "-cloud-amd64";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// How long a list of packages is new enough.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

const ADVICE: &str = "name a kernel's file instead (--vm PATH)";

/// The archive's list of kernels, and where they are kept.
pub(super) struct Archive {
    apt: Apt,
    kernels: PathBuf,
    packages: Vec<Package>,
}

impl Archive {
    /// Reads the list, which is fetched if it is older than a day.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub(super) fn open(directory: &Path) -> Result<Self> {
        ensure!(
            cfg!(target_arch = "x86_64"),
            "packaged kernels are for x86_64 only; {ADVICE}"
        );
        let apt = Apt {
            directory: directory.join("apt"),
        };
        apt.update()?;
        let kernels = directory.join("kernels");
        fs::create_dir_all(&kernels).with_context(|| format!("make {}", kernels.display()))?;
        Ok(Self {
            packages: parse(&apt.list()?),
            apt,
            kernels,
        })
    }

    /// The kernels that are meant, unpacked.
    ///
    /// # Errors
    ///
    /// If there is no such kernel, or it can't be downloaded and unpacked.
    pub(super) fn kernels(&self, wanted: &Wanted) -> Result<Vec<Kernel>> {
        let images = resolve(&self.packages, wanted);
        if images.is_empty() {
            let mut known: Vec<&Package> = self.packages.iter().filter(|p| p.is_image()).collect();
            known.sort_by_key(|package| package.upstream());
            let known: Vec<String> = known.iter().map(|p| dotted(&p.upstream())).collect();
            bail!(
                "no packaged kernel {wanted:?}; there are {}",
                known.join(", ")
            );
        }
        images
            .into_iter()
            .map(|image| {
                let path = self.unpack(image)?;
                let name = match wanted {
                    Wanted::Version(version) => version.clone(),
                    _ => dotted(&image.upstream()[..2]),
                };
                Kernel::of_image(&name, &path)
            })
            .collect()
    }

    /// The path of the package's kernel, below a directory that has its modules.
    fn unpack(&self, image: &Package) -> Result<PathBuf> {
        let directory = self.kernels.join(&image.version);
        if !directory.is_dir() {
            let beside =
                tempfile::tempdir_in(&self.kernels).context("make a temporary directory")?;
            let (debs, root) = (beside.path().join("debs"), beside.path().join("root"));
            fs::create_dir(&debs).context("make a directory for packages")?;
            let packages = closure(&self.packages, image);
            step(
                &format!("apt-get download {}", packages.join(" ")),
                self.apt
                    .command("apt-get")
                    .arg("download")
                    .args(&packages)
                    .current_dir(&debs),
            )?;
            for deb in fs::read_dir(&debs)? {
                output(command("dpkg-deb").arg("-x").arg(deb?.path()).arg(&root))?;
            }
            // Beside its place first: a rename is all or nothing.
            fs::rename(&root, &directory)
                .with_context(|| format!("make {}", directory.display()))?;
        }
        find_image(&directory)
            .with_context(|| format!("no kernel in {}: remove it", directory.display()))
    }
}

/// The one kernel in an unpacked package: in /boot, from 7.2 with its modules.
fn find_image(root: &Path) -> Option<PathBuf> {
    let entries = |directory: &str| {
        let entries = fs::read_dir(root.join(directory)).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path()))
    };
    let in_boot = entries("boot").find(|path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
    });
    in_boot.or_else(|| {
        entries("usr/lib/modules")
            .map(|path| path.join("vmlinuz"))
            .find(|path| path.is_file())
    })
}

/// apt with sources, lists and a cache of its own.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn command(&self, program: &str) -> Command {
        let option = |name: &str, path: &str| format!("{name}={}/{path}", self.directory.display());
        let mut command = command(program);
        for option in [
            option("Dir::Etc::sourcelist", "sources.list"),
            option("Dir::State", "state"),
            option("Dir::Cache", "cache"),
            "Dir::Etc::sourceparts=-".to_owned(),
            "Dir::State::status=/dev/null".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            // The lists of old releases aren't renewed for ever.
            "Acquire::Check-Valid-Until=false".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }

    /// Fetches the lists if they are too old, or others than are wanted.
    fn update(&self) -> Result<()> {
        let sources = sources(&machine_sources()?).with_context(|| {
            format!("no archive of Debian's among this machine's apt sources; {ADVICE}")
        })?;
        // It has the sources that were fetched last; its time says when.
        let fetched = self.directory.join("fetched");
        let known = fs::read_to_string(&fetched).unwrap_or_default() == sources;
        let age = fs::metadata(&fetched)
            .and_then(|metadata| metadata.modified())
            .ok()
            .and_then(|written| written.elapsed().ok());
        if known && age.is_some_and(|age| age < DAY) {
            return Ok(());
        }
        for directory in ["state/lists/partial", "cache/archives/partial"] {
            let directory = self.directory.join(directory);
            fs::create_dir_all(&directory)
                .with_context(|| format!("make {}", directory.display()))?;
        }
        let write = |path: &Path| {
            fs::write(path, &sources).with_context(|| format!("write {}", path.display()))
        };
        write(&self.directory.join("sources.list"))?;
        let update = step(
            "apt-get update, for kernels",
            self.command("apt-get")
                .args(["-o", "APT::Update::Error-Mode=any", "update"]),
        );
        match update {
            Ok(()) => write(&fetched),
            // Without a network, yesterday's kernels still are kernels.
            Err(error) if known => {
                eprintln!("vm: {error:#}\nvm: going on with the old list");
                Ok(())
            }
            Err(error) => Err(error.context("fetch the list of packaged kernels")),
        }
    }

    /// All lists, one after the other.
    fn list(&self) -> Result<String> {
        let files = output(self.command("apt-get").args([
            "indextargets",
            "--format",
            "$(FILENAME)",
            "Created-By: Packages",
        ]))?;
        output(
            command("/usr/lib/apt/apt-helper")
                .arg("cat-file")
                .args(files.lines()),
        )
    }
}

/// The machine's own sources: in each line the archive's address and a release.
fn machine_sources() -> Result<String> {
    output(command("apt-get").args([
        "indextargets",
        "--no-release-info",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
    ]))
}

/// The list of sources, if the machine's name an archive of Debian's.
fn sources(machine: &str) -> Option<String> {
    let find = |name: &str| {
        machine
            .lines()
            .filter_map(|line| line.split(' ').next())
            .find(|uri| uri.trim_end_matches('/').ends_with(name))
            .map(str::to_owned)
    };
    let main = find("/debian")?;
    let security = find("/debian-security")
        .unwrap_or_else(|| main.trim_end_matches('/').to_owned() + "-security/");
    Some(
        SUITES
            .iter()
            .map(|suite| {
                let uri = if suite.security { &security } else { &main };
                format!("deb [signed-by={KEYRING}] {uri} {} main\n", suite.name)
            })
            .collect(),
    )
}

/// A package of a kernel, of its modules, or one that depends on them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Package {
    name: String,
    version: String,
    depends: Vec<String>,
}

impl Package {
    fn is_image(&self) -> bool {
        self.name.strip_prefix("linux-image-").is_some_and(|rest| {
            rest.starts_with(|c: char| c.is_ascii_digit()) && rest.ends_with(FLAVOUR)
        })
    }

    /// The kernel's own version, as numbers.
    fn upstream(&self) -> Vec<u32> {
        let end = self.version.find(|c: char| c != '.' && !c.is_ascii_digit());
        numbers(&self.version[..end.unwrap_or(self.version.len())])
    }
}

fn numbers(version: &str) -> Vec<u32> {
    let numbers = version.split('.');
    numbers.map_while(|number| number.parse().ok()).collect()
}

fn dotted(numbers: &[u32]) -> String {
    let numbers: Vec<String> = numbers.iter().map(u32::to_string).collect();
    numbers.join(".")
}

/// The packages in a list that are a kernel's.
fn parse(list: &str) -> Vec<Package> {
    list.split("\n\n")
        .filter_map(|stanza| {
            let value = |key: &str| {
                stanza
                    .lines()
                    .find_map(|line| line.strip_prefix(key)?.strip_prefix(": "))
            };
            let name = value("Package").filter(|name| name.starts_with("linux-"))?;
            Some(Package {
                name: name.to_owned(),
                version: value("Version")?.to_owned(),
                depends: value("Depends")
                    .unwrap_or_default()
                    .split(", ")
                    .filter_map(|dependency| dependency.split(' ').next())
                    .map(str::to_owned)
                    .collect(),
            })
        })
        .collect()
}

/// The packages of the kernels that are meant. A suite's metapackage says
/// which is its newest; other kernels are those that the archive still has.
fn resolve<'a>(packages: &'a [Package], wanted: &Wanted) -> Vec<&'a Package> {
    let mut current: Vec<&Package> = packages
        .iter()
        .filter(|package| package.name == METAPACKAGE)
        .filter_map(|meta| {
            packages.iter().find(|package| {
                package.is_image()
                    && package.version == meta.version
                    && meta.depends.contains(&package.name)
            })
        })
        .collect();
    current.sort_by_key(|package| package.upstream());
    let newest = |packages: &mut dyn Iterator<Item = &'a Package>| {
        packages.max_by_key(|package| package.upstream())
    };
    match wanted {
        Wanted::All => current,
        Wanted::Newest => current.pop().into_iter().collect(),
        Wanted::Version(version) => {
            let version = numbers(version);
            let is_meant = |package: &&Package| package.upstream().starts_with(&version);
            newest(&mut current.iter().copied().filter(is_meant))
                .or_else(|| newest(&mut packages.iter().filter(|p| p.is_image()).filter(is_meant)))
                .into_iter()
                .collect()
        }
        Wanted::Image(_) => Vec::new(),
    }
}

/// The package and those of its own files that it depends on, each with its version.
fn closure(packages: &[Package], image: &Package) -> Vec<String> {
    let of_kernel = image
        .depends
        .iter()
        .filter(|name| name.starts_with("linux-binary-") || name.starts_with("linux-modules-"))
        .filter_map(|name| {
            packages
                .iter()
                .find(|package| package.name == **name && package.version == image.version)
        });
    [image]
        .into_iter()
        .chain(of_kernel)
        .map(|package| format!("{}={}", package.name, package.version))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
Package: linux-image-cloud-amd64
Version: 6.1.192-2
Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)

Package: linux-image-6.1.0-56-cloud-amd64
Version: 6.1.192-2
Depends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120) | linux-initramfs-tool

Package: linux-image-6.1.0-9-cloud-amd64
Version: 6.1.9-1
Depends: kmod

Package: linux-image-6.1.0-56-cloud-amd64-dbg
Version: 6.1.192-2

Package: linux-image-6.1.0-56-cloud-amd64-unsigned
Version: 6.1.200-1

Package: linux-image-7.2.12+deb13-cloud-amd64
Version: 7.2.12-1~bpo13+1
Depends: kmod

Package: linux-image-7.3.4+deb13-cloud-amd64
Version: 7.3.4-1~bpo13+1
Depends: dracut | linux-initramfs-tool, linux-binary-7.3.4+deb13-cloud-amd64 (= 7.3.4-1~bpo13+1), linux-modules-7.3.4+deb13-cloud-amd64 (= 7.3.4-1~bpo13+1)

Package: linux-binary-7.3.4+deb13-cloud-amd64
Version: 7.3.4-1~bpo13+1

Package: linux-modules-7.3.4+deb13-cloud-amd64
Version: 7.3.4-1~bpo13+1

Package: linux-image-cloud-amd64
Version: 7.3.4-1~bpo13+1
Depends: linux-base-cloud-amd64 (= 7.3.4-1~bpo13+1), linux-image-7.3.4+deb13-cloud-amd64 (= 7.3.4-1~bpo13+1)

Package: zsh
Version: 5
";

    fn found(wanted: &Wanted) -> Vec<String> {
        let packages = parse(LIST);
        let found = resolve(&packages, wanted);
        found
            .iter()
            .map(|package| package.version.clone())
            .collect()
    }

    #[test]
    fn a_version_is_resolved_through_the_metapackages() {
        let version = |version: &str| found(&Wanted::Version(version.to_owned()));
        assert_eq!(version("6.1"), ["6.1.192-2"]);
        assert_eq!(version("6.1.9"), ["6.1.9-1"]);
        assert_eq!(version("7.3"), ["7.3.4-1~bpo13+1"]);
        // No longer its suite's newest, but still there.
        assert_eq!(version("7.2"), ["7.2.12-1~bpo13+1"]);
        assert!(version("6.10").is_empty());
        assert_eq!(found(&Wanted::Newest), ["7.3.4-1~bpo13+1"]);
        assert_eq!(found(&Wanted::All), ["6.1.192-2", "7.3.4-1~bpo13+1"]);
    }

    #[test]
    fn a_kernels_files_may_be_in_several_packages() {
        let packages = parse(LIST);
        let closure = |version: &str| {
            let wanted = Wanted::Version(version.to_owned());
            closure(&packages, resolve(&packages, &wanted)[0])
        };
        assert_eq!(
            closure("6.1"),
            ["linux-image-6.1.0-56-cloud-amd64=6.1.192-2"]
        );
        assert_eq!(
            closure("7.3"),
            [
                "linux-image-7.3.4+deb13-cloud-amd64=7.3.4-1~bpo13+1",
                "linux-binary-7.3.4+deb13-cloud-amd64=7.3.4-1~bpo13+1",
                "linux-modules-7.3.4+deb13-cloud-amd64=7.3.4-1~bpo13+1",
            ]
        );
    }

    #[test]
    fn the_mirror_is_the_machines_own() {
        let machine = "https://other.example/apt stable\n\
                       http://mirror.example/debian/ bookworm\n\
                       http://mirror.example/debian-security/ bookworm-security\n";
        let text = sources(machine).unwrap();
        let line = |suite: &str| text.lines().find(|line| line.contains(suite)).unwrap();
        assert!(line("trixie-security").contains(" http://mirror.example/debian-security/ "));
        assert!(line("trixie-backports").contains(" http://mirror.example/debian/ "));
        assert_eq!(text.lines().count(), SUITES.len());
        assert_eq!(sources("https://other.example/apt stable"), None);
    }
}
