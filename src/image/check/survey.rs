//! Where the tables of an image are, as far as they can be followed.

use super::findings::{Coverage, Finding, Refcounts, Tally, Use};
use crate::error::{Doing, Result};
use crate::image::open::read_header;
use crate::image::snapshots::SnapshotTable;
use crate::qcow2::encryption::{CRYPT_LUKS, LuksArea};
use crate::qcow2::{EntryRules, Geometry, Header, MAX_L1_BYTES, Version};
use crate::store::Store;
use crate::units::HostOffset;

/// Bytes of a table that are read at once.
const CHUNK: u64 = 1 << 16;

/// Bits 9 to 63 of a refcount table entry.
const BLOCK_OFFSET_MASK: u64 = !0x1ff;

/// Bytes of the file and what they are used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Area {
    pub start: HostOffset,
    pub len: u64,
    pub usage: Use,
}

impl Area {
    pub fn new(start: HostOffset, len: u64, usage: Use) -> Self {
        Self { start, len, usage }
    }

    fn end(self) -> u64 {
        self.start.get().saturating_add(self.len)
    }
}

/// The tables of an image.
pub(super) struct Survey<'s> {
    pub store: &'s dyn Store,
    pub header: Header,
    pub geometry: Geometry,
    pub rules: EntryRules,
    /// Length of the file in clusters, the last of which may be cut.
    pub file_clusters: u64,
    file_len: u64,
    /// Tables of which there is one, and the tables that a snapshot or bitmap has one of.
    pub areas: Vec<Area>,
    /// The L1 tables to follow.
    pub l1_tables: Vec<Area>,
    /// The bitmap tables to follow.
    pub bitmap_tables: Vec<Area>,
    /// Where each refcount block is; 0 for none that can be used.
    pub blocks: Vec<u64>,
}

impl<'s> Survey<'s> {
    /// Finds the tables, and tells `tally` of those that can't be followed.
    ///
    /// # Errors
    /// A header that can't be read or whose L1 table can't be, and features that are not supported.
    pub fn new(store: &'s dyn Store, tally: &mut Tally<'_>) -> Result<Self> {
        let header = read_header(store)?;
        header.refuse_unsupported()?;
        header.check_l1_table()?;
        let file_len = store.len().doing("find out its length")?;
        let geometry = header.geometry;
        let mut survey = Self {
            store,
            geometry,
            rules: header.entry_rules(),
            file_clusters: geometry.clusters(file_len),
            file_len,
            areas: vec![Area::new(HostOffset::ZERO, 1, Use::Header)],
            l1_tables: Vec::new(),
            bitmap_tables: Vec::new(),
            blocks: Vec::new(),
            header,
        };
        let l1_len = u64::from(survey.header.l1_entries) * 8;
        survey.find(Area::new(survey.header.l1_offset, l1_len, Use::ActiveL1), tally);
        survey.find_snapshots(tally);
        survey.find_refcounts(tally);
        survey.find_encryption_header(tally);
        survey.find_bitmaps(tally);
        survey.follow_each_byte_once(tally);
        Ok(survey)
    }

    /// Whether the file holds `len` bytes at `start`, or at least a part of their last cluster.
    pub fn holds(&self, start: HostOffset, len: u64) -> bool {
        let end = start.get().saturating_add(len);
        end.saturating_sub(self.file_len) < self.geometry.cluster_size()
    }

    /// Whether an L2 table or refcount block can be at `start`.
    pub fn can_hold_table(&self, start: HostOffset) -> bool {
        let size = self.geometry.cluster_size();
        start != HostOffset::ZERO && start.is_aligned(size) && self.holds(start, size)
    }

    /// The first cluster that neither the file has nor a refcount block describes. A region may reach into the cluster
    /// behind the end of the file.
    pub fn limit(&self) -> u64 {
        let blocks = self.blocks.iter().rposition(|&host| host != 0).map_or(0, |last| last + 1);
        (blocks as u64 * self.geometry.refcounts_per_block()).max(self.file_clusters + 1)
    }

    /// Where the refcount block of `cluster` is.
    pub fn block_of(&self, cluster: u64) -> Option<HostOffset> {
        let index = cluster / self.geometry.refcounts_per_block();
        let host = self.blocks.get(usize::try_from(index).ok()?)?;
        (*host != 0).then(|| HostOffset::new(*host))
    }

    /// Calls `f` with the index and value of each word that is not 0 in the table at `start`.
    ///
    /// Holes of the file are skipped: a sparse file can't make us read for long.
    pub fn each_word(
        &self,
        start: HostOffset,
        len: u64,
        mut f: impl FnMut(usize, u64),
    ) -> std::io::Result<()> {
        let mut bytes = vec![0; CHUNK.min(len) as usize];
        let mut at = 0;
        while at < len {
            match self.store.next_data(start + at)? {
                None => break,
                // Data may begin in the middle of a word.
                Some(data) => {
                    let word = data.start.saturating_sub(start.get()) & !7;
                    at = at.max(word.min(len));
                }
            }
            if at == len {
                break;
            }
            let chunk = &mut bytes[..CHUNK.min(len - at) as usize];
            self.store.read_at(chunk, start + at)?;
            for (index, word) in chunk.as_chunks::<8>().0.iter().enumerate() {
                let word = u64::from_be_bytes(*word);
                if word != 0 {
                    f(at as usize / 8 + index, word);
                }
            }
            at += CHUNK;
        }
        Ok(())
    }

    /// Notes a table, and whether it can be followed.
    fn find(&mut self, area: Area, tally: &mut Tally<'_>) -> bool {
        if area.len == 0 {
            return false;
        }
        let Area { start, len, usage } = area;
        if !self.holds(start, len) {
            tally.add(Finding::BehindTheEnd { what: usage, at: start, len });
            let bits = self.geometry.cluster_bits();
            let end = start.get().saturating_add(len).div_ceil(1 << bits);
            tally.note_dangling(start.get() >> bits..end);
            if !usage.is_refcounts() {
                tally.coverage = Coverage::Partial;
            }
            return false;
        }
        self.areas.push(area);
        match usage {
            Use::ActiveL1 | Use::SnapshotL1 => self.l1_tables.push(area),
            Use::BitmapTable => self.bitmap_tables.push(area),
            _ => {}
        }
        true
    }

    fn broken(&mut self, what: String, tally: &mut Tally<'_>) {
        tally.add(Finding::Broken { what });
        tally.coverage = Coverage::Partial;
    }

    fn find_snapshots(&mut self, tally: &mut Tally<'_>) {
        if let Err(error) = self.header.check_snapshot_table() {
            return self.broken(error.to_string(), tally);
        }
        let mut len = 0;
        for index in 0..self.header.snapshot_count {
            let (snapshot, lengths) = match SnapshotTable::read_entry(self.store, &self.header, len)
            {
                Ok(entry) => entry,
                Err(error) => {
                    self.broken(format!("snapshot table entry {index}: {error}"), tally);
                    break;
                }
            };
            len += lengths.entry() as u64;
            if self.header.version == Version::V3 && !lengths.has_required_extra() {
                // Who wrote this may have meant another length, and other entries behind it.
                self.broken(format!("snapshot table entry {index} is incomplete"), tally);
            }
            let l1_len = u64::from(snapshot.l1_entries) * 8;
            if !snapshot.l1_offset.is_aligned(self.geometry.cluster_size()) || l1_len > MAX_L1_BYTES
            {
                let what = format!(
                    "snapshot {} l1_offset={} l1_size={}: the L1 table is not cluster aligned or too large",
                    snapshot.id, snapshot.l1_offset, snapshot.l1_entries
                );
                self.broken(what, tally);
                continue;
            }
            self.find(Area::new(snapshot.l1_offset, l1_len, Use::SnapshotL1), tally);
        }
        self.find(Area::new(self.header.snapshots_offset, len, Use::SnapshotTable), tally);
    }

    fn find_refcounts(&mut self, tally: &mut Tally<'_>) {
        if let Err(error) = self.header.check_refcount_table() {
            tally.worsen(Refcounts::Broken);
            return tally.add(Finding::Broken { what: error.to_string() });
        }
        let len = u64::from(self.header.reftable_clusters) * self.geometry.cluster_size();
        let start = self.header.reftable_offset;
        if !self.find(Area::new(start, len, Use::RefcountTable), tally) {
            // Nothing is behind it that could be overlooked.
            tally.worsen(Refcounts::Broken);
        }
        let mut entries = vec![0; len as usize / 8];
        if let Err(error) = self.each_word(start, len, |index, word| entries[index] = word) {
            tally.worsen(Refcounts::Broken);
            tally.add(Finding::Unreadable { what: format!("the refcount table: {error}") });
        }
        let mut seen = std::collections::HashSet::new();
        for (index, entry) in entries.iter_mut().enumerate().filter(|(_, entry)| **entry != 0) {
            let host = HostOffset::new(*entry & BLOCK_OFFSET_MASK);
            let mut broken = |what: &str| {
                tally.worsen(Refcounts::Broken);
                let what = format!("refcount table entry {index}, block at {host}: {what}");
                tally.add(Finding::Broken { what });
            };
            if *entry & !BLOCK_OFFSET_MASK != 0 {
                // The block can be read, but nobody is to rely on it.
                broken("reserved bits are set");
                *entry = host.get();
            } else if self.can_hold_table(host) {
                let len = self.geometry.cluster_size();
                self.areas.push(Area::new(host, len, Use::RefcountBlock));
                *entry = host.get();
            } else {
                broken("it is not cluster aligned or behind the end of the file");
                *entry = 0;
            }
            if *entry != 0 && !seen.insert(*entry) {
                *entry = 0;
            }
        }
        self.blocks = entries;
    }

    fn find_encryption_header(&mut self, tally: &mut Tally<'_>) {
        if self.header.crypt_method != CRYPT_LUKS {
            return;
        }
        match LuksArea::find(&self.header.extensions, self.geometry) {
            Ok(Some(area)) => {
                self.find(Area::new(area.offset, area.len, Use::EncryptionHeader), tally);
            }
            Ok(None) => self.broken("there is no encryption header".to_owned(), tally),
            Err(error) => self.broken(error.to_string(), tally),
        }
    }

    fn find_bitmaps(&mut self, tally: &mut Tally<'_>) {
        let directory = match self.header.bitmap_directory() {
            Ok(Some(directory)) => directory,
            Ok(None) => return,
            Err(error) => return self.broken(error.to_string(), tally),
        };
        let area = Area::new(directory.offset, directory.len, Use::BitmapDirectory);
        if !self.find(area, tally) {
            return;
        }
        let mut bytes = vec![0; directory.len as usize];
        if let Err(error) = self.store.read_at(&mut bytes, directory.offset) {
            tally.coverage = Coverage::Partial;
            return tally
                .add(Finding::Unreadable { what: format!("the bitmap directory: {error}") });
        }
        let bitmaps = match directory.parse_entries(&bytes, self.geometry.cluster_size()) {
            Ok(bitmaps) => bitmaps,
            Err(error) => return self.broken(error.to_string(), tally),
        };
        for bitmap in bitmaps {
            let len = u64::from(bitmap.table_entries) * 8;
            self.find(Area::new(bitmap.table_offset, len, Use::BitmapTable), tally);
        }
    }

    /// Leaves out tables that overlap with one before them, which are found as two owners: following them could mean to
    /// read the same bytes for ever.
    fn follow_each_byte_once(&mut self, tally: &mut Tally<'_>) {
        for tables in [&mut self.l1_tables, &mut self.bitmap_tables] {
            // The active L1 is the first, and stays so among those of one place.
            tables.sort_by_key(|area| area.start);
            let mut end = 0;
            tables.retain(|area| {
                let overlaps = area.start.get() < end;
                if overlaps {
                    tally.coverage = Coverage::Partial;
                } else {
                    end = area.end();
                }
                !overlaps
            });
        }
    }
}
