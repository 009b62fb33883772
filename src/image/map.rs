//! Where a disk's bytes are in its image file: the mapping, apart from all data I/O.

use super::Image;
use super::entry::ClusterEntry;
use super::metadata::Metadata;
use super::pages::read_page;
use super::snapshots::{SnapshotL1, SnapshotTree};
use crate::error::{Error, Result};
use crate::qcow2::{CompressedCluster, DataPlace, L1Entry, be_u64};
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
    Unallocated {
        /// A part of a cluster that is allocated for other subclusters; its content does not count.
        kept: Option<Place>,
    },
    /// Zeroes.
    Zero {
        /// Clusters kept for the run; their content does not count.
        kept: Option<Place>,
    },
    /// The bytes in the image, or in its data file, from here on.
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
        let _in_use = match tree {
            Tree::Active => None,
            Tree::Snapshot(snapshot) => Some(snapshot.keep()?),
        };
        loop {
            let mut metadata = self.metadata();
            let lookup = match tree {
                Tree::Active => metadata.lookup_active(range),
                Tree::Snapshot(snapshot) => metadata.lookup_snapshot(snapshot.l1(), range),
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

/// Whose an L2 table is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TableOwner {
    /// The active layer's alone.
    Active,
    /// A snapshot's, too, or only.
    Shared,
}

impl Metadata {
    /// The first run of `range` at the present.
    pub(super) fn lookup_active(&mut self, range: GuestRange) -> Result<Lookup> {
        let first = self.geometry.l1_index(range.start);
        if let L1Entry::Table { host, copied } = L1Entry::decode(self.l1.get(first), self.geometry)?
        {
            // Whoever shares a table shares its clusters, whatever their flags say. A data file has no sharers.
            let is_own = copied && !self.is_frozen(first) || self.rules.data == DataPlace::External;
            let owner = if is_own { TableOwner::Active } else { TableOwner::Shared };
            return self.lookup_l2(host, owner, range);
        }
        // A table may be shorter than the disk: behind its end nothing is allocated.
        let rest = self.l1.entries().get(first..).unwrap_or_default();
        let absent = rest.iter().position(|&entry| entry != 0);
        Ok(Lookup::Found(self.unallocated_run(range, first, absent)))
    }

    /// The first run of `range` in a snapshot.
    fn lookup_snapshot(&mut self, l1: SnapshotL1, range: GuestRange) -> Result<Lookup> {
        let first = self.geometry.l1_index(range.start);
        if first >= l1.entries {
            return Ok(Lookup::Found(self.unallocated_run(range, first, None)));
        }
        let at = first as u64 * 8;
        let in_page = at % self.pages.page_size();
        l1.check(self.geometry)?;
        let page_at = l1.offset + (at - in_page);
        let Some(page) = self.pages.get(page_at) else { return Ok(Lookup::Missing(page_at)) };
        let entries = &page[in_page as usize..];
        if let L1Entry::Table { host, .. } = L1Entry::decode(be_u64(entries, 0), self.geometry)? {
            return self.lookup_l2(host, TableOwner::Shared, range);
        }
        // What is behind this page, or behind the table in it, is another run.
        let here = (entries.len() / 8).min(l1.entries - first);
        let absent = (0..here).find(|&index| be_u64(entries, index) != 0);
        Ok(Lookup::Found(self.unallocated_run(range, first, Some(absent.unwrap_or(here)))))
    }

    /// The run of `absent` L2 tables from `first` on that `range` begins with; all of it if that is `None`.
    fn unallocated_run(&self, range: GuestRange, first: usize, absent: Option<usize>) -> Run {
        let end = absent.map_or(u64::MAX, |absent| {
            ((first + absent.max(1)) as u64).saturating_mul(self.geometry.l2_span())
        });
        let len = end.min(range.end().get()) - range.start.get();
        Run { len, content: Content::Unallocated { kept: None } }
    }

    /// The first run of `range` in the L2 table at `table`.
    fn lookup_l2(
        &mut self,
        table: HostOffset,
        owner: TableOwner,
        range: GuestRange,
    ) -> Result<Lookup> {
        let geometry = self.geometry;
        let unit = geometry.subcluster_size();
        let units_per_cluster = geometry.cluster_size() / unit;
        let in_table = range.start.get() % geometry.l2_span();
        let (first, skip) = (in_table / unit, in_table % unit);
        let end = (first + (skip + range.len).div_ceil(unit)).min(geometry.l2_span() / unit);

        let mut run: Option<Run> = None;
        let mut page = None;
        let mut entry = None;
        for index in first..end {
            let (cluster, subcluster) = (index / units_per_cluster, index % units_per_cluster);
            if entry.is_none() || subcluster == 0 {
                let at = cluster * geometry.l2_entry_len();
                let in_page = at % self.pages.page_size();
                if page.is_none() || in_page == 0 {
                    let page_at = table + (at - in_page);
                    page = self.pages.get(page_at);
                    if page.is_none() && run.is_none() {
                        return Ok(Lookup::Missing(page_at));
                    }
                }
                let Some(bytes) = &page else { break };
                let decoded =
                    ClusterEntry::decode(&bytes[in_page as usize..], geometry, self.rules);
                entry = match (decoded, &run) {
                    (Ok(entry), _) if owner == TableOwner::Shared => Some(entry.shared()),
                    (Ok(entry), _) => Some(entry),
                    (Err(error), None) => return Err(error),
                    (Err(_), Some(_)) => None,
                };
            }
            let Some(entry) = entry else { break };
            let guest = range.start.get() - skip + (index - first) * unit;
            match &mut run {
                None => {
                    let content = entry.content(subcluster, skip, geometry);
                    self.check_raw_place(content, guest + skip)?;
                    let len = match content {
                        Content::Compressed { skip, .. } => geometry.cluster_size() - skip,
                        _ => unit - skip,
                    };
                    run = Some(Run { len, content });
                }
                Some(run) => {
                    let content = entry.content(subcluster, 0, geometry);
                    if !run.content.continues_with(run.len, content)
                        || self.check_raw_place(content, guest).is_err()
                    {
                        break;
                    }
                    run.len += unit;
                }
            }
        }
        let unallocated = Content::Unallocated { kept: None };
        let mut run = run.unwrap_or(Run { len: range.len, content: unallocated });
        run.len = run.len.min(range.len);
        Ok(Lookup::Found(run))
    }

    /// In a raw external data file each byte is where the guest has it.
    fn check_raw_place(&self, content: Content, guest: u64) -> Result<()> {
        match content {
            Content::Data(place) if self.data_file_is_raw && place.host.get() != guest => {
                Err(Error::corrupt(format!(
                    "guest offset {guest:#x} is at {} of a raw data file",
                    place.host
                )))
            }
            _ => Ok(()),
        }
    }
}

impl Place {
    /// The place `bytes` further on.
    pub(super) fn advance(self, bytes: u64) -> Self {
        Self { host: self.host + bytes, ..self }
    }
}

impl Content {
    /// Whether nothing is there, so that the backing file shows through.
    pub fn is_unallocated(self) -> bool {
        matches!(self, Self::Unallocated { .. })
    }

    /// The content `bytes` further on in the same run.
    pub fn advance(self, bytes: u64) -> Self {
        let place = |place: Place| place.advance(bytes);
        match self {
            Self::Unallocated { kept } => Self::Unallocated { kept: kept.map(place) },
            Self::Zero { kept } => Self::Zero { kept: kept.map(place) },
            Self::Data(data) => Self::Data(place(data)),
            Self::Compressed { cluster, skip } => Self::Compressed { cluster, skip: skip + bytes },
        }
    }

    /// Whether `next` goes on where this content ends after `len` bytes.
    pub fn continues_with(self, len: u64, next: Self) -> bool {
        let follows = |place: Place, next: Place| {
            place.host.checked_add(len) == Some(next.host) && place.copied == next.copied
        };
        match (self, next) {
            (Self::Unallocated { kept }, Self::Unallocated { kept: next })
            | (Self::Zero { kept }, Self::Zero { kept: next }) => match (kept, next) {
                (None, None) => true,
                (Some(place), Some(next)) => follows(place, next),
                _ => false,
            },
            (Self::Data(place), Self::Data(next)) => follows(place, next),
            _ => false,
        }
    }
}
