//! Copies of views that stand alone.

use std::ops::Range;
use std::path::Path;

use super::{Extent, Format, Member, View};
use crate::error::{At, Doing, Error, Problem, Result};
use crate::image::{Content, CreateOptions, Image, NewImage, Nothing, Writability};
use crate::qcow2::{Geometry, Version};
use crate::store::{FileStore, LockMode, NewFile, Store, cannot_share};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Bytes that are read at once.
const CHUNK: u64 = 2 << 20;
/// Clusters of 64 KiB and refcounts of 16 bits, as `qemu-img create` chooses.
const GEOMETRY: (u32, u32) = (16, 4);
/// What a hole in a raw copy is long at least.
const RAW_BLOCK: u64 = 4096;

/// Whether a copy shares data with the files that it comes from, where the host's file system lets files do so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reflink {
    /// Where it can.
    Auto,
    /// Or there is no copy. What is compressed, encrypted, or not on the borders of blocks is copied nevertheless.
    Always,
    /// It doesn't.
    Never,
}

impl View {
    /// Makes the new file `to` a copy of the view that needs no other file. What reads as zero takes no space there. `progress` is
    /// told how far the copy is. Nobody may write the view meanwhile.
    ///
    /// # Errors
    /// [`Problem::Exists`](crate::error::Problem::Exists); [`Problem::NotShared`]; failing reads and writes.
    pub fn copy_to(
        &self,
        to: &Path,
        format: Format,
        reflink: Reflink,
        progress: &mut dyn FnMut(GuestOffset),
    ) -> Result<()> {
        let file = NewFile::create(to)?;
        file.store().lock(LockMode::Write).at(to)?;
        let store = file.store();
        let block = store.block_size().doing("look at it").at(to)?.max(RAW_BLOCK);
        match format {
            Format::Raw => {
                store.set_len(self.size()).doing("make it long enough").at(to)?;
                let target = Target {
                    path: to,
                    store,
                    holes: RAW_BLOCK,
                    shares: block,
                    block,
                    write: &|offset, data| {
                        store
                            .write_at(&[data], HostOffset::new(offset.get()))
                            .doing("write to it")
                            .at(to)
                    },
                    fill: &|range, fill| fill(range, HostOffset::new(range.start.get())),
                };
                self.copy_data(&target, reflink, progress)?;
            }
            Format::Qcow2 => {
                let geometry = Geometry::new(GEOMETRY.0, GEOMETRY.1);
                let (size, version) = (self.size(), Version::V3);
                let options = CreateOptions { size, version, geometry, backing: None };
                NewImage::plan(&options).at(to)?.write(&**store).at(to)?;
                let image = Image::open(store.clone(), Writability::Writable).at(to)?;
                let target = Target {
                    path: to,
                    store,
                    holes: geometry.cluster_size(),
                    shares: geometry.cluster_size().max(block),
                    block,
                    write: &|offset, data| image.write(&Nothing, offset, data).at(to),
                    fill: &|range, fill| image.fill_clusters(range, fill),
                };
                self.copy_data(&target, reflink, progress)?;
                image.flush_all().at(to)?;
            }
        }
        file.publish()
    }

    /// Hands all that is not zero to `target`: what it may have without copying that, else without the blocks that are zero.
    fn copy_data(
        &self,
        target: &Target<'_>,
        reflink: Reflink,
        progress: &mut dyn FnMut(GuestOffset),
    ) -> Result<()> {
        for extent in self.look_up_all(self.range()) {
            let extent = extent?;
            let mut at = extent.range.start;
            if extent.is_zero() {
                progress(extent.range.end());
                continue;
            }
            if let Some(shared) = self.shared(&extent, target, reflink)? {
                self.copy_bytes(GuestRange::new(at, shared.start - at), target, progress)?;
                at = shared.end();
                progress(at);
            }
            self.copy_bytes(GuestRange::new(at, extent.range.end() - at), target, progress)?;
        }
        Ok(())
    }

    /// Lets `target` share what it can of `extent`, and says what that was.
    fn shared(
        &self,
        extent: &Extent,
        target: &Target<'_>,
        reflink: Reflink,
    ) -> Result<Option<GuestRange>> {
        // What may change has to be read under the locks of a read.
        if reflink == Reflink::Never
            || self.map().is_none()
            || self.chain().is_writable()
            || self.is_torn()
        {
            return Ok(None);
        }
        let member = &self.chain().members()[extent.member];
        let Some((range, source)) = target.shareable(member, extent)? else { return Ok(None) };
        let store = member.data_store();
        let shared = (target.fill)(range, &|part, host| {
            let start = source.start + (part.start - range.start);
            let shared = store.share(start..start + part.len, target.store, host);
            shared.doing("share data with it")
        });
        match shared {
            // A snapshot that another process has deleted meanwhile may have had other bytes there.
            Ok(()) => self.confirmed(Ok(Some(range))),
            Err(error) if !cannot_share(error.errno()) => Err(error.at(target.path)),
            Err(_) if reflink == Reflink::Auto => Ok(None),
            Err(error) => {
                let reason = std::io::Error::from_raw_os_error(error.errno()).to_string();
                let file = member.data_path().to_path_buf();
                Err(Error::new(Problem::NotShared { file, range: source, reason }).at(target.path))
            }
        }
    }

    fn copy_bytes(
        &self,
        range: GuestRange,
        target: &Target<'_>,
        progress: &mut dyn FnMut(GuestOffset),
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK.min(range.len) as usize];
        for piece in range.split(CHUNK) {
            let bytes = &mut buffer[..piece.len as usize];
            self.read(piece.start, bytes)?;
            for run in data_in(piece, bytes, target.holes) {
                let start = (run.start - piece.start) as usize;
                (target.write)(run.start, &bytes[start..start + run.len as usize])?;
            }
            progress(piece.end());
        }
        Ok(())
    }
}

/// Fills a part of the new disk that is at that place of its file.
type Fill<'a> = &'a dyn Fn(GuestRange, HostOffset) -> Result<()>;

/// A copy in the making.
struct Target<'a> {
    path: &'a Path,
    store: &'a FileStore,
    /// What a hole in it is long at least.
    holes: u64,
    /// What it can share at once, on borders of that.
    shares: u64,
    /// What its file system counts in.
    block: u64,
    write: &'a dyn Fn(GuestOffset, &[u8]) -> Result<()>,
    fill: &'a dyn Fn(GuestRange, Fill<'_>) -> Result<()>,
}

impl Target<'_> {
    /// The part of `extent` that can be shared, and where that is in the file of `member`.
    fn shareable(
        &self,
        member: &Member,
        extent: &Extent,
    ) -> Result<Option<(GuestRange, Range<u64>)>> {
        let Content::Data(place) = extent.content else { return Ok(None) };
        if member.image().is_some_and(Image::is_encrypted) {
            return Ok(None);
        }
        let (guest, host) = (extent.range.start.get(), place.host.get());
        let in_file = member.data_store().len().doing("find out its length").at(member.path())?;
        let len = extent.range.len.min(in_file.saturating_sub(host));
        let start = guest.next_multiple_of(self.shares);
        let end = (guest + len) / self.shares * self.shares;
        let source = host + (start - guest);
        if start >= end || !source.is_multiple_of(self.block) {
            return Ok(None);
        }
        let range = GuestRange::new(GuestOffset::new(start), end - start);
        Ok(Some((range, source..source + range.len)))
    }
}

/// The parts of `range`, which holds `bytes`, without the blocks that are zero.
fn data_in(range: GuestRange, bytes: &[u8], block: u64) -> Vec<GuestRange> {
    let mut runs: Vec<GuestRange> = Vec::new();
    for part in range.split(block) {
        let start = (part.start - range.start) as usize;
        if bytes[start..start + part.len as usize].iter().all(|&byte| byte == 0) {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.end() == part.start => last.len += part.len,
            _ => runs.push(part),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_zeroes_are_left_out_and_neighbours_written_at_once() {
        let range = |start, len| GuestRange::new(GuestOffset::new(start), len);
        let mut bytes = vec![0; 88];
        // In the blocks that begin at 0, 16, 64 and 80 of the disk.
        for at in [8, 20, 70, 95] {
            bytes[at - 8] = 1;
        }
        let found = data_in(range(8, 88), &bytes, 16);
        assert_eq!(found, [range(8, 24), range(64, 32)]);
        assert_eq!(data_in(range(8, 88), &[0; 88], 16), []);
    }
}
