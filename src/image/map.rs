//! Where a disk's bytes are in its image file: the mapping, apart from all data I/O.

use super::Image;
use super::metadata::Metadata;
use super::pages::read_page;
use super::snapshots::SnapshotTree;
use crate::error::Result;
use crate::qcow2::{CompressedCluster, L1Entry, L2Entry, be_u64};
use crate::units::{GuestRange, HostOffset};

/// A run of a disk with one kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Bytes, at least 1.
    pub len: u64,
    /// What they hold.
    pub content: Content,
}

/// What an image has for a run of its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing: the backing file shows through.
    Unallocated,
    /// Zeroes.
    Zero {
        /// Clusters kept for the run; their content does not count.
        kept: Option<Place>,
    },
    /// The bytes in the file from here on.
    Data(Place),
    /// A part of one compressed cluster.
    Compressed {
        /// Where the compressed bytes are.
        cluster: CompressedCluster,
        /// Bytes of the decompressed cluster before the run.
        skip: u64,
    },
}

/// A place in the image file that belongs to a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Where the run's first byte is.
    pub host: HostOffset,
    /// Whether the clusters belong to this run alone, so that they may be written in place.
    pub copied: bool,
}

/// Which point in time of an image is meant.
#[derive(Clone, Copy)]
pub enum Tree<'a> {
    /// The disk as it is now.
    Active,
    /// An internal snapshot.
    Snapshot(&'a SnapshotTree),
}

impl Image {
    /// The first run of `range`, which must not be empty nor end behind the disk.
    ///
    /// A run is at most as long as `range`; what follows may well be a run of the same kind.
    ///
    /// # Errors
    /// Failing reads of tables; impossible entries, which also mark the image corrupt if it is open for writing.
    pub fn map(&self, tree: Tree<'_>, range: GuestRange) -> Result<Run> {
        let snapshot_l1 = match tree {
            Tree::Active => None,
            Tree::Snapshot(snapshot) => Some(snapshot.l1(&*self.store)?),
        };
        loop {
            let mut metadata = self.metadata();
            let lookup = match snapshot_l1 {
                None => metadata.lookup_active(range),
                Some(l1) => metadata.lookup(l1, range),
            };
            let epoch = metadata.pages.epoch();
            let page_size = metadata.pages.page_size();
            drop(metadata);
            let missing = match lookup {
                Ok(Lookup::Found(run)) => return Ok(run),
                Ok(Lookup::Missing(at)) => at,
                Err(error) => return Err(self.note(error)),
            };
            // Read without the lock: nobody else waits for this table. Should a flush come between, the page may be
            // older than the truth and is read again.
            let bytes = read_page(&*self.store, missing, page_size)?;
            let mut metadata = self.metadata();
            if metadata.pages.epoch() == epoch {
                metadata.pages.insert_clean(missing, bytes);
            }
        }
    }
}

/// The answer of the tables in memory.
pub(super) enum Lookup {
    /// The run.
    Found(Run),
    /// The page at this offset must be loaded first.
    Missing(HostOffset),
}

impl Metadata {
    /// The first run of `range` at the present.
    pub(super) fn lookup_active(&mut self, range: GuestRange) -> Result<Lookup> {
        let entry = self.l1.get(self.geometry.l1_index(range.start));
        if let L1Entry::Table { host, .. } = L1Entry::decode(entry, self.geometry)? {
            return self.lookup_l2(host, range);
        }
        Ok(Lookup::Found(self.unallocated_run(self.l1.entries(), range)))
    }

    /// The first run of `range` in the tree that `l1` is the root of.
    pub(super) fn lookup(&mut self, l1: &[u64], range: GuestRange) -> Result<Lookup> {
        let entry = l1.get(self.geometry.l1_index(range.start)).copied().unwrap_or(0);
        match L1Entry::decode(entry, self.geometry)? {
            L1Entry::Table { host, .. } => self.lookup_l2(host, range),
            L1Entry::Unallocated => Ok(Lookup::Found(self.unallocated_run(l1, range))),
        }
    }

    /// The run of absent L2 tables that `range` begins with.
    fn unallocated_run(&self, l1: &[u64], range: GuestRange) -> Run {
        let first = self.geometry.l1_index(range.start);
        let last = self.geometry.l1_index(range.start + (range.len - 1));
        let absent = (first..=last)
            .take_while(|&index| l1.get(index).is_none_or(|&entry| entry == 0))
            .count()
            .max(1) as u64;
        let end = (first as u64 + absent).saturating_mul(self.geometry.l2_span());
        let len = end.min(range.end().get()) - range.start.get();
        Run { len, content: Content::Unallocated }
    }

    /// The first run of `range` in the L2 table at `table`.
    fn lookup_l2(&mut self, table: HostOffset, range: GuestRange) -> Result<Lookup> {
        let geometry = self.geometry;
        let cluster_size = geometry.cluster_size();
        let page_entries = (self.pages.page_size() / 8) as usize;
        let skip = geometry.in_cluster(range.start);
        let first = geometry.l2_index(range.start);
        let end = (first as u64 + geometry.clusters(skip + range.len)).min(geometry.l2_entries());

        let mut run: Option<Run> = None;
        let mut page = None;
        for index in first..end as usize {
            if page.is_none() || index % page_entries == 0 {
                let at = table + (index / page_entries) as u64 * self.pages.page_size();
                page = self.pages.get(at);
                if page.is_none() {
                    match run {
                        None => return Ok(Lookup::Missing(at)),
                        Some(_) => break,
                    }
                }
            }
            let Some(bytes) = &page else { break };
            let raw = be_u64(bytes, index % page_entries);
            match (&mut run, L2Entry::decode(raw, geometry, self.zero_flag)) {
                (None, Ok(entry)) => {
                    let len = cluster_size - skip;
                    run = Some(Run { len, content: Content::new(entry, skip) });
                }
                (None, Err(error)) => return Err(error),
                (Some(run), Ok(entry)) if run.content.continues_with(run.len, entry) => {
                    run.len += cluster_size;
                }
                (Some(_), _) => break,
            }
        }
        let mut run = run.unwrap_or(Run { len: range.len, content: Content::Unallocated });
        run.len = run.len.min(range.len);
        Ok(Lookup::Found(run))
    }
}

impl Content {
    /// What `entry` says of its cluster from byte `skip` on.
    fn new(entry: L2Entry, skip: u64) -> Self {
        let place = |(host, copied)| Place { host: host + skip, copied };
        match entry {
            L2Entry::Unallocated => Self::Unallocated,
            L2Entry::Zero { host } => Self::Zero { kept: host.map(place) },
            L2Entry::Data { host, copied } => Self::Data(place((host, copied))),
            L2Entry::Compressed(cluster) => Self::Compressed { cluster, skip },
        }
    }

    /// Whether a cluster with `entry`, `len` bytes behind the beginning of this run, continues it.
    fn continues_with(self, len: u64, entry: L2Entry) -> bool {
        let follows = |place: Place, host: HostOffset, copied: bool| {
            place.host.checked_add(len) == Some(host) && place.copied == copied
        };
        match (self, entry) {
            (Self::Unallocated, L2Entry::Unallocated)
            | (Self::Zero { kept: None }, L2Entry::Zero { host: None }) => true,
            (Self::Zero { kept: Some(place) }, L2Entry::Zero { host: Some((host, copied)) })
            | (Self::Data(place), L2Entry::Data { host, copied }) => follows(place, host, copied),
            _ => false,
        }
    }
}
