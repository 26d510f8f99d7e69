//! A kernel's image: what it says of itself, and its uncompressed form.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
};

use anyhow::{Context, Result, bail, ensure};

use crate::process::command;

/// A kernel to boot.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    /// What the user calls it.
    pub(super) name: String,
    /// Its version, as `uname -r` says it.
    pub(super) release: String,
    /// The compressed image, or an ELF file.
    pub(super) image: PathBuf,
    /// Where its modules are, if any.
    pub(super) modules: Option<PathBuf>,
}

impl Kernel {
    /// Looks at an image. Its modules are in `lib/modules/RELEASE` or
    /// `usr/lib/modules/RELEASE`, beside it or a directory above.
    ///
    /// # Errors
    ///
    /// If it is no kernel for this architecture.
    pub(super) fn of_image(name: &str, path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let bytes = fs::read(path)?;
            let release = release(&bytes).context(
                "neither a compressed kernel for x86 (bzImage) nor an uncompressed one (vmlinux)",
            )?;
            let path = path.canonicalize()?;
            let modules = path.ancestors().skip(1).find_map(|above| {
                ["lib/modules", "usr/lib/modules"]
                    .map(|below| above.join(below).join(&release))
                    .into_iter()
                    .find(|directory| directory.is_dir())
            });
            Ok(Self {
                name: name.to_owned(),
                release,
                image: path,
                modules,
            })
        };
        read().with_context(|| format!("read the kernel {}", path.display()))
    }

    /// The kernel as QEMU starts it soonest: an ELF file, which is made in
    /// `directory` if the image isn't one.
    ///
    /// # Errors
    ///
    /// If the image can't be decompressed.
    pub(super) fn uncompressed(&self, directory: &Path) -> Result<PathBuf> {
        let bytes =
            fs::read(&self.image).with_context(|| format!("read {}", self.image.display()))?;
        if bytes.starts_with(ELF) {
            return Ok(self.image.clone());
        }
        let path = directory.join("vmlinux");
        let decompress = || -> Result<()> {
            let elf = decompress(payload(&bytes).context("no compressed kernel in it")?)?;
            ensure!(elf.starts_with(ELF), "what is in it is no ELF file");
            fs::write(&path, elf).with_context(|| format!("write {}", path.display()))
        };
        decompress().with_context(|| format!("decompress {}", self.image.display()))?;
        Ok(path)
    }
}

const ELF: &[u8] = b"\x7fELF";
const GZIP: &[u8] = b"\x1f\x8b";

/// The version that an image states.
fn release(image: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let text = if is_bzimage(image) {
        // The header says where, less the 512 bytes of the first sector.
        image.get(usize::from(number16(image, 0x20e)?) + 0x200..)?
    } else if image.starts_with(ELF) {
        image
            .windows(BANNER.len() + 1)
            .position(|at| at.starts_with(BANNER) && at.last().is_some_and(u8::is_ascii_digit))
            .and_then(|at| image.get(at + BANNER.len()..))?
    } else {
        return None;
    };
    let end = text.iter().position(|byte| matches!(byte, b' ' | 0))?;
    String::from_utf8(text.get(..end)?.to_vec()).ok()
}

/// The boot protocol's header is that of a version that has a payload.
fn is_bzimage(image: &[u8]) -> bool {
    image.get(0x202..0x206) == Some(b"HdrS") && number16(image, 0x206) >= Some(0x208)
}

/// The compressed kernel in a bzImage, as the boot protocol's header finds it.
fn payload(image: &[u8]) -> Option<&[u8]> {
    if !is_bzimage(image) {
        return None;
    }
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + number32(image, 0x248)?;
    let payload = image.get(start..start + number32(image, 0x24c)?)?;
    // But for gzip's, its uncompressed length follows it.
    if payload.starts_with(GZIP) {
        Some(payload)
    } else {
        payload.split_last_chunk::<4>().map(|(payload, _)| payload)
    }
}

fn number16(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}

fn number32(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at + 4)?;
    usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
}

/// Decompresses a kernel or a module with the program that can.
fn decompress(bytes: &[u8]) -> Result<Vec<u8>> {
    let program = match bytes {
        _ if bytes.starts_with(GZIP) => "gzip",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        _ => bail!("compressed with something other than gzip, xz, zstd and lz4"),
    };
    let mut child = command(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let mut input = child.stdin.take().context("its input")?;
    let output = thread::scope(|scope| {
        // If the program stops reading, it says why.
        scope.spawn(move || drop(input.write_all(bytes)));
        child.wait_with_output()
    })?;
    ensure!(output.status.success(), "{program} -dc: {}", output.status);
    Ok(output.stdout)
}

/// Reads a module's file, compressed or not.
///
/// # Errors
///
/// If it can't be read or decompressed.
pub(super) fn read_module(path: &Path) -> Result<Vec<u8>> {
    let read = || -> Result<Vec<u8>> {
        let bytes = fs::read(path)?;
        if bytes.starts_with(ELF) {
            Ok(bytes)
        } else {
            decompress(&bytes)
        }
    };
    read().with_context(|| format!("read the module {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with these bytes as its compressed kernel.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x600];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        image[0x300..0x30b].copy_from_slice(b"6.1.0-x (y)");
        image[0x248..0x24c].copy_from_slice(&0x200_u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend(payload);
        image.extend(b"what follows");
        image
    }

    #[test]
    fn an_image_states_its_version() {
        assert_eq!(release(&bzimage(b"")).as_deref(), Some("6.1.0-x"));
        let elf = b"\x7fELF..Linux version %s\0..Linux version 5.10.1 (me)\n\0";
        assert_eq!(release(elf).as_deref(), Some("5.10.1"));
        assert_eq!(release(b"#!/bin/sh"), None);
        assert_eq!(release(&bzimage(b"")[..0x250]), None);
    }

    #[test]
    fn the_compressed_kernel_is_found_without_its_length() {
        let zstd = b"\x28\xb5\x2f\xfd data 1234";
        assert_eq!(payload(&bzimage(zstd)), Some(&zstd[..zstd.len() - 4]));
        let gzip = b"\x1f\x8b data 1234";
        assert_eq!(payload(&bzimage(gzip)), Some(&gzip[..]));
        assert_eq!(payload(b"\x7fELF"), None);
    }

    #[test]
    fn what_is_compressed_is_decompressed() {
        let compress = |text: &str| {
            let script = format!("printf '{text}' | gzip -c");
            command("sh").args(["-c", &script]).output().unwrap().stdout
        };
        assert_eq!(decompress(&compress("kernel")).unwrap(), b"kernel");
        assert!(decompress(b"kernel").is_err());
    }
}
