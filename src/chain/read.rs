//! Reading a view.

use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::thread;

use super::extents::Extent;
use super::view::View;
use crate::error::{At, Doing, Result};
use crate::image::Content;
use crate::units::{GuestOffset, GuestRange};

/// A read of so many bytes may be shared among threads, if there is much to decompress.
const LARGE: usize = 256 << 10;
/// Compressed clusters that are worth a thread.
const WORTH_A_THREAD: usize = 3;

impl View {
    /// Fills `buf` with the bytes from `offset` on; behind the end of the view they are zero.
    ///
    /// # Errors
    /// Failing reads, and corruption.
    pub fn read(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let inside = |len: u64| self.size().saturating_sub(offset.get()).min(len);
        let kept = inside(buf.len() as u64);
        let _mapping = self.keep_mapping(GuestRange::new(offset, kept));
        // Again: the disk may have become smaller while this waited.
        let range = GuestRange::new(offset, inside(kept));
        let (mut buf, behind) = buf.split_at_mut(range.len as usize);
        behind.fill(0);
        if buf.len() >= LARGE {
            let extents = self.look_up_all(range).collect::<Result<Vec<_>>>()?;
            // Should there be no threads to be had, it goes without.
            if self.read_together(&extents, buf).is_ok() {
                return Ok(());
            }
        }
        for extent in self.look_up_all(range) {
            let extent = extent?;
            let (now, rest) = buf.split_at_mut(extent.range.len as usize);
            self.read_extent(&extent, now)?;
            buf = rest;
        }
        Ok(())
    }

    /// Fills `buf` with the bytes of `extents`; what is compressed is decompressed by several threads.
    fn read_together(&self, extents: &[Extent], buf: &mut [u8]) -> Result<()> {
        let is_compressed = |extent: &&Extent| matches!(extent.content, Content::Compressed { .. });
        let threads = extents.iter().filter(is_compressed).count() / WORTH_A_THREAD;
        let share = extents.len().div_ceil(threads.clamp(1, processors())).max(1);
        let (own, others) = extents.split_at(share.min(extents.len()));
        let (own_buf, mut rest) = buf.split_at_mut(len_of(own));
        thread::scope(|scope| {
            let mut others_done = Vec::new();
            for part in others.chunks(share) {
                let (now, later) = rest.split_at_mut(len_of(part));
                rest = later;
                let work = move || self.read_one_by_one(part, now);
                let started =
                    thread::Builder::new().name("reader".into()).spawn_scoped(scope, work);
                others_done.push(started.doing("start a thread")?);
            }
            self.read_one_by_one(own, own_buf)?;
            // A panic is a bug; it goes on here, as it would without threads.
            let results = others_done
                .into_iter()
                .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            results.collect()
        })
    }

    fn read_one_by_one(&self, extents: &[Extent], mut buf: &mut [u8]) -> Result<()> {
        for extent in extents {
            let (now, rest) = buf.split_at_mut(extent.range.len as usize);
            self.read_extent(extent, now)?;
            buf = rest;
        }
        Ok(())
    }

    fn read_extent(&self, extent: &Extent, buf: &mut [u8]) -> Result<()> {
        let member = &self.chain().members()[extent.member];
        member.read_content(extent.range.start, extent.content, buf).at(member.path())
    }
}

fn len_of(extents: &[Extent]) -> usize {
    extents.iter().map(|extent| extent.range.len as usize).sum()
}

fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, NonZeroUsize::get))
}
