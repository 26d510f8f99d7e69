//! The kernel modules that the tests need, in the order in which they load.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::kernel::{Kernel, read_module};

/// Pods need veth; all others are netfilter's, for live iptables, and what
/// finds sockets.
const NEEDED: [&str; 25] = [
    "veth",
    "dummy",
    "tcp_diag",
    "nf_conntrack",
    "nf_nat",
    "ip_tables",
    "iptable_nat",
    "ip6_tables",
    "ip6table_nat",
    "iptable_mangle",
    "ip6table_mangle",
    "iptable_raw",
    "ip6table_raw",
    "nf_tables",
    "nft_chain_nat",
    "nft_compat",
    "xt_CT",
    "xt_TPROXY",
    "xt_connmark",
    "xt_conntrack",
    "xt_mark",
    "xt_multiport",
    "xt_owner",
    "xt_REDIRECT",
    "xt_tcpudp",
];

/// Those that newer kernels have within another of [`NEEDED`].
const MERGED: [&str; 1] = ["nft_counter"];

/// Modules to load, and those that the kernel doesn't have.
#[derive(Debug)]
pub(super) struct Modules {
    /// Names and contents; each after those that it depends on.
    pub(super) load: Vec<(String, Vec<u8>)>,
    /// Neither built in nor a file.
    pub(super) missing: Vec<String>,
}

/// Reads the modules that a guest with this kernel needs. A kernel without a
/// directory of modules is taken to have everything built in.
///
/// # Errors
///
/// If a file can't be read.
pub(super) fn collect(kernel: &Kernel) -> Result<Modules> {
    let mut modules = Modules {
        load: Vec::new(),
        missing: Vec::new(),
    };
    let Some(directory) = &kernel.modules else {
        return Ok(modules);
    };
    let mut files = HashMap::new();
    find(directory, &mut files)
        .with_context(|| format!("read the modules in {}", directory.display()))?;
    let built_in = fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default();
    let built_in: Vec<String> = built_in
        .lines()
        .filter_map(|line| name(Path::new(line)))
        .collect();
    let mut contents = HashMap::new();
    let needed: Vec<&str> = NEEDED.into_iter().chain(MERGED).collect();
    let order = order(&needed, |name| {
        let Some(path) = files.get(name) else {
            if !built_in.iter().any(|built_in| built_in == name) && !MERGED.contains(&name) {
                modules.missing.push(name.to_owned());
            }
            return Ok(None);
        };
        let content = read_module(path)?;
        let depends = depends(&content)
            .with_context(|| format!("{} doesn't say what it depends on", path.display()))?;
        contents.insert(name.to_owned(), content);
        Ok(Some(depends))
    })?;
    modules.load = order
        .into_iter()
        .filter_map(|name| contents.remove_entry(&name))
        .collect();
    Ok(modules)
}

/// The paths of all modules below a directory, by name.
fn find(directory: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            find(&path, files)?;
        } else if let Some(name) = name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The name of the module in a file, if it is one: `a-b.ko.xz` is `a_b`.
fn name(path: &Path) -> Option<String> {
    let (name, rest) = path.file_name()?.to_str()?.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"]
        .contains(&rest)
        .then(|| name.replace('-', "_"))
}

/// What a module says that it depends on: `depends=a,b` among its facts, which
/// end with zeros.
fn depends(module: &[u8]) -> Option<Vec<String>> {
    const KEY: &[u8] = b"depends=";
    module.split(|byte| *byte == 0).find_map(|fact| {
        let names = std::str::from_utf8(fact.strip_prefix(KEY)?).ok()?;
        Some(
            names
                .split(',')
                .filter(|name| !name.is_empty())
                .map(|name| name.replace('-', "_"))
                .collect(),
        )
    })
}

/// The modules and all that they depend on, each after its own dependencies.
/// `depends` is asked once for each, and says `None` of what can't be loaded.
///
/// # Errors
///
/// Those of `depends`.
fn order(
    needed: &[&str],
    mut depends: impl FnMut(&str) -> Result<Option<Vec<String>>>,
) -> Result<Vec<String>> {
    fn visit(
        name: &str,
        depends: &mut dyn FnMut(&str) -> Result<Option<Vec<String>>>,
        seen: &mut Vec<String>,
        order: &mut Vec<String>,
    ) -> Result<()> {
        if seen.iter().any(|other| other == name) {
            return Ok(());
        }
        seen.push(name.to_owned());
        if let Some(names) = depends(name)? {
            for name in names {
                visit(&name, depends, seen, order)?;
            }
            order.push(name.to_owned());
        }
        Ok(())
    }
    let (mut seen, mut order) = (Vec::new(), Vec::new());
    for name in needed {
        visit(name, &mut depends, &mut seen, &mut order)?;
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_load_after_what_they_depend_on() {
        let mut asked = Vec::new();
        let order = order(&["nat", "owner", "missing"], |name| {
            asked.push(name.to_owned());
            Ok(match name {
                "nat" => Some(vec!["conntrack".to_owned(), "tables".to_owned()]),
                "conntrack" => Some(vec!["defrag".to_owned()]),
                "owner" => Some(vec!["tables".to_owned()]),
                "tables" | "defrag" => Some(Vec::new()),
                _ => None,
            })
        });
        assert_eq!(
            order.unwrap(),
            ["defrag", "conntrack", "tables", "nat", "owner"]
        );
        asked.sort();
        assert_eq!(
            asked,
            ["conntrack", "defrag", "missing", "nat", "owner", "tables"]
        );
    }

    #[test]
    fn a_module_says_what_it_depends_on() {
        let module = b"\x7fELF\0license=GPL\0softdepends=no\0depends=nf-nat,x_tables\0name=y\0";
        assert_eq!(depends(module).unwrap(), ["nf_nat", "x_tables"]);
        assert_eq!(depends(b"\0depends=\0").unwrap(), [""; 0]);
        assert_eq!(depends(b"\x7fELF"), None);
    }

    #[test]
    fn a_files_name_is_its_modules() {
        for (file, expected) in [
            ("kernel/net/nft-compat.ko.xz", Some("nft_compat")),
            ("veth.ko", Some("veth")),
            ("modules.order", None),
            ("a.ko.txt", None),
        ] {
            assert_eq!(name(Path::new(file)).as_deref(), expected);
        }
    }
}
