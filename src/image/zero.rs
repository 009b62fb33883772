//! Discarding and zeroing.

use super::map::{Content, Run, Tree};
use super::metadata::{NewEntry, Prepared};
use super::{Below, Image};
use crate::error::Result;
use crate::qcow2::Version;
use crate::units::{GuestOffset, GuestRange};

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
    /// Whole clusters become zero clusters (version 3), so that nothing below ever shows through again; parts of
    /// clusters are overwritten.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn zero(&self, below: &dyn Below, range: GuestRange, mode: ZeroMode) -> Result<()> {
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
            self.zero_claimed(below, part, mode)?;
            drop(guard);
            self.bound_dirty_metadata()?;
            at = end;
        }
        Ok(())
    }

    fn zero_claimed(&self, below: &dyn Below, range: GuestRange, mode: ZeroMode) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        // The last cluster counts as whole if only the disk's end cuts it.
        let whole = if range.end().get() == self.size() {
            GuestRange::new(range.start, range.widen(cluster_size).end() - range.start)
        } else {
            range
        };
        let Some(whole) = whole.narrow(cluster_size) else {
            return self.write_zeroes(below, range);
        };
        self.write_zeroes(below, GuestRange::new(range.start, whole.start - range.start))?;
        let whole_end = whole.end().min(range.end());
        self.zero_clusters(below, GuestRange::new(whole.start, whole_end - whole.start), mode)?;
        self.write_zeroes(below, GuestRange::new(whole_end, range.end() - whole_end))
    }

    /// Zeroes clusters that lie in `range` whole, up to the disk's end.
    fn zero_clusters(&self, below: &dyn Below, range: GuestRange, mode: ZeroMode) -> Result<()> {
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
            (Content::Data(place), ZeroMode::Keep) if place.copied => self
                .change_entries(range, |distance| {
                    NewEntry::ZeroKeeping(place.advance(distance).host)
                }),
            _ => self.change_entries(range, |_| NewEntry::Zero),
        }
    }

    /// Changes the entry of each cluster of `range` to what `new` says for its distance from the range's start.
    fn change_entries(&self, range: GuestRange, new: impl Fn(u64) -> NewEntry) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        for distance in (0..range.len).step_by(cluster_size as usize) {
            self.change_entry(range.start + distance, new(distance))?;
        }
        self.mapping_changed();
        Ok(())
    }

    fn change_entry(&self, offset: GuestOffset, new: NewEntry) -> Result<()> {
        loop {
            let mut metadata = self.metadata();
            match metadata.prepare_l2(&*self.store, offset)? {
                Prepared::Ready => return metadata.set_entry(&*self.store, offset, new),
                Prepared::TableFull => {
                    drop(metadata);
                    self.grow_refcount_table()?;
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
