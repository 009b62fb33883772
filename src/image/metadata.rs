//! The tables of an open image: what is in memory of them, and changes of the mapping.

use super::allocate::{Allocation, Allocator};
use super::map::Place;
use super::pages::{Kind, Pages};
use super::table::Table;
use crate::error::{Error, Problem, Result};
use crate::qcow2::{EntryRules, Geometry, Header, L1Entry, L2Entry, be_u64};
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
}

/// A change of what a cluster holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NewEntry {
    /// Data at this place, whose refcount is one.
    Data(HostOffset),
    /// Zeroes without a cluster.
    Zero,
    /// Zeroes that keep the cluster at this place, whose refcount is one.
    ZeroKeeping(HostOffset),
    /// Nothing.
    Unallocated,
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
        let old = match L1Entry::decode(self.l1.get(l1_index), self.geometry)? {
            L1Entry::Table { copied: true, .. } => return Ok(Prepared::Ready),
            L1Entry::Table { host, copied: false } => Some(host),
            L1Entry::Unallocated => None,
        };
        let (allocator, pages) = self.writer()?;
        let host = match allocator.allocate_table(pages, store)? {
            Allocation::Run(run) => run.start,
            Allocation::TableFull => return Ok(Prepared::TableFull),
        };
        let page_size = pages.page_size();
        for at in (0..self.geometry.cluster_size()).step_by(page_size as usize) {
            let bytes = match old {
                Some(old) => self.pages.load(store, old + at)?,
                None => vec![0; page_size as usize].into(),
            };
            self.pages.replace(host + at, bytes, Kind::NewL2);
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
        new: NewEntry,
    ) -> Result<()> {
        let geometry = self.geometry;
        let entry = self.l1.get(geometry.l1_index(offset));
        let L1Entry::Table { host: table, copied: true } = L1Entry::decode(entry, geometry)? else {
            return Err(Error::corrupt(format!("the L2 table for {offset} is not ours to write")));
        };
        let page_size = self.pages.page_size();
        let in_table = geometry.l2_index(offset) as u64 * 8;
        let page_at = table + in_table / page_size * page_size;
        let index = (in_table % page_size / 8) as usize;

        let bytes = self.pages.modify(store, page_at, Kind::L2)?;
        let old = L2Entry::decode(be_u64(bytes, index), geometry, self.rules)?;
        let entry = match new {
            NewEntry::Data(host) => L2Entry::Data { host, copied: true },
            NewEntry::Zero => L2Entry::Zero { host: None },
            NewEntry::ZeroKeeping(host) => L2Entry::Zero { host: Some((host, true)) },
            NewEntry::Unallocated => L2Entry::Unallocated,
        };
        bytes[index * 8..][..8].copy_from_slice(&entry.encode(geometry).to_be_bytes());
        let (allocator, _) = self.writer()?;
        for host in host_clusters(old, geometry) {
            if new.host() != Some(host) {
                allocator.unreference_later(host);
            }
        }
        Ok(())
    }
}

impl NewEntry {
    fn host(self) -> Option<HostOffset> {
        match self {
            Self::Data(host) | Self::ZeroKeeping(host) => Some(host),
            Self::Zero | Self::Unallocated => None,
        }
    }
}

/// Whether an L2 table is ready for changes.
#[must_use]
pub(super) enum Prepared {
    /// It is.
    Ready,
    /// The refcount table has no room for another block: it must grow first.
    TableFull,
}

/// The host clusters that an L2 entry holds a reference to.
pub(super) fn host_clusters(entry: L2Entry, geometry: Geometry) -> Vec<HostOffset> {
    match entry {
        L2Entry::Unallocated | L2Entry::Zero { host: None } => Vec::new(),
        L2Entry::Zero { host: Some((host, _)) } | L2Entry::Data { host, .. } => vec![host],
        L2Entry::Compressed(cluster) => cluster.host_clusters(geometry).collect(),
    }
}

impl Place {
    /// The place `bytes` further on.
    pub(super) fn advance(self, bytes: u64) -> Self {
        Self { host: self.host + bytes, ..self }
    }
}
