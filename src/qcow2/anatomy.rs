//! Table entries taken apart without judging them: a checker must look at what a reader refuses.

use super::{CompressedCluster, Geometry, L2Form};
use crate::units::HostOffset;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = !(COPIED | OFFSET_MASK);
const L2_RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET_MASK | ZERO);

/// An L1 entry as the table holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawL1Entry(pub u64);

impl RawL1Entry {
    /// Where the L2 table is; 0 if there is none.
    pub fn host(self) -> HostOffset {
        HostOffset::new(self.0 & OFFSET_MASK)
    }

    /// Whether a bit is set that must be clear.
    pub fn has_reserved_bits(self) -> bool {
        self.0 & L1_RESERVED != 0
    }
}

/// An L2 entry as the table holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawL2Entry {
    /// The first or only word.
    pub word: u64,
    /// The subcluster bitmap; 0 in a standard entry.
    pub bitmap: u64,
}

impl RawL2Entry {
    /// Where the cluster is, if the entry is not compressed; 0 for none, or for the first of an external data file.
    pub fn host(self) -> HostOffset {
        HostOffset::new(self.word & OFFSET_MASK)
    }

    /// Whether the entry says that its cluster may be written in place.
    pub fn is_copied(self) -> bool {
        is_copied(self.word)
    }

    /// The compressed bytes, if the entry is one of a compressed cluster.
    pub fn compressed(self, geometry: Geometry) -> Option<CompressedCluster> {
        let compressed = self.word & COMPRESSED != 0;
        compressed.then(|| CompressedCluster::decode(self.word, geometry))
    }

    /// Bit 0.
    pub fn has_zero_flag(self) -> bool {
        self.word & ZERO != 0
    }

    /// Whether a bit is set that must be clear in an entry that is not compressed, bit 0 aside.
    pub fn has_reserved_bits(self) -> bool {
        self.word & L2_RESERVED != 0
    }

    /// Whether a subcluster is both allocated and zero.
    pub fn has_contradictory_subclusters(self) -> bool {
        self.bitmap & (self.bitmap >> 32) & u64::from(u32::MAX) != 0
    }

    /// Whether any subcluster is allocated.
    pub fn has_allocated_subclusters(self) -> bool {
        self.bitmap as u32 != 0
    }

    /// Words of an entry.
    pub fn words(form: L2Form) -> usize {
        match form {
            L2Form::Standard => 1,
            L2Form::Extended => 2,
        }
    }
}

/// Whether the L1 or L2 entry `raw` says that its cluster may be written in place.
pub fn is_copied(raw: u64) -> bool {
    raw & COPIED != 0
}

/// The L1 or L2 entry `raw` with the opposite said of its cluster.
pub fn toggle_copied(raw: u64) -> u64 {
    raw ^ COPIED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_of_an_entry_is_used_or_reserved() {
        assert_eq!(L1_RESERVED, 0x7f00_0000_0000_01ff);
        assert_eq!(L2_RESERVED, 0x3f00_0000_0000_01fe);
        assert!(RawL1Entry(1).has_reserved_bits());
        assert!(!RawL1Entry(COPIED | 0x50000).has_reserved_bits());
    }

    #[test]
    fn a_subcluster_can_not_be_allocated_and_zero() {
        let entry = |bitmap| RawL2Entry { word: 0, bitmap };
        assert!(entry(1 << 33 | 1 << 1).has_contradictory_subclusters());
        assert!(!entry(1 << 33 | 1 << 2).has_contradictory_subclusters());
        assert!(!entry(1 << 33).has_allocated_subclusters());
    }
}
