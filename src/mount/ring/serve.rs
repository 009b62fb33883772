//! One request of the kernel: decode, call, encode. Nothing is decided here.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::wire::{
    Attr, AttrOut, Dirent, EntryOut, FallocateIn, FsyncIn, InHeader, LseekIn, LseekOut, OpenIn,
    OpenOut, ReadIn, ReleaseIn, SetattrIn, StatfsOut, TYPE_SHIFT, WriteIn, WriteOut, changed,
    opcode,
};
use crate::mount::inode::Inode;
use crate::mount::service::{Answer, BLOCK_SIZE, MAX_NAME, Service, links, ttl};
use crate::mount::tree::{Attributes, Entry, Handle, Kind, Statistics};

/// A request without what it moves.
pub struct Asked<'a> {
    /// What is asked, and of which inode.
    pub header: &'a InHeader,
    /// What belongs to this operation alone.
    pub operation: &'a [u8],
    /// Bytes of the payload that came with it: a name, or data to write.
    pub given: usize,
}

/// Answers a request. `payload` has what came with it, and gets what goes back; answers how many bytes that is.
///
/// # Errors
/// What the kernel shall tell whoever asked.
pub fn serve(service: &Service, asked: &Asked<'_>, payload: &mut [u8]) -> Answer<usize> {
    let inode = Inode(asked.header.nodeid);
    match asked.header.opcode {
        opcode::LOOKUP => {
            let name = payload.get(..asked.given).and_then(|name| name.split_last());
            let (_, name) = name.ok_or(Errno::EINVAL)?;
            let found = service.lookup(inode, OsStr::from_bytes(name))?;
            put(payload, &entry_out(&found))
        }
        opcode::GETATTR => put(payload, &attr_out(&service.attributes(inode)?)),
        opcode::SETATTR => {
            let asked: &SetattrIn = asked.arguments()?;
            // Times go along with a new size.
            if asked.valid & (changed::MODE | changed::UID | changed::GID) != 0
                || asked.valid & changed::SIZE == 0
            {
                log::debug!("setattr of {inode}: {:#x}", asked.valid);
                return Err(Errno::EPERM);
            }
            put(payload, &attr_out(&service.resize(inode, asked.size)?))
        }
        opcode::READLINK => {
            let target = service.link_target(inode)?;
            put(payload, target.as_os_str().as_bytes())
        }
        opcode::OPEN => {
            let asked: &OpenIn = asked.arguments()?;
            let (handle, flags) = service.open(inode, asked.flags.cast_signed())?;
            put(payload, &OpenOut { fh: handle.0, open_flags: flags.bits(), backing_id: 0 })
        }
        opcode::READ => {
            let asked: &ReadIn = asked.arguments()?;
            let room = payload.get_mut(..asked.size as usize).ok_or(Errno::EINVAL)?;
            service.read(Handle(asked.fh), asked.offset, room)
        }
        opcode::WRITE => {
            let write: &WriteIn = asked.arguments()?;
            let data = payload.get(..asked.given).ok_or(Errno::EINVAL)?;
            let data = data.get(..write.size as usize).ok_or(Errno::EINVAL)?;
            let flags = write.flags.cast_signed();
            let size = service.write(Handle(write.fh), write.offset, data, flags)?;
            put(payload, &WriteOut { size, padding: 0 })
        }
        // Closing a file promises nothing; whoever wants durability calls fsync. There is nothing to forget.
        opcode::FLUSH | opcode::FORGET | opcode::BATCH_FORGET => Ok(0),
        opcode::RELEASE => {
            service.close(Handle(asked.arguments::<ReleaseIn>()?.fh))?;
            Ok(0)
        }
        opcode::FSYNC => {
            service.sync(Handle(asked.arguments::<FsyncIn>()?.fh))?;
            Ok(0)
        }
        opcode::OPENDIR => {
            let fh = service.open_directory(inode)?;
            put(payload, &OpenOut { fh, open_flags: 0, backing_id: 0 })
        }
        opcode::READDIR => {
            let asked: &ReadIn = asked.arguments()?;
            let listing = service.listing(asked.fh)?;
            let room = payload.get_mut(..asked.size as usize).ok_or(Errno::EINVAL)?;
            Ok(put_listing(room, &listing, asked.offset))
        }
        opcode::RELEASEDIR => {
            service.close_directory(asked.arguments::<ReleaseIn>()?.fh);
            Ok(0)
        }
        opcode::FSYNCDIR => {
            service.sync_all()?;
            Ok(0)
        }
        opcode::STATFS => put(payload, &statfs_out(&service.statistics()?)),
        opcode::FALLOCATE => {
            let FallocateIn { fh, offset, length, mode, .. } = *asked.arguments()?;
            service.fallocate(Handle(fh), offset, length, mode.cast_signed())?;
            Ok(0)
        }
        opcode::LSEEK => {
            let LseekIn { fh, offset, whence, .. } = *asked.arguments()?;
            let offset = service.seek(Handle(fh), offset, whence.cast_signed())?;
            put(payload, &LseekOut { offset })
        }
        // Names are made by snapshots and overlays, not by those who use the files. To a read-only mount the kernel
        // itself says so, before it asks.
        opcode::MKNOD
        | opcode::MKDIR
        | opcode::CREATE
        | opcode::SYMLINK
        | opcode::LINK
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::UNLINK
        | opcode::RMDIR => Err(Errno::EPERM),
        opcode::SETXATTR => Err(Errno::EOPNOTSUPP),
        _ => Err(Errno::ENOSYS),
    }
}

impl<'a> Asked<'a> {
    fn arguments<T: FromBytes + Immutable + KnownLayout>(&self) -> Answer<&'a T> {
        T::ref_from_prefix(self.operation)
            .map(|(arguments, _)| arguments)
            .map_err(|_| Errno::EINVAL)
    }
}

/// Puts `value` to the start of `room`. Answers its length.
fn put<T: IntoBytes + Immutable + ?Sized>(room: &mut [u8], value: &T) -> Answer<usize> {
    let bytes = value.as_bytes();
    room.get_mut(..bytes.len()).ok_or(Errno::EIO)?.copy_from_slice(bytes);
    Ok(bytes.len())
}

/// Puts as many entries as have room, from the one of index `first` on. Answers how many bytes they are.
fn put_listing(room: &mut [u8], listing: &[Entry], first: u64) -> usize {
    let mut filled = 0;
    let skipped = usize::try_from(first).unwrap_or(usize::MAX);
    for (index, entry) in listing.iter().enumerate().skip(skipped) {
        let name = entry.name.as_bytes();
        let header = Dirent {
            ino: entry.inode.0,
            off: index as u64 + 1,
            namelen: name.len() as u32,
            kind: type_bits(entry.kind) >> TYPE_SHIFT,
        };
        let len = (size_of::<Dirent>() + name.len()).next_multiple_of(8);
        let Some(room) = room.get_mut(filled..filled + len) else { break };
        room.fill(0);
        room[..size_of::<Dirent>()].copy_from_slice(header.as_bytes());
        room[size_of::<Dirent>()..][..name.len()].copy_from_slice(name);
        filled += len;
    }
    filled
}

fn entry_out(attributes: &Attributes) -> EntryOut {
    let valid = ttl(attributes);
    EntryOut {
        nodeid: attributes.inode.0,
        generation: 0,
        entry_valid: valid.as_secs(),
        attr_valid: valid.as_secs(),
        entry_valid_nsec: valid.subsec_nanos(),
        attr_valid_nsec: valid.subsec_nanos(),
        attr: attr(attributes),
    }
}

fn attr_out(attributes: &Attributes) -> AttrOut {
    let valid = ttl(attributes);
    AttrOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        padding: 0,
        attr: attr(attributes),
    }
}

fn attr(attributes: &Attributes) -> Attr {
    let (seconds, nanoseconds) = since_epoch(attributes.time);
    Attr {
        ino: attributes.inode.0,
        size: attributes.size,
        blocks: attributes.allocated.div_ceil(512),
        atime: seconds,
        mtime: seconds,
        ctime: seconds,
        atimensec: nanoseconds,
        mtimensec: nanoseconds,
        ctimensec: nanoseconds,
        mode: type_bits(attributes.kind) | u32::from(attributes.mode),
        nlink: links(attributes),
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// Seconds, which the kernel takes as signed, and nanoseconds behind them.
fn since_epoch(time: SystemTime) -> (u64, u32) {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => (since.as_secs(), since.subsec_nanos()),
        Err(before) => {
            // The nanoseconds count forwards, whichever side of the epoch it is.
            let before = before.duration();
            let seconds = before.as_secs() + u64::from(before.subsec_nanos() > 0);
            let nanoseconds = (Duration::from_secs(seconds) - before).subsec_nanos();
            (seconds.wrapping_neg(), nanoseconds)
        }
    }
}

fn statfs_out(statistics: &Statistics) -> StatfsOut {
    StatfsOut {
        blocks: statistics.size.div_ceil(u64::from(BLOCK_SIZE)),
        files: statistics.files,
        bsize: BLOCK_SIZE,
        namelen: MAX_NAME,
        frsize: BLOCK_SIZE,
        ..StatfsOut::default()
    }
}

fn type_bits(kind: Kind) -> u32 {
    match kind {
        Kind::Directory => libc::S_IFDIR,
        Kind::File => libc::S_IFREG,
        Kind::Link => libc::S_IFLNK,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    #[test]
    fn a_listing_goes_on_where_the_room_ended() {
        let entry =
            |name: &str| Entry { name: OsString::from(name), inode: Inode(7), kind: Kind::File };
        let listing = ["a", "name of 17 bytes.", "b"].map(entry);
        // One entry takes 24 bytes and its name, up to a multiple of 8.
        let mut room = [0xff; 32 + 48];
        assert_eq!(put_listing(&mut room[..79], &listing, 0), 32);
        assert_eq!(put_listing(&mut room, &listing, 0), 80);
        let (second, name) = Dirent::read_from_prefix(&room[32..]).unwrap();
        assert_eq!((second.ino, second.off, second.namelen, second.kind), (7, 2, 17, 8));
        assert_eq!(&name[..24], b"name of 17 bytes.\0\0\0\0\0\0\0");
        assert_eq!(put_listing(&mut room, &listing, 2), 32);
        assert_eq!(put_listing(&mut room, &listing, 3), 0);
        assert_eq!(put_listing(&mut room, &listing, u64::MAX), 0);
    }

    #[test]
    fn times_before_the_epoch_count_their_nanoseconds_forwards() {
        let epoch = SystemTime::UNIX_EPOCH;
        assert_eq!(since_epoch(epoch + Duration::new(5, 7)), (5, 7));
        assert_eq!(since_epoch(epoch - Duration::new(5, 0)), (-5i64 as u64, 0));
        assert_eq!(since_epoch(epoch - Duration::new(5, 7)), (-6i64 as u64, 999_999_993));
    }
}
