//! Internal snapshots: the table, their trees, and making a new one.

use std::sync::{Arc, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::Image;
use super::allocate::Clusters;
use super::entry::ClusterEntry;
use super::layout::Owner;
use super::metadata::Metadata;
use super::pages::Kind;
use super::sync::atomic::Ordering;
use crate::error::{Doing, Error, Result};
use crate::qcow2::{
    DataPlace, Geometry, Header, L1Entry, MAX_FILE_LEN, MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS, SNAPSHOT_FIXED_LEN, Snapshot, SnapshotLengths, offsets,
};
use crate::store::Store;
use crate::units::HostOffset;

/// An internal snapshot of an open image.
///
/// While it exists its content can't change: whoever writes to the image leaves its clusters alone.
pub struct SnapshotTree {
    entry: Snapshot,
    size: u64,
}

impl SnapshotTree {
    fn new(entry: Snapshot, header: &Header) -> Self {
        let size = entry.disk_size.unwrap_or(header.size) & !511;
        Self { entry, size }
    }

    /// What the snapshot table says of it.
    pub fn entry(&self) -> &Snapshot {
        &self.entry
    }

    /// Size of the disk in bytes at the time of the snapshot.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the L1 table is.
    pub(super) fn l1(&self) -> SnapshotL1 {
        SnapshotL1 { offset: self.entry.l1_offset, entries: self.entry.l1_entries as usize }
    }

    /// Checks that the L1 table can be used.
    ///
    /// # Errors
    /// As [`SnapshotL1::check`]; a table behind the end of a file of `file_len` bytes.
    pub(super) fn check_l1(&self, geometry: Geometry, file_len: u64) -> Result<()> {
        let l1 = self.l1();
        l1.check(geometry)?;
        if l1.offset.get() + l1.byte_len() > file_len {
            return Err(Error::invalid(
                "snapshot's l1_table_offset",
                "the L1 table lies behind the end of the file",
            ));
        }
        Ok(())
    }
}

/// The L1 table of a snapshot. It is read page by page: an image may have many, each of megabytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct SnapshotL1 {
    pub offset: HostOffset,
    pub entries: usize,
}

impl SnapshotL1 {
    fn byte_len(self) -> u64 {
        self.entries as u64 * 8
    }

    /// Checks that there can be such a table. Not at open: a snapshot that nobody uses may be broken.
    ///
    /// # Errors
    /// A table that is not cluster-aligned, above 32 MiB, or where no file reaches.
    pub fn check(self, geometry: Geometry) -> Result<()> {
        if self.byte_len() > MAX_L1_BYTES {
            return Err(Error::invalid("snapshot's l1_size", "the L1 table is above 32 MiB"));
        }
        if !self.offset.is_aligned(geometry.cluster_size()) {
            return Err(Error::invalid("snapshot's l1_table_offset", "it is not cluster-aligned"));
        }
        if self.offset.get() > MAX_FILE_LEN - MAX_L1_BYTES {
            return Err(Error::invalid("snapshot's l1_table_offset", "no file reaches so far"));
        }
        Ok(())
    }
}

/// The snapshot table of an image: the bytes as they are, so that rewriting it keeps what is not understood.
pub(super) struct SnapshotTable {
    pub trees: Vec<Arc<SnapshotTree>>,
    pub bytes: Vec<u8>,
}

impl SnapshotTable {
    /// Reads the table that `header` names.
    pub fn read(store: &dyn Store, header: &Header) -> Result<Self> {
        let mut table = Self { trees: Vec::new(), bytes: Vec::new() };
        for _ in 0..header.snapshot_count {
            let (entry, fixed, variable) = Self::read_one(store, header, table.bytes.len() as u64)?;
            table.bytes.extend(fixed);
            table.bytes.extend(variable);
            table.bytes.resize(table.bytes.len().next_multiple_of(8), 0);
            table.trees.push(Arc::new(SnapshotTree::new(entry, header)));
        }
        Ok(table)
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
    /// Makes an internal snapshot of the disk as it is now, named `name`.
    ///
    /// Waits for all reads and writes of the active disk, and holds new ones off until it is durable.
    ///
    /// # Errors
    /// An empty or overlong name or one that is taken, too many snapshots, refcounts too narrow to share clusters.
    pub fn create_snapshot(&self, name: &str) -> Result<Arc<SnapshotTree>> {
        self.snapshot_disk(name).map_err(|error| self.note(error))
    }

    fn snapshot_disk(&self, name: &str) -> Result<Arc<SnapshotTree>> {
        if self.data_place == DataPlace::External {
            return Err(Error::unsupported("snapshots of an image with an external data file"));
        }
        let _disk = self.claim_disk();
        self.begin_change()?;
        self.check_new_name(name)?;
        // Nothing may wait to be freed: the snapshot is going to share what the tables name, not what they named.
        self.flush_all()?;

        let old = SnapshotTable::read(&*self.store, &self.header())?;
        let l1_bytes = {
            let metadata = self.metadata();
            metadata.l1.entries().iter().flat_map(|entry| entry.to_be_bytes()).collect::<Vec<u8>>()
        };
        let l1_place = self.allocate_contiguous(self.geometry.clusters(l1_bytes.len() as u64))?;
        let entry = self.new_entry(name, l1_place.start, (l1_bytes.len() / 8) as u32);
        let mut table_bytes = old.bytes.clone();
        entry.write(&mut table_bytes);
        let table_len = table_bytes.len() as u64;
        let table_place = match self.allocate_contiguous(self.geometry.clusters(table_len)) {
            Ok(place) => place,
            Err(error) => {
                self.take_back(l1_place)?;
                return Err(error);
            }
        };
        if let Err(error) = self.share_active_tree() {
            self.take_back(l1_place)?;
            self.take_back(table_place)?;
            return Err(error);
        }
        self.write_table(l1_place, Owner::SnapshotL1, l1_bytes)?;
        self.write_table(table_place, Owner::SnapshotTable, table_bytes)?;
        // Refcounts first, then the tables that are no longer ours alone: the order of every flush.
        self.flush()?;
        self.publish_table(table_place, table_len, &old)?;
        let tree = Arc::new(SnapshotTree::new(entry, &self.header()));
        let mut snapshots = self.snapshots.write().unwrap_or_else(PoisonError::into_inner);
        snapshots.push(tree.clone());
        Ok(tree)
    }

    fn check_new_name(&self, name: &str) -> Result<()> {
        let snapshots = self.snapshots();
        if name.is_empty() || name.len() > 255 {
            return Err(Error::usage("a snapshot's name has between 1 and 255 bytes"));
        }
        let taken = |tree: &Arc<SnapshotTree>| tree.entry.name == name || tree.entry.id == name;
        if snapshots.iter().any(taken) {
            return Err(Error::usage(format!("there is a snapshot \"{name}\" already")));
        }
        if snapshots.len() >= MAX_SNAPSHOTS as usize {
            return Err(Error::usage("an image has at most 65536 snapshots"));
        }
        Ok(())
    }

    fn new_entry(&self, name: &str, l1_offset: HostOffset, l1_entries: u32) -> Snapshot {
        let numbers = self.snapshots();
        let last = numbers.iter().filter_map(|tree| tree.entry.id.parse::<u64>().ok()).max();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Snapshot {
            l1_offset,
            l1_entries,
            id: (last.unwrap_or(0) + 1).to_string(),
            name: name.to_owned(),
            date_seconds: now.as_secs() as u32,
            date_nanoseconds: now.subsec_nanos(),
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            disk_size: Some(self.size()),
            icount: None,
        }
    }

    /// Writes a new table to clusters that nothing names yet.
    fn write_table(&self, place: Clusters, owner: Owner, bytes: Vec<u8>) -> Result<()> {
        let mut metadata = self.metadata();
        let (allocator, _) = metadata.writer()?;
        allocator.layout.claim(place.start, bytes.len() as u64, owner)?;
        let write = allocator.layout.check(owner, place.start, bytes)?;
        self.closing_on_error(write.perform(&*self.store))?;
        self.unsynced.store(true, Ordering::Release);
        Ok(())
    }

    /// Counts one more reference for all that the active tables name, and marks it as not ours alone.
    fn share_active_tree(&self) -> Result<()> {
        let store = &*self.store;
        let mut metadata = self.metadata();
        let mut references = metadata.active_references(store)?;
        references.sort_unstable();
        let (allocator, pages) = metadata.writer()?;
        allocator.check_room_for_references(pages, store, &references)?;
        // Counts of which some are raised, or all beside flags that are not cleared, must not reach the disk.
        let added = allocator.add_references(pages, store, &references);
        let cleared = added.and_then(|()| metadata.clear_copied(store));
        self.closing_on_error(cleared)
    }

    /// Lets the header name the new snapshot table, and gives the old one back.
    fn publish_table(&self, place: Clusters, len: u64, old: &SnapshotTable) -> Result<()> {
        let mut metadata = self.metadata();
        let count = metadata.header.snapshot_count + 1;
        let mut field = count.to_be_bytes().to_vec();
        field.extend(place.start.get().to_be_bytes());
        debug_assert!(len > 0);
        self.write_header_field(&mut metadata, offsets::SNAPSHOTS, field)?;
        let old_offset = metadata.header.snapshots_offset;
        metadata.header.snapshot_count = count;
        metadata.header.snapshots_offset = place.start;
        let (allocator, _) = metadata.writer()?;
        let old_len = old.bytes.len() as u64;
        allocator.layout.release(old_offset, old_len);
        for at in (0..old_len).step_by(self.geometry.cluster_size() as usize) {
            allocator.unreference_later(old_offset + at);
        }
        Ok(())
    }
}

impl Metadata {
    /// Every reference that the active L1 and L2 tables hold, one mention each.
    fn active_references(&mut self, store: &dyn Store) -> Result<Vec<HostOffset>> {
        let mut references = Vec::new();
        for table in self.active_l2_tables()? {
            references.push(table);
            for at in (0..self.geometry.cluster_size()).step_by(self.pages.page_size() as usize) {
                let bytes = self.pages.load(store, table + at)?;
                for raw in bytes.chunks_exact(self.geometry.l2_entry_len() as usize) {
                    let entry = ClusterEntry::decode(raw, self.geometry, self.rules)?;
                    references.extend(entry.host_clusters(self.geometry));
                }
            }
        }
        Ok(references)
    }

    /// Clears every COPIED flag of the active tables.
    fn clear_copied(&mut self, store: &dyn Store) -> Result<()> {
        for table in self.active_l2_tables()? {
            for at in (0..self.geometry.cluster_size()).step_by(self.pages.page_size() as usize) {
                let old = self.pages.load(store, table + at)?;
                let mut new = old.to_vec();
                for raw in new.chunks_exact_mut(self.geometry.l2_entry_len() as usize) {
                    let entry = ClusterEntry::decode(raw, self.geometry, self.rules)?;
                    entry.shared().encode(raw, self.geometry);
                }
                if new[..] != old[..] {
                    self.pages.replace(table + at, new.into(), Kind::L2);
                }
            }
        }
        for index in 0..self.l1.entries().len() {
            if let L1Entry::Table { host, copied: true } =
                L1Entry::decode(self.l1.get(index), self.geometry)?
            {
                self.l1.set(index, L1Entry::Table { host, copied: false }.encode());
            }
        }
        Ok(())
    }

    fn active_l2_tables(&self) -> Result<Vec<HostOffset>> {
        let mut tables = Vec::new();
        for &entry in self.l1.entries() {
            if let L1Entry::Table { host, .. } = L1Entry::decode(entry, self.geometry)? {
                tables.push(host);
            }
        }
        Ok(tables)
    }
}
