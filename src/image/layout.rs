//! Which host clusters hold metadata, and the only way to write one.
//!
//! Invariant: a write of metadata reaches the file only as a [`CheckedWrite`], which exists only if the range
//! belongs to the table that it is meant for. Guest data goes only to clusters that no table owns.

use std::collections::HashMap;

use crate::error::{Doing, Error, Result};
use crate::qcow2::Geometry;
use crate::store::Store;
use crate::units::HostOffset;

/// What a host cluster holds besides guest data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The header, cluster 0.
    Header,
    /// The active L1 table.
    ActiveL1,
    /// An L2 table that the active L1 names.
    ActiveL2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The L1 table of a snapshot.
    SnapshotL1,
    /// The keys of encrypted data.
    EncryptionHeader,
}

/// The owner of each metadata cluster of an image that is open for writing.
pub struct Layout {
    geometry: Geometry,
    owners: HashMap<u64, Owner>,
}

impl Layout {
    /// A layout that knows the header only.
    pub fn new(geometry: Geometry) -> Self {
        Self { geometry, owners: HashMap::from([(0, Owner::Header)]) }
    }

    /// Gives the clusters that `len` bytes at `start` touch to `owner`.
    ///
    /// # Errors
    /// Two owners of one cluster are corruption.
    pub fn claim(&mut self, start: HostOffset, len: u64, owner: Owner) -> Result<()> {
        for cluster in self.clusters(start, len) {
            if let Some(other) = self.owners.insert(cluster, owner) {
                return Err(Error::corrupt(format!(
                    "host cluster {:#x} belongs to {other:?} and to {owner:?}",
                    cluster << self.geometry.cluster_bits()
                )));
            }
        }
        Ok(())
    }

    /// Takes the clusters of `len` bytes at `start` from whoever owns them.
    pub fn release(&mut self, start: HostOffset, len: u64) {
        for cluster in self.clusters(start, len) {
            self.owners.remove(&cluster);
        }
    }

    /// Whose the cluster at `start` is, if it holds metadata.
    pub fn owner(&self, start: HostOffset) -> Option<Owner> {
        self.owners.get(&(start.get() >> self.geometry.cluster_bits())).copied()
    }

    /// Admits a write of metadata.
    ///
    /// # Errors
    /// A write outside the clusters of `owner` is refused as corruption.
    pub fn check(&self, owner: Owner, offset: HostOffset, bytes: Vec<u8>) -> Result<CheckedWrite> {
        for cluster in self.clusters(offset, bytes.len() as u64) {
            let found = self.owners.get(&cluster);
            if found != Some(&owner) {
                return Err(Error::corrupt(format!(
                    "a write of {owner:?} at {offset} would hit {found:?}"
                )));
            }
        }
        Ok(CheckedWrite { offset, bytes })
    }

    /// Admits guest data to the clusters of `len` bytes at `start`.
    ///
    /// # Errors
    /// A cluster that holds metadata is refused as corruption.
    pub fn check_data(&self, start: HostOffset, len: u64) -> Result<()> {
        match self.clusters(start, len).find_map(|cluster| self.owners.get(&cluster)) {
            None => Ok(()),
            Some(owner) => {
                Err(Error::corrupt(format!("guest data at {start} would overwrite {owner:?}")))
            }
        }
    }

    fn clusters(&self, start: HostOffset, len: u64) -> std::ops::Range<u64> {
        let bits = self.geometry.cluster_bits();
        start.get() >> bits..start.get().saturating_add(len).div_ceil(1 << bits)
    }
}

/// A write of metadata that [`Layout::check`] has admitted.
#[must_use]
pub struct CheckedWrite {
    offset: HostOffset,
    bytes: Vec<u8>,
}

impl CheckedWrite {
    /// Writes it: the one place through which metadata of an open image reaches its file.
    pub fn perform(&self, store: &dyn Store) -> Result<()> {
        store.write_at(&[&self.bytes], self.offset).doing("write its metadata")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 65536;

    fn layout() -> Layout {
        let mut layout = Layout::new(Geometry::new(16, 4));
        layout.claim(HostOffset::new(CLUSTER), 100, Owner::ActiveL1).unwrap();
        layout
    }

    #[test]
    fn a_table_may_be_written_only_where_it_is() {
        let layout = layout();
        assert!(layout.check(Owner::ActiveL1, HostOffset::new(CLUSTER), vec![0; 8]).is_ok());
        assert!(layout.check(Owner::ActiveL2, HostOffset::new(CLUSTER), vec![0; 8]).is_err());
        let across = HostOffset::new(2 * CLUSTER - 4);
        assert!(layout.check(Owner::ActiveL1, across, vec![0; 8]).is_err());
    }

    #[test]
    fn guest_data_never_lands_on_the_header_or_a_table() {
        let layout = layout();
        assert!(layout.check_data(HostOffset::ZERO, CLUSTER).is_err());
        assert!(layout.check_data(HostOffset::new(CLUSTER), CLUSTER).is_err());
        assert!(layout.check_data(HostOffset::new(2 * CLUSTER), CLUSTER).is_ok());
    }

    #[test]
    fn two_owners_of_a_cluster_are_corruption() {
        assert!(layout().claim(HostOffset::new(CLUSTER + 512), 8, Owner::ActiveL2).is_err());
    }
}
