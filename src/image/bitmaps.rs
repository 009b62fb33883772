//! Persistent dirty bitmaps: which there are.

use super::Image;
use crate::error::{Doing, Error, Result};
use crate::qcow2::Bitmap;

impl Image {
    /// The persistent bitmaps that count.
    ///
    /// # Errors
    /// A broken directory, besides failing reads.
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        let Some(directory) = self.header().bitmap_directory()? else { return Ok(Vec::new()) };
        let file_len = self.store.len().doing("find out its length")?;
        let end = directory.offset.checked_add(directory.len);
        if end.is_none_or(|end| end.get() > file_len) {
            return Err(Error::invalid("bitmap directory", "it lies behind the end of the file"));
        }
        let mut bytes = vec![0; directory.len as usize];
        self.store.read_at(&mut bytes, directory.offset).doing("read its bitmap directory")?;
        directory.parse_entries(&bytes, self.geometry.cluster_size())
    }
}
