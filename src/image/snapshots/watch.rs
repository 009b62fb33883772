//! The snapshots of an image that another process writes: which there are, and whether one is still there.
//!
//! It relies on what QEMU and this program do: a snapshot is complete in the file before the header names a table with it,
//! nothing of it is given away before the header names a table without it, and a table that the header names is not
//! written. So what was read of a snapshot is right if the table that the header names *afterwards* still has its very
//! entry. The entry tells it from one that took its name, its id and even its place: the time of creation is part of it.

use std::sync::{Arc, PoisonError};

use super::{SnapshotTable, SnapshotTree};
use crate::error::{Doing, Error, Result};
use crate::image::Image;
use crate::image::sync::atomic::{AtomicU64, Ordering};
use crate::image::sync::{Mutex, RwLock};
use crate::qcow2::{Header, SNAPSHOT_FIXED_LEN, SnapshotLengths, offsets};
use crate::store::Store;
use crate::units::HostOffset;

/// Bytes of the header that name the table: the number of its entries and its place.
type Field = [u8; 12];

/// How often a table is read that changes meanwhile. Each change takes its writer several syncs.
const MAX_ATTEMPTS: usize = 1000;

/// What is known of the snapshot table of an image that another process writes.
pub(in crate::image) struct Watch {
    known: RwLock<Arc<Known>>,
    /// Held over reading it anew.
    following: Mutex<()>,
    /// Counts its changes.
    generation: AtomicU64,
}

/// A snapshot table as the file had it.
struct Known {
    field: Field,
    table: SnapshotTable,
}

impl Watch {
    /// The watch over the image in `store`, and the snapshots that there are now.
    pub fn begin(store: &dyn Store, header: &Header) -> Result<(Self, Vec<Arc<SnapshotTree>>)> {
        let known = Known::read(store, header)?;
        let trees = known.table.trees.clone();
        let watch = Self {
            known: RwLock::new(Arc::new(known)),
            following: Mutex::new(()),
            generation: AtomicU64::new(0),
        };
        Ok((watch, trees))
    }

    fn known(&self) -> Arc<Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Known {
    /// Reads the table that the header names now.
    fn read(store: &dyn Store, header: &Header) -> Result<Self> {
        let mut result = Err(Error::invalid("snapshot table", "it never holds still"));
        for _ in 0..MAX_ATTEMPTS {
            let field = read_field(store)?;
            result = Self::read_named(store, header, field);
            // Else it was another table before all of it was read, or the field was caught half written.
            if read_field(store)? == field {
                break;
            }
        }
        result
    }

    /// Reads the table that `field` names.
    fn read_named(store: &dyn Store, header: &Header, field: Field) -> Result<Self> {
        let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        let (count, offset) = field.split_at(4);
        let header = Header {
            snapshot_count: number(count) as u32,
            snapshots_offset: HostOffset::new(number(offset)),
            ..header.clone()
        };
        header.check_snapshot_table()?;
        Ok(Self { field, table: SnapshotTable::read(store, &header)? })
    }

    /// Whether the file still has the first `count` entries as they are here. What fills the space between them does not
    /// count: it may be anything.
    fn is_still_there(&self, store: &dyn Store, count: usize) -> Result<bool> {
        let end = self.table.places[..count].last().map_or(0, |place| place.end);
        if read_field(store)? != self.field {
            return Ok(false);
        }
        let mut found = vec![0; end];
        let offset = self.field[4..].iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        store.read_at(&mut found, HostOffset::new(offset)).doing("read its snapshot table")?;
        let alike = self.table.places[..count].iter().all(|place| {
            let known = &self.table.bytes[place.clone()];
            let len = known.first_chunk().map_or(0, entry_len);
            known.get(..len) == found[place.clone()].get(..len)
        });
        Ok(alike && read_field(store)? == self.field)
    }

    /// The place of `tree` in the table.
    fn position(&self, tree: &SnapshotTree) -> Option<usize> {
        self.table.trees.iter().position(|known| std::ptr::eq(&**known, tree))
    }

    /// The entry at `index`, without what fills the space up to the next one.
    fn entry(&self, index: usize) -> &[u8] {
        let bytes = &self.table.bytes[self.table.places[index].clone()];
        let len = bytes.first_chunk().map_or(0, entry_len);
        &bytes[..len]
    }
}

/// Bytes of an entry with this fixed part.
fn entry_len(fixed: &[u8; SNAPSHOT_FIXED_LEN]) -> usize {
    SNAPSHOT_FIXED_LEN + SnapshotLengths::parse(fixed).variable()
}

fn read_field(store: &dyn Store) -> Result<Field> {
    let mut field = [0; size_of::<Field>()];
    store.read_at(&mut field, offsets::SNAPSHOTS).doing("read its header")?;
    Ok(field)
}

impl Image {
    /// Whether another process may write it while it is read here.
    pub fn is_beside_writer(&self) -> bool {
        self.watch.is_some()
    }

    /// Grows whenever [`Image::follow`] has found other snapshots.
    pub fn snapshot_generation(&self) -> u64 {
        self.watch.as_ref().map_or(0, |watch| watch.generation.load(Ordering::Acquire))
    }

    /// Finds out which snapshots there are by now, where another process may make and delete them. Those that are gone can't
    /// be read any more; those that stay are the same [`SnapshotTree`]s as before.
    ///
    /// # Errors
    /// Failing reads; a table that is broken. Then all is as before.
    pub fn follow(&self) -> Result<()> {
        let Some(watch) = &self.watch else { return Ok(()) };
        let known = watch.known();
        if known.is_still_there(&*self.store, known.table.trees.len())? {
            return Ok(());
        }
        let _following = watch.following.lock().unwrap_or_else(PoisonError::into_inner);
        let (old, header) = (watch.known(), self.header());
        let mut new = Known::read(&*self.store, &header)?;
        for index in 0..new.table.trees.len() {
            let same = (0..old.table.trees.len()).find(|&at| old.entry(at) == new.entry(index));
            if let Some(at) = same {
                new.table.trees[index] = old.table.trees[at].clone();
            }
        }
        // What is remembered of the file may have been something else's than the new snapshots'.
        self.metadata().pages.forget_clean();
        self.decompressed.forget();
        let trees = new.table.trees.clone();
        for tree in &old.table.trees {
            if new.position(tree).is_none() {
                tree.vanish();
            }
        }
        *watch.known.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        *self.snapshots.write().unwrap_or_else(PoisonError::into_inner) = trees;
        watch.generation.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// To be asked after all that was read of a snapshot of an image that another process may write: only if the snapshot
    /// is there now, what was read is its content.
    ///
    /// # Errors
    /// [`crate::error::Problem::SnapshotGone`], from then on; as [`Image::follow`].
    pub fn confirm(&self, tree: &SnapshotTree) -> Result<()> {
        let Some(watch) = &self.watch else { return Ok(()) };
        let known = watch.known();
        let is_there = match known.position(tree) {
            Some(index) => known.is_still_there(&*self.store, index + 1)?,
            None => false,
        };
        if !is_there {
            self.follow()?;
        }
        tree.check_is_there()
    }

    /// Forgets what is remembered of the active layer's tables, where another process may write them. What is read then is
    /// what the file has, which may be half of a change.
    ///
    /// # Errors
    /// Failing reads; a header that makes no sense.
    pub fn look_again(&self) -> Result<()> {
        if !self.is_beside_writer() {
            return Ok(());
        }
        let header = crate::image::read_header(&*self.store)?;
        header.check_l1_table()?;
        let l1 = super::Table::read(&*self.store, header.l1_offset, header.l1_entries as usize)?;
        let mut metadata = self.metadata();
        metadata.l1 = l1;
        metadata.pages.forget_clean();
        self.decompressed.forget();
        Ok(())
    }
}
