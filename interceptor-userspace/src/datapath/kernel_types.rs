//! Where the running kernel keeps the fields that the programs read: offsets
//! from its BTF, because Rust has no CO-RE relocations.

use std::fs;

use btf_rs::{Btf, BtfType, Type};

use crate::{Error, Result};

/// The kernel's type information.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Offsets in bytes, each with the name of the programs' global.
#[derive(Debug)]
pub(crate) struct Offsets(Vec<(&'static str, u32)>);

/// The fields: the global's name, the structure, and the member or the members
/// on the way to it.
const FIELDS: [(&str, &str, &str); 8] = [
    ("SOCK_COMMON_SKC_NET", "sock_common", "skc_net.net"),
    ("NET_NS_INUM", "net", "ns.inum"),
    ("SOCK_SK_SOCKET", "sock", "sk_socket"),
    ("SOCKET_FILE", "socket", "file"),
    ("FILE_F_CRED", "file", "f_cred"),
    ("CRED_FSUID", "cred", "fsuid"),
    ("CRED_FSGID", "cred", "fsgid"),
    ("INET_SOCK_INET_SPORT", "inet_sock", "inet_sport"),
];

impl Offsets {
    /// Reads them from the running kernel.
    pub(crate) fn of_running_kernel() -> Result<Self> {
        let unreadable = |error| Error::Btf {
            missing: "its types".to_owned(),
            source: Some(error),
        };
        // As a whole: the reader of files seeks for every single type.
        let bytes = fs::read(VMLINUX).map_err(|error| unreadable(error.into()))?;
        let btf = Btf::from_bytes(&bytes).map_err(unreadable)?;
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

/// The offset in bytes of a member, or of a member's member (`a.b`).
fn offset(btf: &Btf, structure: &str, path: &str) -> Result<Option<u32>, btf_rs::Error> {
    'candidates: for candidate in btf.resolve_types_by_name(structure)? {
        let mut bits = 0;
        let mut current = candidate;
        for member in path.split('.') {
            let Type::Struct(structure) = current else {
                continue 'candidates;
            };
            let Some((offset, member)) = find(btf, &structure.members, member)? else {
                continue 'candidates;
            };
            bits += offset;
            current = resolve(btf, &member)?;
        }
        return Ok(Some(bits / 8));
    }
    Ok(None)
}

/// The type of a member, behind its typedefs and qualifiers.
fn resolve(btf: &Btf, member: &btf_rs::Member) -> Result<Type, btf_rs::Error> {
    let mut current = btf.resolve_chained_type(member)?;
    loop {
        current = match current {
            Type::Typedef(inner) => btf.resolve_chained_type(&inner)?,
            Type::Volatile(inner) => btf.resolve_chained_type(&inner)?,
            Type::Const(inner) => btf.resolve_chained_type(&inner)?,
            other => return Ok(other),
        };
    }
}

/// A member and its offset in bits, also within anonymous structs and unions.
fn find(
    btf: &Btf,
    members: &[btf_rs::Member],
    wanted: &str,
) -> Result<Option<(u32, btf_rs::Member)>, btf_rs::Error> {
    for member in members {
        let anonymous = member.get_name_offset().is_none_or(|offset| offset == 0);
        if !anonymous && btf.resolve_name(member)? == wanted {
            return Ok(Some((member.bit_offset(), member.clone())));
        }
        if anonymous {
            let (Type::Struct(inner) | Type::Union(inner)) = btf.resolve_chained_type(member)?
            else {
                continue;
            };
            if let Some((offset, found)) = find(btf, &inner.members, wanted)? {
                return Ok(Some((member.bit_offset() + offset, found)));
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
        // After two addresses, two ports, the family and the state.
        assert!(get("SOCK_COMMON_SKC_NET") > 16);
        assert_eq!(get("CRED_FSGID"), get("CRED_FSUID") + 4);
    }
}
