//! Open files: reads, writes, holes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::{Attributes, DiscardMode, Growth, Tree, What, Window};
use crate::chain::View;
use crate::error::{Error, Problem, Result};
use crate::image::{SnapshotTree, ZeroMode};
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

/// The open files of a tree.
#[derive(Default)]
pub(super) struct Handles {
    next: AtomicU64,
    open: RwLock<HashMap<u64, Arc<Open>>>,
    /// Nobody may open the active disk for writing. Changes under the lock of `open` only.
    writers_kept_out: AtomicBool,
}

/// Nobody opens the active disk for writing until this is dropped.
pub(super) struct NoWriters<'a>(&'a Handles);

impl Drop for NoWriters<'_> {
    fn drop(&mut self) {
        self.0.writers_kept_out.store(false, Ordering::Release);
    }
}

enum Open {
    /// The active disk, whichever image is on top.
    Active {
        window: Window,
        purpose: OpenFor,
    },
    /// A view that stays what it is.
    Disk {
        view: View,
        window: Window,
    },
    Document(Vec<u8>),
}

impl Open {
    fn can_write(&self) -> bool {
        matches!(self, Self::Active { purpose: OpenFor::Writing, .. })
    }
}

impl Handles {
    fn add(&self, open: Open) -> Result<Handle> {
        let mut files = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.can_write() && self.writers_kept_out.load(Ordering::Acquire) {
            return Err(Error::new(Problem::Busy { holders: Vec::new() }));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        files.insert(number, Arc::new(open));
        Ok(Handle(number))
    }

    fn get(&self, handle: Handle) -> Result<Arc<Open>> {
        let files = self.open.read().unwrap_or_else(PoisonError::into_inner);
        files.get(&handle.0).cloned().ok_or_else(|| Error::usage("no such open file"))
    }

    /// Keeps those out who want to write to the active disk, unless there are some.
    pub fn keep_writers_out(&self) -> Option<NoWriters<'_>> {
        let files = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if files.values().any(|open| open.can_write()) {
            return None;
        }
        self.writers_kept_out.store(true, Ordering::Release);
        Some(NoWriters(self))
    }

    /// Whether somebody has a disk of that snapshot open.
    pub fn has_open(&self, snapshot: &SnapshotTree) -> bool {
        let files = self.open.read().unwrap_or_else(PoisonError::into_inner);
        files.values().any(|open| match &**open {
            Open::Disk { view, .. } => {
                view.snapshot().is_some_and(|tree| std::ptr::eq(tree, snapshot))
            }
            _ => false,
        })
    }
}

impl Tree {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Problem::ReadOnly`] for a write open of anything but the active disk of a writable mount.
    pub fn open(&self, inode: Inode, purpose: OpenFor) -> Result<(Handle, Caching)> {
        self.follow();
        // Held until the file counts as open: what is open is not taken away.
        let shape = self.shape.read().unwrap_or_else(PoisonError::into_inner);
        let node = self.node(&shape, inode)?;
        let view = &shape.views[node.view].view;
        let (open, caching) = match node.what {
            What::Disk(window) if view.is_writable() => {
                (Open::Active { window, purpose }, Caching::Nothing)
            }
            What::Disk(window) => {
                let caching = if view.is_torn() { Caching::Nothing } else { Caching::Everything };
                (Open::Disk { view: view.clone(), window }, caching)
            }
            What::Document(document) => {
                (Open::Document(self.content(&shape, document, node.view)?), Caching::Nothing)
            }
            What::Directory(_) | What::Link(_) | What::ControlSocket => {
                return Err(Error::usage("not a file"));
            }
        };
        if purpose == OpenFor::Writing && !matches!(open, Open::Active { .. }) {
            return Err(Error::new(Problem::ReadOnly));
        }
        Ok((self.handles.add(open)?, caching))
    }

    /// Closes a file.
    pub fn close(&self, handle: Handle) {
        let mut files = self.handles.open.write().unwrap_or_else(PoisonError::into_inner);
        files.remove(&handle.0);
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
            Open::Document(_) | Open::Active { .. } => None,
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
        self.on_disk(&*self.handles.get(handle)?, |view, range| {
            let len = range.len.saturating_sub(offset).min(data.len() as u64) as usize;
            if len == 0 && !data.is_empty() {
                let len = data.len() as u64;
                return Err(Error::new(Problem::OutOfRange { offset, len, size: range.len }));
            }
            let written = view.write(range.start + offset, &data[..len]);
            self.writes.fetch_add(1, Ordering::AcqRel);
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
        self.on_disk(&*self.handles.get(handle)?, |view, range| {
            self.make_zero(view, range, offset, len, mode)
        })
    }

    /// Makes a range read as zero and keeps its space.
    ///
    /// # Errors
    /// [`Problem::SizeIsFixed`]; as [`View::zero`].
    pub fn zero(&self, handle: Handle, offset: u64, len: u64, past_end: PastEnd) -> Result<()> {
        self.on_disk(&*self.handles.get(handle)?, |view, range| {
            if past_end == PastEnd::Refuse && offset.saturating_add(len) > range.len {
                return Err(Error::new(Problem::SizeIsFixed));
            }
            self.make_zero(view, range, offset, len, ZeroMode::Keep)
        })
    }

    /// Zeroes what of the `len` bytes at `offset` of the file that shows `range` is inside it.
    fn make_zero(
        &self,
        view: &View,
        range: GuestRange,
        offset: u64,
        len: u64,
        mode: ZeroMode,
    ) -> Result<()> {
        let len = range.len.saturating_sub(offset).min(len);
        let zeroed = view.zero(GuestRange::new(range.start + offset.min(range.len), len), mode);
        self.writes.fetch_add(1, Ordering::AcqRel);
        zeroed
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
        if !shape.views[node.view].view.is_writable() {
            return Err(Error::new(Problem::ReadOnly));
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
