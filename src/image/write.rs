//! Writing: in place where the cluster is ours alone, else copy-on-write into a new cluster.
//!
//! An allocating write has three steps. Prepare: the L2 table is ours, clusters are allocated and their refcounts
//! counted. Write: the data goes there, with what the cluster held around it; no lock but the range is held. Commit:
//! the L2 entries point there. A failure before the commit takes the clusters back and changes nothing.

use super::allocate::{Allocation, Before, Clusters};
use super::map::{Content, Tree};
use super::metadata::{NewEntry, Prepared};
use super::sync::atomic::Ordering;
use super::{Below, Image};
use crate::error::{Doing, Result};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Dirty metadata pages after which a writer flushes, so that a crash loses little and memory is bounded (8 MiB).
const MAX_DIRTY_PAGES: usize = 2048;

impl Image {
    /// Writes `data` at `offset` of the active disk.
    ///
    /// # Errors
    /// A range outside the disk; no space (the disk is then as before, or partly written as on any disk); an image
    /// that takes no writes.
    pub fn write(&self, below: &dyn Below, offset: GuestOffset, data: &[u8]) -> Result<()> {
        self.write_anywhere(below, offset, data).map_err(|error| self.note(error))
    }

    fn write_anywhere(&self, below: &dyn Below, offset: GuestOffset, data: &[u8]) -> Result<()> {
        let range = GuestRange::new(offset, data.len() as u64);
        self.check_inside(range)?;
        self.begin_change()?;
        if range.is_empty() || self.overwrite(range, data)? {
            return Ok(());
        }
        let guard = self.claim_range(range);
        self.write_claimed(below, offset, data)?;
        drop(guard);
        self.bound_dirty_metadata()
    }

    /// Writes in place if all of `range` is ours alone to overwrite; else writes nothing and answers `false`.
    fn overwrite(&self, range: GuestRange, data: &[u8]) -> Result<bool> {
        let _mapping = self.keep_mapping(range);
        let mut places = Vec::with_capacity(1);
        let mut at = range.start;
        while at < range.end() {
            let run = self.map(Tree::Active, GuestRange::new(at, range.end() - at))?;
            match run.content {
                Content::Data(place) if place.copied => places.push((place.host, run.len)),
                _ => return Ok(false),
            }
            at = at + run.len;
        }
        let mut rest = data;
        for (host, len) in places {
            let (now, later) = rest.split_at(len as usize);
            self.write_data(&[now], host)?;
            rest = later;
        }
        Ok(true)
    }

    /// Writes `data` at `offset`; the caller holds the range's clusters exclusively.
    pub(super) fn write_claimed(
        &self,
        below: &dyn Below,
        offset: GuestOffset,
        data: &[u8],
    ) -> Result<()> {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let run = self.map(Tree::Active, GuestRange::new(at, rest.len() as u64))?;
            let (now, _) = rest.split_at(run.len as usize);
            let written = match run.content {
                Content::Data(place) if place.copied => {
                    self.write_data(&[now], place.host)?;
                    now.len()
                }
                Content::Zero { kept: Some(place) } if place.copied => {
                    let skip = self.geometry.in_cluster(at);
                    let start = HostOffset::new(place.host.get() - skip);
                    let count = self.geometry.clusters(skip + run.len);
                    let reused = Clusters { start, count, before: Before::Unknown };
                    self.fill_clusters(below, at, now, reused)?;
                    self.commit(at, reused)?;
                    now.len()
                }
                _ => self.write_allocating(below, at, now)?,
            };
            at = at + written as u64;
            rest = &rest[written..];
        }
        Ok(())
    }

    /// Writes the beginning of `data`, which lies in one L2 table, to new clusters. Answers how many bytes.
    fn write_allocating(
        &self,
        below: &dyn Below,
        offset: GuestOffset,
        data: &[u8],
    ) -> Result<usize> {
        let range = GuestRange::new(offset, data.len() as u64);
        let skip = self.geometry.in_cluster(offset);
        // A run of absent L2 tables can be longer than one table.
        let to_table_end = self.geometry.l2_span() - offset.get() % self.geometry.l2_span();
        let wanted = self.geometry.clusters(skip + range.len.min(to_table_end));
        let clusters = self.allocate(offset, wanted)?;
        let room = clusters.count * self.geometry.cluster_size() - skip;
        let len = room.min(range.len) as usize;
        if let Err(error) = self.fill_clusters(below, offset, &data[..len], clusters) {
            self.take_back(clusters)?;
            return Err(error);
        }
        // A failure from here on must not take the clusters back: some entries may point there.
        self.commit(offset, clusters)?;
        Ok(len)
    }

    /// Allocates `count` clusters that lie one behind the other, for a table.
    pub(super) fn allocate_contiguous(&self, count: u64) -> Result<Clusters> {
        let cluster_size = self.geometry.cluster_size();
        // What is in the way of a long run is held until one is found, so that the search gets on.
        let mut fragments: Vec<Clusters> = Vec::new();
        let found = loop {
            let have = fragments.last().map_or(0, |run| run.count);
            let more = match self.allocate_any(count - have) {
                Ok(more) => more,
                Err(error) => break Err(error),
            };
            match fragments.last_mut() {
                Some(run) if run.start + run.count * cluster_size == more.start => {
                    run.count += more.count;
                }
                _ => fragments.push(more),
            }
            match fragments.pop() {
                Some(run) if run.count >= count => break Ok(run),
                run => fragments.extend(run),
            }
        };
        for fragment in fragments {
            self.take_back(fragment)?;
        }
        found
    }

    /// Allocates between 1 and `wanted` neighbouring clusters.
    fn allocate_any(&self, wanted: u64) -> Result<Clusters> {
        loop {
            let mut metadata = self.metadata();
            let (allocator, pages) = metadata.writer()?;
            match allocator.allocate(pages, &*self.store, wanted)? {
                Allocation::Run(run) => return Ok(run),
                Allocation::TableFull(full) => {
                    drop(metadata);
                    self.grow_refcount_table(full)?;
                }
            }
        }
    }

    /// Prepares the L2 table for `offset` and allocates up to `wanted` neighbouring clusters.
    fn allocate(&self, offset: GuestOffset, wanted: u64) -> Result<Clusters> {
        loop {
            let mut metadata = self.metadata();
            let full = match metadata.prepare_l2(&*self.store, offset)? {
                Prepared::TableFull(full) => full,
                Prepared::Ready => {
                    let (allocator, pages) = metadata.writer()?;
                    match allocator.allocate(pages, &*self.store, wanted)? {
                        Allocation::Run(run) => return Ok(run),
                        Allocation::TableFull(full) => full,
                    }
                }
            };
            drop(metadata);
            self.grow_refcount_table(full)?;
        }
    }

    /// Gives back clusters that nothing points to yet.
    pub(super) fn take_back(&self, clusters: Clusters) -> Result<()> {
        let mut metadata = self.metadata();
        let (allocator, pages) = metadata.writer()?;
        allocator.take_back(pages, &*self.store, clusters)
    }

    /// Writes `data` into `clusters`, which are ours and do not hold live data, with what the disk holds around it.
    fn fill_clusters(
        &self,
        below: &dyn Below,
        offset: GuestOffset,
        data: &[u8],
        clusters: Clusters,
    ) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let start = offset.align_down(cluster_size);
        let end = start + clusters.count * cluster_size;
        let data_end = offset + data.len() as u64;
        let head = GuestRange::new(start, offset - start);
        let tail = GuestRange::new(data_end, end - data_end);
        let head_bytes = self.surroundings(below, head, clusters.before)?;
        let tail_bytes = self.surroundings(below, tail, clusters.before)?;
        let host = match &head_bytes {
            Some(_) => clusters.start,
            None => clusters.start + head.len,
        };
        let pieces: Vec<&[u8]> = [head_bytes.as_deref(), Some(data), tail_bytes.as_deref()]
            .into_iter()
            .flatten()
            .filter(|piece| !piece.is_empty())
            .collect();
        self.write_data(&pieces, host)
    }

    /// What the disk holds in `range`, next to a write; `None` where the new cluster holds it already.
    fn surroundings(
        &self,
        below: &dyn Below,
        range: GuestRange,
        before: Before,
    ) -> Result<Option<Vec<u8>>> {
        if range.is_empty() || before == Before::Zeroes && self.is_zero(below, range)? {
            return Ok(None);
        }
        let mut bytes = vec![0; range.len as usize];
        self.read_active(below, range.start, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// Points the L2 entries from the cluster at `offset` on to `clusters`.
    fn commit(&self, offset: GuestOffset, clusters: Clusters) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let start = offset.align_down(cluster_size);
        let mut metadata = self.metadata();
        if let Prepared::TableFull(full) = metadata.prepare_l2(&*self.store, start)? {
            drop(metadata);
            self.grow_refcount_table(full)?;
            return self.commit(start, clusters);
        }
        for index in 0..clusters.count {
            let distance = index * cluster_size;
            let new = NewEntry::Data(clusters.start + distance);
            metadata.set_entry(&*self.store, start + distance, new)?;
        }
        drop(metadata);
        self.mapping_changed();
        Ok(())
    }

    /// Writes guest data: never to a cluster that holds a table, whatever the L2 entries say.
    fn write_data(&self, pieces: &[&[u8]], host: HostOffset) -> Result<()> {
        let len = pieces.iter().map(|piece| piece.len() as u64).sum();
        self.metadata().writer()?.0.layout.check_data(host, len)?;
        let written = self.store.write_at(pieces, host).doing("write its data");
        // Also after an error: a part may have been written and must be covered by the next sync.
        self.unsynced.store(true, Ordering::Release);
        written
    }

    /// Flushes if much metadata waits to be written. Called with no lock held.
    pub(super) fn bound_dirty_metadata(&self) -> Result<()> {
        let waiting = self.metadata().pages.dirty_count();
        if waiting > MAX_DIRTY_PAGES { self.flush() } else { Ok(()) }
    }
}
