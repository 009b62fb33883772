//! The maps of immutable views through the whole chain, resolved a piece at a time and kept: a lookup costs the same
//! however deep the chain is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::extents::Extent;
use super::view::View;
use crate::image::{Content, Tree};
use crate::units::{GuestOffset, GuestRange};

/// Bytes of a disk that are resolved at once: what one page of L2 entries maps at the usual cluster size.
const PIECE: u64 = 32 << 20;
/// Bytes of memory for all pieces of all views of a chain.
const MAX_BYTES: usize = 16 << 20;
/// The same for a scratch twin, of which there may be many beside the chain itself.
const MAX_BYTES_OF_TWIN: usize = 1 << 20;

/// The pieces of all views of a chain that were looked at last.
pub(super) struct ResolvedMaps {
    kept: Mutex<Kept>,
    next: AtomicU64,
}

struct Kept {
    pieces: LruCache<Key, Arc<Piece>>,
    bytes: usize,
    max_bytes: usize,
}

/// A view and the number of one of its pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    view: MapId,
    piece: u64,
}

/// Tells the maps of views apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct MapId(u64);

/// The extents of one piece.
struct Piece {
    /// In order and without gaps but for what could not be resolved.
    extents: Box<[Extent]>,
}

impl ResolvedMaps {
    /// Maps of a chain of `members` members, of which nothing is resolved yet.
    pub fn new(members: usize) -> Self {
        Self::within(MAX_BYTES, members)
    }

    /// The same for the chain of a scratch twin.
    pub fn of_twin(members: usize) -> Self {
        Self::within(MAX_BYTES_OF_TWIN, members)
    }

    fn within(max_bytes: usize, members: usize) -> Self {
        let kept = Kept { pieces: LruCache::unbounded(), bytes: 0, max_bytes };
        Self { kept: Mutex::new(kept), next: AtomicU64::new(members as u64) }
    }

    /// The map of the view of member `index`, at the present of that member.
    pub fn of_member(index: usize) -> MapId {
        MapId(index as u64)
    }

    /// The map of a view that has none yet.
    pub fn of_another(&self) -> MapId {
        MapId(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// The first extent of `range`, which must not be empty nor end behind `view`; `None` where tables can't be read: who
    /// looks there without this map finds out why.
    pub fn extent(&self, view: &View, map: MapId, range: GuestRange) -> Option<Extent> {
        let number = range.start.get() / PIECE;
        let key = Key { view: map, piece: number };
        let found = self.kept().pieces.get(&key).cloned();
        let piece = match found {
            Some(piece) => piece,
            None => {
                // Not under the lock: two who need the same piece at the same time both resolve it.
                let start = number * PIECE;
                let len = PIECE.min(view.size() - start);
                let piece = Piece::resolve(view, GuestRange::new(GuestOffset::new(start), len));
                let piece = Arc::new(piece);
                self.kept().insert(key, piece.clone());
                piece
            }
        };
        piece.extent(range)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn insert(&mut self, key: Key, piece: Arc<Piece>) {
        self.bytes += piece.bytes();
        if let Some((_, old)) = self.pieces.push(key, piece) {
            self.bytes -= old.bytes();
        }
        while self.bytes > self.max_bytes && self.pieces.len() > 1 {
            let Some((_, old)) = self.pieces.pop_lru() else { break };
            self.bytes -= old.bytes();
        }
    }
}

impl Piece {
    /// Resolves `range` of `view`, member by member from its own down: what one leaves open, the next may decide.
    fn resolve(view: &View, range: GuestRange) -> Self {
        let mut extents = Vec::new();
        let mut open = vec![range];
        let mut tree = view.tree();
        let members = view.chain().members();
        for (index, member) in members.iter().enumerate().skip(view.member()) {
            let is_last = index + 1 == members.len();
            let mut still_open: Vec<GuestRange> = Vec::new();
            for part in open {
                // Behind the end of a shorter member nothing shows through, whatever lies deeper.
                let inside = match index == view.member() {
                    true => part.len,
                    false => member.size().saturating_sub(part.start.get()).min(part.len),
                };
                let mut at = part.start;
                let end = part.start + inside;
                while at < end {
                    let Ok(run) = member.map(tree, GuestRange::new(at, end - at)) else { break };
                    let range = GuestRange::new(at, run.len);
                    at = range.end();
                    if !run.content.is_unallocated() || is_last {
                        extents.push(Extent { range, member: index, content: run.content });
                        continue;
                    }
                    match still_open.last_mut() {
                        Some(last) if last.end() == range.start => last.len += range.len,
                        _ => still_open.push(range),
                    }
                }
                if inside < part.len && at == end {
                    let range = GuestRange::new(end, part.len - inside);
                    let content = Content::Unallocated { kept: None };
                    extents.push(Extent { range, member: index - 1, content });
                }
            }
            open = still_open;
            tree = Tree::Active;
            if open.is_empty() {
                break;
            }
        }
        extents.sort_unstable_by_key(|extent| extent.range.start);
        extents.dedup_by(|next, last| {
            let goes_on = last.range.end() == next.range.start
                && last.member == next.member
                && last.content.continues_with(last.range.len, next.content);
            if goes_on {
                last.range.len += next.range.len;
            }
            goes_on
        });
        Self { extents: extents.into() }
    }

    /// The extent that `range` begins with, cut to it.
    fn extent(&self, range: GuestRange) -> Option<Extent> {
        let behind = self.extents.partition_point(|extent| extent.range.start <= range.start);
        let extent = self.extents.get(behind.checked_sub(1)?)?;
        let skip = range.start - extent.range.start;
        let len = extent.range.len.checked_sub(skip).filter(|&len| len > 0)?.min(range.len);
        let range = GuestRange::new(range.start, len);
        Some(Extent { range, member: extent.member, content: extent.content.advance(skip) })
    }

    /// Memory in bytes.
    fn bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.extents)
    }
}
