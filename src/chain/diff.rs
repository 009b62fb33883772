//! Where two views differ. What their maps say to be the same is not read.

use std::collections::VecDeque;

use super::extents::Extent;
use super::view::View;
use crate::error::Result;
use crate::image::Content;
use crate::units::{GuestOffset, GuestRange};

/// The unit in which differences are told: the least that a disk can write.
const SECTOR: u64 = 512;
/// Bytes that are read of each view at once.
const CHUNK: u64 = 1 << 20;

impl View {
    /// The ranges in which the two views differ, in order. The shorter one reads as zero behind its end.
    ///
    /// A range is widened to sectors of 512 bytes, and ranges that touch are one. Neither view may be written meanwhile.
    pub fn differences(&self, other: &Self) -> Differences {
        Differences {
            end: self.size().max(other.size()),
            sides: [Side::new(self), Side::new(other)],
            at: 0,
            found: VecDeque::new(),
            last: None,
        }
    }
}

/// See [`View::differences`].
pub struct Differences {
    sides: [Side; 2],
    /// Up to here the views have been compared.
    at: u64,
    /// The end of the longer view.
    end: u64,
    /// Ranges that are complete, of one chunk at most.
    found: VecDeque<GuestRange>,
    /// The last range: what follows may still belong to it.
    last: Option<GuestRange>,
}

impl Iterator for Differences {
    type Item = Result<GuestRange>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.found.is_empty() && self.at < self.end {
            if let Err(error) = self.step() {
                (self.at, self.last) = (self.end, None);
                return Some(Err(error));
            }
        }
        self.found.pop_front().or_else(|| self.last.take()).map(Ok)
    }
}

impl Differences {
    /// Compares the next run in which each view has one kind of content, or a chunk of it.
    fn step(&mut self) -> Result<()> {
        let (at, end) = (self.at, self.end);
        let [a, b] = &mut self.sides;
        let (first, second) = (a.piece(at, end)?, b.piece(at, end)?);
        let range = GuestRange::new(GuestOffset::new(at), first.len.min(second.len));
        if first.is_same(&second) {
            self.at = range.end().get();
            return Ok(());
        }
        let range = GuestRange::new(range.start, range.len.min(CHUNK));
        let (first, second) = (a.bytes(range)?, b.bytes(range)?);
        if first != second {
            note_sectors(range, first, second, |sector| {
                // The last sector of a disk can be a part of one.
                let len = sector.len.min(end - sector.start.get());
                let sector = GuestRange::new(sector.start, len);
                match &mut self.last {
                    Some(last) if last.end() >= sector.start => {
                        last.len = sector.end() - last.start;
                    }
                    last => self.found.extend(last.replace(sector)),
                }
            });
        }
        self.at = range.end().get();
        Ok(())
    }
}

/// Calls `note` with every sector of `range` in which the bytes differ.
fn note_sectors(range: GuestRange, first: &[u8], second: &[u8], mut note: impl FnMut(GuestRange)) {
    let mut at = 0;
    while at < range.len {
        let sector = GuestRange::new(range.start + at, 1).widen(SECTOR);
        let next = (sector.end() - range.start).min(range.len);
        let part = at as usize..next as usize;
        if first[part.clone()] != second[part] {
            note(sector);
        }
        at = next;
    }
}

/// One of the two views, with a cursor.
struct Side {
    view: View,
    /// The run of the view in which the cursor is.
    extent: Option<Extent>,
    buffer: Vec<u8>,
}

impl Side {
    fn new(view: &View) -> Self {
        Self { view: view.clone(), extent: None, buffer: Vec::new() }
    }

    /// What the view has at `at`, up to `end` at most, which may be behind the view's own end.
    fn piece(&mut self, at: u64, end: u64) -> Result<Piece<'_>> {
        let size = self.view.size();
        if at >= size {
            return Ok(Piece { view: &self.view, len: end - at, kind: PieceKind::Zero });
        }
        let start = GuestOffset::new(at);
        let extent = match self.extent.filter(|extent| extent.range.end() > start) {
            Some(extent) => extent,
            None => *self.extent.insert(self.view.extent(GuestRange::new(start, size - at))?),
        };
        let kind = if extent.is_zero() { PieceKind::Zero } else { PieceKind::of(&extent, start) };
        Ok(Piece { view: &self.view, len: extent.range.end() - start, kind })
    }

    /// The bytes of `range`, zeroes behind the view's end.
    fn bytes(&mut self, range: GuestRange) -> Result<&[u8]> {
        let len = range.len as usize;
        if self.buffer.len() < len {
            self.buffer.resize(len, 0);
        }
        let bytes = &mut self.buffer[..len];
        self.view.read(range.start, bytes)?;
        Ok(bytes)
    }
}

/// A run of a view from the cursor on.
struct Piece<'a> {
    view: &'a View,
    len: u64,
    kind: PieceKind,
}

/// Where the bytes of a run come from.
#[derive(PartialEq, Eq)]
enum PieceKind {
    Zero,
    Stored { member: usize, content: Content },
}

impl PieceKind {
    /// What `extent` has from `at` on, which is inside it.
    fn of(extent: &Extent, at: GuestOffset) -> Self {
        let before = at - extent.range.start;
        let content = match extent.content {
            Content::Data(mut place) => {
                place.host = place.host + before;
                Content::Data(place)
            }
            Content::Compressed { cluster, skip } => {
                Content::Compressed { cluster, skip: skip + before }
            }
            other => other,
        };
        Self::Stored { member: extent.member, content }
    }
}

impl Piece<'_> {
    /// Whether both are known to hold the same bytes without being read, as far as they reach together.
    fn is_same(&self, other: &Self) -> bool {
        match (&self.kind, &other.kind) {
            (PieceKind::Zero, PieceKind::Zero) => true,
            (
                PieceKind::Stored { member, content },
                PieceKind::Stored { member: other_member, content: other_content },
            ) => {
                let mine = &self.view.chain().members()[*member];
                let others = &other.view.chain().members()[*other_member];
                // The same file in another format is another disk.
                mine.store().id() == others.store().id()
                    && mine.format() == others.format()
                    && is_same_place(*content, *other_content)
            }
            _ => false,
        }
    }
}

/// Whether two runs of one file begin at the same bytes; whom the clusters belong to does not matter.
fn is_same_place(first: Content, second: Content) -> bool {
    match (first, second) {
        (Content::Data(first), Content::Data(second)) => first.host == second.host,
        (Content::Compressed { .. }, Content::Compressed { .. }) => first == second,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sectors(start: u64, first: &[u8], second: &[u8]) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        let range = GuestRange::new(GuestOffset::new(start), first.len() as u64);
        note_sectors(range, first, second, |sector| found.push((sector.start.get(), sector.len)));
        found
    }

    #[test]
    fn a_byte_that_differs_makes_its_whole_sector_differ() {
        let (zeroes, mut bytes) = (vec![0; 2048], vec![0; 2048]);
        bytes[0] = 1;
        bytes[1535] = 1;
        assert_eq!(sectors(4096, &zeroes, &bytes), [(4096, 512), (5120, 512)]);
        assert_eq!(sectors(4096, &zeroes, &zeroes), []);
    }

    #[test]
    fn a_run_that_begins_inside_a_sector_is_told_in_whole_sectors() {
        let (zeroes, mut bytes) = (vec![0; 600], vec![0; 600]);
        bytes[0] = 1;
        bytes[599] = 1;
        assert_eq!(sectors(1000, &zeroes, &bytes), [(512, 512), (1536, 512)]);
    }
}
