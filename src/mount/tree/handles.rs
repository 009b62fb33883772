//! Open files: reads, writes, holes.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::opened::Open;
use super::{Attributes, DiscardMode, Growth, Tree, What, Window};
use crate::chain::View;
use crate::error::{Error, Problem, Result};
use crate::image::ZeroMode;
use crate::mount::inode::Inode;
use crate::store::MappedRun;
use crate::units::GuestRange;

/// The number of an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle(pub u64);

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenFor {
    /// Reading only.
    Reading,
    /// Writing, or both.
    Writing,
}

/// What the kernel may keep of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Everything: the bytes never change.
    Everything,
    /// Nothing: the same bytes can be written through another file.
    Nothing,
}

/// What to do about the part of a range that is behind the end of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PastEnd {
    /// Nothing.
    Ignore,
    /// The file would have to grow for it: refuse it all.
    Refuse,
}

impl Tree {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Problem::ReadOnly`] for a write open of anything but the active disk of a writable mount and scratch twins; as
    /// [`View::twin`]; [`Problem::Busy`] while a twin is kept still.
    pub fn open(&self, inode: Inode, purpose: OpenFor) -> Result<(Handle, Caching)> {
        if purpose == OpenFor::Writing {
            self.make_twin(inode)?;
        }
        self.follow();
        if let Some(document) = self.open_document(inode, purpose)? {
            return Ok((document, Caching::Nothing));
        }
        // Held until the file counts as open: what is open is not taken away.
        let shape = self.shape.read().unwrap_or_else(PoisonError::into_inner);
        let node = self.node(&shape, inode)?;
        let files = &shape.views[node.view];
        let view = files.view();
        let (open, caching) = match node.what {
            What::Disk(window) if files.twin().is_some() => {
                (Open::Twin { files: files.clone(), window, purpose }, Caching::Nothing)
            }
            What::StillDisk => (Open::StillTwin { files: files.clone() }, Caching::Nothing),
            What::Disk(window) if view.is_writable() => {
                (Open::Active { window, purpose }, Caching::Nothing)
            }
            What::Disk(window) => {
                let caching = if view.is_torn() { Caching::Nothing } else { Caching::Everything };
                (Open::Disk { view: view.clone(), window }, caching)
            }
            What::Document(_) | What::Directory(_) | What::Link(_) | What::ControlSocket => {
                return Err(Error::usage("not a disk"));
            }
        };
        // A twin is not, where what it is one of was deleted since the beginning and made anew.
        let can_write = match &open {
            Open::Active { .. } => true,
            Open::Twin { files, .. } => files.view().is_writable(),
            _ => false,
        };
        if purpose == OpenFor::Writing && !can_write {
            return Err(Error::new(Problem::ReadOnly));
        }
        Ok((self.handles.add(open)?, caching))
    }

    /// Opens `inode` if it is a document. Making one may take reading the tables of a whole disk, and whoever changes the
    /// chain must not wait for that: the shape is not held.
    fn open_document(&self, inode: Inode, purpose: OpenFor) -> Result<Option<Handle>> {
        let shape = self.shape();
        let node = self.node(&shape, inode)?;
        let What::Document(document) = node.what else { return Ok(None) };
        if purpose == OpenFor::Writing {
            return Err(Error::new(Problem::ReadOnly));
        }
        let content = self.content(&shape, document, node.view)?;
        self.handles.add(Open::Document(content)).map(Some)
    }

    /// Makes the twin whose disk `inode` is ready to be written, if it is one.
    fn make_twin(&self, inode: Inode) -> Result<()> {
        let shape = self.shape();
        let node = self.node(&shape, inode)?;
        let files = &shape.views[node.view];
        match (&node.what, files.twin(), &self.options.scratch) {
            (What::Disk(_), Some(twin), Some(scratch)) => twin.make(files.original(), scratch),
            _ => Ok(()),
        }
    }

    /// Makes durable what was written to an open file, as far as that means anything: a scratch twin lasts as long as this
    /// process.
    ///
    /// # Errors
    /// As [`Chain::flush`](crate::chain::Chain::flush).
    pub fn sync_file(&self, handle: Handle) -> Result<()> {
        match &*self.handles.get(handle)? {
            Open::Twin { files, .. } => files.view().chain().flush(),
            _ => self.chain().flush(),
        }
    }

    /// Closes a file.
    pub fn close(&self, handle: Handle) {
        self.handles.remove(handle);
    }

    /// Reads up to `buf.len()` bytes from `offset` on; fewer only at the end of the file.
    ///
    /// # Errors
    /// As [`View::read`].
    pub fn read(&self, handle: Handle, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match &*self.handles.get(handle)? {
            Open::Document(content) => {
                let rest = content.get(offset as usize..).unwrap_or_default();
                let len = rest.len().min(buf.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(len)
            }
            open => self.on_disk(open, |view, range| {
                let len = range.len.saturating_sub(offset).min(buf.len() as u64) as usize;
                if len > 0 {
                    view.read(range.start + offset, &mut buf[..len])?;
                }
                Ok(len)
            }),
        }
    }

    /// What [`Self::read`] would read of `len` bytes, without copying it, where that can be had.
    pub fn mapped(&self, handle: Handle, offset: u64, len: u64) -> Option<MappedRun> {
        match &*self.handles.get(handle).ok()? {
            Open::Document(_)
            | Open::Active { .. }
            | Open::Twin { .. }
            | Open::StillTwin { .. } => None,
            Open::Disk { view, window } => {
                let range = window.range(view);
                let len = range.len.checked_sub(offset)?.min(len);
                view.mapped(GuestRange::new(range.start + offset, len))
            }
        }
    }

    /// Writes `data` at `offset`, as much of it as there is room for.
    ///
    /// # Errors
    /// [`Problem::OutOfRange`] if there is no room at all; as [`View::write`].
    pub fn write(&self, handle: Handle, offset: u64, data: &[u8]) -> Result<usize> {
        let open = self.handles.get(handle)?;
        self.on_disk(&open, |view, range| {
            let len = range.len.saturating_sub(offset).min(data.len() as u64) as usize;
            if len == 0 && !data.is_empty() {
                let len = data.len() as u64;
                return Err(Error::new(Problem::OutOfRange { offset, len, size: range.len }));
            }
            let written = view.write(range.start + offset, &data[..len]);
            self.wrote(&open);
            written.map(|()| len)
        })
    }

    /// Makes a range read as zero and gives its space back, as far as the mount's options say.
    ///
    /// # Errors
    /// As [`View::zero`].
    pub fn discard(&self, handle: Handle, offset: u64, len: u64) -> Result<()> {
        let mode = match self.options.discard {
            DiscardMode::Unmap => ZeroMode::Unmap,
            DiscardMode::Ignore => ZeroMode::Keep,
        };
        let open = self.handles.get(handle)?;
        self.on_disk(&open, |view, range| self.make_zero(&open, view, range, offset, len, mode))
    }

    /// Makes a range read as zero and keeps its space.
    ///
    /// # Errors
    /// [`Problem::SizeIsFixed`]; as [`View::zero`].
    pub fn zero(&self, handle: Handle, offset: u64, len: u64, past_end: PastEnd) -> Result<()> {
        let open = self.handles.get(handle)?;
        self.on_disk(&open, |view, range| {
            if past_end == PastEnd::Refuse && offset.saturating_add(len) > range.len {
                return Err(Error::new(Problem::SizeIsFixed));
            }
            self.make_zero(&open, view, range, offset, len, ZeroMode::Keep)
        })
    }

    /// Zeroes what of the `len` bytes at `offset` of the file that shows `range` is inside it.
    fn make_zero(
        &self,
        open: &Open,
        view: &View,
        range: GuestRange,
        offset: u64,
        len: u64,
        mode: ZeroMode,
    ) -> Result<()> {
        let len = range.len.saturating_sub(offset).min(len);
        let zeroed = view.zero(GuestRange::new(range.start + offset.min(range.len), len), mode);
        self.wrote(open);
        zeroed
    }

    /// Notes that the content of an open disk has changed: a partition table may be another.
    fn wrote(&self, open: &Open) {
        match open {
            Open::Twin { files, .. } => files.twin().into_iter().for_each(|twin| twin.wrote()),
            _ => _ = self.writes.fetch_add(1, Ordering::AcqRel),
        }
    }

    /// The first byte at or behind `offset` that may not be zero (`SEEK_DATA`).
    ///
    /// # Errors
    /// `None` if there is none; failing reads of tables.
    pub fn seek_data(&self, handle: Handle, offset: u64) -> Result<Option<u64>> {
        match &*self.handles.get(handle)? {
            Open::Document(content) => Ok((offset < content.len() as u64).then_some(offset)),
            open => self.on_disk(open, |view, range| {
                if offset >= range.len {
                    return Ok(None);
                }
                let found = view.next_data(range.start + offset)?;
                let inside = found.filter(|&found| found < range.end());
                Ok(inside.map(|found| found - range.start))
            }),
        }
    }

    /// The first byte at or behind `offset` that is in a hole (`SEEK_HOLE`); the end of the file is one.
    ///
    /// # Errors
    /// `None` behind the end; failing reads of tables.
    pub fn seek_hole(&self, handle: Handle, offset: u64) -> Result<Option<u64>> {
        match &*self.handles.get(handle)? {
            Open::Document(content) => {
                let len = content.len() as u64;
                Ok((offset < len).then_some(len))
            }
            open => self.on_disk(open, |view, range| {
                if offset >= range.len {
                    return Ok(None);
                }
                let found = view.next_hole(range.start + offset)?;
                Ok(Some(found.min(range.end()) - range.start))
            }),
        }
    }

    /// Changes a file's size, where the mount's options allow that.
    ///
    /// # Errors
    /// [`Problem::SizeIsFixed`]: a disk's size is not for `> disk.raw` to change.
    pub fn resize(&self, inode: Inode, size: u64) -> Result<Attributes> {
        let shape = self.shape();
        let node = self.node(&shape, inode)?;
        let old = self.attributes_of(&shape, &node)?;
        if size == old.size {
            return Ok(old);
        }
        let What::Disk(window) = node.what else { return Err(Error::new(Problem::ReadOnly)) };
        let files = &shape.views[node.view];
        if !files.is_writable() {
            return Err(Error::new(Problem::ReadOnly));
        }
        if files.twin().is_some() {
            return Err(Error::new(Problem::SizeIsFixed));
        }
        if self.options.growth == Growth::Fixed || window != Window::Whole || size < old.size {
            return Err(Error::new(Problem::SizeIsFixed));
        }
        self.grow(size)?;
        self.attributes(inode)
    }

    /// Makes the active disk larger.
    ///
    /// # Errors
    /// As [`View::grow`].
    pub fn grow(&self, size: u64) -> Result<()> {
        let active = Open::Active { window: Window::Whole, purpose: OpenFor::Writing };
        let grown = self.on_disk(&active, |view, _| view.grow(size));
        // A partition table can mean something else on a larger disk.
        self.writes.fetch_add(1, Ordering::AcqRel);
        grown
    }

    /// Does `f` with the view of an open disk and the part of it that the file shows; again, if another image has become
    /// the active layer while it waited for the old one.
    fn on_disk<T>(
        &self,
        open: &Open,
        mut f: impl FnMut(&View, GuestRange) -> Result<T>,
    ) -> Result<T> {
        loop {
            let (done, chain) = match open {
                Open::Document(_) => return Err(Error::new(Problem::ReadOnly)),
                Open::Disk { view, window } => return f(view, window.range(view)),
                Open::Twin { files, window, .. } => {
                    let view = files.view();
                    return f(view, window.range(view));
                }
                Open::StillTwin { files } => return f(files.view(), files.view().range()),
                Open::Active { window, .. } => {
                    let shape = self.shape();
                    let view = shape.root();
                    (f(view, window.range(view)), shape.chain.clone())
                }
            };
            match done {
                Err(error)
                    if matches!(error.problem(), Problem::Retired)
                        && !Arc::ptr_eq(&chain, &self.chain()) => {}
                done => return done,
            }
        }
    }
}
