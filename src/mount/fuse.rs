//! The kernel's requests in terms of [`Tree`]: decode, call, reply. Nothing is decided here.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::crew::Crew;
use super::inode::Inode;
use super::tree::{Attributes, Caching, Entry, Handle, Kind, Lifetime, OpenFor, PastEnd, Tree};
use crate::error::Result;

/// Bytes in one request at most; the kernel's own limit is the same.
const MAX_REQUEST: u32 = 1 << 20;
/// A read of so many bytes is cheaper without copying, though mapping them costs something, too.
const WORTH_MAPPING: u32 = 64 << 10;
/// Requests that the kernel may have under way in the background: readahead, direct I/O in parts.
const MAX_BACKGROUND: u16 = 256;
/// What the block sizes of `stat` and `statfs` are; loop devices take the latter as discard granularity.
const BLOCK_SIZE: u32 = 4096;
/// How long the kernel may believe what never changes.
const FOREVER: Duration = Duration::from_secs(86400);
/// How long it may believe what changes with a write.
const MOMENT: Duration = Duration::ZERO;

/// A tree as a FUSE file system.
pub(super) struct Fuse {
    tree: Arc<Tree>,
    /// What open directories list, as of when they were opened.
    listings: RwLock<HashMap<u64, Arc<Vec<Entry>>>>,
    next_listing: AtomicU64,
    crew: Crew,
}

impl Fuse {
    pub fn new(tree: Arc<Tree>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            tree,
            listings: RwLock::default(),
            next_listing: AtomicU64::new(0),
            crew: Crew::new(processors),
        }
    }

    /// Calls `f`, with errors as the numbers that the kernel wants. A panic is a bug that must cost a request its
    /// answer, not the mount its threads.
    fn answer<T>(
        &self,
        operation: &str,
        inode: INodeNo,
        f: impl FnOnce(&Tree) -> Result<T>,
    ) -> std::result::Result<T, Errno> {
        let result = catch_unwind(AssertUnwindSafe(|| f(&self.tree)));
        let Ok(result) = result else {
            log::error!("{operation} of inode {inode:?} ran into a bug");
            return Err(Errno::EIO);
        };
        result.map_err(|error| {
            let number = error.errno();
            if number == libc::EIO {
                log::error!("{operation}: {error}");
            } else {
                log::debug!("{operation}: {error}");
            }
            Errno::from_i32(number)
        })
    }
}

/// Replies with `result` by `reply.$method(value…)` or with the error.
macro_rules! reply {
    ($reply:ident, $result:expr, $value:pat => $answer:expr) => {
        match $result {
            Ok($value) => $answer,
            Err(errno) => $reply.error(errno),
        }
    };
}

impl Filesystem for Fuse {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for (what, set) in [
            ("max_write", config.set_max_write(MAX_REQUEST).err().map(u64::from)),
            ("max_background", config.set_max_background(MAX_BACKGROUND).err().map(u64::from)),
        ] {
            if let Some(nearest) = set {
                log::debug!("the kernel takes {what} up to {nearest} only");
            }
        }
        for wanted in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            InitFlags::FUSE_CACHE_SYMLINKS,
        ] {
            if let Err(missing) = config.add_capabilities(wanted) {
                log::debug!("the kernel lacks {missing:?}");
            }
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.answer("lookup", parent, |tree| tree.lookup(Inode(parent.0), name));
        reply!(reply, found, attributes => {
            let ttl = ttl(&attributes);
            reply.entry(&ttl, &file_attr(&attributes), Generation(0));
        });
    }

    fn getattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let found = self.answer("getattr", inode, |tree| tree.attributes(Inode(inode.0)));
        reply!(reply, found, attributes => reply.attr(&ttl(&attributes), &file_attr(&attributes)));
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let only_size = mode.is_none() && uid.is_none() && gid.is_none();
        let Some(size) = size.filter(|_| only_size) else {
            log::debug!("setattr of {inode:?}: mode {mode:?}, times {atime:?} {mtime:?}");
            return reply.error(Errno::EPERM);
        };
        let resized = self.answer("resize", inode, |tree| tree.resize(Inode(inode.0), size));
        reply!(reply, resized, attributes => reply.attr(&ttl(&attributes), &file_attr(&attributes)));
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        let found = self.answer("readlink", inode, |tree| tree.link_target(Inode(inode.0)));
        reply!(reply, found, target => reply.data(target.as_os_str().as_encoded_bytes()));
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let purpose = match flags.acc_mode() {
            OpenAccMode::O_RDONLY => OpenFor::Reading,
            OpenAccMode::O_WRONLY | OpenAccMode::O_RDWR => OpenFor::Writing,
        };
        let opened = self.answer("open", inode, |tree| tree.open(Inode(inode.0), purpose));
        reply!(reply, opened, (handle, caching) => {
            let flags = match caching {
                Caching::Everything => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
                Caching::Nothing => {
                    FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
                }
            };
            reply.opened(FileHandle(handle.0), flags);
        });
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _turn = self.crew.turn(size.into());
        if size >= WORTH_MAPPING
            && let Some(run) = self.tree.mapped(Handle(handle.0), offset, size.into())
        {
            return reply.data(run.bytes());
        }
        thread_local! {
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        BUFFER.with_borrow_mut(|buffer| {
            let size = size as usize;
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let buffer = &mut buffer[..size];
            let read =
                self.answer("read", inode, |tree| tree.read(Handle(handle.0), offset, buffer));
            reply!(reply, read, len => reply.data(&buffer[..len]));
        });
    }

    fn write(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _turn = self.crew.turn(data.len() as u64);
        let written = self.answer("write", inode, |tree| {
            let len = tree.write(Handle(handle.0), offset, data)?;
            // The bit of O_DSYNC is part of O_SYNC, too.
            if flags.0 & libc::O_DSYNC != 0 {
                tree.sync_file(Handle(handle.0))?;
            }
            Ok(len)
        });
        reply!(reply, written, len => reply.written(len as u32));
    }

    fn flush(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // Closing a file promises nothing; whoever wants durability calls fsync.
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.tree.close(Handle(handle.0));
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.crew.turn(0);
        let synced = self.answer("fsync", inode, |tree| tree.sync_file(Handle(handle.0)));
        reply!(reply, synced, () => reply.ok());
    }

    fn opendir(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let listed = self.answer("opendir", inode, |tree| tree.list(Inode(inode.0)));
        reply!(reply, listed, entries => {
            let number = self.next_listing.fetch_add(1, Ordering::Relaxed);
            let mut listings = self.listings.write().unwrap_or_else(PoisonError::into_inner);
            listings.insert(number, Arc::new(entries));
            reply.opened(FileHandle(number), FopenFlags::empty());
        });
    }

    fn readdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listings = self.listings.read().unwrap_or_else(PoisonError::into_inner);
        let listing = listings.get(&handle.0).cloned();
        drop(listings);
        let Some(listing) = listing else { return reply.error(Errno::EBADF) };
        for (index, entry) in listing.iter().enumerate().skip(offset as usize) {
            let kind = file_type(entry.kind);
            if reply.add(INodeNo(entry.inode.0), index as u64 + 1, kind, &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let mut listings = self.listings.write().unwrap_or_else(PoisonError::into_inner);
        listings.remove(&handle.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let synced = self.answer("fsyncdir", inode, |tree| tree.sync());
        reply!(reply, synced, () => reply.ok());
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let statistics = self.tree.statistics();
        let blocks = statistics.size.div_ceil(u64::from(BLOCK_SIZE));
        reply.statfs(blocks, 0, 0, statistics.files, 0, BLOCK_SIZE, 255, BLOCK_SIZE);
    }

    fn fallocate(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let done = self.answer("fallocate", inode, |tree| {
            let handle = Handle(handle.0);
            let past_end = match mode & libc::FALLOC_FL_KEEP_SIZE {
                0 => PastEnd::Refuse,
                _ => PastEnd::Ignore,
            };
            match mode & !libc::FALLOC_FL_KEEP_SIZE {
                libc::FALLOC_FL_PUNCH_HOLE => tree.discard(handle, offset, length).map(Some),
                libc::FALLOC_FL_ZERO_RANGE => tree.zero(handle, offset, length, past_end).map(Some),
                _ => Ok(None),
            }
        });
        reply!(reply, done, done => match done {
            Some(()) => reply.ok(),
            None => reply.error(Errno::EOPNOTSUPP),
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let found = self.answer("lseek", inode, |tree| match whence {
            libc::SEEK_DATA => tree.seek_data(Handle(handle.0), offset),
            _ => tree.seek_hole(Handle(handle.0), offset),
        });
        reply!(reply, found, found => match found {
            Some(found) => reply.offset(found.cast_signed()),
            None => reply.error(Errno::ENXIO),
        });
    }

    // Names are made by snapshots and overlays, not by those who use the files. To a read-only mount the kernel
    // itself says so, before it asks.

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn symlink(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _parent: INodeNo,
        _name: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn setxattr(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }
}

fn ttl(attributes: &Attributes) -> Duration {
    match attributes.lifetime {
        Lifetime::Forever => FOREVER,
        Lifetime::Moment => MOMENT,
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
    }
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.inode.0),
        size: attributes.size,
        blocks: attributes.allocated.div_ceil(512),
        atime: attributes.time,
        mtime: attributes.time,
        ctime: attributes.time,
        crtime: attributes.time,
        kind: file_type(attributes.kind),
        perm: attributes.mode,
        nlink: if attributes.kind == Kind::Directory { 2 } else { 1 },
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}
