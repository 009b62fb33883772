//! Discarding and zeroing.

use super::sync::atomic::Ordering;

use super::entry::{NewEntry, Subclusters};
use super::map::{Content, Run, Tree};
use super::metadata::Prepared;
use super::{Below, Image};
use crate::error::{Doing, Result};
use crate::qcow2::{DataPlace, Version};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// What becomes of the clusters of a zeroed range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// Their space is given back.
    Unmap,
    /// They stay allocated, so that later writes need no new space.
    Keep,
}

/// Zeroes written at once where there is no other way.
const CHUNK: usize = 1 << 20;

impl Image {
    /// Makes `range` of the active disk read as zero.
    ///
    /// Whole clusters or subclusters become zero ones (version 3), so that nothing below ever shows through again;
    /// parts of them are overwritten.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn zero(&self, below: &dyn Below, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.zero_in_steps(below, range, mode).map_err(|error| self.note(error))
    }

    fn zero_in_steps(&self, below: &dyn Below, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.check_inside(range)?;
        self.begin_change()?;
        if range.is_empty() {
            return Ok(());
        }
        // In bounded steps, so that readers and writers elsewhere in a large range need not wait for all of it.
        let step = self.geometry.l2_span().max(CHUNK as u64);
        let mut at = range.start;
        while at < range.end() {
            let end = (at.align_down(step) + step).min(range.end());
            let part = GuestRange::new(at, end - at);
            let guard = self.claim_range(part);
            self.check_still_inside(part)?;
            self.zero_claimed(below, part, mode)?;
            drop(guard);
            self.bound_dirty_metadata()?;
            at = end;
        }
        Ok(())
    }

    /// Makes `range` read as zero; the caller holds its clusters exclusively.
    pub(super) fn zero_claimed(
        &self,
        below: &dyn Below,
        range: GuestRange,
        mode: ZeroMode,
    ) -> Result<()> {
        if self.metadata().data_file_is_raw {
            return self.zero_raw_data(below, range, mode);
        }
        let unit = self.geometry.subcluster_size();
        // The last cluster counts as whole if only the disk's end cuts it.
        let whole = if range.end().get() == self.size() {
            GuestRange::new(range.start, range.widen(unit).end() - range.start)
        } else {
            range
        };
        let Some(whole) = whole.narrow(unit) else {
            return self.write_zeroes(below, range);
        };
        self.write_zeroes(below, GuestRange::new(range.start, whole.start - range.start))?;
        let whole_end = whole.end().min(range.end());
        self.zero_subclusters(below, GuestRange::new(whole.start, whole_end - whole.start), mode)?;
        self.write_zeroes(below, GuestRange::new(whole_end, range.end() - whole_end))
    }

    /// Zeroes subclusters that lie in `range` whole, up to the disk's end.
    fn zero_subclusters(&self, below: &dyn Below, range: GuestRange, mode: ZeroMode) -> Result<()> {
        let mut at = range.start;
        while at < range.end() {
            let run = self.map(Tree::Active, GuestRange::new(at, range.end() - at))?;
            let part = GuestRange::new(at, run.len);
            self.zero_run(below, part, run, mode)?;
            at = part.end();
        }
        Ok(())
    }

    fn zero_run(
        &self,
        below: &dyn Below,
        range: GuestRange,
        run: Run,
        mode: ZeroMode,
    ) -> Result<()> {
        let nothing_below = below.is_zero(range)?;
        if self.header_version() == Version::V2 {
            return match (run.content, mode) {
                (Content::Unallocated { .. }, _) if nothing_below => Ok(()),
                (Content::Data(_) | Content::Compressed { .. }, ZeroMode::Unmap)
                    if nothing_below =>
                {
                    self.change_entries(range, |_| NewEntry::Unallocated)
                }
                // Version 2 has no zero clusters: only real zeroes keep what is below hidden.
                _ => self.write_zeroes(below, range),
            };
        }
        match (run.content, mode) {
            (Content::Unallocated { .. }, _) if nothing_below => Ok(()),
            (Content::Zero { kept: None }, _)
            | (Content::Zero { kept: Some(_) }, ZeroMode::Keep) => Ok(()),
            // A compressed cluster has no subclusters that could differ.
            (Content::Compressed { .. }, _) if !self.is_whole_cluster(range) => {
                self.write_zeroes(below, range)
            }
            (content, mode) => {
                self.change_entries(range, |subclusters| NewEntry::Zero { subclusters, mode })?;
                self.punch_data_file(content, range.len, mode)
            }
        }
    }

    /// Whether `range`, which lies in one cluster, covers all of it that the disk has.
    fn is_whole_cluster(&self, range: GuestRange) -> bool {
        let whole = range.widen(self.geometry.cluster_size());
        range.start == whole.start && range.end().get() == whole.end().get().min(self.size())
    }

    /// Gives the space of `len` bytes in an external data file back, which the disk does not use any more.
    ///
    /// At once, unlike clusters of the image: the place belongs to this part of the disk for good, and might be in use
    /// again by the next flush. Until then the file's tables may still point there, and find zeroes: the new content.
    fn punch_data_file(&self, content: Content, len: u64, mode: ZeroMode) -> Result<()> {
        let (Content::Data(place) | Content::Zero { kept: Some(place) }) = content else {
            return Ok(());
        };
        // Encrypted, a hole would be noise to a reader of the old tables.
        if self.data_place == DataPlace::External
            && mode == ZeroMode::Unmap
            && self.encryption.keeps_zeroes()
        {
            self.punch_data(place.host, len)?;
        }
        Ok(())
    }

    pub(super) fn punch_data(&self, host: HostOffset, len: u64) -> Result<()> {
        let punched = self.data.punch_hole(host, len).doing("give space of its data file back");
        self.unsynced.store(true, Ordering::Release);
        punched
    }

    /// Makes `range` zero in a data file that has to be readable by itself.
    fn zero_raw_data(&self, below: &dyn Below, range: GuestRange, mode: ZeroMode) -> Result<()> {
        if mode == ZeroMode::Unmap && self.encryption.keeps_zeroes() {
            return self.punch_data(HostOffset::new(range.start.get()), range.len);
        }
        self.write_zeroes(below, range)
    }

    /// Changes the entry of each cluster of `range` to what `new` says for its subclusters in the range.
    fn change_entries(
        &self,
        range: GuestRange,
        new: impl Fn(Subclusters) -> NewEntry,
    ) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        // What the last cluster has behind the disk's end goes with it.
        let end = if range.end().get() == self.size() {
            range.widen(cluster_size).end()
        } else {
            range.end()
        };
        let changed = GuestRange::new(range.start, end - range.start)
            .split(cluster_size)
            .try_for_each(|part| {
                let subclusters = Subclusters::touched_by(part, self.geometry);
                self.change_entry(part.start, new(subclusters))
            });
        // Also after an error: some may have changed.
        self.mapping_changed();
        changed
    }

    pub(super) fn change_entry(&self, offset: GuestOffset, new: NewEntry) -> Result<()> {
        loop {
            let mut metadata = self.metadata();
            match metadata.prepare_l2(&*self.store, offset)? {
                Prepared::Ready => return metadata.set_entry(&*self.store, offset, new),
                Prepared::TableFull(full) => {
                    drop(metadata);
                    self.grow_refcount_table(full)?;
                }
            }
        }
    }

    /// Overwrites `range` with zeroes unless it reads as zero already.
    fn write_zeroes(&self, below: &dyn Below, range: GuestRange) -> Result<()> {
        const ZEROES: &[u8] = &[0; CHUNK];
        if range.is_empty() || self.is_zero(below, range)? {
            return Ok(());
        }
        let mut at = range.start;
        while at < range.end() {
            let len = (range.end() - at).min(CHUNK as u64);
            self.write_claimed(below, at, &ZEROES[..len as usize])?;
            at = at + len;
        }
        Ok(())
    }

    fn header_version(&self) -> Version {
        self.metadata().header.version
    }
}
