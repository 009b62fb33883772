//! Making the disk larger.

use super::entry::{NewEntry, Subclusters};
use super::layout::Owner;
use super::sync::atomic::Ordering;
use super::table::Table;
use super::{Below, Image, ZeroMode};
use crate::error::{Doing, Error, Result};
use crate::qcow2::{MAX_L1_BYTES, offsets};
use crate::units::{GuestOffset, GuestRange, HostOffset};

impl Image {
    /// Makes the disk `size` bytes long, rounded up to 512; new bytes read as zero, whatever lies below.
    ///
    /// # Errors
    /// A size below the present one, or one that needs an L1 table above 32 MiB; version 2 with snapshots, or a snapshot
    /// that does not know its own size.
    pub fn grow(&self, below: &dyn Below, size: u64) -> Result<()> {
        let size = size.checked_next_multiple_of(512).unwrap_or(u64::MAX);
        self.check_can_grow(size)?;
        if size.div_ceil(self.geometry.l2_span()) * 8 > MAX_L1_BYTES {
            return Err(Error::usage(format!(
                "{size} bytes are more than clusters of {} bytes can map",
                self.geometry.cluster_size()
            )));
        }
        let _shape = self.keep_shape();
        self.begin_change()?;
        self.grow_to(below, size).map_err(|error| self.note(error))
    }

    fn check_can_grow(&self, size: u64) -> Result<()> {
        let old_size = self.size();
        if size < old_size {
            return Err(Error::usage(format!(
                "{size} bytes are less than the {old_size} of today"
            )));
        }
        self.check_snapshots_know_their_size("growing")
    }

    fn grow_to(&self, below: &dyn Below, size: u64) -> Result<()> {
        // Nobody reads or writes meanwhile: what the new part holds is settled when the first can.
        let _disk = self.claim_disk();
        self.check_open_for_writing()?;
        // Again: others may have grown the disk or made a snapshot while this waited.
        self.check_can_grow(size)?;
        let old_size = self.size();
        self.grow_l1(self.geometry.l1_entries(size) as usize)?;
        // Zeroed before the header says that it is there: a crash in between changes nothing that can be seen.
        self.size.store(size, Ordering::Release);
        let new = GuestRange::new(GuestOffset::new(old_size), size - old_size);
        let prepared = self.hide_old_bytes(below, new);
        let prepared = prepared.and_then(|()| self.lengthen_raw_data(new));
        let prepared = prepared.and_then(|()| self.flush());
        if let Err(error) = prepared.and_then(|()| self.write_size(size)) {
            self.size.store(old_size, Ordering::Release);
            return Err(error);
        }
        self.mapping_changed();
        Ok(())
    }

    /// Makes the new part of the disk read as zero: the rest of the old last cluster, what clusters behind it held,
    /// and all that would show through.
    fn hide_old_bytes(&self, below: &dyn Below, new: GuestRange) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let old_cluster_end = new.start.get().next_multiple_of(cluster_size).min(new.end().get());
        let rest = GuestRange::new(new.start, old_cluster_end - new.start.get());
        if !rest.is_empty() {
            self.zero_claimed(below, rest, ZeroMode::Unmap)?;
        }
        let behind = GuestRange::new(rest.end(), new.len - rest.len);
        if behind.is_empty() || self.is_zero(below, behind)? {
            return Ok(());
        }
        for part in behind.split(self.geometry.l2_span()) {
            self.zero_claimed(below, part, ZeroMode::Unmap)?;
            self.bound_dirty_metadata()?;
        }
        Ok(())
    }

    /// Makes a data file that has to be readable by itself as long as the disk, and lets all new clusters point into it:
    /// then also what is written there by others is on the disk.
    fn lengthen_raw_data(&self, new: GuestRange) -> Result<()> {
        // Encrypted, a new part of the file would be noise instead of zeroes.
        if !self.metadata().data_file_is_raw || !self.encryption.keeps_zeroes() {
            return Ok(());
        }
        let len = self.data.len().doing("find out the length of its data file")?;
        if len > new.start.get() {
            self.punch_data(HostOffset::new(new.start.get()), new.len)?;
        }
        if len < new.end().get() {
            self.data.set_len(new.end().get()).doing("make its data file longer")?;
        }
        self.unsynced.store(true, Ordering::Release);
        for table in new.split(self.geometry.l2_span()) {
            for part in table.split(self.geometry.cluster_size()) {
                let cluster = part.start.align_down(self.geometry.cluster_size());
                let (host, written) = (HostOffset::new(cluster.get()), Subclusters::ALL);
                self.change_entry(cluster, NewEntry::Data { host, written })?;
            }
            self.bound_dirty_metadata()?;
        }
        Ok(())
    }

    /// Lets the header say that the disk has `size` bytes.
    pub(super) fn write_size(&self, size: u64) -> Result<()> {
        let mut metadata = self.metadata();
        self.write_header_field(&mut metadata, offsets::SIZE, size.to_be_bytes().to_vec())?;
        metadata.header.size = size;
        Ok(())
    }

    /// Moves the L1 table to a place with room for `len` entries, if it has fewer. The caller holds the whole disk.
    fn grow_l1(&self, len: usize) -> Result<()> {
        if self.metadata().l1.entries().len() >= len {
            return Ok(());
        }
        // What the new table names must be durable before it is.
        self.flush()?;
        let place = self.allocate_contiguous(self.geometry.clusters(len as u64 * 8))?;
        self.flush()?;
        let _one_at_a_time = self.flushing.lock().unwrap_or_else(|lock| lock.into_inner());
        let mut metadata = self.metadata();
        let mut entries = metadata.l1.entries().to_vec();
        entries.resize(len, 0);
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let (allocator, _) = metadata.writer()?;
        allocator.layout.claim(place.start, bytes.len() as u64, Owner::ActiveL1)?;
        let write = allocator.layout.check(Owner::ActiveL1, place.start, bytes)?;
        let written = write.perform(&*self.store);
        let synced = written.and_then(|()| self.store.sync().doing("make its L1 table durable"));
        self.closing_on_error(synced)?;
        let mut field = (len as u32).to_be_bytes().to_vec();
        field.extend(place.start.get().to_be_bytes());
        self.write_header_field(&mut metadata, offsets::L1, field)?;

        metadata.header.l1_entries = len as u32;
        metadata.header.l1_offset = place.start;
        let old = std::mem::replace(&mut metadata.l1, Table::new(place.start, entries));
        let (allocator, _) = metadata.writer()?;
        allocator.layout.release(old.offset(), old.byte_len());
        allocator.unreference_all_later(old.offset(), old.byte_len());
        Ok(())
    }
}
