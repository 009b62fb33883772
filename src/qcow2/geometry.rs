//! How offsets split into table indexes (section "Cluster mapping").

use crate::units::GuestOffset;

/// The sizes that follow from a header's cluster size and refcount width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    l2_form: L2Form,
}

/// The form of L2 entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L2Form {
    /// 64 bits a cluster.
    Standard,
    /// 128 bits: a cluster has 32 subclusters, each with a state of its own.
    Extended,
}

impl Geometry {
    /// For clusters of `1 << cluster_bits` bytes (9 to 21) and refcounts of `1 << refcount_order` bits (0 to 6).
    pub fn new(cluster_bits: u32, refcount_order: u32) -> Self {
        debug_assert!((9..=21).contains(&cluster_bits) && refcount_order <= 6);
        Self { cluster_bits, refcount_order, l2_form: L2Form::Standard }
    }

    /// The same with another form of L2 entries; extended ones need clusters of 16 KiB or more.
    pub fn with_l2_form(self, l2_form: L2Form) -> Self {
        debug_assert!(l2_form == L2Form::Standard || self.cluster_bits >= 14);
        Self { l2_form, ..self }
    }

    /// The form of L2 entries.
    pub fn l2_form(self) -> L2Form {
        self.l2_form
    }

    /// log2 of the cluster size.
    pub fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// log2 of the refcount width in bits.
    pub fn refcount_order(self) -> u32 {
        self.refcount_order
    }

    /// Bytes in a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries in an L2 table.
    pub fn l2_entries(self) -> u64 {
        self.cluster_size() / self.l2_entry_len()
    }

    /// Bytes in an L2 entry.
    pub fn l2_entry_len(self) -> u64 {
        match self.l2_form {
            L2Form::Standard => 8,
            L2Form::Extended => 16,
        }
    }

    /// Bytes of the disk that have a state of their own: a subcluster, or a cluster that has none.
    pub fn subcluster_size(self) -> u64 {
        match self.l2_form {
            L2Form::Standard => self.cluster_size(),
            L2Form::Extended => self.cluster_size() / 32,
        }
    }

    /// Bytes of the disk that one L2 table maps.
    pub fn l2_span(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Entries that an L1 table needs for a disk of `size` bytes.
    pub fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    /// Which L1 entry maps `offset`.
    pub fn l1_index(self, offset: GuestOffset) -> usize {
        (offset.get() / self.l2_span()) as usize
    }

    /// Which entry of its L2 table maps `offset`.
    pub fn l2_index(self, offset: GuestOffset) -> usize {
        ((offset.get() >> self.cluster_bits) % self.l2_entries()) as usize
    }

    /// Bytes from the beginning of its cluster to `offset`.
    pub fn in_cluster(self, offset: GuestOffset) -> u64 {
        offset.get() & (self.cluster_size() - 1)
    }

    /// Refcounts in a refcount block.
    pub fn refcounts_per_block(self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// `bytes` rounded up to whole clusters, counted in clusters.
    pub fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_geometry_maps_half_a_gibibyte_per_l2_table() {
        let geometry = Geometry::new(16, 4);
        assert_eq!(geometry.l2_entries(), 8192);
        assert_eq!(geometry.l2_span(), 512 << 20);
        assert_eq!(geometry.refcounts_per_block(), 32768);
        let offset = GuestOffset::new((512 << 20) + (3 << 16) + 7);
        assert_eq!(geometry.l1_index(offset), 1);
        assert_eq!(geometry.l2_index(offset), 3);
        assert_eq!(geometry.in_cluster(offset), 7);
    }

    #[test]
    fn a_disk_of_one_byte_more_than_a_span_needs_two_l1_entries() {
        let geometry = Geometry::new(9, 4);
        assert_eq!(geometry.l1_entries(0), 0);
        assert_eq!(geometry.l1_entries(geometry.l2_span()), 1);
        assert_eq!(geometry.l1_entries(geometry.l2_span() + 1), 2);
    }
}
