//! A view resolved through the whole chain: which member holds what.

use super::view::View;
use crate::error::{At, Result};
use crate::image::Content;
use crate::units::{GuestOffset, GuestRange};

/// A run of a view that one member decides on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte and length.
    pub range: GuestRange,
    /// The index in the chain of the member that decides.
    pub member: usize,
    /// What that member holds. [`Content::Unallocated`] means that no member has anything: zeroes.
    pub content: Content,
}

impl Extent {
    /// Whether the run reads as zero without being read.
    pub fn is_zero(&self) -> bool {
        matches!(self.content, Content::Unallocated { .. } | Content::Zero { .. })
    }

    /// Whether reading the run takes decompressing it.
    pub fn is_compressed(&self) -> bool {
        matches!(self.content, Content::Compressed { .. })
    }
}

impl View {
    /// The first extent of `range`, which must not be empty nor end behind the view.
    ///
    /// What follows may well be an extent of the same kind.
    ///
    /// # Errors
    /// Failing reads of tables, and impossible ones.
    pub fn extent(&self, range: GuestRange) -> Result<Extent> {
        let members = self.chain().members();
        let mut index = self.member();
        let mut tree = self.tree();
        let mut len = range.len;
        loop {
            let member = &members[index];
            let run = member.map(tree, GuestRange::new(range.start, len)).at(member.path())?;
            len = run.len;
            let found = |len, content| Extent {
                range: GuestRange::new(range.start, len),
                member: index,
                content,
            };
            if !run.content.is_unallocated() {
                return Ok(found(len, run.content));
            }
            // Behind the end of a shorter member nothing shows through, whatever lies deeper.
            match self.chain().below(index + 1) {
                Some((below, size)) if range.start.get() < size => {
                    len = len.min(size - range.start.get());
                    index += 1;
                    tree = below;
                }
                _ => return Ok(found(len, run.content)),
            }
        }
    }

    /// [`Self::extent`] at the same cost whatever the depth of the chain. For ranges that are read: longer ones may be cut
    /// where the map's pieces end, and of what reads as zero it may tell another reason.
    pub(super) fn look_up(&self, range: GuestRange) -> Result<Extent> {
        let Some(map) = self.map() else { return self.look_up_active(range) };
        let resolved = self.chain().resolved().extent(self, map, range);
        resolved.map_or_else(|| self.extent(range), Ok)
    }

    /// [`Self::look_up`] of the active layer, which may change, while what lies below it does not.
    fn look_up_active(&self, range: GuestRange) -> Result<Extent> {
        let member = &self.chain().members()[self.member()];
        let run = member.map(self.tree(), range).at(member.path())?;
        let own = GuestRange::new(range.start, run.len);
        let shows_through = run.content.is_unallocated();
        match self.chain().view(self.member() + 1) {
            Ok(below) if shows_through && own.start.get() < below.size() => {
                let len = own.len.min(below.size() - own.start.get());
                below.look_up(GuestRange::new(own.start, len))
            }
            _ => Ok(Extent { range: own, member: self.member(), content: run.content }),
        }
    }

    /// All extents of `range` in order, neighbours of one kind not merged.
    ///
    /// In a chain beside a writer they hold only if the snapshot is still there afterwards.
    pub fn extents(&self, range: GuestRange) -> impl Iterator<Item = Result<Extent>> {
        one_by_one(range, |rest| self.extent(rest))
    }

    /// [`Self::extents`], by [`Self::look_up`].
    pub(super) fn look_up_all(&self, range: GuestRange) -> impl Iterator<Item = Result<Extent>> {
        one_by_one(range, |rest| self.look_up(rest))
    }

    /// The first byte at or behind `from` that is not known to be zero.
    ///
    /// # Errors
    /// As [`View::extent`].
    pub fn next_data(&self, from: GuestOffset) -> Result<Option<GuestOffset>> {
        self.next(from, |extent| !extent.is_zero())
    }

    /// The first byte at or behind `from` that is known to be zero without being read; the view's end counts as one.
    ///
    /// # Errors
    /// As [`View::extent`].
    pub fn next_hole(&self, from: GuestOffset) -> Result<GuestOffset> {
        let hole = self.next(from, Extent::is_zero)?;
        Ok(hole.unwrap_or(GuestOffset::new(self.size())))
    }

    fn next(
        &self,
        from: GuestOffset,
        wanted: impl Fn(&Extent) -> bool,
    ) -> Result<Option<GuestOffset>> {
        let len = self.size().saturating_sub(from.get());
        self.look_again()?;
        let mut extents = self.extents(GuestRange::new(from, len));
        self.confirmed(loop {
            match extents.next() {
                Some(Ok(extent)) if wanted(&extent) => break Ok(Some(extent.range.start)),
                Some(Ok(_)) => {}
                Some(Err(error)) => break Err(error),
                None => break Ok(None),
            }
        })
    }

    /// Bytes of `range` that are allocated somewhere in the chain and not known to be zero.
    ///
    /// # Errors
    /// As [`View::extent`].
    pub fn allocated(&self, range: GuestRange) -> Result<u64> {
        self.look_again()?;
        let lens = self.extents(range).map(|extent| {
            let extent = extent?;
            Ok(if extent.is_zero() { 0 } else { extent.range.len })
        });
        self.confirmed(lens.sum())
    }
}

/// The extents of `range`, as `first` finds the first of what is left.
fn one_by_one(
    range: GuestRange,
    first: impl Fn(GuestRange) -> Result<Extent>,
) -> impl Iterator<Item = Result<Extent>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let rest = GuestRange::new(at, range.end() - at);
        if rest.is_empty() {
            return None;
        }
        let extent = first(rest);
        at = match &extent {
            Ok(extent) => extent.range.end(),
            Err(_) => range.end(),
        };
        Some(extent)
    })
}
