//! What an L2 entry, of either form, says of its guest cluster, and how it changes.

use super::ZeroMode;
use super::map::{Content, Place};
use crate::error::Result;
use crate::qcow2::{
    CompressedCluster, DataPlace, EntryRules, ExtendedL2Entry, Geometry, L2Entry, L2Form, be_u64,
};
use crate::units::{GuestRange, HostOffset};

/// An L2 entry of either form. A standard one has its subclusters all in the same state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClusterEntry {
    /// A compressed cluster.
    Compressed(CompressedCluster),
    /// Any other: subclusters in neither set are unallocated.
    Plain {
        /// The host cluster, if there is one.
        host: Option<Place>,
        /// Those with data at `host`.
        allocated: Subclusters,
        /// Those that read as zero; none of them is in `allocated`.
        zero: Subclusters,
    },
}

impl ClusterEntry {
    /// Nothing at all.
    pub const UNALLOCATED: Self =
        Self::Plain { host: None, allocated: Subclusters::NONE, zero: Subclusters::NONE };

    /// Reads the entry at the beginning of `bytes`.
    ///
    /// # Errors
    /// As [`L2Entry::decode`] and [`ExtendedL2Entry::decode`].
    pub fn decode(bytes: &[u8], geometry: Geometry, rules: EntryRules) -> Result<Self> {
        let raw = be_u64(bytes, 0);
        let place = |(host, copied)| Place {
            host,
            // A data file counts no references: its clusters have one owner each, flag or not.
            copied: copied || rules.data == DataPlace::External,
        };
        let (none, all) = (Subclusters::NONE, Subclusters::ALL);
        let (host, allocated, zero) = match geometry.l2_form() {
            L2Form::Standard => match L2Entry::decode(raw, geometry, rules)? {
                L2Entry::Compressed(cluster) => return Ok(Self::Compressed(cluster)),
                L2Entry::Unallocated => (None, none, none),
                // Offset 0 of a data file may be a place, but QEMU takes it for none here, and maps shall agree.
                L2Entry::Zero { host } => {
                    (host.filter(|(host, _)| *host != HostOffset::ZERO), none, all)
                }
                L2Entry::Data { host, copied } => (Some((host, copied)), all, none),
            },
            L2Form::Extended => {
                match ExtendedL2Entry::decode(raw, be_u64(bytes, 1), geometry, rules)? {
                    ExtendedL2Entry::Compressed(cluster) => return Ok(Self::Compressed(cluster)),
                    ExtendedL2Entry::Subclusters { host, allocated, zero } => {
                        (host, Subclusters(allocated), Subclusters(zero))
                    }
                }
            }
        };
        Ok(Self::Plain { host: host.map(place), allocated, zero })
    }

    /// Writes the entry to the beginning of `bytes`.
    pub fn encode(self, bytes: &mut [u8], geometry: Geometry) {
        match geometry.l2_form() {
            L2Form::Standard => {
                let raw = self.standard().encode(geometry);
                bytes[..8].copy_from_slice(&raw.to_be_bytes());
            }
            L2Form::Extended => {
                let (raw, bitmap) = self.extended().encode(geometry);
                bytes[..8].copy_from_slice(&raw.to_be_bytes());
                bytes[8..16].copy_from_slice(&bitmap.to_be_bytes());
            }
        }
    }

    fn standard(self) -> L2Entry {
        match self {
            Self::Compressed(cluster) => L2Entry::Compressed(cluster),
            Self::Plain { host, allocated, zero } => match host {
                Some(Place { host, copied }) if !allocated.is_empty() => {
                    L2Entry::Data { host, copied }
                }
                host if !zero.is_empty() => {
                    L2Entry::Zero { host: host.map(|place| (place.host, place.copied)) }
                }
                _ => L2Entry::Unallocated,
            },
        }
    }

    fn extended(self) -> ExtendedL2Entry {
        match self {
            Self::Compressed(cluster) => ExtendedL2Entry::Compressed(cluster),
            Self::Plain { host, allocated, zero } => ExtendedL2Entry::Subclusters {
                host: host.map(|place| (place.host, place.copied)),
                allocated: allocated.0,
                zero: zero.0,
            },
        }
    }

    /// What the subcluster `index` holds from its byte `skip` on.
    pub fn content(self, index: u64, skip: u64, geometry: Geometry) -> Content {
        let at = index * geometry.subcluster_size() + skip;
        match self {
            Self::Compressed(cluster) => Content::Compressed { cluster, skip: at },
            Self::Plain { host, allocated, zero } => match host.map(|host| host.advance(at)) {
                Some(place) if allocated.contains(index) => Content::Data(place),
                kept if zero.contains(index) => Content::Zero { kept },
                kept => Content::Unallocated { kept },
            },
        }
    }

    /// The entry after a change.
    pub fn changed(self, change: NewEntry) -> Self {
        let (host, allocated, zero) = match self {
            Self::Compressed(_) => (None, Subclusters::ALL, Subclusters::NONE),
            Self::Plain { host, allocated, zero } => (host, allocated, zero),
        };
        match change {
            NewEntry::Data { host, written } => {
                let allocated = allocated.with(written);
                let host = Some(Place { host, copied: true });
                Self::Plain { host, allocated, zero: zero.without(allocated) }
            }
            NewEntry::Zero { subclusters, mode } => {
                let allocated = allocated.without(subclusters);
                let host = host.filter(|place| {
                    !allocated.is_empty() || mode == ZeroMode::Keep && place.copied
                });
                Self::Plain { host, allocated, zero: zero.with(subclusters) }
            }
            NewEntry::Unallocated => Self::UNALLOCATED,
        }
    }

    /// The entry once somebody else refers to its cluster, too.
    pub fn shared(self) -> Self {
        self.with_copied(false)
    }

    /// The entry once nobody else refers to its cluster any more.
    pub fn unshared(self) -> Self {
        self.with_copied(true)
    }

    fn with_copied(self, copied: bool) -> Self {
        match self {
            Self::Plain { host: Some(place), allocated, zero } => {
                let place = Place { copied, ..place };
                Self::Plain { host: Some(place), allocated, zero }
            }
            other => other,
        }
    }

    /// The host clusters that the entry holds a reference to.
    pub fn host_clusters(self, geometry: Geometry) -> Vec<HostOffset> {
        match self {
            Self::Compressed(cluster) => cluster.host_clusters(geometry).collect(),
            Self::Plain { host, .. } => host.iter().map(|place| place.host).collect(),
        }
    }

    /// The bytes of the cluster, counted from its beginning, that must go along when its data moves to another host
    /// cluster: from the first subcluster with data of its own to the last.
    pub fn bytes_to_move(self, geometry: Geometry) -> Option<std::ops::Range<u64>> {
        let unit = geometry.subcluster_size();
        match (self, geometry.l2_form()) {
            (Self::Plain { allocated: Subclusters::NONE, .. }, _) => None,
            (Self::Compressed(_), _) | (_, L2Form::Standard) => Some(0..geometry.cluster_size()),
            (Self::Plain { allocated: Subclusters(bits), .. }, L2Form::Extended) => {
                let end = u64::from(u32::BITS - bits.leading_zeros());
                Some(u64::from(bits.trailing_zeros()) * unit..end * unit)
            }
        }
    }
}

/// A change of what a cluster holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NewEntry {
    /// Data in the cluster at `host`, whose refcount is one.
    Data {
        /// The cluster. What had data elsewhere has been copied there.
        host: HostOffset,
        /// What has data now, besides what had before.
        written: Subclusters,
    },
    /// Zeroes.
    Zero {
        /// What reads as zero now; all of a compressed cluster.
        subclusters: Subclusters,
        /// Whether a host cluster without data is kept.
        mode: ZeroMode,
    },
    /// Nothing.
    Unallocated,
}

/// A set of subclusters of one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Subclusters(u32);

impl Subclusters {
    const NONE: Self = Self(0);
    /// The whole cluster.
    pub const ALL: Self = Self(u32::MAX);

    /// Those that hold a byte of `range`, which lies in one cluster and is not empty.
    pub fn touched_by(range: GuestRange, geometry: Geometry) -> Self {
        if geometry.l2_form() == L2Form::Standard {
            return Self::ALL;
        }
        let unit = geometry.subcluster_size();
        let first = geometry.in_cluster(range.start) / unit;
        let last = (geometry.in_cluster(range.start) + range.len - 1) / unit;
        Self((u32::MAX >> (31 - (last - first))) << first)
    }

    fn contains(self, index: u64) -> bool {
        self.0 >> index & 1 == 1
    }

    fn is_empty(self) -> bool {
        self == Self::NONE
    }

    fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::ZeroFlag;
    use crate::units::GuestOffset;

    const RULES: EntryRules =
        EntryRules { zero_flag: ZeroFlag::Defined, data: DataPlace::Internal };
    const HOST: HostOffset = HostOffset::new(0x50000);

    fn extended() -> Geometry {
        Geometry::new(16, 4).with_l2_form(L2Form::Extended)
    }

    fn touched(start: u64, len: u64) -> Subclusters {
        Subclusters::touched_by(GuestRange::new(GuestOffset::new(start), len), extended())
    }

    fn plain(place: Option<Place>, allocated: Subclusters, zero: Subclusters) -> ClusterEntry {
        ClusterEntry::Plain { host: place, allocated, zero }
    }

    #[test]
    fn a_range_touches_the_subclusters_that_it_reaches_into() {
        assert_eq!(touched(0, 65536), Subclusters::ALL);
        assert_eq!(touched(65536 + 2047, 2), Subclusters(0b11));
        assert_eq!(touched(2048 * 31, 1), Subclusters(1 << 31));
        assert_eq!(touched(2048 * 3, 2048 * 2), Subclusters(0b11000));
    }

    #[test]
    fn every_entry_survives_encoding_in_both_forms() {
        let own = Some(Place { host: HOST, copied: true });
        let compressed = ClusterEntry::Compressed(CompressedCluster { host: HOST, len: 512 });
        for (geometry, entry) in [
            (Geometry::new(16, 4), plain(own, Subclusters::ALL, Subclusters::NONE)),
            (Geometry::new(16, 4), plain(own, Subclusters::NONE, Subclusters::ALL)),
            (Geometry::new(16, 4), plain(None, Subclusters::NONE, Subclusters::ALL)),
            (Geometry::new(16, 4), compressed),
            (extended(), plain(own, Subclusters(5), Subclusters(0x8000_0002))),
            (extended(), plain(own, Subclusters::NONE, Subclusters::NONE)),
            (extended(), plain(None, Subclusters::NONE, Subclusters(7))),
            (extended(), compressed),
        ] {
            let mut bytes = [0; 16];
            entry.encode(&mut bytes, geometry);
            assert_eq!(ClusterEntry::decode(&bytes, geometry, RULES).unwrap(), entry);
        }
    }

    #[test]
    fn writing_a_part_of_a_cluster_leaves_the_other_subclusters_as_they_were() {
        let shared = Some(Place { host: HOST, copied: false });
        let old = plain(shared, Subclusters(0b0001), Subclusters(0b0110));
        let new = HostOffset::new(0x90000);
        let written = Subclusters(0b0010);
        let own = Some(Place { host: new, copied: true });
        let expected = plain(own, Subclusters(0b0011), Subclusters(0b0100));
        assert_eq!(old.changed(NewEntry::Data { host: new, written }), expected);
    }

    #[test]
    fn the_host_cluster_goes_when_its_last_subcluster_is_zeroed() {
        let own = Some(Place { host: HOST, copied: true });
        let old = plain(own, Subclusters(0b11), Subclusters::NONE);
        let zero = |bits, mode| NewEntry::Zero { subclusters: Subclusters(bits), mode };
        let half = old.changed(zero(1, ZeroMode::Unmap));
        assert_eq!(half, plain(own, Subclusters(0b10), Subclusters(0b01)));
        let none = half.changed(zero(2, ZeroMode::Unmap));
        assert_eq!(none, plain(None, Subclusters::NONE, Subclusters(0b11)));
        let kept = half.changed(zero(2, ZeroMode::Keep));
        assert_eq!(kept, plain(own, Subclusters::NONE, Subclusters(0b11)));
    }

    #[test]
    fn data_moves_from_its_first_subcluster_to_its_last() {
        let entry = plain(None, Subclusters(0b10100), Subclusters::NONE);
        assert_eq!(entry.bytes_to_move(extended()), Some(2 * 2048..5 * 2048));
        let all = plain(None, Subclusters::ALL, Subclusters::NONE);
        assert_eq!(all.bytes_to_move(extended()), Some(0..65536));
    }
}
