//! Builds the kernel programs and leaves their object where `src/datapath` embeds it.

use std::{env, path::PathBuf};

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

/// The toolchain that `cargo xtask setup` links: one that has the source of core.
const TOOLCHAIN: &str = "interceptor-bpf";

fn main() -> anyhow::Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?);
    // TARGET/PROFILE/build/PACKAGE/out, or TARGET/TRIPLE/PROFILE/...
    let mut target = out.ancestors().nth(4).context("OUT_DIR is too short")?;
    if target.file_name() == env::var_os("TARGET").as_deref() {
        target = target.parent().context("OUT_DIR is too short")?;
    }
    // SAFETY: a build script has one thread here.
    unsafe {
        // One for all profiles and for clippy, so that core is compiled once.
        env::set_var("CARGO_BUILD_BUILD_DIR", target.join("bpf"));
        // Lets the toolchain build core from source even if it isn't a nightly.
        env::set_var("RUSTC_BOOTSTRAP", "1");
        // What the inner cargo says becomes warnings of the outer one.
        env::set_var("CARGO_TERM_QUIET", "true");
    }
    build_ebpf(
        [Package {
            name: "interceptor-ebpf",
            root_dir: "../interceptor-ebpf",
            ..Package::default()
        }],
        Toolchain::Custom(TOOLCHAIN),
    )
    .context("building the kernel programs; `cargo xtask setup` installs what that needs")
}
