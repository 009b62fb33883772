//! What the kernel's requests mean in terms of [`Tree`], whichever way they come: arguments as the kernel gives them, errors
//! as the numbers that it takes.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use fuser::{FopenFlags, InitFlags};
use nix::errno::Errno;

use super::inode::Inode;
use super::tree::{
    Attributes, Caching, Entry, Handle, Kind, Lifetime, OpenFor, PastEnd, Statistics, Tree,
};
use crate::error::Result;
use crate::store::MappedRun;

/// Bytes in one request at most; the kernel's own limit is the same.
pub(super) const MAX_REQUEST: u32 = 1 << 20;
/// Requests that the kernel may have under way in the background: readahead, direct I/O in parts.
pub(super) const MAX_BACKGROUND: u16 = 256;

/// What block sizes `stat` and `statfs` tell; loop devices take the latter as discard granularity.
pub(super) const BLOCK_SIZE: u32 = 4096;
/// Bytes of a name.
pub(super) const MAX_NAME: u32 = 255;
/// What the kernel shall do if it can.
pub(super) const WANTED: InitFlags = InitFlags::FUSE_ASYNC_DIO
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP)
    .union(InitFlags::FUSE_CACHE_SYMLINKS);

/// How long the kernel may believe what never changes.
const FOREVER: Duration = Duration::from_secs(86400);
/// How long it may believe what changes with a write.
const MOMENT: Duration = Duration::ZERO;

/// What a request comes to.
pub(super) type Answer<T> = std::result::Result<T, Errno>;

/// A tree at the kernel's service.
pub(super) struct Service {
    /// Asked through [`Service::answer`] only.
    tree: Arc<Tree>,
    /// What open directories list, as of when they were opened.
    listings: RwLock<HashMap<u64, Arc<Vec<Entry>>>>,
    next_listing: AtomicU64,
}

impl Service {
    pub fn new(tree: Arc<Tree>) -> Self {
        Self { tree, listings: RwLock::default(), next_listing: AtomicU64::new(0) }
    }

    /// Calls `f`, with errors as the numbers that the kernel wants. A panic is a bug that must cost a request its
    /// answer, not the mount its threads.
    fn answer<T>(
        &self,
        operation: &str,
        number: u64,
        f: impl FnOnce(&Tree) -> Result<T>,
    ) -> Answer<T> {
        let result = catch_unwind(AssertUnwindSafe(|| f(&self.tree)));
        let Ok(result) = result else {
            log::error!("{operation} of {number} ran into a bug");
            return Err(Errno::EIO);
        };
        result.map_err(|error| {
            let errno = Errno::from_raw(error.errno());
            if errno == Errno::EIO {
                log::error!("{operation}: {error}");
            } else {
                log::debug!("{operation}: {error}");
            }
            errno
        })
    }

    pub fn lookup(&self, parent: Inode, name: &OsStr) -> Answer<Attributes> {
        self.answer("lookup", parent.0, |tree| tree.lookup(parent, name))
    }

    pub fn attributes(&self, inode: Inode) -> Answer<Attributes> {
        self.answer("getattr", inode.0, |tree| tree.attributes(inode))
    }

    pub fn resize(&self, inode: Inode, size: u64) -> Answer<Attributes> {
        self.answer("resize", inode.0, |tree| tree.resize(inode, size))
    }

    pub fn link_target(&self, inode: Inode) -> Answer<PathBuf> {
        self.answer("readlink", inode.0, |tree| tree.link_target(inode))
    }

    /// With the flags of `open(2)`.
    pub fn open(&self, inode: Inode, flags: i32) -> Answer<(Handle, FopenFlags)> {
        let purpose = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => OpenFor::Reading,
            _ => OpenFor::Writing,
        };
        let (handle, caching) = self.answer("open", inode.0, |tree| tree.open(inode, purpose))?;
        let flags = match caching {
            Caching::Everything => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
            Caching::Nothing => {
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            }
        };
        Ok((handle, flags))
    }

    pub fn close(&self, handle: Handle) -> Answer<()> {
        self.answer("release", handle.0, |tree| {
            tree.close(handle);
            Ok(())
        })
    }

    /// The bytes themselves, where they can be had without reading.
    pub fn mapped(&self, handle: Handle, offset: u64, len: u64) -> Option<MappedRun> {
        self.answer("read", handle.0, |tree| Ok(tree.mapped(handle, offset, len))).ok().flatten()
    }

    /// Answers how many bytes it has read to the start of `buffer`.
    pub fn read(&self, handle: Handle, offset: u64, buffer: &mut [u8]) -> Answer<usize> {
        self.answer("read", handle.0, |tree| tree.read(handle, offset, buffer))
    }

    /// With the flags that the file was opened with. Answers how many bytes were written.
    pub fn write(&self, handle: Handle, offset: u64, data: &[u8], flags: i32) -> Answer<u32> {
        self.answer("write", handle.0, |tree| {
            let len = tree.write(handle, offset, data)?;
            // The bit of O_DSYNC is part of O_SYNC, too.
            if flags & libc::O_DSYNC != 0 {
                tree.sync_file(handle)?;
            }
            Ok(len as u32)
        })
    }

    pub fn sync(&self, handle: Handle) -> Answer<()> {
        self.answer("fsync", handle.0, |tree| tree.sync_file(handle))
    }

    pub fn sync_all(&self) -> Answer<()> {
        self.answer("fsyncdir", Inode::ROOT.0, |tree| tree.sync())
    }

    pub fn open_directory(&self, inode: Inode) -> Answer<u64> {
        let entries = self.answer("opendir", inode.0, |tree| tree.list(inode))?;
        let number = self.next_listing.fetch_add(1, Ordering::Relaxed);
        let mut listings = self.listings.write().unwrap_or_else(PoisonError::into_inner);
        listings.insert(number, Arc::new(entries));
        Ok(number)
    }

    /// What the directory that was opened as `number` lists.
    pub fn listing(&self, number: u64) -> Answer<Arc<Vec<Entry>>> {
        let listings = self.listings.read().unwrap_or_else(PoisonError::into_inner);
        listings.get(&number).cloned().ok_or(Errno::EBADF)
    }

    pub fn close_directory(&self, number: u64) {
        let mut listings = self.listings.write().unwrap_or_else(PoisonError::into_inner);
        listings.remove(&number);
    }

    /// Bytes and files of the file system.
    pub fn statistics(&self) -> Answer<Statistics> {
        self.answer("statfs", Inode::ROOT.0, |tree| Ok(tree.statistics()))
    }

    /// With the mode of `fallocate(2)`.
    pub fn fallocate(&self, handle: Handle, offset: u64, len: u64, mode: i32) -> Answer<()> {
        let past_end = match mode & libc::FALLOC_FL_KEEP_SIZE {
            0 => PastEnd::Refuse,
            _ => PastEnd::Ignore,
        };
        self.answer("fallocate", handle.0, |tree| match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE => tree.discard(handle, offset, len).map(Some),
            libc::FALLOC_FL_ZERO_RANGE => tree.zero(handle, offset, len, past_end).map(Some),
            _ => Ok(None),
        })?
        .ok_or(Errno::EOPNOTSUPP)
    }

    /// With the arguments of `lseek(2)`; the kernel asks about data and holes only.
    pub fn seek(&self, handle: Handle, offset: i64, whence: i32) -> Answer<i64> {
        let from = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        let found = self.answer("lseek", handle.0, |tree| match whence {
            libc::SEEK_DATA => tree.seek_data(handle, from),
            _ => tree.seek_hole(handle, from),
        })?;
        found.map(u64::cast_signed).ok_or(Errno::ENXIO)
    }
}

/// How long the kernel may believe what `attributes` say.
pub(super) fn ttl(attributes: &Attributes) -> Duration {
    match attributes.lifetime {
        Lifetime::Forever => FOREVER,
        Lifetime::Moment => MOMENT,
    }
}

/// How many names a file has.
pub(super) fn links(attributes: &Attributes) -> u32 {
    match attributes.kind {
        Kind::Directory => 2,
        Kind::File | Kind::Link => 1,
    }
}
