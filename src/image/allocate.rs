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
    lost: Lost,
}

/// What has lost pointers in memory, though not yet on disk.
#[derive(Default)]
pub(super) struct Lost {
    /// Clusters that lost a reference, once per reference.
    pub references: Vec<HostOffset>,
    /// L2 tables that are no longer the active layer's. Until the flush that takes them has written what it took, pages
    /// of theirs may wait to be written: a snapshot may need them.
    pub tables: Vec<HostOffset>,
}

/// A cluster with its place in the refcount structures.
struct Counted {
    host: HostOffset,
    /// How often it was mentioned.
    mentions: u64,
    /// The page with its refcount.
    page: HostOffset,
    /// The refcount's index in the page.
    index: usize,
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
        Self { geometry, reftable, layout, hint: 0, file_len, lost: Lost::default() }
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
        self.lost.tables.push(table);
        self.unreference_later(table);
    }

    /// Notes that a pointer to `cluster` is gone. The refcount follows when the pointer is gone on disk, too.
    pub fn unreference_later(&mut self, cluster: HostOffset) {
        self.lost.references.push(cluster);
    }

    /// Notes that pointers to the clusters of `len` bytes at `start` are gone.
    pub fn unreference_all_later(&mut self, start: HostOffset, len: u64) {
        for at in (0..len).step_by(self.geometry.cluster_size() as usize) {
            self.unreference_later(start + at);
        }
    }

    /// What was lost since the last call.
    pub fn take_lost(&mut self) -> Lost {
        std::mem::take(&mut self.lost)
    }

    /// How many references wait to be given back.
    pub fn lost_references(&self) -> usize {
        self.lost.references.len()
    }

    /// Checks that an L2 table of a snapshot can be at `table`.
    ///
    /// # Errors
    /// A place behind the end of the file, or one of another table.
    pub fn check_table_place(&self, table: HostOffset) -> Result<()> {
        self.check_inside(table)?;
        match self.layout.owner(table) {
            None | Some(Owner::ActiveL2) => Ok(()),
            Some(other) => {
                Err(Error::corrupt(format!("the L2 table at {table} would overlap {other:?}")))
            }
        }
    }

    /// Checks that data of a snapshot can be in the cluster at `host`.
    ///
    /// # Errors
    /// As [`Self::check_table_place`].
    pub fn check_data_place(&self, host: HostOffset) -> Result<()> {
        self.check_inside(host)?;
        self.layout.check_data(host, 1)
    }

    fn check_inside(&self, host: HostOffset) -> Result<()> {
        match host.get() < self.file_len {
            true => Ok(()),
            false => Err(Error::corrupt(format!("{host} is behind the end of the file"))),
        }
    }

    /// Whether each of `clusters` (sorted) can have one more reference per mention.
    ///
    /// # Errors
    /// A refcount that can't grow so far (1-bit refcounts can't be shared), or a cluster with no reference at all.
    pub fn check_references(
        &self,
        pages: &mut Pages,
        store: &dyn Store,
        clusters: &[HostOffset],
    ) -> Result<()> {
        let max = refcount::max(self.geometry.refcount_order());
        for (host, mentions, count) in self.counts(pages, store, clusters)? {
            if count == 0 {
                return Err(Error::corrupt(format!("cluster {host} is in use but free")));
            }
            if count.checked_add(mentions).is_none_or(|count| count > max) {
                return Err(self.too_many_references());
            }
        }
        Ok(())
    }

    /// The error for references that can't be counted.
    pub fn too_many_references(&self) -> Error {
        Error::unsupported(format!(
            "more references to a cluster than {}-bit refcounts can count",
            1_u32 << self.geometry.refcount_order()
        ))
    }

    /// Makes sure that one reference per mention in `clusters` (sorted) can be added.
    ///
    /// # Errors
    /// As [`Self::check_references`]; failing reads.
    pub fn reference_all(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        clusters: &[HostOffset],
    ) -> Result<()> {
        self.check_references(pages, store, clusters)?;
        let order = self.geometry.refcount_order();
        let counted = self.place_all(pages, clusters)?;
        let in_pages: Vec<&[Counted]> = counted.chunk_by(|a, b| a.page == b.page).collect();
        // All pages are dirty before the first count changes: from then on none has to be read, and nothing can fail.
        for in_page in &in_pages {
            pages.modify(store, in_page[0].page, Kind::RefcountBlock)?;
        }
        for in_page in in_pages {
            let bytes = pages.modify(store, in_page[0].page, Kind::RefcountBlock)?;
            for one in in_page {
                let count = refcount::get(bytes, one.index, order);
                refcount::set(bytes, one.index, order, count + one.mentions);
            }
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
        let counts = self.counts(pages, store, clusters)?.into_iter();
        let last = counts.filter(|(_, mentions, count)| mentions == count);
        Ok(last.map(|(host, ..)| host).collect())
    }

    /// Gives back one reference per mention in `clusters` (sorted).
    pub fn unreference(
        &mut self,
        pages: &mut Pages,
        store: &dyn Store,
        clusters: &[HostOffset],
    ) -> Result<()> {
        let order = self.geometry.refcount_order();
        for in_page in self.place_all(pages, clusters)?.chunk_by(|a, b| a.page == b.page) {
            let bytes = pages.modify(store, in_page[0].page, Kind::RefcountBlock)?;
            for one in in_page {
                let count = refcount::get(bytes, one.index, order);
                let Some(left) = count.checked_sub(one.mentions) else {
                    return Err(Error::corrupt(format!(
                        "cluster {} was in use but free",
                        one.host
                    )));
                };
                refcount::set(bytes, one.index, order, left);
                if left == 0 {
                    self.hint = self.hint.min(one.host.get() >> self.geometry.cluster_bits());
                }
            }
        }
        Ok(())
    }

    /// Each of `clusters` (sorted) once, with how often it was mentioned and its refcount.
    pub fn counts(
        &self,
        pages: &mut Pages,
        store: &dyn Store,
        clusters: &[HostOffset],
    ) -> Result<Vec<(HostOffset, u64, u64)>> {
        let order = self.geometry.refcount_order();
        let counted = self.place_all(pages, clusters)?;
        let mut counts = Vec::with_capacity(counted.len());
        for in_page in counted.chunk_by(|a, b| a.page == b.page) {
            let bytes = pages.load(store, in_page[0].page)?;
            counts.extend(
                in_page
                    .iter()
                    .map(|one| (one.host, one.mentions, refcount::get(&bytes, one.index, order))),
            );
        }
        Ok(counts)
    }

    /// Where the refcounts of `clusters` (sorted) are.
    fn place_all(&self, pages: &Pages, clusters: &[HostOffset]) -> Result<Vec<Counted>> {
        let mut counted = Vec::with_capacity(clusters.len());
        for mentions in clusters.chunk_by(|a, b| a == b) {
            let host = mentions[0];
            let Some((page, index)) = self.place(pages, self.cluster(host))? else {
                return Err(Error::corrupt(format!("cluster {host} is in use but not counted")));
            };
            counted.push(Counted { host, mentions: mentions.len() as u64, page, index });
        }
        Ok(counted)
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
        self.unreference_all_later(old.offset(), old.byte_len());
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
