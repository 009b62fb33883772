//! A cache of metadata: L2 tables and refcount blocks in pages of at most 4 KiB.
//!
//! Clean pages may be forgotten at any time. Dirty pages stay until a flush has written them.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;

use crate::error::{Doing, Result};
use crate::store::Store;
use crate::units::HostOffset;

/// Largest page in bytes; smaller clusters have smaller pages.
const MAX_PAGE: u64 = 4096;

/// The pages of one image.
pub struct Pages {
    page_size: u64,
    clean: LruCache<HostOffset, Arc<[u8]>>,
    dirty: BTreeMap<HostOffset, Dirty>,
    epoch: u64,
}

/// A page that differs from the file.
#[derive(Clone)]
pub struct Dirty {
    /// Its content.
    pub bytes: Arc<[u8]>,
    /// When it may be written.
    pub kind: Kind,
    /// Counts its changes, so that a flush can tell whether it wrote the latest.
    change: u64,
}

/// The place of a page in the order of writes (see `flush`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Of a refcount block that the refcount table on disk does not name yet.
    NewRefcountBlock,
    /// Of a refcount block in use.
    RefcountBlock,
    /// Of an L2 table that the L1 table on disk does not name yet.
    NewL2,
    /// Of an L2 table in use.
    L2,
}

impl Kind {
    /// What the page is once it has been written.
    fn settled(self) -> Self {
        match self {
            Self::NewRefcountBlock | Self::RefcountBlock => Self::RefcountBlock,
            Self::NewL2 | Self::L2 => Self::L2,
        }
    }
}

impl Pages {
    /// An empty cache that keeps up to `capacity` bytes of clean pages.
    pub fn new(cluster_size: u64, capacity: u64) -> Self {
        let page_size = cluster_size.min(MAX_PAGE);
        let count = NonZeroUsize::new((capacity / page_size) as usize).unwrap_or(NonZeroUsize::MIN);
        // Not allocated in advance: a chain has hundreds of members that never need it.
        let mut clean = LruCache::unbounded();
        clean.resize(count);
        Self { page_size, clean, dirty: BTreeMap::new(), epoch: 0 }
    }

    /// Bytes in a page.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The page that begins at `at`, if it is here.
    pub fn get(&mut self, at: HostOffset) -> Option<Arc<[u8]>> {
        match self.dirty.get(&at) {
            Some(dirty) => Some(dirty.bytes.clone()),
            None => self.clean.get(&at).cloned(),
        }
    }

    /// The page that begins at `at`, read from the store if need be.
    pub fn load(&mut self, store: &dyn Store, at: HostOffset) -> Result<Arc<[u8]>> {
        if let Some(bytes) = self.get(at) {
            return Ok(bytes);
        }
        let bytes = read_page(store, at, self.page_size)?;
        self.clean.put(at, bytes.clone());
        Ok(bytes)
    }

    /// Grows with every flush: a page that was read from the file in one epoch may be stale in the next.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Keeps a page that was read from the file in this epoch.
    pub fn insert_clean(&mut self, at: HostOffset, bytes: Arc<[u8]>) {
        if !self.dirty.contains_key(&at) {
            self.clean.put(at, bytes);
        }
    }

    /// The page that begins at `at`, for changing; `kind` counts if it was clean.
    ///
    /// # Errors
    /// Failing reads; no space on the host, which must not be found out by a flush: a page of zeroes may be a hole of
    /// the file, as `cp --sparse=always` makes them of tables, too.
    pub fn modify(&mut self, store: &dyn Store, at: HostOffset, kind: Kind) -> Result<&mut [u8]> {
        let bytes = self.load(store, at)?;
        if !self.dirty.contains_key(&at) && bytes.iter().all(|&byte| byte == 0) {
            store.reserve(at, self.page_size).doing("find space for its metadata")?;
        }
        self.clean.pop(&at);
        let dirty = self.dirty.entry(at).or_insert(Dirty { bytes, kind, change: 0 });
        dirty.change += 1;
        Ok(Arc::make_mut(&mut dirty.bytes))
    }

    /// Makes the page that begins at `at` hold `bytes`, whatever the file has there.
    pub fn replace(&mut self, at: HostOffset, bytes: Arc<[u8]>, kind: Kind) {
        debug_assert_eq!(bytes.len() as u64, self.page_size);
        self.clean.pop(&at);
        let change = self.dirty.get(&at).map_or(1, |dirty| dirty.change + 1);
        self.dirty.insert(at, Dirty { bytes, kind, change });
    }

    /// Makes the page that begins at `at` hold `bytes`, a change of what it holds; `kind` counts if it was clean.
    pub fn change(&mut self, at: HostOffset, bytes: Arc<[u8]>, kind: Kind) {
        let kind = self.dirty.get(&at).map_or(kind, |dirty| dirty.kind);
        self.replace(at, bytes, kind);
    }

    /// Whether the table that begins at `at` is one that the file does not have yet.
    pub fn is_new(&self, at: HostOffset) -> bool {
        let kind = self.dirty.get(&at).map(|dirty| dirty.kind);
        matches!(kind, Some(Kind::NewRefcountBlock | Kind::NewL2))
    }

    /// How many pages differ from the file.
    pub fn dirty_count(&self) -> usize {
        self.dirty.len()
    }

    /// A copy of all dirty pages for a flush to write. Changes from now on belong to the next flush.
    pub fn capture(&mut self) -> Vec<(HostOffset, Dirty)> {
        let captured = self.dirty.iter().map(|(&at, dirty)| (at, dirty.clone())).collect();
        for dirty in self.dirty.values_mut() {
            dirty.kind = dirty.kind.settled();
        }
        captured
    }

    /// Called when a flush has written what it captured: pages that did not change meanwhile are clean.
    pub fn written(&mut self, captured: Vec<(HostOffset, Dirty)>) {
        self.epoch += 1;
        for (at, written) in captured {
            if self.dirty.get(&at).is_some_and(|dirty| dirty.change == written.change) {
                self.dirty.remove(&at);
                self.clean.put(at, written.bytes);
            }
        }
    }

    /// Forgets all clean pages: somebody else may have written the file.
    pub fn forget_clean(&mut self) {
        self.epoch += 1;
        self.clean.clear();
    }

    /// Forgets the clean pages of a range that is about to hold something else.
    pub fn forget(&mut self, start: HostOffset, len: u64) {
        self.epoch += 1;
        for at in (start.get()..start.get() + len).step_by(self.page_size as usize) {
            self.clean.pop(&HostOffset::new(at));
        }
    }
}

/// Reads the page that begins at `at` from the file.
pub fn read_page(store: &dyn Store, at: HostOffset, page_size: u64) -> Result<Arc<[u8]>> {
    let mut bytes = vec![0; page_size as usize];
    store.read_at(&mut bytes, at).doing("read its metadata")?;
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    const AT: HostOffset = HostOffset::new(4096);

    #[test]
    fn a_change_during_a_flush_stays_dirty() {
        let store = MemoryStore::new(vec![0; 8192]);
        let mut pages = Pages::new(65536, 1 << 20);
        pages.modify(&store, AT, Kind::L2).unwrap()[0] = 1;
        let captured = pages.capture();
        pages.modify(&store, AT, Kind::L2).unwrap()[0] = 2;
        assert_eq!(captured[0].1.bytes[0], 1);
        pages.written(captured);
        assert_eq!(pages.dirty_count(), 1);
        let captured = pages.capture();
        pages.written(captured);
        assert_eq!(pages.dirty_count(), 0);
        assert_eq!(pages.get(AT).unwrap()[0], 2);
    }

    #[test]
    fn what_was_forgotten_is_read_anew_and_reads_under_way_are_stale() {
        let store = MemoryStore::new(vec![1; 1 << 20]);
        let mut pages = Pages::new(65536, 1 << 20);
        let old = pages.load(&store, AT).unwrap();
        let epoch = pages.epoch();
        store.write_at(&[&[2; 4096]], AT).unwrap();
        assert_eq!(pages.load(&store, AT).unwrap(), old);
        pages.forget(HostOffset::new(0), 65536);
        assert_eq!(pages.load(&store, AT).unwrap()[0], 2);
        assert_ne!(pages.epoch(), epoch);
    }

    #[test]
    fn dirty_pages_are_never_forgotten() {
        let store = MemoryStore::new(vec![0; 1 << 20]);
        let mut pages = Pages::new(65536, 8192);
        pages.modify(&store, AT, Kind::L2).unwrap()[0] = 1;
        for page in 2..100 {
            pages.load(&store, HostOffset::new(page * 4096)).unwrap();
        }
        assert_eq!(pages.get(AT).unwrap()[0], 1);
    }
}
