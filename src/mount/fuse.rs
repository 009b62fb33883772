//! The kernel's requests by way of `fuser`: decode, call, reply. Nothing is decided here.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    Request, TimeOrNow, WriteFlags,
};

use super::crew::Crew;
use super::inode::Inode;
use super::service::{
    BLOCK_SIZE, MAX_BACKGROUND, MAX_NAME, MAX_REQUEST, Service, WANTED, links, ttl,
};
use super::tree::{Attributes, Handle, Kind};
use crate::processors;

/// A read of so many bytes is cheaper without copying, though mapping them costs something, too.
const WORTH_MAPPING: u32 = 64 << 10;

/// A service as a FUSE file system.
pub(super) struct Fuse {
    service: Arc<Service>,
    crew: Crew,
}

impl Fuse {
    pub fn new(service: Arc<Service>) -> Self {
        Self { service, crew: Crew::new(processors::usable()) }
    }
}

/// Replies with `result` by `reply.$method(value…)` or with the error.
macro_rules! reply {
    ($reply:ident, $result:expr, $value:pat => $answer:expr) => {
        match $result {
            Ok($value) => $answer,
            Err(errno) => $reply.error(Errno::from_i32(errno as i32)),
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
        for wanted in WANTED.iter() {
            if let Err(missing) = config.add_capabilities(wanted) {
                log::debug!("the kernel lacks {missing:?}");
            }
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.service.lookup(Inode(parent.0), name);
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
        let found = self.service.attributes(Inode(inode.0));
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
        let resized = self.service.resize(Inode(inode.0), size);
        reply!(reply, resized, attributes => reply.attr(&ttl(&attributes), &file_attr(&attributes)));
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        let found = self.service.link_target(Inode(inode.0));
        reply!(reply, found, target => reply.data(target.as_os_str().as_encoded_bytes()));
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.service.open(Inode(inode.0), flags.0);
        reply!(reply, opened, (handle, flags) => reply.opened(FileHandle(handle.0), flags));
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _turn = self.crew.turn(size.into());
        if size >= WORTH_MAPPING
            && let Some(run) = self.service.mapped(Handle(handle.0), offset, size.into())
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
            let read = self.service.read(Handle(handle.0), offset, buffer);
            reply!(reply, read, len => reply.data(&buffer[..len]));
        });
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _turn = self.crew.turn(data.len() as u64);
        let written = self.service.write(Handle(handle.0), offset, data, flags.0);
        reply!(reply, written, len => reply.written(len));
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
        let closed = self.service.close(Handle(handle.0));
        reply!(reply, closed, () => reply.ok());
    }

    fn fsync(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.crew.turn(0);
        let synced = self.service.sync(Handle(handle.0));
        reply!(reply, synced, () => reply.ok());
    }

    fn opendir(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.service.open_directory(Inode(inode.0));
        reply!(reply, opened, number => {
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
        let listing = match self.service.listing(handle.0) {
            Ok(listing) => listing,
            Err(errno) => return reply.error(Errno::from_i32(errno as i32)),
        };
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
        self.service.close_directory(handle.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let synced = self.service.sync_all();
        reply!(reply, synced, () => reply.ok());
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let found = self.service.statistics();
        reply!(reply, found, found => {
            let blocks = found.size.div_ceil(u64::from(BLOCK_SIZE));
            reply.statfs(blocks, 0, 0, found.files, 0, BLOCK_SIZE, MAX_NAME, BLOCK_SIZE);
        });
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let done = self.service.fallocate(Handle(handle.0), offset, length, mode);
        reply!(reply, done, () => reply.ok());
    }

    fn lseek(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = self.service.seek(Handle(handle.0), offset, whence);
        reply!(reply, found, found => reply.offset(found));
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
        nlink: links(attributes),
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}
