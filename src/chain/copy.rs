//! Copies of views that stand alone.

use std::path::Path;

use super::{Format, View};
use crate::error::{At, Doing, Result};
use crate::image::{CreateOptions, Image, NewImage, Nothing, Writability};
use crate::qcow2::{Geometry, Version};
use crate::store::{LockMode, NewFile, Store};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Bytes that are read at once.
const CHUNK: u64 = 2 << 20;
/// Clusters of 64 KiB and refcounts of 16 bits, as `qemu-img create` chooses.
const GEOMETRY: (u32, u32) = (16, 4);
/// What a hole in a raw copy is long at least.
const RAW_BLOCK: u64 = 4096;

impl View {
    /// Makes the new file `to` a copy of the view that needs no other file. What reads as zero takes no space there. `progress` is
    /// told how far the copy is. Nobody may write the view meanwhile.
    ///
    /// # Errors
    /// [`Problem::Exists`](crate::error::Problem::Exists); failing reads and writes.
    pub fn copy_to(
        &self,
        to: &Path,
        format: Format,
        progress: &mut dyn FnMut(GuestOffset),
    ) -> Result<()> {
        let file = NewFile::create(to)?;
        file.store().lock(LockMode::Write).at(to)?;
        match format {
            Format::Raw => {
                let store = file.store();
                store.set_len(self.size()).doing("make it long enough").at(to)?;
                self.copy_data(RAW_BLOCK, progress, &|offset, data| {
                    store
                        .write_at(&[data], HostOffset::new(offset.get()))
                        .doing("write to it")
                        .at(to)
                })?;
            }
            Format::Qcow2 => {
                let geometry = Geometry::new(GEOMETRY.0, GEOMETRY.1);
                let (size, version) = (self.size(), Version::V3);
                let options = CreateOptions { size, version, geometry, backing: None };
                NewImage::plan(&options).at(to)?.write(&**file.store()).at(to)?;
                let image = Image::open(file.store().clone(), Writability::Writable).at(to)?;
                self.copy_data(geometry.cluster_size(), progress, &|offset, data| {
                    image.write(&Nothing, offset, data).at(to)
                })?;
                image.flush_all().at(to)?;
            }
        }
        file.publish()
    }

    /// Hands all that is not zero to `write`, without the blocks in it that are.
    fn copy_data(
        &self,
        block: u64,
        progress: &mut dyn FnMut(GuestOffset),
        write: &dyn Fn(GuestOffset, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK as usize];
        for extent in self.look_up_all(self.range()) {
            let extent = extent?;
            for piece in extent.range.split(CHUNK).filter(|_| !extent.is_zero()) {
                let bytes = &mut buffer[..piece.len as usize];
                self.read(piece.start, bytes)?;
                for run in data_in(piece, bytes, block) {
                    let start = (run.start - piece.start) as usize;
                    write(run.start, &bytes[start..start + run.len as usize])?;
                }
                progress(piece.end());
            }
            progress(extent.range.end());
        }
        Ok(())
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
