//! The tables of an open image: what is in memory of them, and changes of the mapping.

use super::allocate::{Allocation, Allocator, TableFull};
use super::entry::{ClusterEntry, NewEntry};
use super::pages::{Kind, Pages};
use super::snapshots::Freeze;
use super::table::Table;
use crate::error::{Error, Problem, Result};
use crate::qcow2::{DataPlace, EntryRules, Geometry, Header, L1Entry};
use crate::store::Store;
use crate::units::{GuestOffset, HostOffset};

/// Everything that the metadata lock of an image protects.
pub(super) struct Metadata {
    pub geometry: Geometry,
    pub rules: EntryRules,
    /// Whether guest data is in a file of its own and each byte where the guest has it.
    pub data_file_is_raw: bool,
    pub header: Header,
    pub l1: Table,
    pub pages: Pages,
    /// Only in an image that is open for writing.
    pub allocator: Option<Allocator>,
    /// The tree of a snapshot that is being made.
    pub freeze: Option<Freeze>,
}

impl Metadata {
    /// The tables that only a writer has.
    pub fn writer(&mut self) -> Result<(&mut Allocator, &mut Pages)> {
        match &mut self.allocator {
            Some(allocator) => Ok((allocator, &mut self.pages)),
            None => Err(Error::new(Problem::ReadOnly)),
        }
    }

    /// Makes sure that the L2 table that maps `offset` exists and belongs to the active layer alone.
    ///
    /// A table that is shared with a snapshot is copied; its clusters keep their refcounts, since the snapshot's
    /// references to them remain.
    pub fn prepare_l2(&mut self, store: &dyn Store, offset: GuestOffset) -> Result<Prepared> {
        let l1_index = self.geometry.l1_index(offset);
        self.count_frozen(store, l1_index);
        let old = match L1Entry::decode(self.l1.get(l1_index), self.geometry)? {
            L1Entry::Table { copied: true, .. } => return Ok(Prepared::Ready),
            L1Entry::Table { host, copied: false } => Some(host),
            L1Entry::Unallocated => None,
        };
        self.l1.reserve(store, l1_index)?;
        let page_size = self.pages.page_size();
        let places = (0..self.geometry.cluster_size()).step_by(page_size as usize);
        // Read before a cluster is taken: a read that fails changes nothing.
        let mut content = Vec::new();
        for at in places.clone() {
            content.push(match old {
                Some(old) => {
                    let page = self.pages.load(store, old + at)?;
                    // Whoever shares a table shares its clusters, whatever their flags say.
                    self.shared_page(&page)?.unwrap_or(page)
                }
                None => vec![0; page_size as usize].into(),
            });
        }
        let (allocator, pages) = self.writer()?;
        let host = match allocator.allocate_table(pages, store)? {
            Allocation::Run(run) => run.start,
            Allocation::TableFull(full) => return Ok(Prepared::TableFull(full)),
        };
        for (at, bytes) in places.zip(content) {
            pages.replace(host + at, bytes, Kind::NewL2);
        }
        if let (Some(old), Some(allocator)) = (old, &mut self.allocator) {
            allocator.drop_table(old);
        }
        self.l1.set(l1_index, L1Entry::Table { host, copied: true }.encode());
        Ok(Prepared::Ready)
    }

    /// Changes the entry of the cluster at `offset`, whose L2 table has been prepared.
    ///
    /// References to clusters that the old entry held are given back after the next flush, when nothing on disk
    /// points to them any more.
    pub fn set_entry(
        &mut self,
        store: &dyn Store,
        offset: GuestOffset,
        change: NewEntry,
    ) -> Result<()> {
        let geometry = self.geometry;
        let entry = self.l1.get(geometry.l1_index(offset));
        let L1Entry::Table { host: table, copied: true } = L1Entry::decode(entry, geometry)? else {
            return Err(Error::corrupt(format!("the L2 table for {offset} is not ours to write")));
        };
        let (page_at, index) = self.entry_place(table, offset);
        let bytes = self.pages.modify(store, page_at, Kind::L2)?;
        let old = ClusterEntry::decode(&bytes[index..], geometry, self.rules)?;
        let new = old.changed(change);
        new.encode(&mut bytes[index..], geometry);
        // Nobody counts the clusters of a data file.
        if self.rules.data == DataPlace::Internal {
            let kept = new.host_clusters(geometry);
            let (allocator, _) = self.writer()?;
            for host in old.host_clusters(geometry) {
                if !kept.contains(&host) {
                    allocator.unreference_later(host);
                }
            }
        }
        Ok(())
    }

    /// The entry of the cluster at `offset`.
    pub fn entry(&mut self, store: &dyn Store, offset: GuestOffset) -> Result<ClusterEntry> {
        let raw = self.l1.get(self.geometry.l1_index(offset));
        let L1Entry::Table { host: table, .. } = L1Entry::decode(raw, self.geometry)? else {
            return Ok(ClusterEntry::UNALLOCATED);
        };
        let (page_at, index) = self.entry_place(table, offset);
        let bytes = self.pages.load(store, page_at)?;
        ClusterEntry::decode(&bytes[index..], self.geometry, self.rules)
    }

    /// Checks that every cluster in a data file has the place that it has on the disk, as QEMU puts them.
    ///
    /// New clusters go there, which must not be another one's.
    ///
    /// # Errors
    /// Clusters elsewhere: such an image can only be read.
    pub fn check_data_places(&mut self, store: &dyn Store) -> Result<()> {
        let span = self.geometry.l2_span();
        for l1_index in 0..self.l1.entries().len() {
            if self.l1.get(l1_index) == 0 {
                continue;
            }
            for index in 0..self.geometry.l2_entries() {
                let at = l1_index as u64 * span + index * self.geometry.cluster_size();
                let entry = self.entry(store, GuestOffset::new(at))?;
                if entry.host_clusters(self.geometry).iter().any(|host| host.get() != at) {
                    return Err(Error::new(Problem::ReadableOnly {
                        feature: "an image with clusters in another order than its data file",
                    }));
                }
            }
        }
        Ok(())
    }

    /// The page of the L2 table at `table` that has the entry of the cluster at `offset`, and its place in it.
    fn entry_place(&self, table: HostOffset, offset: GuestOffset) -> (HostOffset, usize) {
        let at = self.geometry.l2_index(offset) as u64 * self.geometry.l2_entry_len();
        let in_page = at % self.pages.page_size();
        (table + (at - in_page), in_page as usize)
    }
}

/// Whether an L2 table is ready for changes.
#[must_use]
pub(super) enum Prepared {
    /// It is.
    Ready,
    /// The refcount table must grow first.
    TableFull(TableFull),
}
