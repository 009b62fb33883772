//! Writes refcounts of an image that nobody has open.

use super::findings::Use;
use super::survey::Survey;
use crate::error::{Doing, Result};
use crate::image::layout::{Layout, Owner};
use crate::qcow2::{Geometry, refcount};
use crate::store::Store;
use crate::units::HostOffset;

/// Bytes that are written at once; a block has at least as many.
const PAGE: u64 = 512;

/// Sets refcounts in blocks that are there, cluster by cluster in ascending order.
pub(super) struct CountWriter<'s> {
    store: &'s dyn Store,
    geometry: Geometry,
    layout: Layout,
    page: Option<(HostOffset, Vec<u8>)>,
}

impl<'s> CountWriter<'s> {
    /// For the blocks of `survey`, which overlap with nothing.
    ///
    /// # Errors
    /// They do overlap.
    pub fn new(survey: &Survey<'s>) -> Result<Self> {
        let mut layout = Layout::new(survey.geometry);
        for area in &survey.areas {
            match area.usage {
                Use::RefcountTable => layout.claim(area.start, area.len, Owner::RefcountTable)?,
                Use::RefcountBlock => layout.claim(area.start, area.len, Owner::RefcountBlock)?,
                _ => {}
            }
        }
        Ok(Self { store: survey.store, geometry: survey.geometry, layout, page: None })
    }

    /// Sets the refcount of `cluster`, whose block is at `block`, as close to `count` as its width allows.
    ///
    /// # Errors
    /// A failing read or write of the page before.
    pub fn set(&mut self, cluster: u64, block: HostOffset, count: u64) -> Result<()> {
        let order = self.geometry.refcount_order();
        let per_page = (PAGE * 8) >> order;
        let index = cluster % self.geometry.refcounts_per_block();
        let at = block + index / per_page * PAGE;
        if self.page.as_ref().is_none_or(|(current, _)| *current != at) {
            self.write()?;
            let mut bytes = vec![0; PAGE as usize];
            self.store.read_at(&mut bytes, at).doing("read its refcounts")?;
            self.page = Some((at, bytes));
        }
        if let Some((_, bytes)) = &mut self.page {
            let count = count.min(refcount::max(order));
            refcount::set(bytes, (index % per_page) as usize, order, count);
        }
        Ok(())
    }

    /// Writes what has not been written yet.
    ///
    /// # Errors
    /// A failing write, or one that would hit something else than a refcount block.
    pub fn write(&mut self) -> Result<()> {
        match self.page.take() {
            Some((at, bytes)) => {
                self.layout.check(Owner::RefcountBlock, at, bytes)?.perform(self.store)
            }
            None => Ok(()),
        }
    }

    /// Writes a refcount table.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_table(&mut self, at: HostOffset, bytes: Vec<u8>) -> Result<()> {
        self.layout.check(Owner::RefcountTable, at, bytes)?.perform(self.store)
    }
}
