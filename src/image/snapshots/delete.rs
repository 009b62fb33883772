//! Deleting a snapshot: first it is not in the table any more, then its space is given back.

use std::sync::PoisonError;

use super::table::SnapshotTable;
use crate::error::Result;
use crate::image::Image;
use crate::image::layout::Owner;

impl Image {
    /// Deletes the snapshot with this id, and gives back what only it had, its machine's state included.
    ///
    /// Whoever reads it is waited for, and then finds it gone. Writers of the disk go on.
    ///
    /// # Errors
    /// [`crate::error::Problem::NoSuchSnapshot`]; a snapshot whose tables can't be followed or are not counted, by its
    /// name: then nothing has changed. A failure after the snapshot is gone leaks clusters, which `check -r leaks` finds.
    pub fn delete_snapshot(&self, id: &str) -> Result<()> {
        self.remove_snapshot(id).map_err(|error| self.note(error))
    }

    fn remove_snapshot(&self, id: &str) -> Result<()> {
        self.check_has_snapshots()?;
        let _shape = self.keep_shape();
        self.begin_change()?;
        let (index, tree) = self.find_snapshot(id)?;
        let l1 = self.read_l1(&tree)?;
        self.check_tree(&tree, &l1)?;
        let old = SnapshotTable::read(&*self.store, &self.header())?;
        let bytes = old.without(index);
        let place = self.allocate_bytes(bytes.len() as u64)?;
        if let Some(place) = place {
            self.write_table(place, Owner::SnapshotTable, bytes)?;
        }
        self.flush()?;
        self.publish_table(place, old.trees.len() - 1, &old)?;
        self.snapshots.write().unwrap_or_else(PoisonError::into_inner).remove(index);
        tree.retire();

        for (index, &raw) in l1.iter().enumerate() {
            self.release_table(index, raw)?;
        }
        {
            let mut metadata = self.metadata();
            let (allocator, _) = metadata.writer()?;
            let (offset, len) = (tree.l1().offset, l1.len() as u64 * 8);
            allocator.layout.release(offset, len);
            allocator.unreference_all_later(offset, len);
        }
        self.flush_all()
    }
}
