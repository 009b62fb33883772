//! Making the disk smaller.

use super::sync::atomic::Ordering;

use super::entry::{ClusterEntry, NewEntry};
use super::{Below, Image, Tree, ZeroMode};
use crate::error::{Doing, Error, Result};
use crate::qcow2::{DataPlace, L1Entry};
use crate::units::{GuestOffset, GuestRange};

/// L2 tables dropped between two flushes.
const TABLES_AT_ONCE: usize = 64;

impl Image {
    /// Cuts the disk to `size` bytes, rounded up to 512. What is behind is gone; snapshots keep it.
    ///
    /// The header is changed first: a crash leaves the disk at one size or the other, whatever of the rest is still
    /// allocated. Growing hides that.
    ///
    /// # Errors
    /// A size above the present one; version 2 with snapshots, or a snapshot that does not know its own size.
    pub fn shrink(&self, below: &dyn Below, size: u64) -> Result<()> {
        let size = size.checked_next_multiple_of(512).unwrap_or(u64::MAX);
        self.check_can_shrink(size)?;
        let _shape = self.keep_shape();
        self.begin_change()?;
        self.shrink_to(below, size).map_err(|error| self.note(error))
    }

    fn check_can_shrink(&self, size: u64) -> Result<()> {
        let old_size = self.size();
        if size > old_size {
            return Err(Error::usage(format!(
                "{size} bytes are more than the {old_size} of today"
            )));
        }
        self.check_snapshots_know_their_size("shrinking")
    }

    fn shrink_to(&self, below: &dyn Below, size: u64) -> Result<()> {
        let _disk = self.claim_disk();
        self.check_open_for_writing()?;
        // Again: others may have shrunk the disk or made a snapshot while this waited.
        self.check_can_shrink(size)?;
        // No table that goes may wait to be written.
        self.flush_all()?;
        let old_size = self.size();
        self.write_size(size)?;
        // Nobody sees the rest any more, but until it is gone the code below has to.
        let rest = self.give_up(below, GuestRange::new(GuestOffset::new(size), old_size - size));
        self.size.store(size, Ordering::Release);
        self.mapping_changed();
        rest?;
        self.flush_all()?;
        self.cut_data_file(size)
    }

    /// Frees what `rest`, the end of the disk, has. Of a cluster that stays in part, the rest becomes zero.
    fn give_up(&self, below: &dyn Below, rest: GuestRange) -> Result<()> {
        let clusters_start = rest.start.get().next_multiple_of(self.geometry.cluster_size());
        let in_last = clusters_start.min(rest.end().get()) - rest.start.get();
        if in_last > 0 {
            self.zero_claimed(below, GuestRange::new(rest.start, in_last), ZeroMode::Keep)?;
        }
        let span = self.geometry.l2_span();
        let tables_start = clusters_start.next_multiple_of(span);
        let in_table = tables_start.min(rest.end().get()).saturating_sub(clusters_start);
        self.unallocate(GuestRange::new(GuestOffset::new(clusters_start), in_table))?;
        // No entry of the tables behind is to be written while these are dropped.
        self.flush_all()?;
        let first = self.geometry.l1_index(GuestOffset::new(tables_start));
        let end = rest.end().get().div_ceil(span) as usize;
        for l1_index in first..end {
            self.drop_table(l1_index)?;
            // What waits to be freed is a list in memory.
            if l1_index % TABLES_AT_ONCE == 0 {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Empties the entries of the clusters of `range`.
    fn unallocate(&self, range: GuestRange) -> Result<()> {
        for part in range.split(self.geometry.cluster_size()) {
            let run = self.map(Tree::Active, part)?;
            if !run.content.is_unallocated() || run.len < part.len {
                self.change_entry(part.start, NewEntry::Unallocated)?;
            }
        }
        Ok(())
    }

    /// Drops the L2 table that the L1 entry with this index names, and with it a reference to all that it names.
    fn drop_table(&self, l1_index: usize) -> Result<()> {
        let geometry = self.geometry;
        let mut metadata = self.metadata();
        let entry = L1Entry::decode(metadata.l1.get(l1_index), geometry)?;
        let L1Entry::Table { host: table, .. } = entry else { return Ok(()) };
        let mut lost = Vec::new();
        let page_size = metadata.pages.page_size();
        for at in (0..geometry.cluster_size()).step_by(page_size as usize) {
            let bytes = metadata.pages.load(&*self.store, table + at)?;
            for raw in bytes.chunks_exact(geometry.l2_entry_len() as usize) {
                let entry = ClusterEntry::decode(raw, geometry, metadata.rules)?;
                lost.extend(entry.host_clusters(geometry));
            }
        }
        metadata.l1.set(l1_index, L1Entry::Unallocated.encode());
        let (allocator, _) = metadata.writer()?;
        allocator.drop_table(table);
        if self.data_place == DataPlace::Internal {
            lost.into_iter().for_each(|cluster| allocator.unreference_later(cluster));
        }
        Ok(())
    }

    /// Cuts an external data file to the clusters of a disk of `size` bytes, once nothing points behind them.
    fn cut_data_file(&self, size: u64) -> Result<()> {
        if self.data_place == DataPlace::Internal {
            return Ok(());
        }
        let end = size.next_multiple_of(self.geometry.cluster_size());
        if self.data.len().doing("find out the length of its data file")? > end {
            self.data.set_len(end).doing("cut its data file")?;
        }
        Ok(())
    }
}
