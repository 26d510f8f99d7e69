//! Where the running kernel keeps the fields that the programs read: offsets
//! from its BTF, because Rust has no CO-RE relocations.
//!
//! The kernel has some 150,000 types, of which a dozen are wanted. They are
//! walked once and left where they lie: libraries make an object of each, which
//! takes several times as long as all the rest of attaching a pod.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    sync::OnceLock,
};

use bytemuck::{AnyBitPattern, Pod, Zeroable};
use memmap2::{Mmap, MmapOptions};

use crate::{Error, Result};

/// The kernel's type information.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

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

/// The fields that only the iterators read.
const ITERATOR_FIELDS: [(&str, &str, &str); 13] = [
    ("SOCK_COMMON_SKC_FAMILY", "sock_common", "skc_family"),
    ("SOCK_COMMON_SKC_STATE", "sock_common", "skc_state"),
    ("SOCK_COMMON_SKC_RCV_SADDR", "sock_common", "skc_rcv_saddr"),
    ("SOCK_COMMON_SKC_DADDR", "sock_common", "skc_daddr"),
    (
        "SOCK_COMMON_SKC_V6_RCV_SADDR",
        "sock_common",
        "skc_v6_rcv_saddr",
    ),
    ("SOCK_COMMON_SKC_V6_DADDR", "sock_common", "skc_v6_daddr"),
    ("SOCK_COMMON_SKC_NUM", "sock_common", "skc_num"),
    ("SOCK_COMMON_SKC_DPORT", "sock_common", "skc_dport"),
    (
        "SOCK_COMMON_SKC_BOUND_DEV_IF",
        "sock_common",
        "skc_bound_dev_if",
    ),
    ("SOCK_SK_MARK", "sock", "sk_mark"),
    ("INET_SOCK_MC_INDEX", "inet_sock", "mc_index"),
    ("INET_SOCK_PINET6", "inet_sock", "pinet6"),
    ("IPV6_PINFO_MCAST_OIF", "ipv6_pinfo", "mcast_oif"),
];

/// The iterators: the program, and the function that stands for what it goes through.
const ITERATORS: [(&str, &str); 2] = [
    ("redirected", "bpf_iter_bpf_sk_storage_map"),
    ("connected", "bpf_iter_tcp"),
];

/// What the programs must be told of the running kernel.
#[derive(Debug)]
pub(crate) struct Offsets {
    /// In bytes, each with the name of the programs' global.
    fields: Vec<(&'static str, u32)>,
    /// Whether sk_lookup programs are told which interface a connection arrives
    /// by (Linux 5.17): their context, `struct bpf_sk_lookup`, has the field.
    pub(crate) has_ingress_ifindex: bool,
    /// The programs that are iterators, each with the number of its function's type.
    iterators: Vec<(&'static str, u32)>,
}

/// The kernel's types where it lets them be mapped (Linux 6.16): 5 MiB less to copy, and
/// to have memory for.
fn map_types() -> Option<Mmap> {
    let file = File::open(VMLINUX).ok()?;
    // SAFETY: the kernel's own, which nobody can write to.
    unsafe { MmapOptions::new().map_copy_read_only(&file) }.ok()
}

fn unreadable(error: io::Error) -> Error {
    Error::Btf {
        missing: "its types".to_owned(),
        source: Some(error),
    }
}

const fn missing(what: String) -> Error {
    Error::Btf {
        missing: what,
        source: None,
    }
}

/// The context of sk_lookup programs.
const SK_LOOKUP: &str = "bpf_sk_lookup";

impl Offsets {
    /// Those of the running kernel, which doesn't change: they are read once.
    ///
    /// # Errors
    ///
    /// If the kernel has no type information, or lacks one of the fields.
    pub(crate) fn of_running_kernel() -> Result<&'static Self> {
        static KNOWN: OnceLock<Offsets> = OnceLock::new();
        Self::read_once(&KNOWN, false)
    }

    /// Those of the running kernel with those that the iterators need, read once.
    ///
    /// # Errors
    ///
    /// As of [`Self::of_running_kernel`].
    pub(crate) fn for_iterators() -> Result<&'static Self> {
        static KNOWN: OnceLock<Offsets> = OnceLock::new();
        Self::read_once(&KNOWN, true)
    }

    fn read_once(known: &'static OnceLock<Self>, for_iterators: bool) -> Result<&'static Self> {
        if let Some(known) = known.get() {
            return Ok(known);
        }
        let read = Self::read(for_iterators)?;
        Ok(known.get_or_init(|| read))
    }

    fn read(for_iterators: bool) -> Result<Self> {
        let more: &[_] = if for_iterators { &ITERATOR_FIELDS } else { &[] };
        let wanted = || FIELDS.iter().chain(more);
        let mapped = map_types();
        let bytes = match &mapped {
            Some(mapped) => mapped,
            None => &fs::read(VMLINUX).map_err(unreadable)?[..],
        };
        let mut structures: Vec<_> = wanted().map(|(_, structure, _)| *structure).collect();
        structures.push(SK_LOOKUP);
        let btf = Btf::parse(bytes, &structures)
            .ok_or_else(|| unreadable(io::ErrorKind::InvalidData.into()))?;
        let fields = wanted()
            .map(|(global, structure, member)| {
                btf.offset(structure, member)
                    .map(|offset| (*global, offset))
                    .ok_or_else(|| missing(format!("{structure}.{member}")))
            })
            .collect::<Result<_>>()?;
        let iterators = ITERATORS
            .iter()
            .filter(|_| for_iterators)
            .map(|(program, function)| {
                btf.function(function)
                    .map(|number| (*program, number))
                    .ok_or_else(|| missing((*function).to_owned()))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            fields,
            has_ingress_ifindex: btf.offset(SK_LOOKUP, "ingress_ifindex").is_some(),
            iterators,
        })
    }

    /// The number of the function's type that a program is an iterator of; 0 for one
    /// that is none, and unless they were read for iterators.
    pub(crate) fn iterator(&self, program: &str) -> u32 {
        self.iterators
            .iter()
            .find(|(name, _)| *name == program)
            .map_or(0, |(_, number)| *number)
    }

    /// The globals' names and values.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &(&'static str, u32)> {
        self.fields.iter()
    }
}

// The kinds of types (`BTF_KIND_*` in linux/btf.h).
const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FWD: u32 = 7;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const FLOAT: u32 = 16;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// `BTF_MAGIC`.
const MAGIC: u16 = 0xeb9f;

/// How deep structures without a name, or typedefs, may be nested.
const MAX_DEPTH: usize = 32;

/// `struct btf_header`: the offsets count from its end.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: u16,
    version: u8,
    flags: u8,
    header_len: u32,
    types_offset: u32,
    types_len: u32,
    strings_offset: u32,
    strings_len: u32,
}

/// `struct btf_type`; what else belongs to the type comes after it.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Type {
    name: u32,
    info: u32,
    /// The size, or the number of the type that this one refers to.
    size_or_type: u32,
}

impl Type {
    const fn kind(self) -> u32 {
        (self.info >> 24) & 0x1f
    }

    /// How many members or the like there are.
    const fn count(self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// Whether offsets of members share their word with the size of a bitfield.
    const fn has_bitfields(self) -> bool {
        self.info >> 31 == 1
    }

    /// The bytes that come after; none if the kind isn't known.
    fn more(self) -> Option<usize> {
        Some(match self.kind() {
            PTR | FWD | TYPEDEF | VOLATILE | CONST | RESTRICT | FUNC | FLOAT | TYPE_TAG => 0,
            INT | VAR | DECL_TAG => 4,
            ARRAY => 12,
            STRUCT | UNION | DATASEC | ENUM64 => 12 * self.count(),
            ENUM | FUNC_PROTO => 8 * self.count(),
            _ => return None,
        })
    }
}

/// `struct btf_member`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Member {
    name: u32,
    of_type: u32,
    offset: u32,
}

/// Type information as the kernel gives it, with the places of all types.
struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where in `types` each type begins; the first is number 1.
    places: Vec<u32>,
    /// The numbers of the wanted structures: there may be several of a name.
    structures: BTreeMap<&'static str, Vec<u32>>,
}

impl<'a> Btf<'a> {
    /// Walks the types and notes those that are wanted; none if that isn't BTF.
    fn parse(bytes: &'a [u8], structures: &[&'static str]) -> Option<Self> {
        let header: Header = read(bytes, 0)?;
        if header.magic != MAGIC || header.version != 1 {
            return None;
        }
        let part = |offset: u32, length: u32| {
            let start = (header.header_len as usize).checked_add(offset as usize)?;
            bytes.get(start..start.checked_add(length as usize)?)
        };
        let mut btf = Self {
            types: part(header.types_offset, header.types_len)?,
            strings: part(header.strings_offset, header.strings_len)?,
            places: Vec::with_capacity(header.types_len as usize / 16),
            structures: BTreeMap::new(),
        };
        let mut place = 0;
        while place < btf.types.len() {
            let found: Type = read(btf.types, place)?;
            btf.places.push(u32::try_from(place).ok()?);
            let number = u32::try_from(btf.places.len()).ok()?;
            if found.kind() == STRUCT {
                for structure in structures {
                    if btf.is_name(found.name, structure) {
                        let numbers = btf.structures.entry(structure).or_default();
                        // The same structure is asked for more than once.
                        if numbers.last() != Some(&number) {
                            numbers.push(number);
                        }
                    }
                }
            }
            place += size_of::<Type>() + found.more()?;
        }
        Some(btf)
    }

    /// Whether the string at `offset` is `name`.
    fn is_name(&self, offset: u32, name: &str) -> bool {
        self.strings
            .get(offset as usize..)
            .and_then(|string| string.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    /// The number of a function.
    fn function(&self, name: &str) -> Option<u32> {
        (1..=u32::try_from(self.places.len()).ok()?).find(|number| {
            self.get(*number)
                .is_some_and(|(_, found)| found.kind() == FUNC && self.is_name(found.name, name))
        })
    }

    fn get(&self, number: u32) -> Option<(usize, Type)> {
        let place = *self.places.get(number.checked_sub(1)? as usize)? as usize;
        Some((place, read(self.types, place)?))
    }

    /// The offset in bytes of a member of a wanted structure, or of a member's
    /// member (`a.b`).
    fn offset(&self, structure: &str, path: &str) -> Option<u32> {
        let candidates = self.structures.get(structure)?;
        candidates.iter().find_map(|candidate| {
            let mut bits = 0;
            let mut current = *candidate;
            for name in path.split('.') {
                let (offset, of_type) = self.member(current, name, MAX_DEPTH)?;
                bits += offset;
                current = self.resolve(of_type)?;
            }
            Some(bits / 8)
        })
    }

    /// The offset in bits and the type of a member, also within members without
    /// a name.
    fn member(&self, number: u32, name: &str, depth: usize) -> Option<(u32, u32)> {
        let depth = depth.checked_sub(1)?;
        let (place, of) = self.get(number)?;
        if of.kind() != STRUCT && of.kind() != UNION {
            return None;
        }
        let first = place + size_of::<Type>();
        (0..of.count()).find_map(|index| {
            let member: Member = read(self.types, first + index * size_of::<Member>())?;
            let offset = if of.has_bitfields() {
                member.offset & 0x00ff_ffff
            } else {
                member.offset
            };
            if self.is_name(member.name, "") {
                let inner = self.member(self.resolve(member.of_type)?, name, depth)?;
                Some((offset + inner.0, inner.1))
            } else {
                self.is_name(member.name, name)
                    .then_some((offset, member.of_type))
            }
        })
    }

    /// The type behind typedefs and qualifiers.
    fn resolve(&self, mut number: u32) -> Option<u32> {
        for _ in 0..MAX_DEPTH {
            let (_, found) = self.get(number)?;
            match found.kind() {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => number = found.size_or_type,
                _ => return Some(number),
            }
        }
        None
    }
}

/// The value at `place`; none if the bytes end before.
fn read<T: AnyBitPattern>(bytes: &[u8], place: usize) -> Option<T> {
    let end = place.checked_add(size_of::<T>())?;
    Some(bytemuck::pod_read_unaligned(bytes.get(place..end)?))
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

    /// Type information in the making.
    #[derive(Default)]
    struct Builder {
        types: Vec<u32>,
        strings: Vec<u8>,
    }

    impl Builder {
        fn name(&mut self, name: &str) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            if name.is_empty() {
                return 0;
            }
            let offset = self.strings.len().try_into().unwrap();
            self.strings.extend(name.as_bytes());
            self.strings.push(0);
            offset
        }

        fn add(&mut self, name: &str, kind: u32, info: u32, size_or_type: u32, more: &[u32]) {
            let name = self.name(name);
            self.types.extend([name, kind << 24 | info, size_or_type]);
            self.types.extend(more);
        }

        fn bytes(&self) -> Vec<u8> {
            let types: &[u8] = bytemuck::cast_slice(&self.types);
            let header = Header {
                magic: MAGIC,
                version: 1,
                flags: 0,
                header_len: size_of::<Header>().try_into().unwrap(),
                types_offset: 0,
                types_len: types.len().try_into().unwrap(),
                strings_offset: types.len().try_into().unwrap(),
                strings_len: self.strings.len().try_into().unwrap(),
            };
            [bytemuck::bytes_of(&header), types, &self.strings].concat()
        }
    }

    /// ```c
    /// typedef const struct { int a; int b; } alias;         // 2, behind 3 and 4
    /// struct outer { int x : 3; struct { int y; alias z; }; };   // 5 (unnamed), 6
    /// void function(void);                                   // 7
    /// ```
    fn example() -> Vec<u8> {
        let mut btf = Builder::default();
        btf.add("int", INT, 0, 4, &[32]);
        let [a, b] = ["a", "b"].map(|name| btf.name(name));
        btf.add("", STRUCT, 2, 8, &[a, 1, 0, b, 1, 32]);
        btf.add("", CONST, 0, 2, &[]);
        btf.add("alias", TYPEDEF, 0, 3, &[]);
        let [y, z] = ["y", "z"].map(|name| btf.name(name));
        btf.add("", STRUCT, 2, 12, &[y, 1, 0, z, 4, 32]);
        let x = btf.name("x");
        btf.add("outer", STRUCT, 1 << 31 | 2, 16, &[x, 1, 3 << 24, 0, 5, 32]);
        btf.add("function", FUNC, 0, 1, &[]);
        btf.bytes()
    }

    #[test]
    fn members_are_found_behind_typedefs_and_in_what_has_no_name() {
        let bytes = example();
        let btf = Btf::parse(&bytes, &["outer"]).unwrap();
        for (path, offset) in [
            ("x", Some(0)),
            ("y", Some(4)),
            ("z", Some(8)),
            ("z.b", Some(12)),
            ("b", None),
            ("y.b", None),
            ("outer", None),
        ] {
            assert_eq!(btf.offset("outer", path), offset, "{path}");
        }
        assert_eq!(btf.offset("alias", "a"), None);
        assert_eq!(btf.function("function"), Some(7));
        assert_eq!(btf.function("alias"), None);
    }

    #[test]
    fn a_part_is_no_type_information() {
        let bytes = example();
        for length in 0..bytes.len() {
            assert!(Btf::parse(&bytes[..length], &["outer"]).is_none());
        }
        let mut other = example();
        other[0] = 0;
        assert!(Btf::parse(&other, &["outer"]).is_none());
    }
}
