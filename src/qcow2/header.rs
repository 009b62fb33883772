//! The image header (section "Header") with everything that shares its cluster.

mod check;
mod places;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use places::Places;

use super::{
    AutoclearFeatures, BaseRecord, BitmapDirectory, CompatibleFeatures, Compression, DataPlace,
    EntryRules, Extension, Geometry, IncompatibleFeatures, L2Form, ZeroFlag,
};
use crate::error::{Error, Problem, Result};
use crate::units::HostOffset;

/// Greatest length of a backing file's name in bytes.
pub const MAX_BACKING_NAME: usize = 1023;

/// The first bytes of every qcow2 image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
const COMPRESSION_ZLIB: u8 = 0;
const COMPRESSION_ZSTD: u8 = 1;
/// Length of the version 3 header that we write: up to the compression type, padded.
const OWN_V3_LEN: u32 = 112;

/// Where the fields are that change on their own, each in one write inside one sector.
pub mod offsets {
    use crate::units::HostOffset;

    /// Offset of the backing file's name, 8 bytes.
    pub const BACKING_NAME: HostOffset = HostOffset::new(8);
    /// Virtual size, 8 bytes.
    pub const SIZE: HostOffset = HostOffset::new(24);
    /// Entries (4 bytes) and offset (8 bytes) of the L1 table.
    pub const L1: HostOffset = HostOffset::new(36);
    /// Offset (8 bytes) and clusters (4 bytes) of the refcount table.
    pub const REFTABLE: HostOffset = HostOffset::new(48);
    /// Number (4 bytes) of snapshots and offset (8 bytes) of their table.
    pub const SNAPSHOTS: HostOffset = HostOffset::new(60);
    /// Incompatible feature bits, 8 bytes, version 3.
    pub const INCOMPATIBLE: HostOffset = HostOffset::new(72);
    /// Autoclear feature bits, 8 bytes, version 3.
    pub const AUTOCLEAR: HostOffset = HostOffset::new(88);
}

/// The header's fields, checked, and its extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Version of the format.
    pub version: Version,
    /// Cluster size and refcount width.
    pub geometry: Geometry,
    /// Virtual size in bytes, rounded down to sectors as QEMU does.
    pub size: u64,
    /// Name of the backing file as it stands there: no file name rules applied yet.
    pub backing_name: Option<Vec<u8>>,
    /// Encryption method: 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where it is.
    pub l1_offset: HostOffset,
    /// Where the refcount table is.
    pub reftable_offset: HostOffset,
    /// Its length in clusters.
    pub reftable_clusters: u32,
    /// Number of internal snapshots.
    pub snapshot_count: u32,
    /// Where their table is.
    pub snapshots_offset: HostOffset,
    /// Bits that a reader must know.
    pub incompatible: IncompatibleFeatures,
    /// Bits that a reader may ignore.
    pub compatible: CompatibleFeatures,
    /// Bits that a writer must clear if it does not maintain them.
    pub autoclear: AutoclearFeatures,
    /// 0 for deflate, 1 for zstd.
    pub compression_type: u8,
    /// Extensions in the order of the file.
    pub extensions: Vec<Extension>,
}

/// Version of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// `compat=0.10`: no zero clusters, no feature bits, 16-bit refcounts.
    V2,
    /// `compat=1.1`.
    V3,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeaderV3 {
    incompatible: U64,
    compatible: U64,
    autoclear: U64,
    refcount_order: U32,
    header_length: U32,
}

impl Header {
    /// The size in bytes of the first cluster, from at least the first 72 bytes of a file.
    ///
    /// # Errors
    /// No qcow2 magic, a version other than 2 and 3, or a cluster size outside 512 B to 2 MiB.
    pub fn first_cluster_len(start: &[u8]) -> Result<usize> {
        let raw = parse_fixed(start)?;
        Ok(1 << cluster_bits(raw)?)
    }

    /// Reads the header from the first cluster of a file; a shorter file's bytes end earlier.
    ///
    /// # Errors
    /// Whatever the specification or QEMU's limits forbid, by the name of the field. Features that are not
    /// supported are not errors here: see [`Header::refuse_unsupported`].
    pub fn parse(cluster: &[u8]) -> Result<Self> {
        let raw = parse_fixed(cluster)?;
        let version = version(raw)?;
        let cluster_bits = cluster_bits(raw)?;
        let (v3, header_len) = match version {
            Version::V2 => (None, size_of::<RawHeader>()),
            Version::V3 => {
                let (v3, _) = RawHeaderV3::ref_from_prefix(&cluster[size_of::<RawHeader>()..])
                    .map_err(|_| Error::invalid("header", "the file ends inside it"))?;
                (Some(v3), header_len(v3, cluster.len(), cluster_bits)?)
            }
        };
        let refcount_order = v3.map_or(4, |v3| v3.refcount_order.get());
        if refcount_order > 6 {
            return Err(Error::invalid("refcount_order", format!("{refcount_order} is above 6")));
        }
        let incompatible = v3.map_or(0, |v3| v3.incompatible.get());
        let incompatible = IncompatibleFeatures::from_bits_retain(incompatible);
        let geometry = Geometry::new(cluster_bits, refcount_order)
            .with_l2_form(l2_form(incompatible, cluster_bits)?);
        let backing_name = backing_name(raw, cluster, header_len, geometry)?;
        let extensions_end = match raw.backing_file_offset.get() {
            0 => cluster.len(),
            offset => (offset as usize).min(cluster.len()),
        };
        let extensions =
            Extension::parse_all(cluster.get(header_len..extensions_end).unwrap_or_default())?;
        let has_compression_type = header_len > size_of::<RawHeader>() + size_of::<RawHeaderV3>();
        let header = Self {
            version,
            geometry,
            size: raw.size.get() & !511,
            backing_name,
            crypt_method: raw.crypt_method.get(),
            l1_entries: raw.l1_size.get(),
            l1_offset: HostOffset::new(raw.l1_table_offset.get()),
            reftable_offset: HostOffset::new(raw.refcount_table_offset.get()),
            reftable_clusters: raw.refcount_table_clusters.get(),
            snapshot_count: raw.nb_snapshots.get(),
            snapshots_offset: HostOffset::new(raw.snapshots_offset.get()),
            incompatible,
            compatible: CompatibleFeatures::from_bits_retain(
                v3.map_or(0, |v3| v3.compatible.get()),
            ),
            autoclear: AutoclearFeatures::from_bits_retain(v3.map_or(0, |v3| v3.autoclear.get())),
            compression_type: if has_compression_type { cluster[104] } else { COMPRESSION_ZLIB },
            extensions,
        };
        Ok(header)
    }

    /// How clusters are compressed; of an image that [`Header::refuse_unsupported`] lets pass.
    pub fn compression(&self) -> Compression {
        match self.compression_type {
            COMPRESSION_ZSTD => Compression::Zstd,
            _ => Compression::Zlib,
        }
    }

    /// Where guest data is.
    pub fn data_place(&self) -> DataPlace {
        match self.incompatible.contains(IncompatibleFeatures::DATA_FILE) {
            true => DataPlace::External,
            false => DataPlace::Internal,
        }
    }

    /// Whether the external data file is to be readable by itself: each byte is where the guest has it.
    pub fn data_file_is_raw(&self) -> bool {
        self.data_place() == DataPlace::External
            && self.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE)
    }

    /// The name of the external data file, as the image has it.
    pub fn data_file_name(&self) -> Option<&[u8]> {
        self.last_extension(|extension| match extension {
            Extension::DataFileName(name) => Some(&name[..]),
            _ => None,
        })
    }

    /// Where the directory of the persistent bitmaps is; `None` if there are none, or none that count.
    ///
    /// # Errors
    /// As [`BitmapDirectory::parse`].
    pub fn bitmap_directory(&self) -> Result<Option<BitmapDirectory>> {
        if !self.autoclear.contains(AutoclearFeatures::BITMAPS) {
            return Ok(None);
        }
        let data = self.last_extension(|extension| match extension {
            Extension::Bitmaps(data) => Some(data),
            _ => None,
        });
        data.map(|data| BitmapDirectory::parse(data, self.geometry.cluster_size())).transpose()
    }

    /// What the L2 entries mean.
    pub fn entry_rules(&self) -> EntryRules {
        let zero_flag = match self.version {
            Version::V2 => ZeroFlag::Reserved,
            Version::V3 => ZeroFlag::Defined,
        };
        EntryRules { zero_flag, data: self.data_place() }
    }

    /// The backing file's format, as the image names it.
    pub fn backing_format(&self) -> Option<&str> {
        self.last_extension(|extension| match extension {
            Extension::BackingFormat(name) => Some(&name[..]),
            _ => None,
        })
    }

    /// What the image remembers of its backing file, if that is the one that it names.
    pub fn base_record(&self) -> Option<BaseRecord> {
        let data = self.last_extension(|extension| match extension {
            Extension::BaseRecord(data) => Some(data),
            _ => None,
        });
        let name = self.backing_name.as_deref().unwrap_or_default();
        data.and_then(|data| BaseRecord::parse(data, name))
    }

    /// Of two extensions of one type QEMU takes the last.
    fn last_extension<'a, T>(&'a self, find: impl FnMut(&'a Extension) -> Option<T>) -> Option<T> {
        self.extensions.iter().rev().find_map(find)
    }

    /// The header, extensions and backing name as the first cluster of a new image holds them.
    ///
    /// # Errors
    /// They don't fit into the cluster, or the backing name is too long.
    pub fn to_cluster(&self) -> Result<Vec<u8>> {
        let cluster_size = self.geometry.cluster_size() as usize;
        let mut bytes = Vec::with_capacity(cluster_size);
        let name = self.backing_name.as_deref().unwrap_or_default();
        if name.len() > MAX_BACKING_NAME {
            return Err(Error::usage(format!(
                "the name of the backing file has {} bytes, more than {MAX_BACKING_NAME}",
                name.len()
            )));
        }
        let mut raw = self.to_raw();
        bytes.extend(raw.as_bytes());
        if self.version == Version::V3 {
            let v3 = RawHeaderV3 {
                incompatible: self.incompatible.bits().into(),
                compatible: self.compatible.bits().into(),
                autoclear: self.autoclear.bits().into(),
                refcount_order: self.geometry.refcount_order().into(),
                header_length: OWN_V3_LEN.into(),
            };
            bytes.extend(v3.as_bytes());
            bytes.push(self.compression_type);
            bytes.resize(OWN_V3_LEN as usize, 0);
        }
        Extension::write_all(&self.extensions, &mut bytes);
        if !name.is_empty() {
            raw.backing_file_offset = (bytes.len() as u64).into();
            raw.backing_file_size = (name.len() as u32).into();
            bytes[..size_of::<RawHeader>()].copy_from_slice(raw.as_bytes());
            bytes.extend(name);
        }
        if bytes.len() > cluster_size {
            return Err(Error::usage(format!(
                "the header with the name of the backing file does not fit into a cluster of {cluster_size} bytes"
            )));
        }
        bytes.resize(cluster_size, 0);
        Ok(bytes)
    }

    fn to_raw(&self) -> RawHeader {
        RawHeader {
            magic: MAGIC,
            version: match self.version {
                Version::V2 => 2.into(),
                Version::V3 => 3.into(),
            },
            backing_file_offset: 0.into(),
            backing_file_size: 0.into(),
            cluster_bits: self.geometry.cluster_bits().into(),
            size: self.size.into(),
            crypt_method: self.crypt_method.into(),
            l1_size: self.l1_entries.into(),
            l1_table_offset: self.l1_offset.get().into(),
            refcount_table_offset: self.reftable_offset.get().into(),
            refcount_table_clusters: self.reftable_clusters.into(),
            nb_snapshots: self.snapshot_count.into(),
            snapshots_offset: self.snapshots_offset.get().into(),
        }
    }
}

fn parse_fixed(bytes: &[u8]) -> Result<&RawHeader> {
    match RawHeader::ref_from_prefix(bytes) {
        Ok((raw, _)) if raw.magic == MAGIC => Ok(raw),
        _ if bytes.starts_with(&MAGIC) => Err(Error::invalid("header", "the file ends inside it")),
        _ => Err(Error::new(Problem::NotQcow2)),
    }
}

fn version(raw: &RawHeader) -> Result<Version> {
    match raw.version.get() {
        2 => Ok(Version::V2),
        3 => Ok(Version::V3),
        1 => Err(Error::unsupported("qcow version 1")),
        other => Err(Error::unsupported(format!("qcow2 version {other}"))),
    }
}

fn cluster_bits(raw: &RawHeader) -> Result<u32> {
    version(raw)?;
    match raw.cluster_bits.get() {
        bits @ 9..=21 => Ok(bits),
        bits => Err(Error::invalid("cluster_bits", format!("{bits} is not between 9 and 21"))),
    }
}

fn l2_form(incompatible: IncompatibleFeatures, cluster_bits: u32) -> Result<L2Form> {
    if !incompatible.contains(IncompatibleFeatures::EXTENDED_L2) {
        return Ok(L2Form::Standard);
    }
    if cluster_bits < 14 {
        return Err(Error::invalid("cluster_bits", "extended L2 entries need clusters of 16 KiB"));
    }
    Ok(L2Form::Extended)
}

fn header_len(v3: &RawHeaderV3, available: usize, cluster_bits: u32) -> Result<usize> {
    let len = v3.header_length.get() as usize;
    let shortest = size_of::<RawHeader>() + size_of::<RawHeaderV3>();
    if len < shortest || len > 1 << cluster_bits || len > available {
        return Err(Error::invalid(
            "header_length",
            format!("{len} bytes is too short or too long"),
        ));
    }
    Ok(len)
}

fn backing_name(
    raw: &RawHeader,
    cluster: &[u8],
    header_len: usize,
    geometry: Geometry,
) -> Result<Option<Vec<u8>>> {
    let (offset, len) = (raw.backing_file_offset.get(), raw.backing_file_size.get() as usize);
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    if offset >= geometry.cluster_size() || (offset as usize) < header_len {
        return Err(Error::invalid("backing_file_offset", "it is not inside the first cluster"));
    }
    let name = cluster.get(offset as usize..).and_then(|rest| rest.get(..len));
    match name.filter(|name| name.len() <= MAX_BACKING_NAME) {
        Some(name) => Ok(Some(name.to_vec())),
        None => Err(Error::invalid("backing_file_size", format!("{len} bytes is too long"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(version: Version) -> Header {
        Header {
            version,
            geometry: Geometry::new(16, 4),
            size: 100 << 20,
            backing_name: Some(b"base.qcow2".to_vec()),
            crypt_method: 0,
            l1_entries: 1,
            l1_offset: HostOffset::new(0x30000),
            reftable_offset: HostOffset::new(0x10000),
            reftable_clusters: 1,
            snapshot_count: 0,
            snapshots_offset: HostOffset::ZERO,
            incompatible: IncompatibleFeatures::empty(),
            compatible: CompatibleFeatures::empty(),
            autoclear: AutoclearFeatures::empty(),
            compression_type: 0,
            extensions: vec![Extension::BackingFormat("qcow2".into())],
        }
    }

    #[test]
    fn both_versions_survive_writing_and_reading() {
        for version in [Version::V2, Version::V3] {
            let header = sample(version);
            assert_eq!(Header::parse(&header.to_cluster().unwrap()).unwrap(), header);
        }
    }

    #[test]
    fn of_two_extensions_of_one_type_the_last_counts() {
        let mut header = sample(Version::V3);
        header.extensions = vec![
            Extension::BackingFormat("qcow2".into()),
            Extension::DataFileName(b"first".to_vec()),
            Extension::BackingFormat("raw".into()),
            Extension::DataFileName(b"last".to_vec()),
        ];
        assert_eq!(header.backing_format(), Some("raw"));
        assert_eq!(header.data_file_name(), Some(&b"last"[..]));
    }

    #[test]
    fn unknown_incompatible_bits_are_refused_by_number_or_name() {
        let mut header = sample(Version::V3);
        header.incompatible = IncompatibleFeatures::from_bits_retain(1 << 40 | 1 << 5);
        let error = header.refuse_unsupported().unwrap_err();
        assert!(error.headline().contains("bit 5"), "{error}");
        assert!(error.headline().contains("bit 40"), "{error}");
    }

    #[test]
    fn no_prefix_of_a_header_and_no_broken_byte_makes_the_parser_panic() {
        let cluster = sample(Version::V3).to_cluster().unwrap();
        for len in 0..300 {
            let _ = Header::parse(&cluster[..len]);
        }
        for at in 0..300 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut broken = cluster.clone();
                broken[at] = value;
                let _ = Header::parse(&broken).map(|header| header.check_tables());
                let _ = Header::parse(&broken[..512]);
            }
        }
    }

    #[test]
    fn a_table_that_is_not_cluster_aligned_is_named() {
        let mut header = sample(Version::V3);
        header.l1_offset = HostOffset::new(0x30200);
        let error = header.check_tables().unwrap_err();
        assert!(matches!(error.problem(), Problem::Invalid { field: "l1_table_offset", .. }));
    }
}
