//! L1 and L2 table entries (sections "L1 table entry", "L2 table entry", "Compressed Clusters Descriptor").

use super::Geometry;
use crate::error::{Error, Result};
use crate::units::HostOffset;

/// The cluster's refcount is exactly one, so that it may be written in place.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// An entry of an L1 table: where the L2 table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L1Entry {
    /// No L2 table: all its clusters are unallocated.
    Unallocated,
    /// The L2 table at `host`, which may be written in place if `copied`.
    Table {
        /// Cluster-aligned offset of the table.
        host: HostOffset,
        /// Its refcount is exactly one.
        copied: bool,
    },
}

impl L1Entry {
    /// Reads the entry `raw`.
    ///
    /// # Errors
    /// A table offset that is not cluster-aligned is corruption.
    pub fn decode(raw: u64, geometry: Geometry) -> Result<Self> {
        let host = HostOffset::new(raw & OFFSET_MASK);
        if host == HostOffset::ZERO {
            return Ok(Self::Unallocated);
        }
        if !host.is_aligned(geometry.cluster_size()) {
            return Err(Error::corrupt(format!("L2 table offset {host} is not cluster-aligned")));
        }
        Ok(Self::Table { host, copied: raw & COPIED != 0 })
    }

    /// Where the L2 table is that the entry `raw` names, 0 if there is none. Nothing is checked.
    pub fn table_offset(raw: u64) -> u64 {
        raw & OFFSET_MASK
    }

    /// The entry as the table holds it.
    pub fn encode(self) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Table { host, copied } => host.get() | copied_bit(copied),
        }
    }
}

/// An entry of a standard L2 table: what a guest cluster holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L2Entry {
    /// Nothing here: the backing file shows through.
    Unallocated,
    /// Reads as zero; `host` is a cluster kept for it, whose content does not count.
    Zero {
        /// The preallocated cluster, if any, and whether it may be written in place.
        host: Option<(HostOffset, bool)>,
    },
    /// The cluster at `host`, which may be written in place if `copied`.
    Data {
        /// Cluster-aligned offset of the data.
        host: HostOffset,
        /// Its refcount is exactly one.
        copied: bool,
    },
    /// Compressed data.
    Compressed(CompressedCluster),
}

/// What an image's header says about the meaning of its L2 entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRules {
    /// What bit 0 means.
    pub zero_flag: ZeroFlag,
    /// Where guest data is.
    pub data: DataPlace,
}

/// What bit 0 of an L2 entry means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroFlag {
    /// The cluster reads as zero (version 3).
    Defined,
    /// It must be clear (version 2).
    Reserved,
}

/// Where guest data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataPlace {
    /// In the image.
    Internal,
    /// In a file of its own, in which offset 0 is as good as any.
    External,
}

impl L2Entry {
    /// Reads the standard entry `raw`.
    ///
    /// # Errors
    /// An unaligned cluster offset, a zero flag in a version 2 image and a compressed cluster beside an external data
    /// file are corruption.
    pub fn decode(raw: u64, geometry: Geometry, rules: EntryRules) -> Result<Self> {
        if raw == 0 {
            return Ok(Self::Unallocated);
        }
        if let Some(cluster) = decode_compressed(raw, geometry, rules)? {
            return Ok(Self::Compressed(cluster));
        }
        let host = decode_host(raw, geometry, rules)?;
        if raw & ZERO != 0 {
            if rules.zero_flag == ZeroFlag::Reserved {
                return Err(Error::corrupt("zero flag in an L2 entry of a version 2 image"));
            }
            return Ok(Self::Zero { host });
        }
        Ok(match host {
            Some((host, copied)) => Self::Data { host, copied },
            None => Self::Unallocated,
        })
    }

    /// The entry as the table holds it.
    pub fn encode(self, geometry: Geometry) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Zero { host: None } => ZERO,
            Self::Zero { host: Some((host, copied)) } => host.get() | copied_bit(copied) | ZERO,
            Self::Data { host, copied } => host.get() | copied_bit(copied),
            Self::Compressed(cluster) => cluster.encode(geometry),
        }
    }
}

/// An extended L2 entry (section "Extended L2 Entries").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtendedL2Entry {
    /// A compressed cluster has no subclusters.
    Compressed(CompressedCluster),
    /// 32 subclusters.
    Subclusters {
        /// The cluster, if there is one, and whether it may be written in place.
        host: Option<(HostOffset, bool)>,
        /// Bit `i` is set if subcluster `i` has its data there.
        allocated: u32,
        /// Bit `i` is set if subcluster `i` reads as zero.
        zero: u32,
    },
}

impl ExtendedL2Entry {
    /// Reads the entry of the words `raw` and `bitmap`.
    ///
    /// # Errors
    /// As [`L2Entry::decode`]; a subcluster that is both allocated and zero, allocated subclusters without a cluster,
    /// and a zero flag or bitmap where there must be none are corruption.
    pub fn decode(raw: u64, bitmap: u64, geometry: Geometry, rules: EntryRules) -> Result<Self> {
        if let Some(cluster) = decode_compressed(raw, geometry, rules)? {
            if bitmap != 0 {
                return Err(Error::corrupt("a compressed cluster with a subcluster bitmap"));
            }
            return Ok(Self::Compressed(cluster));
        }
        if raw & ZERO != 0 {
            return Err(Error::corrupt("zero flag in an extended L2 entry"));
        }
        let host = decode_host(raw, geometry, rules)?;
        let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        if allocated & zero != 0 {
            return Err(Error::corrupt("a subcluster that is both allocated and zero"));
        }
        if allocated != 0 && host.is_none() {
            return Err(Error::corrupt("allocated subclusters without a cluster"));
        }
        Ok(Self::Subclusters { host, allocated, zero })
    }

    /// The two words of the entry as the table holds them.
    pub fn encode(self, geometry: Geometry) -> (u64, u64) {
        match self {
            Self::Compressed(cluster) => (cluster.encode(geometry), 0),
            Self::Subclusters { host, allocated, zero } => {
                let raw = host.map_or(0, |(host, copied)| host.get() | copied_bit(copied));
                (raw, u64::from(zero) << 32 | u64::from(allocated))
            }
        }
    }
}

/// The compressed cluster that `raw` describes, if it does.
fn decode_compressed(
    raw: u64,
    geometry: Geometry,
    rules: EntryRules,
) -> Result<Option<CompressedCluster>> {
    match (raw & COMPRESSED != 0, rules.data) {
        (false, _) => Ok(None),
        (true, DataPlace::Internal) => Ok(Some(CompressedCluster::decode(raw, geometry))),
        (true, DataPlace::External) => {
            Err(Error::corrupt("a compressed cluster in an image with an external data file"))
        }
    }
}

/// The cluster that `raw` points to, if any, and whether it may be written in place.
fn decode_host(
    raw: u64,
    geometry: Geometry,
    rules: EntryRules,
) -> Result<Option<(HostOffset, bool)>> {
    let host = HostOffset::new(raw & OFFSET_MASK);
    let copied = raw & COPIED != 0;
    if !host.is_aligned(geometry.cluster_size()) {
        return Err(Error::corrupt(format!("data cluster offset {host} is not aligned")));
    }
    let absent = match rules.data {
        DataPlace::Internal => host == HostOffset::ZERO,
        DataPlace::External => host == HostOffset::ZERO && !copied,
    };
    Ok((!absent).then_some((host, copied)))
}

/// Where the compressed bytes of a cluster are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CompressedCluster {
    /// First byte; any alignment.
    pub host: HostOffset,
    /// Bytes up to the end of the last 512-byte sector in use. The stream itself may end before, and the file may
    /// end inside the last sector.
    pub len: u64,
}

impl CompressedCluster {
    pub(super) fn decode(raw: u64, geometry: Geometry) -> Self {
        let offset_bits = Self::offset_bits(geometry);
        let host = raw & ((1 << offset_bits) - 1);
        let sectors = ((raw & !(COMPRESSED | COPIED)) >> offset_bits) + 1;
        Self { host: HostOffset::new(host), len: sectors * 512 - (host & 511) }
    }

    fn encode(self, geometry: Geometry) -> u64 {
        let sectors = ((self.host.get() & 511) + self.len).div_ceil(512);
        COMPRESSED | ((sectors - 1) << Self::offset_bits(geometry)) | self.host.get()
    }

    /// Bits of the descriptor that hold the offset; the sector count is above them.
    fn offset_bits(geometry: Geometry) -> u32 {
        62 - (geometry.cluster_bits() - 8)
    }

    /// The host clusters that hold a part of the bytes, each of which counts one reference.
    pub fn host_clusters(self, geometry: Geometry) -> impl Iterator<Item = HostOffset> {
        let first = self.host.align_down(geometry.cluster_size());
        let last = (self.host + (self.len - 1)).align_down(geometry.cluster_size());
        (first.get()..=last.get()).step_by(geometry.cluster_size() as usize).map(HostOffset::new)
    }
}

fn copied_bit(copied: bool) -> u64 {
    if copied { COPIED } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: EntryRules =
        EntryRules { zero_flag: ZeroFlag::Defined, data: DataPlace::Internal };
    const GEOMETRY: fn() -> Geometry = || Geometry::new(16, 4);

    fn decode(raw: u64) -> L2Entry {
        L2Entry::decode(raw, GEOMETRY(), RULES).unwrap()
    }

    #[test]
    fn every_kind_of_entry_survives_encoding() {
        let host = HostOffset::new(0x50000);
        for entry in [
            L2Entry::Unallocated,
            L2Entry::Zero { host: None },
            L2Entry::Zero { host: Some((host, true)) },
            L2Entry::Data { host, copied: true },
            L2Entry::Data { host, copied: false },
            L2Entry::Compressed(CompressedCluster { host: host + 77, len: 3 * 512 - 77 }),
        ] {
            assert_eq!(decode(entry.encode(GEOMETRY())), entry);
        }
    }

    #[test]
    fn an_unaligned_offset_is_corruption() {
        assert!(L2Entry::decode(0x50200, GEOMETRY(), RULES).is_err());
        assert!(L1Entry::decode(0x50200, GEOMETRY()).is_err());
    }

    #[test]
    fn the_zero_flag_is_corruption_in_version_2() {
        let rules = EntryRules { zero_flag: ZeroFlag::Reserved, ..RULES };
        assert!(L2Entry::decode(1, GEOMETRY(), rules).is_err());
    }

    #[test]
    fn offset_zero_is_data_only_in_an_external_file_and_only_with_copied() {
        let external = EntryRules { data: DataPlace::External, ..RULES };
        let entry = L2Entry::decode(COPIED, GEOMETRY(), external).unwrap();
        assert_eq!(entry, L2Entry::Data { host: HostOffset::ZERO, copied: true });
        assert_eq!(decode(COPIED), L2Entry::Unallocated);
        assert!(L2Entry::decode(COMPRESSED, GEOMETRY(), external).is_err());
    }

    #[test]
    fn a_subcluster_with_both_bits_or_without_its_cluster_is_corruption() {
        let extended = |raw, bitmap| ExtendedL2Entry::decode(raw, bitmap, GEOMETRY(), RULES);
        assert!(extended(0x50000 | COPIED, 1 | 2 << 32).is_ok());
        assert!(extended(0x50000 | COPIED, 1 | 1 << 32).is_err());
        assert!(extended(0, 1).is_err());
        assert!(extended(0, 1 << 32).is_ok());
        assert!(extended(0x50000 | ZERO, 0).is_err());
        assert!(extended(COMPRESSED | 0x50000, 1).is_err());
    }

    #[test]
    fn compressed_bytes_that_cross_a_border_touch_two_host_clusters() {
        let cluster = CompressedCluster { host: HostOffset::new(0x1ff00), len: 512 };
        let touched: Vec<_> = cluster.host_clusters(GEOMETRY()).collect();
        assert_eq!(touched, [HostOffset::new(0x10000), HostOffset::new(0x20000)]);
    }
}
