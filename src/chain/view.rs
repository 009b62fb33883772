//! One readable point in time, flat: the active layer, a member with all below it, or a snapshot.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Chain;
use super::resolved::{MapId, ResolvedMaps};
use super::together::{Piece, read_together};
use crate::error::{At, Doing, Error, Problem, Result};
use crate::image::{Below, Image, RangeGuard, SnapshotInUse, SnapshotTree, Tree, ZeroMode};
use crate::store::MappedRun;
use crate::units::{GuestOffset, GuestRange};

/// A read of fewer bytes is done as its runs are found.
const WORTH_GATHERING: u64 = 128 << 10;

/// A view of an open chain.
#[derive(Clone)]
pub struct View {
    chain: Arc<Chain>,
    member: usize,
    snapshot: Option<Arc<SnapshotTree>>,
    /// Where its resolved map is kept, if it can't change.
    map: Option<MapId>,
}

impl View {
    pub(super) fn new(
        chain: Arc<Chain>,
        member: usize,
        snapshot: Option<Arc<SnapshotTree>>,
    ) -> Self {
        let map = match &snapshot {
            // Below a twin there is no other view of that member.
            Some(_) if member == 1 && chain.below_top.is_some() => {
                Some(ResolvedMaps::of_member(member))
            }
            Some(_) => Some(chain.resolved().of_another()),
            None if member == 0 && (chain.is_writable() || chain.is_beside_writer()) => None,
            None => Some(ResolvedMaps::of_member(member)),
        };
        Self { chain, member, snapshot, map }
    }

    /// The chain that the view belongs to.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Index of its member.
    pub fn member(&self) -> usize {
        self.member
    }

    /// Its snapshot, if it is one.
    pub fn snapshot(&self) -> Option<&SnapshotTree> {
        self.snapshot.as_deref()
    }

    /// Its snapshot, to make a view of it in another part of the chain.
    pub fn snapshot_tree(&self) -> Option<Arc<SnapshotTree>> {
        self.snapshot.clone()
    }

    /// Size in bytes: the view's own, which need not be that of its chain today.
    pub fn size(&self) -> u64 {
        match &self.snapshot {
            Some(snapshot) => snapshot.size(),
            None => self.chain.members()[self.member].size(),
        }
    }

    /// All of it.
    pub fn range(&self) -> GuestRange {
        GuestRange::new(GuestOffset::ZERO, self.size())
    }

    /// When it was made: the snapshot's time, or the last change of the member's file.
    ///
    /// # Errors
    /// The file can't be looked at.
    pub fn time(&self) -> Result<SystemTime> {
        let member = &self.chain.members()[self.member];
        match &self.snapshot {
            None => member.store().modified().doing("look at it").at(member.path()),
            Some(snapshot) => {
                let entry = snapshot.entry();
                let nanoseconds = entry.date_nanoseconds.min(999_999_999);
                Ok(UNIX_EPOCH + Duration::new(entry.date_seconds.into(), nanoseconds))
            }
        }
    }

    /// Whether this is the active layer, open for writing.
    pub fn is_writable(&self) -> bool {
        self.writable_image().is_ok()
    }

    /// Whether this is an active layer that another process may write: its bytes may be half of a change.
    pub fn is_torn(&self) -> bool {
        self.member == 0 && self.snapshot.is_none() && self.chain.is_beside_writer()
    }

    /// Grows whenever the mapping of the view changes; never for an immutable one.
    pub fn generation(&self) -> u64 {
        self.writable_image().map_or(0, Image::generation)
    }

    /// Fills `buf` with the bytes from `offset` on; behind the end of the view they are zero.
    ///
    /// # Errors
    /// Failing reads, and corruption.
    pub fn read(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let inside = |len: u64| self.size().saturating_sub(offset.get()).min(len);
        let kept = inside(buf.len() as u64);
        let _in_use = self.keep_snapshot()?;
        self.look_again()?;
        let _mapping = self.keep_mapping(GuestRange::new(offset, kept));
        // Again: the disk may have become smaller while this waited.
        let range = GuestRange::new(offset, inside(kept));
        let (buf, behind) = buf.split_at_mut(range.len as usize);
        behind.fill(0);
        self.confirmed(self.read_inside(range, buf))
    }

    /// Fills `buf` with the bytes of `range`, which ends within the view.
    fn read_inside(&self, range: GuestRange, mut buf: &mut [u8]) -> Result<()> {
        let mut pieces = self.look_up_all(range).map(|extent| {
            let extent = extent?;
            let (bytes, rest) = mem::take(&mut buf).split_at_mut(extent.range.len as usize);
            buf = rest;
            Ok(Piece { extent, bytes })
        });
        if range.len < WORTH_GATHERING {
            return pieces.try_for_each(|piece| piece?.read(&self.chain));
        }
        let pieces = pieces.collect::<Result<_>>()?;
        read_together(&self.chain, pieces)
    }

    /// The bytes of `range` without copying them, if they are all in one run of a file and the view can't change.
    pub fn mapped(&self, range: GuestRange) -> Option<MappedRun> {
        self.map?;
        if self.snapshot.is_some() && self.member == 0 && self.chain.is_writable() {
            // It may be deleted while the map is in use, and its clusters written by others.
            return None;
        }
        let extent = self.look_up(range).ok().filter(|extent| extent.range == range)?;
        if extent.member == 0 && self.chain.is_beside_writer() {
            return None;
        }
        self.confirmed(Ok(())).ok()?;
        self.chain.members()[extent.member].mapped_content(extent.content, range.len)
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// [`Problem::ReadOnly`] for any view but the active layer of a chain open for writing; see [`Image::write`].
    pub fn write(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        self.change(|image, below| image.write(below, offset, data))
    }

    /// Makes `range` read as zero.
    ///
    /// # Errors
    /// As [`View::write`].
    pub fn zero(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.change(|image, below| image.zero(below, range, mode))
    }

    /// Makes the view `size` bytes long; new bytes read as zero.
    ///
    /// # Errors
    /// As [`View::write`]; see [`Image::grow`].
    pub fn grow(&self, size: u64) -> Result<()> {
        self.change(|image, below| image.grow(below, size))
    }

    /// Cuts the view to `size` bytes. What is behind is lost.
    ///
    /// # Errors
    /// As [`View::write`]; see [`Image::shrink`].
    pub fn shrink(&self, size: u64) -> Result<()> {
        self.change(|image, below| image.shrink(below, size))
    }

    fn change(&self, f: impl FnOnce(&Image, &dyn Below) -> Result<()>) -> Result<()> {
        let path = self.chain.members()[self.member].path();
        let image = self.writable_image().at(path)?;
        let _in_use = self.keep_snapshot()?;
        f(image, &Backing::of(&self.chain)).at(path)
    }

    fn writable_image(&self) -> Result<&Image> {
        match (self.member, &self.snapshot, self.chain.active_image()) {
            (0, None, Some(image)) if image.is_writable() => Ok(image),
            (0, None, Some(image)) if image.is_retired() => Err(Error::new(Problem::Retired)),
            _ => Err(Error::new(Problem::ReadOnly)),
        }
    }

    /// The active layer's mapping must not change under a reader; everything else can't.
    fn keep_mapping(&self, range: GuestRange) -> Option<RangeGuard<'_>> {
        self.writable_image().ok().map(|image| image.keep_mapping(range))
    }

    /// A snapshot must not be deleted under a reader, be it a scratch twin's.
    fn keep_snapshot(&self) -> Result<Option<SnapshotInUse<'_>>> {
        let path = self.chain.members()[self.member].path();
        let snapshot = self.snapshot.as_ref().or(self.chain.below_top.as_ref());
        snapshot.map(|snapshot| snapshot.keep()).transpose().at(path)
    }

    /// `found`, which was found by looking at the view, unless that was a snapshot that another process has deleted: then
    /// it may be anything, and so may an error.
    pub(super) fn confirmed<T>(&self, found: Result<T>) -> Result<T> {
        let member = &self.chain.members()[self.member];
        match (&self.snapshot, member.image()) {
            (Some(snapshot), Some(image)) => image.confirm(snapshot).at(member.path()).and(found),
            _ => found,
        }
    }

    /// What is remembered of an active layer that another process may write is worth nothing.
    pub(super) fn look_again(&self) -> Result<()> {
        match self.chain.active_image().filter(|_| self.is_torn()) {
            Some(image) => image.look_again().at(self.chain.members()[0].path()),
            None => Ok(()),
        }
    }

    /// Where its resolved map is kept, if it can't change.
    pub(super) fn map(&self) -> Option<MapId> {
        self.map
    }

    pub(super) fn tree(&self) -> Tree<'_> {
        match &self.snapshot {
            Some(snapshot) => Tree::Snapshot(snapshot),
            None => Tree::Active,
        }
    }
}

/// What lies under the active layer of a chain.
pub(super) struct Backing<'a> {
    chain: &'a Arc<Chain>,
}

impl<'a> Backing<'a> {
    pub fn of(chain: &'a Arc<Chain>) -> Self {
        Self { chain }
    }
}

impl Backing<'_> {
    fn view(&self) -> Option<View> {
        self.chain.view(1).ok()
    }
}

impl Below for Backing<'_> {
    fn read(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        match self.view() {
            Some(view) => view.read(offset, buf),
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    fn is_zero(&self, range: GuestRange) -> Result<bool> {
        let Some(view) = self.view() else { return Ok(true) };
        let len = range.end().get().min(view.size()).saturating_sub(range.start.get());
        for extent in view.look_up_all(GuestRange::new(range.start, len)) {
            if !extent?.is_zero() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::OpenOptions;
    use crate::image::tests::waiting::wait_for_requests;
    use crate::image::{CreateOptions, NewBacking, NewImage, Writability};
    use crate::qcow2::{Geometry, Version};
    use crate::store::memory::MemoryStore;

    const CLUSTER: u64 = 4096;
    const OLD: u64 = 20 * CLUSTER;
    /// Ends within a cluster.
    const NEW: u64 = 10 * CLUSTER + 1024;

    /// A disk full of ones over one full of twos.
    fn disk(directory: &std::path::Path) -> View {
        std::fs::write(directory.join("base.raw"), vec![2; OLD as usize]).unwrap();
        let store = MemoryStore::default();
        let options = CreateOptions {
            size: OLD,
            version: Version::V3,
            geometry: Geometry::new(12, 4),
            backing: Some(NewBacking {
                name: b"base.raw".to_vec(),
                format: "raw".into(),
                record: None,
            }),
        };
        NewImage::plan(&options).unwrap().write(&store).unwrap();
        let top = directory.join("top.qcow2");
        std::fs::write(&top, store.bytes()).unwrap();
        let options = OpenOptions { writability: Writability::Writable, ..OpenOptions::default() };
        let view = Arc::new(Chain::open(&top, &options).unwrap()).view(0).unwrap();
        view.write(GuestOffset::ZERO, &vec![1; OLD as usize]).unwrap();
        view
    }

    #[test]
    fn a_reader_who_waited_for_a_smaller_disk_sees_zeroes_behind_its_end() {
        // Within the last cluster, in clusters that are gone, across the end and before it.
        for (offset, len) in
            [(NEW, 512), (15 * CLUSTER, CLUSTER), (NEW - 700, 3 * CLUSTER), (NEW - 700, 600)]
        {
            let directory = tempfile::tempdir().unwrap();
            let view = disk(directory.path());
            let image = view.chain().active_image().unwrap();
            let kept = image.keep_mapping(view.range());
            let mut found = vec![9; len as usize];
            std::thread::scope(|scope| {
                let shrinker = scope.spawn(|| view.shrink(NEW));
                wait_for_requests(image, 2);
                let reader = scope.spawn(|| view.read(GuestOffset::new(offset), &mut found));
                wait_for_requests(image, 3);
                drop(kept);
                shrinker.join().unwrap().unwrap();
                reader.join().unwrap().unwrap();
            });
            let mut expected = vec![1; NEW.saturating_sub(offset).min(len) as usize];
            expected.resize(len as usize, 0);
            assert!(found == expected, "{len} bytes at {offset} are not what they should be");
        }
    }
}
