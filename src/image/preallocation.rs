//! Telling whether an image's clusters were allocated ahead of their data.

use super::Image;
use super::table::Table;
use crate::error::{Doing, Result};
use crate::qcow2::refcount;
use crate::units::HostOffset;

impl Image {
    /// Whether notably more clusters are in use than the host has space for, as after `preallocation=metadata`.
    ///
    /// Data clusters of such an image may be holes of the file, which its tables don't tell. QEMU asks the same question
    /// before it looks for holes there, so that maps agree.
    ///
    /// # Errors
    /// Failing reads.
    pub fn looks_preallocated(&self) -> Result<bool> {
        let geometry = self.geometry;
        let store = &*self.store;
        let header = self.header();
        let cluster_size = geometry.cluster_size();
        let on_host = store.allocated().doing("find out its size")? / cluster_size;
        let many = (on_host * 10 / 9).max(on_host + 2);
        let clusters = geometry.clusters(store.len().doing("find out its length")?);
        let per_block = geometry.refcounts_per_block();
        let table_len = u64::from(header.reftable_clusters) * cluster_size / 8;
        let table = Table::read(store, header.reftable_offset, table_len as usize)?;
        let mut in_use = 0;
        let mut block = vec![0; cluster_size as usize];
        for (index, &entry) in (0..clusters.div_ceil(per_block)).zip(table.entries()) {
            if entry == 0 {
                continue;
            }
            store
                .read_at(&mut block, HostOffset::new(entry & !0x1ff))
                .doing("read its refcounts")?;
            let described = per_block.min(clusters - index * per_block);
            in_use += (0..described)
                .filter(|&at| refcount::get(&block, at as usize, geometry.refcount_order()) > 0)
                .count() as u64;
            if in_use >= many {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
