//! Where the running kernel keeps the fields that the programs read: offsets
//! from its BTF, because Rust has no CO-RE relocations.

use btf_rs::{Btf, BtfType, Type};

use crate::{Error, Result};

/// The kernel's type information.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Offsets in bytes, each with the name of the programs' global.
#[derive(Debug)]
pub(crate) struct Offsets(Vec<(&'static str, u32)>);

/// The fields: the global's name, the structure and the member.
const FIELDS: [(&str, &str, &str); 8] = [
    ("SOCK_SK_SOCKET", "sock", "sk_socket"),
    ("SOCKET_FILE", "socket", "file"),
    ("FILE_F_CRED", "file", "f_cred"),
    ("CRED_FSUID", "cred", "fsuid"),
    ("CRED_FSGID", "cred", "fsgid"),
    ("SOCK_COMMON_SKC_NUM", "sock_common", "skc_num"),
    ("SOCK_COMMON_SKC_STATE", "sock_common", "skc_state"),
    ("INET_SOCK_INET_SPORT", "inet_sock", "inet_sport"),
];

impl Offsets {
    /// Reads them from the running kernel.
    pub(crate) fn of_running_kernel() -> Result<Self> {
        let btf = Btf::from_file(VMLINUX).map_err(|error| Error::Btf {
            missing: "its types".to_owned(),
            source: Some(error),
        })?;
        FIELDS
            .into_iter()
            .map(|(global, structure, member)| {
                let missing = |source| Error::Btf {
                    missing: format!("{structure}.{member}"),
                    source,
                };
                offset(&btf, structure, member)
                    .map_err(|error| missing(Some(error)))?
                    .map(|offset| (global, offset))
                    .ok_or_else(|| missing(None))
            })
            .collect::<Result<_>>()
            .map(Self)
    }

    /// The globals' names and values.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &(&'static str, u32)> {
        self.0.iter()
    }
}

fn offset(btf: &Btf, structure: &str, member: &str) -> Result<Option<u32>, btf_rs::Error> {
    for candidate in btf.resolve_types_by_name(structure)? {
        if let Type::Struct(candidate) = candidate
            && let Some(bits) = bit_offset(btf, &candidate.members, member)?
        {
            return Ok(Some(bits / 8));
        }
    }
    Ok(None)
}

/// The offset of a member, also within anonymous structs and unions.
fn bit_offset(
    btf: &Btf,
    members: &[btf_rs::Member],
    wanted: &str,
) -> Result<Option<u32>, btf_rs::Error> {
    for member in members {
        let anonymous = member.get_name_offset().is_none_or(|offset| offset == 0);
        if !anonymous && btf.resolve_name(member)? == wanted {
            return Ok(Some(member.bit_offset()));
        }
        if anonymous {
            let inner = match btf.resolve_chained_type(member)? {
                Type::Struct(inner) | Type::Union(inner) => inner,
                _ => continue,
            };
            if let Some(offset) = bit_offset(btf, &inner.members, wanted)? {
                return Ok(Some(member.bit_offset() + offset));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_has_every_field() {
        let offsets = Offsets::of_running_kernel().unwrap();
        let get = |name| {
            offsets
                .iter()
                .find(|(global, _)| *global == name)
                .map(|(_, offset)| *offset)
                .unwrap()
        };
        // Both have stood in `struct sock_common`'s first cache line for ever.
        assert_eq!(get("SOCK_COMMON_SKC_NUM"), 14);
        assert_eq!(get("SOCK_COMMON_SKC_STATE"), 18);
        assert_eq!(get("CRED_FSGID"), get("CRED_FSUID") + 4);
    }
}
