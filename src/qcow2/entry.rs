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

impl L2Entry {
    /// Reads the entry `raw`. `zero_flag_exists` is false for version 2, in which bit 0 is reserved.
    ///
    /// # Errors
    /// An unaligned cluster offset, or a zero flag in a version 2 image, is corruption.
    pub fn decode(raw: u64, geometry: Geometry, zero_flag: ZeroFlag) -> Result<Self> {
        if raw == 0 {
            return Ok(Self::Unallocated);
        }
        if raw & COMPRESSED != 0 {
            return Ok(Self::Compressed(CompressedCluster::decode(raw, geometry)));
        }
        let host = HostOffset::new(raw & OFFSET_MASK);
        let copied = raw & COPIED != 0;
        if !host.is_aligned(geometry.cluster_size()) {
            return Err(Error::corrupt(format!("data cluster offset {host} is not aligned")));
        }
        if raw & ZERO != 0 {
            if zero_flag == ZeroFlag::Reserved {
                return Err(Error::corrupt("zero flag in an L2 entry of a version 2 image"));
            }
            let host = (host != HostOffset::ZERO).then_some((host, copied));
            return Ok(Self::Zero { host });
        }
        if host == HostOffset::ZERO {
            return Ok(Self::Unallocated);
        }
        Ok(Self::Data { host, copied })
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

/// What bit 0 of an L2 entry means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroFlag {
    /// The cluster reads as zero (version 3).
    Defined,
    /// It must be clear (version 2).
    Reserved,
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
    fn decode(raw: u64, geometry: Geometry) -> Self {
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

    const GEOMETRY: fn() -> Geometry = || Geometry::new(16, 4);

    fn decode(raw: u64) -> L2Entry {
        L2Entry::decode(raw, GEOMETRY(), ZeroFlag::Defined).unwrap()
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
        assert!(L2Entry::decode(0x50200, GEOMETRY(), ZeroFlag::Defined).is_err());
        assert!(L1Entry::decode(0x50200, GEOMETRY()).is_err());
    }

    #[test]
    fn the_zero_flag_is_corruption_in_version_2() {
        assert!(L2Entry::decode(1, GEOMETRY(), ZeroFlag::Reserved).is_err());
    }

    #[test]
    fn compressed_bytes_that_cross_a_border_touch_two_host_clusters() {
        let cluster = CompressedCluster { host: HostOffset::new(0x1ff00), len: 512 };
        let touched: Vec<_> = cluster.host_clusters(GEOMETRY()).collect();
        assert_eq!(touched, [HostOffset::new(0x10000), HostOffset::new(0x20000)]);
    }
}
