//! Host clusters: who is free, who has how many references. In an open image only this file changes refcounts, and only
//! it makes the file longer.

use super::layout::{Layout, Owner};
use super::pages::{Kind, Pages};
use super::table::Table;
use crate::error::{Doing, Error, Result};
use crate::qcow2::{Geometry, MAX_REFTABLE_BYTES, refcount};
use crate::store::Store;
use crate::units::HostOffset;

/// Bits 9 to 63 of a refcount table entry.
const BLOCK_OFFSET_MASK: u64 = !0x1ff;

/// The refcounts of an image that is open for writing.
pub(super) struct Allocator {
    geometry: Geometry,
    pub reftable: Table,
    pub layout: Layout,
    /// No cluster below this index is free.
    hint: u64,
    /// Length of the file in bytes, as far as we made it.
    file_len: u64,
    /// Clusters that lost a reference, once per reference. The pointer is gone in memory, not yet on disk.
    unreferenced: Vec<HostOffset>,
}

/// Clusters that lie one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Clusters {
    /// The first.
    pub start: HostOffset,
    /// How many, at least 1.
    pub count: u64,
    /// What they hold before anything is written.
    pub before: Before,
}

/// What a newly allocated cluster holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    /// Zeroes: it was behind the end of the file.
    Zeroes,
    /// Anything.
    Unknown,
}

/// The outcome of an allocation.
#[must_use]
pub(super) enum Allocation {
    /// Clusters with a refcount of one.
    Run(Clusters),
    /// The refcount table must grow first.
    TableFull(TableFull),
}

/// The refcount table has no room for another block.
#[derive(Debug, Clone, Copy)]
pub(super) struct TableFull {
    /// The entries that it had when that was found.
    pub entries: usize,
}

/// A place for a longer refcount table.
pub(super) struct LongerTable {
    /// Index of the first new refcount block.
    first_block: u64,
    /// New blocks, which lie one behind the other, the table behind them.
    blocks: u64,
    table_clusters: u64,
    entries: u64,
}

impl Allocator {
    pub fn new(geometry: Geometry, reftable: Table, layout: Layout, file_len: u64) -> Self {
        Self { geometry, reftable, layout, hint: 0, file_len, unreferenced: Vec::new() }
    }

    /// Allocates between 1 and `wanted` neighbouring clusters for guest data.
    pub fn allocate(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        wanted: u64,
    ) -> Result<Allocation> {
        let Some((first, count)) = self.find_free(pages, store, wanted)? else {
            let entries = self.reftable.entries().len();
            return Ok(Allocation::TableFull(TableFull { entries }));
        };
        let start = self.host(first);
        let len = count * self.geometry.cluster_size();
        // A refcount that says "free" of a table's cluster is wrong, and believing it would destroy the table.
        self.layout.check_data(start, len)?;
        let before = if start.get() >= self.file_len { Before::Zeroes } else { Before::Unknown };
        self.grow_file(store, start.get() + len)?;
        for cluster in first..first + count {
            self.set_refcount(pages, store, cluster, 1)?;
        }
        self.hint = first + count;
        Ok(Allocation::Run(Clusters { start, count, before }))
    }

    /// Allocates a cluster for an L2 table.
    pub fn allocate_table(&mut self, pages: &mut Pages, store: &dyn Store) -> Result<Allocation> {
        let allocation = self.allocate(pages, store, 1)?;
        if let Allocation::Run(run) = allocation {
            self.reserve(pages, store, run)?;
            self.layout.claim(run.start, self.geometry.cluster_size(), Owner::ActiveL2)?;
            pages.forget(run.start, self.geometry.cluster_size());
        }
        Ok(allocation)
    }

    /// Makes sure that a full disk is found out now, while it is an ordinary error, and not by a flush. Takes `clusters`
    /// back if it is.
    pub fn reserve(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        clusters: Clusters,
    ) -> Result<()> {
        let len = clusters.count * self.geometry.cluster_size();
        let reserved = store.reserve(clusters.start, len).doing("find space for its metadata");
        if reserved.is_err() {
            self.take_back(pages, store, clusters)?;
        }
        reserved
    }

    /// Takes back clusters that nothing has pointed to yet.
    pub fn take_back(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        clusters: Clusters,
    ) -> Result<()> {
        let first = self.cluster(clusters.start);
        for cluster in first..first + clusters.count {
            self.set_refcount(pages, store, cluster, 0)?;
        }
        self.hint = self.hint.min(first);
        Ok(())
    }

    /// Notes that an L2 table is no longer the active layer's.
    pub fn drop_table(&mut self, table: HostOffset) {
        self.layout.release(table, self.geometry.cluster_size());
        self.unreference_later(table);
    }

    /// Notes that a pointer to `cluster` is gone. The refcount follows when the pointer is gone on disk, too.
    pub fn unreference_later(&mut self, cluster: HostOffset) {
        self.unreferenced.push(cluster);
    }

    /// What [`Self::unreference_later`] has noted since the last call.
    pub fn take_unreferenced(&mut self) -> Vec<HostOffset> {
        std::mem::take(&mut self.unreferenced)
    }

    /// Whether references wait to be given back.
    pub fn has_unreferenced(&self) -> bool {
        !self.unreferenced.is_empty()
    }

    /// Makes sure that one reference per mention in `clusters` (sorted) can be added.
    ///
    /// # Errors
    /// A refcount that can't grow so far (1-bit refcounts can't be shared), or a cluster with no reference at all.
    pub fn check_room_for_references(
        &self,
        pages: &mut Pages,
        store: &dyn Store,
        clusters: &[HostOffset],
    ) -> Result<()> {
        let max = refcount::max(self.geometry.refcount_order());
        for mentions in clusters.chunk_by(|a, b| a == b) {
            let count = self.refcount(pages, store, self.cluster(mentions[0]))?;
            if count == 0 {
                return Err(Error::corrupt(format!("cluster {} is in use but free", mentions[0])));
            }
            if count.checked_add(mentions.len() as u64).is_none_or(|count| count > max) {
                return Err(Error::unsupported(format!(
                    "more references to a cluster than {}-bit refcounts can count",
                    1 << self.geometry.refcount_order()
                )));
            }
        }
        Ok(())
    }

    /// Adds one reference per mention in `clusters` (sorted), for which there is room.
    ///
    /// # Errors
    /// A failing read: some have been added then.
    pub fn add_references(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        clusters: &[HostOffset],
    ) -> Result<()> {
        for mentions in clusters.chunk_by(|a, b| a == b) {
            let cluster = self.cluster(mentions[0]);
            let count = self.refcount(pages, store, cluster)?;
            self.set_refcount(pages, store, cluster, count + mentions.len() as u64)?;
        }
        Ok(())
    }

    /// Which of `clusters` (sorted) are free once each mention of them has given back a reference.
    pub fn last_references(
        &self,
        pages: &mut Pages,
        store: &dyn Store,
        clusters: &[HostOffset],
    ) -> Result<Vec<HostOffset>> {
        let mut last = Vec::new();
        for mentions in clusters.chunk_by(|a, b| a == b) {
            let count = self.refcount(pages, store, self.cluster(mentions[0]))?;
            if count == mentions.len() as u64 {
                last.push(mentions[0]);
            }
        }
        Ok(last)
    }

    /// Gives back one reference per mention in `clusters`.
    pub fn unreference(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        clusters: &[HostOffset],
    ) -> Result<()> {
        for &host in clusters {
            let cluster = self.cluster(host);
            let count = self.refcount(pages, store, cluster)?;
            let Some(count) = count.checked_sub(1) else {
                return Err(Error::corrupt(format!("cluster {host} was in use but free")));
            };
            self.set_refcount(pages, store, cluster, count)?;
            if count == 0 {
                self.hint = self.hint.min(cluster);
            }
        }
        Ok(())
    }

    /// References to the cluster with this index.
    pub fn refcount(&self, pages: &mut Pages, store: &dyn Store, cluster: u64) -> Result<u64> {
        match self.place(pages, cluster)? {
            None => Ok(0),
            Some((page, index)) => {
                Ok(refcount::get(&pages.load(store, page)?, index, self.geometry.refcount_order()))
            }
        }
    }

    fn set_refcount(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        cluster: u64,
        count: u64,
    ) -> Result<()> {
        let Some((page, index)) = self.place(pages, cluster)? else {
            return Err(Error::corrupt(format!("cluster {cluster:#x} has no refcount block")));
        };
        let bytes = pages.modify(store, page, Kind::RefcountBlock)?;
        refcount::set(bytes, index, self.geometry.refcount_order(), count);
        Ok(())
    }

    /// The page with the refcount of a cluster and the refcount's index in it, if there is a block for it.
    fn place(&self, pages: &Pages, cluster: u64) -> Result<Option<(HostOffset, usize)>> {
        let per_block = self.geometry.refcounts_per_block();
        let Some(block) = self.block((cluster / per_block) as usize)? else { return Ok(None) };
        let per_page = refcounts_per_page(pages, self.geometry);
        let index = cluster % per_block;
        let page = block + index / per_page * pages.page_size();
        Ok(Some((page, (index % per_page) as usize)))
    }

    /// Where the refcount block with this index is.
    fn block(&self, index: usize) -> Result<Option<HostOffset>> {
        let host = HostOffset::new(self.reftable.get(index) & BLOCK_OFFSET_MASK);
        if !host.is_aligned(self.geometry.cluster_size()) {
            return Err(Error::corrupt(format!("refcount block offset {host} is not aligned")));
        }
        Ok((host != HostOffset::ZERO).then_some(host))
    }

    /// The first free cluster and how many of up to `wanted` follow it; makes the refcount block for it if there is
    /// none yet. `None` if the refcount table is too short for that.
    fn find_free(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        wanted: u64,
    ) -> Result<Option<(u64, u64)>> {
        let order = self.geometry.refcount_order();
        let per_block = self.geometry.refcounts_per_block();
        let per_page = refcounts_per_page(pages, self.geometry);
        let mut cluster = self.hint;
        loop {
            let block = (cluster / per_block) as usize;
            if block >= self.reftable.entries().len() {
                return Ok(None);
            }
            let Some((page, index)) = self.place(pages, cluster)? else {
                self.add_block(pages, store, block, cluster)?;
                cluster += 1;
                continue;
            };
            let bytes = pages.load(store, page)?;
            let is_free = |index: &usize| refcount::get(&bytes, *index, order) == 0;
            let end = per_page as usize;
            match (index..end).find(is_free) {
                Some(free) => {
                    let most = end.min(free.saturating_add(wanted as usize));
                    let count = (free..most).take_while(is_free).count();
                    return Ok(Some((cluster + (free - index) as u64, count as u64)));
                }
                None => cluster += (end - index) as u64,
            }
        }
    }

    /// Makes the refcount block with index `block` in the cluster `at`, which it describes itself.
    fn add_block(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        block: usize,
        at: u64,
    ) -> Result<()> {
        let host = self.host(at);
        let cluster_size = self.geometry.cluster_size();
        self.layout.check_data(host, cluster_size)?;
        self.grow_file(store, host.get() + cluster_size)?;
        store.reserve(host, cluster_size).doing("find space for its refcounts")?;
        self.reftable.reserve(store, block)?;
        self.layout.claim(host, cluster_size, Owner::RefcountBlock)?;
        pages.forget(host, cluster_size);
        for page in (0..cluster_size).step_by(pages.page_size() as usize) {
            let bytes = vec![0; pages.page_size() as usize].into();
            pages.replace(host + page, bytes, Kind::NewRefcountBlock);
        }
        self.reftable.set(block, host.get());
        self.set_refcount(pages, store, at, 1)
    }

    /// Finds a place for a longer refcount table: behind everything that the old one can describe.
    ///
    /// # Errors
    /// A table at its greatest size (8 MiB).
    pub fn plan_longer_table(&self) -> Result<LongerTable> {
        let geometry = self.geometry;
        let per_block = geometry.refcounts_per_block();
        let old = self.reftable.entries().len() as u64;
        let first_block = old.max(geometry.clusters(self.file_len).div_ceil(per_block));
        let mut entries = (old * 2).min(MAX_REFTABLE_BYTES / 8).max(first_block + 1);
        loop {
            if entries * 8 > MAX_REFTABLE_BYTES {
                let full = std::io::Error::from_raw_os_error(libc::EFBIG);
                return Err(Error::io("make its refcount table longer", full));
            }
            let table_clusters = geometry.clusters(entries * 8);
            // Each block describes itself, too.
            let blocks = table_clusters.div_ceil(per_block - 1);
            entries = table_clusters * (geometry.cluster_size() / 8);
            if first_block + blocks <= entries {
                return Ok(LongerTable { first_block, blocks, table_clusters, entries });
            }
            entries = first_block + blocks;
        }
    }

    /// Makes sure that there is space for a longer table and its blocks.
    ///
    /// # Errors
    /// No space; nothing has changed but the length of the file.
    pub fn reserve_longer_table(&mut self, store: &dyn Store, place: &LongerTable) -> Result<()> {
        let first = self.host(place.first_block * self.geometry.refcounts_per_block());
        let len = (place.blocks + place.table_clusters) * self.geometry.cluster_size();
        self.grow_file(store, first.get() + len)?;
        store.reserve(first, len).doing("find space for a longer refcount table")
    }

    /// Writes a longer refcount table and the blocks that describe it, and makes them durable. The header still names
    /// the old one.
    ///
    /// Invariant: the table on disk names only blocks that are there. Blocks that the next flush will write are named
    /// by the table that it writes.
    pub fn write_longer_table(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        place: &LongerTable,
    ) -> Result<Table> {
        let cluster_size = self.geometry.cluster_size();
        let per_block = self.geometry.refcounts_per_block();
        let (first, in_use) = (place.first_block * per_block, place.blocks + place.table_clusters);
        self.grow_file(store, self.host(first + in_use).get())?;
        let mut entries = self.reftable.entries().to_vec();
        entries.resize(place.entries as usize, 0);
        for block in 0..place.blocks {
            let mut bytes = vec![0; cluster_size as usize];
            for index in 0..in_use.saturating_sub(block * per_block).min(per_block) {
                refcount::set(&mut bytes, index as usize, self.geometry.refcount_order(), 1);
            }
            let host = self.host(first + block);
            entries[(place.first_block + block) as usize] = host.get();
            pages.forget(host, cluster_size);
            self.layout.claim(host, cluster_size, Owner::RefcountBlock)?;
            self.layout.check(Owner::RefcountBlock, host, bytes)?.perform(store)?;
        }
        let mut not_there_yet = Vec::new();
        for (index, entry) in entries.iter_mut().enumerate() {
            if pages.is_new(HostOffset::new(*entry & BLOCK_OFFSET_MASK)) {
                not_there_yet.push((index, std::mem::take(entry)));
            }
        }
        let mut table = Table::new(self.host(first + place.blocks), entries);
        self.layout.claim(table.offset(), table.byte_len(), Owner::RefcountTable)?;
        let bytes = table.entries().iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.layout.check(Owner::RefcountTable, table.offset(), bytes)?.perform(store)?;
        store.sync().doing("make its refcount table durable")?;
        for (index, entry) in not_there_yet {
            table.set(index, entry);
        }
        Ok(table)
    }

    /// Goes over to a table from [`Self::write_longer_table`] that the header names by now.
    pub fn use_table(&mut self, new: Table) {
        let old = std::mem::replace(&mut self.reftable, new);
        self.layout.release(old.offset(), old.byte_len());
        for at in (0..old.byte_len()).step_by(self.geometry.cluster_size() as usize) {
            self.unreference_later(old.offset() + at);
        }
    }

    /// Makes the file at least `len` bytes long: a cluster behind its end must not be pointed to.
    pub fn grow_file(&mut self, store: &dyn Store, len: u64) -> Result<()> {
        if len > self.file_len {
            store.set_len(len).doing("make it longer")?;
            self.file_len = len;
        }
        Ok(())
    }

    fn host(&self, cluster: u64) -> HostOffset {
        HostOffset::new(cluster << self.geometry.cluster_bits())
    }

    fn cluster(&self, host: HostOffset) -> u64 {
        host.get() >> self.geometry.cluster_bits()
    }
}

fn refcounts_per_page(pages: &Pages, geometry: Geometry) -> u64 {
    (pages.page_size() * 8) >> geometry.refcount_order()
}
