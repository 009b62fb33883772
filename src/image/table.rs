//! A table of 64-bit entries that is kept in memory whole: the L1 table and the refcount table.

use std::collections::BTreeSet;

use crate::error::{Doing, Result};
use crate::qcow2::be_u64;
use crate::store::Store;
use crate::units::HostOffset;

/// Entries in a 512-byte sector, the unit that a disk writes whole or not at all.
const SECTOR_ENTRIES: usize = 64;

/// The entries of a table and which of its sectors differ from the file.
pub struct Table {
    offset: HostOffset,
    entries: Vec<u64>,
    dirty_sectors: BTreeSet<usize>,
}

impl Table {
    /// Reads a table of `len` entries for looking at.
    ///
    /// What lies behind the end of the file is zero and takes no memory: a small file can't ask for much.
    pub fn read(store: &dyn Store, offset: HostOffset, len: usize) -> Result<Self> {
        let file_len = store.len().doing("find out its length")?;
        let inside = file_len.saturating_sub(offset.get()).div_ceil(8);
        let mut bytes = vec![0; len.min(inside as usize) * 8];
        store.read_at(&mut bytes, offset).doing("read a table of its metadata")?;
        let entries = bytes.chunks_exact(8).map(|entry| be_u64(entry, 0)).collect();
        Ok(Self::new(offset, entries))
    }

    /// Reads a table of `len` entries for changing.
    pub fn read_whole(store: &dyn Store, offset: HostOffset, len: usize) -> Result<Self> {
        let mut table = Self::read(store, offset, len)?;
        table.entries.resize(len, 0);
        Ok(table)
    }

    /// A table that agrees with the file.
    pub fn new(offset: HostOffset, entries: Vec<u64>) -> Self {
        Self { offset, entries, dirty_sectors: BTreeSet::new() }
    }

    /// Where the table is.
    pub fn offset(&self) -> HostOffset {
        self.offset
    }

    /// All entries, but for those that a table read for looking at may lack at its end: they are 0.
    pub fn entries(&self) -> &[u64] {
        &self.entries
    }

    /// The entry at `index`, 0 behind the end.
    pub fn get(&self, index: usize) -> u64 {
        self.entries.get(index).copied().unwrap_or(0)
    }

    /// Makes sure that the sector of the entry at `index` has space on the host: it may be in a hole of the file.
    ///
    /// # Errors
    /// No space.
    pub fn reserve(&self, store: &dyn Store, index: usize) -> Result<()> {
        let sector = index / SECTOR_ENTRIES;
        let entries = self.entries.chunks(SECTOR_ENTRIES).nth(sector).unwrap_or_default();
        if entries.iter().any(|&entry| entry != 0) {
            return Ok(());
        }
        let start = self.offset + (sector * SECTOR_ENTRIES) as u64 * 8;
        store.reserve(start, entries.len() as u64 * 8).doing("find space for a table")
    }

    /// Changes the entry at `index`, which exists.
    pub fn set(&mut self, index: usize, entry: u64) {
        self.entries[index] = entry;
        self.dirty_sectors.insert(index / SECTOR_ENTRIES);
    }

    /// The length in bytes.
    pub fn byte_len(&self) -> u64 {
        self.entries.len() as u64 * 8
    }

    /// Whether anything differs from the file.
    pub fn is_dirty(&self) -> bool {
        !self.dirty_sectors.is_empty()
    }

    /// The bytes to write, by place; the table counts as clean from now on.
    pub fn capture(&mut self) -> Vec<(HostOffset, Vec<u8>)> {
        let sectors = std::mem::take(&mut self.dirty_sectors);
        let bytes_of = |sector: usize| {
            let start = sector * SECTOR_ENTRIES;
            let end = (start + SECTOR_ENTRIES).min(self.entries.len());
            let bytes = self.entries[start..end].iter().flat_map(|entry| entry.to_be_bytes());
            (self.offset + start as u64 * 8, bytes.collect())
        };
        sectors.into_iter().map(bytes_of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sectors_that_changed_are_written() {
        let mut table = Table::new(HostOffset::new(0x1000), vec![0; 200]);
        table.set(3, 1);
        table.set(199, 2);
        let writes = table.capture();
        let places: Vec<_> = writes.iter().map(|(at, bytes)| (at.get(), bytes.len())).collect();
        assert_eq!(places, [(0x1000, 512), (0x1000 + 192 * 8, 64)]);
        assert!(!table.is_dirty());
    }
}
