//! Making a snapshot: a point in time that costs writers a moment, and then work beside them.

use std::sync::{Arc, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::SnapshotTree;
use super::freeze::Freeze;
use super::table::SnapshotTable;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::allocate::Clusters;
use crate::image::layout::Owner;
use crate::qcow2::{L1Entry, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS, Snapshot, refcount};
use crate::units::HostOffset;

impl Image {
    /// Makes an internal snapshot of the disk as it is now, named `name`.
    ///
    /// It holds all that was written before, and nothing that is written after this has returned. Writers wait for as
    /// long as the requests take that are under way, not for the size of the image. It is durable when this returns.
    ///
    /// # Errors
    /// An empty or overlong name or one that is taken, too many snapshots, refcounts too narrow to share clusters.
    pub fn create_snapshot(&self, name: &str) -> Result<Arc<SnapshotTree>> {
        self.snapshot_disk(name).map_err(|error| self.note(error))
    }

    fn snapshot_disk(&self, name: &str) -> Result<Arc<SnapshotTree>> {
        self.check_has_snapshots()?;
        let _shape = self.keep_shape();
        self.begin_change()?;
        self.check_new_name(name)?;
        self.check_can_share()?;
        let old = SnapshotTable::read(&*self.store, &self.header())?;
        let places = self.allocate_tables(name, &old)?;
        // What waits to be written would only make the instant longer: who waits for the disk waits for this, too.
        self.flush()?;

        let (l1, entry) = {
            let _disk = self.claim_disk();
            let entry = self.new_entry(name, places.l1_offset());
            (self.metadata().freeze(), entry)
        };
        if let Err(error) = self.count_tree(&l1) {
            // Should that fail, too, clusters leak, which whoever opens the image anew can find.
            self.closing_on_error(self.undo_counting(places))?;
            return Err(error);
        }
        let l1_bytes = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        if let Some(l1) = places.l1 {
            self.write_table(l1, Owner::SnapshotL1, l1_bytes)?;
        }
        self.write_table(places.table, Owner::SnapshotTable, old.with(&entry))?;
        // Data, counts and tables are durable before the header names the snapshot.
        self.flush()?;
        self.publish_table(Some(places.table), old.trees.len() + 1, &old)?;
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

    /// Refuses what can't be, before anything is changed for it.
    fn check_can_share(&self) -> Result<()> {
        let mut metadata = self.metadata();
        let is_empty = metadata.l1.entries().iter().all(|&entry| entry == 0);
        let (allocator, _) = metadata.writer()?;
        match refcount::max(self.geometry.refcount_order()) {
            1 if !is_empty => Err(allocator.too_many_references()),
            _ => Ok(()),
        }
    }

    /// Finds room for what the snapshot needs, while a full disk is still an ordinary error.
    fn allocate_tables(&self, name: &str, old: &SnapshotTable) -> Result<Places> {
        let l1_len = self.metadata().l1.byte_len();
        let table_len = old.with(&self.new_entry(name, HostOffset::ZERO)).len() as u64;
        if table_len > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::usage("a snapshot table has at most 64 MiB"));
        }
        let l1 = self.allocate_bytes(l1_len)?;
        match self.allocate_contiguous(self.geometry.clusters(table_len)) {
            Ok(table) => Ok(Places { l1, table }),
            Err(error) => {
                l1.map_or(Ok(()), |l1| self.take_back(l1))?;
                Err(error)
            }
        }
    }

    /// Counts the references of the frozen tree, a table at a time, and thaws it.
    fn count_tree(&self, l1: &[u64]) -> Result<()> {
        for (index, &raw) in l1.iter().enumerate() {
            if let Ok(L1Entry::Table { host, .. }) = L1Entry::decode(raw, self.geometry) {
                self.load_table(host)?;
            }
            {
                let mut metadata = self.metadata();
                metadata.count_frozen(&*self.store, index);
                if let Some(error) = metadata.take_failure() {
                    return Err(error);
                }
            }
            self.bound_metadata_beside_writers()?;
        }
        self.thaw();
        Ok(())
    }

    /// Thaws the tree and gives back what was counted for a snapshot that there will not be.
    fn undo_counting(&self, places: Places) -> Result<()> {
        if let Some(freeze) = self.thaw() {
            for (index, raw) in freeze.counted() {
                self.release_table(index, raw)?;
            }
        }
        places.l1.map_or(Ok(()), |l1| self.take_back(l1))?;
        self.take_back(places.table)?;
        // The next one must not find references that are counted and gone.
        self.flush_all()
    }

    /// Ends the freeze.
    fn thaw(&self) -> Option<Freeze> {
        self.metadata().freeze.take()
    }

    fn new_entry(&self, name: &str, l1_offset: HostOffset) -> Snapshot {
        let numbers = self.snapshots();
        let last = numbers.iter().filter_map(|tree| tree.entry.id.parse::<u64>().ok()).max();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Snapshot {
            l1_offset,
            l1_entries: self.metadata().l1.entries().len() as u32,
            id: last.unwrap_or(0).saturating_add(1).to_string(),
            name: name.to_owned(),
            date_seconds: now.as_secs() as u32,
            date_nanoseconds: now.subsec_nanos(),
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            disk_size: Some(self.size()),
            icount: None,
        }
    }
}

/// Where the tables of a new snapshot go.
#[derive(Clone, Copy)]
struct Places {
    /// None for the empty L1 table of a disk that has had no bytes yet.
    l1: Option<Clusters>,
    table: Clusters,
}

impl Places {
    fn l1_offset(&self) -> HostOffset {
        self.l1.map_or(HostOffset::ZERO, |l1| l1.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{CreateOptions, NewImage, Nothing, Writability};
    use crate::qcow2::{Geometry, Version};
    use crate::store::memory::MemoryStore;
    use crate::units::GuestOffset;

    #[test]
    fn who_writes_after_a_snapshot_has_failed_takes_nothing_from_the_snapshots_before() {
        let store = Arc::new(MemoryStore::default());
        // Two bits count up to three: the disk and two snapshots.
        let (version, geometry) = (Version::V3, Geometry::new(9, 1));
        let options = CreateOptions { size: 64 << 10, version, geometry, backing: None };
        NewImage::plan(&options).unwrap().write(&*store).unwrap();
        let image = Image::open(store, Writability::Writable).unwrap();
        let write = |at, data: &[u8]| image.write(&Nothing, GuestOffset::new(at), data).unwrap();
        write(0, &[1; 64 << 10]);
        image.create_snapshot("a").unwrap();
        image.create_snapshot("b").unwrap();

        let table = SnapshotTable::read(&*image.store, &image.header()).unwrap();
        let places = image.allocate_tables("c", &table).unwrap();
        image.metadata().freeze();
        // The first table can't be counted. The second is copied after that, and the copy has room for one more owner.
        write(0, &[2; 512]);
        write(32 << 10, &[2; 32 << 10]);
        assert!(image.metadata().take_failure().is_some());
        write(32 << 10, &[3; 512]);
        image.undo_counting(places).unwrap();

        image.delete_snapshot("1").unwrap();
        image.apply_snapshot("2").unwrap();
        let mut disk = vec![0; 64 << 10];
        image.read_active(&Nothing, GuestOffset::ZERO, &mut disk).unwrap();
        assert!(disk.iter().all(|&byte| byte == 1), "the snapshot has lost data");
    }
}
