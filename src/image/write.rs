//! Writing: in place where the cluster is ours alone, else copy-on-write into a new cluster.
//!
//! An allocating write has three steps. Prepare: the L2 table is ours, clusters are allocated and their refcounts
//! counted. Write: the data goes there, with what the cluster held around it; no lock but the range is held. Commit:
//! the L2 entries point there. A failure before the commit takes the clusters back and changes nothing.

use super::allocate::{Allocation, Allocator, Before, Clusters};
use super::cipher::Encryption;
use super::entry::{NewEntry, Subclusters};
use super::map::{Content, Tree};
use super::metadata::Prepared;
use super::sync::atomic::Ordering;
use super::{Below, Image};
use crate::error::{Doing, Error, Problem, Result};
use crate::qcow2::DataPlace;
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Dirty metadata pages after which a writer flushes, so that a crash loses little and memory is bounded (8 MiB).
const MAX_DIRTY_PAGES: usize = 2048;

/// References that wait to be given back after which a writer flushes (4 MiB).
const MAX_LOST_REFERENCES: usize = 1 << 19;

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
        self.check_still_inside(range)?;
        self.write_claimed(below, offset, data)?;
        drop(guard);
        self.bound_dirty_metadata()
    }

    /// Writes in place if all of `range` is ours alone to overwrite; else writes nothing and answers `false`.
    fn overwrite(&self, range: GuestRange, data: &[u8]) -> Result<bool> {
        if !self.encryption.can_write_alone(range.start, range.len) {
            return Ok(false);
        }
        let _mapping = self.keep_mapping(range);
        self.check_still_inside(range)?;
        let mut places = Vec::with_capacity(1);
        let mut at = range.start;
        while at < range.end() {
            let run = self.map(Tree::Active, GuestRange::new(at, range.end() - at))?;
            match run.content {
                Content::Data(place) if place.copied => places.push((at, place.host, run.len)),
                _ => return Ok(false),
            }
            at = at + run.len;
        }
        let mut rest = data;
        for (guest, host, len) in places {
            let (now, later) = rest.split_at(len as usize);
            self.write_data(&[now], guest, host)?;
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
                    self.write_data(&[now], at, place.host)?;
                    now.len()
                }
                Content::Zero { kept: Some(place) }
                | Content::Unallocated { kept: Some(place) }
                    if place.copied =>
                {
                    let skip = self.geometry.in_cluster(at);
                    let start = HostOffset::new(place.host.get() - skip);
                    let count = self.geometry.clusters(skip + run.len);
                    let reused = Clusters { start, count, before: Before::Unknown };
                    let range = GuestRange::new(at, run.len);
                    // The other subclusters of these clusters hold live data or none.
                    let filled = range.widen(self.geometry.subcluster_size());
                    self.fill(below, filled, at, now, reused)?;
                    self.commit(range, reused)?;
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
        let range = GuestRange::new(offset, room.min(range.len));
        let data = &data[..range.len as usize];
        let filled = self.range_to_fill(range);
        let filled = filled.and_then(|filled| self.fill(below, filled, offset, data, clusters));
        if let Err(error) = filled {
            self.take_back_data(clusters)?;
            return Err(error);
        }
        // A failure from here on must not take the clusters back: some entries may point there.
        self.commit(range, clusters)?;
        Ok(data.len())
    }

    /// What new clusters for a write of `range` must hold: its subclusters, and what of the first and the last cluster
    /// has data elsewhere that moves along.
    fn range_to_fill(&self, range: GuestRange) -> Result<GuestRange> {
        let geometry = self.geometry;
        let around = range.widen(geometry.subcluster_size());
        let (mut start, mut end) = (around.start, around.end());
        let mut metadata = self.metadata();
        let first = range.start.align_down(geometry.cluster_size());
        let last = GuestOffset::new(range.end().get() - 1).align_down(geometry.cluster_size());
        for cluster in [first, last] {
            if let Some(bytes) = metadata.entry(&*self.store, cluster)?.bytes_to_move(geometry) {
                start = start.min(cluster + bytes.start);
                end = end.max(cluster + bytes.end);
            }
        }
        Ok(GuestRange::new(start, end - start))
    }

    /// Has whole clusters of the disk, `range`, filled by `fill`, which is given a part of the range and the place in the file
    /// of its new clusters. Those that they replace are given back.
    ///
    /// # Errors
    /// As [`Image::write`]; of `fill`, by which nothing of that part changes.
    pub fn fill_clusters(
        &self,
        range: GuestRange,
        fill: &dyn Fn(GuestRange, HostOffset) -> Result<()>,
    ) -> Result<()> {
        self.check_inside(range)?;
        self.begin_change()?;
        let guard = self.claim_range(range);
        let cluster_size = self.geometry.cluster_size();
        let mut at = range.start;
        while at < range.end() {
            let to_table_end = self.geometry.l2_span() - at.get() % self.geometry.l2_span();
            let wanted = (range.end() - at).min(to_table_end) / cluster_size;
            let clusters = self.allocate(at, wanted)?;
            let part = GuestRange::new(at, clusters.count * cluster_size);
            let checked = self.metadata().writer()?.0.layout.check_data(clusters.start, part.len);
            let filled = checked.and_then(|()| fill(part, clusters.start));
            self.unsynced.store(true, Ordering::Release);
            if let Err(error) = filled {
                self.take_back_data(clusters)?;
                return Err(error);
            }
            self.commit(part, clusters)?;
            at = part.end();
        }
        drop(guard);
        self.bound_dirty_metadata()
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
        let found = found?;
        let mut metadata = self.metadata();
        let (allocator, pages) = metadata.writer()?;
        allocator.reserve(pages, &*self.store, found)?;
        Ok(found)
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

    /// Prepares the L2 table for `offset` and allocates up to `wanted` neighbouring clusters for the data from there on.
    fn allocate(&self, offset: GuestOffset, wanted: u64) -> Result<Clusters> {
        loop {
            let mut metadata = self.metadata();
            let full = match metadata.prepare_l2(&*self.store, offset)? {
                Prepared::TableFull(full) => full,
                Prepared::Ready if self.data_place == DataPlace::External => {
                    // In a data file each cluster has the place that it has on the disk.
                    let start = offset.align_down(self.geometry.cluster_size()).get();
                    let (start, before) = (HostOffset::new(start), Before::Unknown);
                    return Ok(Clusters { start, count: wanted, before });
                }
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

    /// Gives back clusters for data that nothing points to yet.
    fn take_back_data(&self, clusters: Clusters) -> Result<()> {
        match self.data_place {
            DataPlace::Internal => self.take_back(clusters),
            DataPlace::External => Ok(()),
        }
    }

    /// Gives back clusters of the image that nothing points to yet.
    pub(super) fn take_back(&self, clusters: Clusters) -> Result<()> {
        let mut metadata = self.metadata();
        let (allocator, pages) = metadata.writer()?;
        allocator.take_back(pages, &*self.store, clusters)
    }

    /// Fills `filled` of `clusters`, which are ours and do not hold live data there: with `data` from `offset` on, and
    /// around it with what the disk holds.
    fn fill(
        &self,
        below: &dyn Below,
        filled: GuestRange,
        offset: GuestOffset,
        data: &[u8],
        clusters: Clusters,
    ) -> Result<()> {
        let data_end = offset + data.len() as u64;
        let head = GuestRange::new(filled.start, offset - filled.start);
        let tail = GuestRange::new(data_end, filled.end() - data_end);
        let head_bytes = self.surroundings(below, head, clusters.before)?;
        let tail_bytes = self.surroundings(below, tail, clusters.before)?;
        let start = if head_bytes.is_some() { filled.start } else { offset };
        let host = clusters.start + (start - offset.align_down(self.geometry.cluster_size()));
        let pieces: Vec<&[u8]> = [head_bytes.as_deref(), Some(data), tail_bytes.as_deref()]
            .into_iter()
            .flatten()
            .filter(|piece| !piece.is_empty())
            .collect();
        self.write_data(&pieces, start, host)
    }

    /// What the disk holds in `range`, next to a write; `None` where the new cluster holds it already.
    fn surroundings(
        &self,
        below: &dyn Below,
        range: GuestRange,
        before: Before,
    ) -> Result<Option<Vec<u8>>> {
        let is_there = before == Before::Zeroes && self.encryption.keeps_zeroes();
        if range.is_empty() || is_there && self.is_zero(below, range)? {
            return Ok(None);
        }
        let mut bytes = vec![0; range.len as usize];
        self.read_active(below, range.start, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// Points the L2 entries of `range` to `clusters`, which hold its data by now.
    fn commit(&self, range: GuestRange, clusters: Clusters) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let mut metadata = self.metadata();
        if let Prepared::TableFull(full) = metadata.prepare_l2(&*self.store, range.start)? {
            drop(metadata);
            self.grow_refcount_table(full)?;
            return self.commit(range, clusters);
        }
        let mut host = clusters.start;
        let committed = range.split(cluster_size).try_for_each(|part| {
            let written = Subclusters::touched_by(part, self.geometry);
            metadata.set_entry(&*self.store, part.start, NewEntry::Data { host, written })?;
            host = host + cluster_size;
            Ok(())
        });
        drop(metadata);
        // Also after an error: some may have changed.
        self.mapping_changed();
        committed
    }

    /// Writes guest data from `guest` on to `host`: never to a cluster that holds a table, whatever the L2 entries say.
    fn write_data(&self, pieces: &[&[u8]], guest: GuestOffset, host: HostOffset) -> Result<()> {
        if self.data_place == DataPlace::Internal {
            let len = pieces.iter().map(|piece| piece.len() as u64).sum();
            self.metadata().writer()?.0.layout.check_data(host, len)?;
        }
        let written = match &self.encryption {
            Encryption::None => self.data.write_at(pieces, host).doing("write its data"),
            Encryption::Unlocked(cipher) => cipher.write(&*self.data, guest, host, pieces),
            Encryption::Locked => Err(Error::new(Problem::KeyMissing)),
        };
        // Also after an error: a part may have been written and must be covered by the next sync.
        self.unsynced.store(true, Ordering::Release);
        written
    }

    /// Flushes if much metadata waits to be written. Called with no lock held.
    pub(super) fn bound_dirty_metadata(&self) -> Result<()> {
        self.flush_beyond(MAX_DIRTY_PAGES)
    }

    /// The same for who makes much metadata dirty beside writers: long before they would have to wait for a flush.
    pub(super) fn bound_metadata_beside_writers(&self) -> Result<()> {
        self.flush_beyond(MAX_DIRTY_PAGES / 8)
    }

    fn flush_beyond(&self, most: usize) -> Result<()> {
        let (dirty, lost) = {
            let metadata = self.metadata();
            let lost = metadata.allocator.as_ref().map_or(0, Allocator::lost_references);
            (metadata.pages.dirty_count(), lost)
        };
        if dirty > most || lost > MAX_LOST_REFERENCES { self.flush() } else { Ok(()) }
    }
}
