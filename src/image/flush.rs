//! From memory to stable storage, in an order in which a power cut can only leak clusters.
//!
//! 1. New refcount blocks; sync.
//! 2. Refcount table entries, refcounts, new L2 tables (nothing points to these yet); sync, which also makes the guest's
//!    data durable.
//! 3. L2 and L1 entries: they point only to what step 2 made durable; sync.
//! 4. Clusters that lost their last pointer in step 3 are punched, then counted as free. These counts are written by
//!    the next flush: until then a power cut leaves them as leaks.
//!
//! A step that has nothing to write does not sync.

use super::Image;
use super::allocate::{Lost, TableFull};
use super::layout::{CheckedWrite, Owner};
use super::metadata::Metadata;
use super::pages::{Dirty, Kind};
use super::sync::atomic::Ordering;
use crate::error::{Doing, Error, Problem, Result};
use crate::qcow2::{DataPlace, offsets};
use crate::units::HostOffset;

/// References given back in one go, so that writers wait for the metadata lock no longer than a moment.
const GIVEN_BACK_AT_ONCE: usize = 1 << 14;

impl Image {
    /// Returns when all that was written before is on stable storage.
    ///
    /// # Errors
    /// After the first failure the image takes no more writes until it is opened anew: what the disk holds is no
    /// longer known, and a second `fdatasync` would claim success for lost pages.
    pub fn flush(&self) -> Result<()> {
        let _one_at_a_time = self.flushing.lock().unwrap_or_else(|lock| lock.into_inner());
        // All of a retired image was durable before it was retired.
        if self.is_retired() {
            return Ok(());
        }
        // Before anything else: once a sync has failed, "nothing to write" is no success.
        self.check_open_for_writing()?;
        if !self.has_unwritten() {
            return Ok(());
        }
        // From here on a failure leaves the file in a state that only a new open can find out.
        self.write_out().map_err(|error| self.close_for_writing(self.note(error)))
    }

    /// Flushes until not even freed clusters wait to be written: what a clean close needs.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn flush_all(&self) -> Result<()> {
        self.flush()?;
        while self.has_unwritten() {
            self.flush()?;
        }
        Ok(())
    }

    /// Whether a flush would have something to do.
    pub fn has_unwritten(&self) -> bool {
        let metadata = self.metadata();
        self.unsynced.load(Ordering::Acquire)
            || metadata.pages.dirty_count() > 0
            || metadata.l1.is_dirty()
            || metadata.allocator.as_ref().is_some_and(|allocator| {
                allocator.reftable.is_dirty() || allocator.lost_references() > 0
            })
    }

    fn write_out(&self) -> Result<()> {
        let Captured { new_blocks, early, late, pages, lost } = self.metadata().capture()?;
        let data_unsynced = self.unsynced.swap(false, Ordering::AcqRel);
        let store = &*self.store;
        let write = |writes: &[CheckedWrite]| writes.iter().try_for_each(|one| one.perform(store));
        let sync = || store.sync().doing("make it durable");
        let mut early_unsynced = data_unsynced;
        if data_unsynced && self.data_place == DataPlace::External {
            self.data.sync().doing("make its data durable")?;
            early_unsynced = false;
        }

        if !new_blocks.is_empty() {
            write(&new_blocks)?;
            sync()?;
        }
        if !early.is_empty() || early_unsynced {
            write(&early)?;
            sync()?;
        }
        if !late.is_empty() {
            write(&late)?;
            sync()?;
        }
        self.metadata().pages.written(pages);
        self.give_back(lost)
    }

    /// Step 4: there are no pointers on disk any more to what was lost.
    fn give_back(&self, lost: Lost) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        if !lost.tables.is_empty() {
            let mut metadata = self.metadata();
            let (allocator, _) = metadata.writer()?;
            lost.tables.iter().for_each(|&table| allocator.layout.release(table, cluster_size));
        }
        let mut references = lost.references;
        references.sort_unstable();
        let mut rest = &references[..];
        while !rest.is_empty() {
            // All mentions of a cluster belong together.
            let end = rest.len().min(GIVEN_BACK_AT_ONCE);
            let end = end + rest[end..].iter().take_while(|&&one| one == rest[end - 1]).count();
            let (now, later) = rest.split_at(end);
            self.give_back_some(now)?;
            rest = later;
        }
        Ok(())
    }

    /// Gives back one reference per mention in `clusters` (sorted).
    fn give_back_some(&self, clusters: &[HostOffset]) -> Result<()> {
        let store = &*self.store;
        let last = {
            let mut metadata = self.metadata();
            let (allocator, pages) = metadata.writer()?;
            allocator.last_references(pages, store, clusters)?
        };
        // Punched before they count as free: a late punch would hit the next owner's data.
        let cluster_size = self.geometry.cluster_size();
        for run in last.chunk_by(|a, b| *b - *a == cluster_size) {
            let len = run.len() as u64 * cluster_size;
            // A table that something claimed as data must not be punched away.
            self.metadata().writer()?.0.layout.check_data(run[0], len)?;
            if let Err(error) = store.punch_hole(run[0], len) {
                log::warn!("could not give space back to the host: {error}");
            }
        }
        let mut metadata = self.metadata();
        let (allocator, pages) = metadata.writer()?;
        for &cluster in &last {
            pages.forget(cluster, cluster_size);
        }
        allocator.unreference(pages, store, clusters)
    }

    /// Makes the refcount table longer, so that clusters behind what it describes can be allocated, unless somebody else
    /// has done so since it was found `full`.
    ///
    /// The new table and the blocks that describe it lie behind everything else, durable before the header names them.
    pub(super) fn grow_refcount_table(&self, full: TableFull) -> Result<()> {
        // A flush under way would write to the old table after it was left.
        let _one_at_a_time = self.flushing.lock().unwrap_or_else(|lock| lock.into_inner());
        self.check_open_for_writing()?;
        let store = &*self.store;
        let mut metadata = self.metadata();
        let (allocator, pages) = metadata.writer()?;
        if allocator.reftable.entries().len() > full.entries {
            return Ok(());
        }
        let place = allocator.plan_longer_table()?;
        allocator.reserve_longer_table(store, &place)?;
        let table = self.closing_on_error(allocator.write_longer_table(pages, store, &place))?;
        let clusters = self.geometry.clusters(table.byte_len()) as u32;
        let mut field = table.offset().get().to_be_bytes().to_vec();
        field.extend(clusters.to_be_bytes());
        self.write_header_field(&mut metadata, offsets::REFTABLE, field)?;
        metadata.header.reftable_offset = table.offset();
        metadata.header.reftable_clusters = clusters;
        let (allocator, _) = metadata.writer()?;
        allocator.use_table(table);
        Ok(())
    }

    /// Changes a field of the header and makes it durable.
    ///
    /// # Errors
    /// Whether the header has the new value is not known then; the image is closed for writing.
    pub(super) fn write_header_field(
        &self,
        metadata: &mut Metadata,
        field: HostOffset,
        bytes: Vec<u8>,
    ) -> Result<()> {
        let (allocator, _) = metadata.writer()?;
        let write = allocator.layout.check(Owner::Header, field, bytes);
        self.perform_header_write(write)
    }

    /// As [`Self::write_header_field`], without the metadata lock over the sync: for fields that only the holder of the
    /// shape changes (`Image::keep_shape`). What the header has in memory is the caller's business.
    pub(super) fn switch_header_field(&self, field: HostOffset, bytes: Vec<u8>) -> Result<()> {
        let write = self.metadata().writer()?.0.layout.check(Owner::Header, field, bytes);
        self.perform_header_write(write)
    }

    fn perform_header_write(&self, write: Result<CheckedWrite>) -> Result<()> {
        let written = write.and_then(|write| write.perform(&*self.store));
        let synced = written.and_then(|()| self.store.sync().doing("make its header durable"));
        self.closing_on_error(synced)
    }

    /// Marks the image corrupt if `error` says that it is, and closes it for writing. Called without locks.
    ///
    /// An error that names a file came from below: that one is corrupt, and this image as good as before.
    pub(super) fn note(&self, error: Error) -> Error {
        let is_ours = error.path().is_none();
        if is_ours && matches!(error.problem(), Problem::Corrupt { .. }) && self.is_writable() {
            log::error!("{error}");
            if !self.closed.swap(true, Ordering::AcqRel) {
                self.mark_corrupt();
            }
        }
        error
    }

    /// Closes the image for writing if `result` is an error: a write or sync of metadata has failed.
    pub(super) fn closing_on_error<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| self.close_for_writing(error))
    }

    fn close_for_writing(&self, error: Error) -> Error {
        if !self.closed.swap(true, Ordering::AcqRel) {
            log::error!("no more writes are taken: {error}");
        }
        error
    }

    /// Sets the header's corrupt bit, as QEMU does; version 2 has none.
    fn mark_corrupt(&self) {
        use crate::qcow2::{IncompatibleFeatures, Version};
        let mut metadata = self.metadata();
        if metadata.header.version == Version::V2 {
            return;
        }
        metadata.header.incompatible |= IncompatibleFeatures::CORRUPT;
        let bits = metadata.header.incompatible.bits().to_be_bytes().to_vec();
        if let Err(error) = self.write_header_field(&mut metadata, offsets::INCOMPATIBLE, bits) {
            log::error!("could not mark the image corrupt: {error}");
        }
    }
}

/// All that one flush writes, taken at one instant.
struct Captured {
    new_blocks: Vec<CheckedWrite>,
    early: Vec<CheckedWrite>,
    late: Vec<CheckedWrite>,
    pages: Vec<(HostOffset, Dirty)>,
    lost: Lost,
}

impl Metadata {
    fn capture(&mut self) -> Result<Captured> {
        let l1 = self.l1.capture();
        let (allocator, pages) = self.writer()?;
        let lost = allocator.take_lost();
        let reftable = allocator.reftable.capture();
        let pages = pages.capture();

        let (mut new_blocks, mut early, mut late) = (Vec::new(), Vec::new(), Vec::new());
        let layout = &allocator.layout;
        for (at, bytes) in reftable {
            early.push(layout.check(Owner::RefcountTable, at, bytes)?);
        }
        for (at, dirty) in &pages {
            let (owner, step) = match dirty.kind {
                Kind::NewRefcountBlock => (Owner::RefcountBlock, &mut new_blocks),
                Kind::RefcountBlock => (Owner::RefcountBlock, &mut early),
                Kind::NewL2 => (Owner::ActiveL2, &mut early),
                Kind::L2 => (Owner::ActiveL2, &mut late),
            };
            step.push(layout.check(owner, *at, dirty.bytes.to_vec())?);
        }
        for (at, bytes) in l1 {
            late.push(layout.check(Owner::ActiveL1, at, bytes)?);
        }
        Ok(Captured { new_blocks, early, late, pages, lost })
    }
}
