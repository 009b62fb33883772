//! The snapshot table: reading it, writing a new one, and the one header write that names it.

use std::ops::Range;
use std::sync::Arc;

use super::SnapshotTree;
use crate::error::{Doing, Error, Result};
use crate::image::Image;
use crate::image::allocate::Clusters;
use crate::image::layout::Owner;
use crate::image::sync::atomic::Ordering;
use crate::qcow2::{
    Header, MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, SNAPSHOT_FIXED_LEN, Snapshot, SnapshotLengths,
    offsets,
};
use crate::store::Store;
use crate::units::HostOffset;

/// The snapshot table of an image: the bytes as they are, so that rewriting it keeps what is not understood.
pub(in crate::image) struct SnapshotTable {
    pub trees: Vec<Arc<SnapshotTree>>,
    pub bytes: Vec<u8>,
    /// Where in `bytes` the entry of each tree is, padding included.
    pub places: Vec<Range<usize>>,
}

impl SnapshotTable {
    /// Reads the table that `header` names.
    pub fn read(store: &dyn Store, header: &Header) -> Result<Self> {
        let mut table = Self { trees: Vec::new(), bytes: Vec::new(), places: Vec::new() };
        for _ in 0..header.snapshot_count {
            let start = table.bytes.len();
            let (entry, fixed, variable) = Self::read_one(store, header, start as u64)?;
            table.bytes.extend(fixed);
            table.bytes.extend(variable);
            table.bytes.resize(table.bytes.len().next_multiple_of(8), 0);
            table.places.push(start..table.bytes.len());
            table.trees.push(Arc::new(SnapshotTree::new(entry, header)));
        }
        Ok(table)
    }

    /// The table with `entry` behind all others.
    pub fn with(&self, entry: &Snapshot) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        entry.write(&mut bytes);
        bytes
    }

    /// The table without the entry at `index`; all others as the bytes they are.
    pub fn without(&self, index: usize) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.drain(self.places[index].clone());
        bytes
    }

    /// Reads the entry that begins `at` bytes behind the beginning of the table, and its lengths.
    pub fn read_entry(
        store: &dyn Store,
        header: &Header,
        at: u64,
    ) -> Result<(Snapshot, SnapshotLengths)> {
        let (entry, fixed, _) = Self::read_one(store, header, at)?;
        Ok((entry, SnapshotLengths::parse(&fixed)))
    }

    /// Reads an entry, its fixed part and what follows that.
    fn read_one(
        store: &dyn Store,
        header: &Header,
        at: u64,
    ) -> Result<(Snapshot, [u8; SNAPSHOT_FIXED_LEN], Vec<u8>)> {
        let file_len = store.len().doing("find out its length")?;
        let start = header.snapshots_offset.checked_add(at);
        let start = start.filter(|start| start.get() < file_len).ok_or_else(|| {
            Error::invalid("snapshot table", "it lies behind the end of the file")
        })?;
        let mut fixed = [0; SNAPSHOT_FIXED_LEN];
        store.read_at(&mut fixed, start).doing("read its snapshot table")?;
        let lengths = SnapshotLengths::parse(&fixed);
        if at + lengths.entry() as u64 > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::invalid("snapshot table", "it is longer than 64 MiB"));
        }
        let mut variable = vec![0; lengths.variable()];
        let behind = start + SNAPSHOT_FIXED_LEN as u64;
        store.read_at(&mut variable, behind).doing("read its snapshot table")?;
        let entry = Snapshot::parse(&fixed, &variable)?;
        let needed = header.geometry.l1_entries(entry.disk_size.unwrap_or(0));
        if needed > MAX_L1_BYTES / 8 {
            return Err(Error::invalid("snapshot's disk_size", "no L1 table can map so much"));
        }
        Ok((entry, fixed, variable))
    }
}

impl Image {
    /// Finds a place for a table of `len` bytes; none for an empty one.
    pub(super) fn allocate_bytes(&self, len: u64) -> Result<Option<Clusters>> {
        match self.geometry.clusters(len) {
            0 => Ok(None),
            count => self.allocate_contiguous(count).map(Some),
        }
    }

    /// Writes a new table to clusters that nothing names yet.
    pub(super) fn write_table(&self, place: Clusters, owner: Owner, bytes: Vec<u8>) -> Result<()> {
        let write = {
            let mut metadata = self.metadata();
            let (allocator, pages) = metadata.writer()?;
            allocator.layout.claim(place.start, bytes.len() as u64, owner)?;
            // Who was reading here may have left what the clusters held before.
            pages.forget(place.start, place.count * self.geometry.cluster_size());
            allocator.layout.check(owner, place.start, bytes)?
        };
        self.closing_on_error(write.perform(&*self.store))?;
        self.unsynced.store(true, Ordering::Release);
        Ok(())
    }

    /// Lets the header name a new snapshot table, which is durable, and gives the old one back.
    pub(super) fn publish_table(
        &self,
        place: Option<Clusters>,
        count: usize,
        old: &SnapshotTable,
    ) -> Result<()> {
        let offset = place.map_or(HostOffset::ZERO, |place| place.start);
        let mut field = (count as u32).to_be_bytes().to_vec();
        field.extend(offset.get().to_be_bytes());
        self.switch_header_field(offsets::SNAPSHOTS, field)?;
        let mut metadata = self.metadata();
        let old_offset = metadata.header.snapshots_offset;
        metadata.header.snapshot_count = count as u32;
        metadata.header.snapshots_offset = offset;
        let (allocator, _) = metadata.writer()?;
        let old_len = old.bytes.len() as u64;
        allocator.layout.release(old_offset, old_len);
        allocator.unreference_all_later(old_offset, old_len);
        Ok(())
    }
}
