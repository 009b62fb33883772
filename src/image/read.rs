//! From a place in the image file to bytes of the disk.

use super::cipher::Encryption;
use super::map::{Content, Tree};
use super::{Below, Image};
use crate::error::{Doing, Error, Problem, Result};
use crate::store::MappedRun;
use crate::units::{GuestOffset, GuestRange};

impl Image {
    /// Fills `buf` with the first bytes of a run that [`Image::map`] has found at `at`.
    ///
    /// `buf` must not reach behind the run. An unallocated run reads as zero here: what shows through is not this
    /// image's business.
    ///
    /// # Errors
    /// Failing reads; a compressed cluster that does not decompress to a whole cluster.
    pub fn read_content(&self, at: GuestOffset, content: Content, buf: &mut [u8]) -> Result<()> {
        match content {
            Content::Unallocated { .. } | Content::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            Content::Data(place) => match &self.encryption {
                Encryption::None => self.data.read_at(buf, place.host).doing("read its data"),
                Encryption::Unlocked(cipher) => cipher.read(&*self.data, at, place.host, buf),
                Encryption::Locked => Err(Error::new(Problem::KeyMissing)),
            },
            Content::Compressed { cluster, skip } => {
                self.decompressed.read(&*self.store, cluster, skip as usize, buf)
            }
        }
    }

    /// The `len` bytes of a run, if they are as they stand in a file that nobody changes: see [`Image::read_content`].
    pub fn mapped_content(&self, content: Content, len: u64) -> Option<MappedRun> {
        match content {
            Content::Data(place) if self.encryption.keeps_zeroes() => {
                let start = place.host.get();
                self.data.mapped(start..start.checked_add(len)?)
            }
            _ => None,
        }
    }

    /// Fills `buf` with the active disk's bytes from `offset` on, or zeroes behind its end.
    ///
    /// The caller holds the range. For the whole chain's views see `chain::View`.
    pub(super) fn read_active(
        &self,
        below: &dyn Below,
        offset: GuestOffset,
        buf: &mut [u8],
    ) -> Result<()> {
        let inside = self.size().saturating_sub(offset.get()).min(buf.len() as u64) as usize;
        let (mut buf, behind) = buf.split_at_mut(inside);
        behind.fill(0);
        let mut at = offset;
        while !buf.is_empty() {
            let run = self.map(Tree::Active, GuestRange::new(at, buf.len() as u64))?;
            let (now, rest) = buf.split_at_mut(run.len as usize);
            match run.content {
                Content::Unallocated { .. } => below.read(at, now)?,
                content => self.read_content(at, content, now)?,
            }
            at = at + run.len;
            buf = rest;
        }
        Ok(())
    }

    /// Whether `range` of the active disk is known to read as zero without reading it; behind the end it is.
    pub(super) fn is_zero(&self, below: &dyn Below, range: GuestRange) -> Result<bool> {
        let end = range.end().get().min(self.size());
        let mut at = range.start;
        while at.get() < end {
            let run = self.map(Tree::Active, GuestRange::new(at, end - at.get()))?;
            let zero = match run.content {
                Content::Zero { .. } => true,
                Content::Unallocated { .. } => below.is_zero(GuestRange::new(at, run.len))?,
                Content::Data(_) | Content::Compressed { .. } => false,
            };
            if !zero {
                return Ok(false);
            }
            at = at + run.len;
        }
        Ok(true)
    }
}
