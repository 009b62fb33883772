//! An image file on the host.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::pwritev;
use nix::unistd::{Whence, lseek};

use super::mapping::{MappedRun, Mapping};
use super::reflink::share;
use super::write_behind::{LARGE, WriteBehind};
use super::{LockMode, Store, lock};
use crate::error::{Doing, Error, Problem, Result};
use crate::units::HostOffset;

/// A regular file, opened once and kept open: image locks live as long as this value.
pub struct FileStore {
    file: Arc<File>,
    id: FileId,
    /// Bytes that the file has unless somebody else has cut it. What it had behind that never was there, and reads as zero.
    least_len: AtomicU64,
    /// Made when first asked for; `None` if it can't be had.
    mapping: OnceLock<Option<Arc<Mapping>>>,
    lasting: Lasting,
    /// Made when something large is first written; `None` if it can't be had.
    write_behind: OnceLock<Option<WriteBehind>>,
}

/// How long what is written to a file shall last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lasting {
    /// Through power cuts.
    Forever,
    /// As long as it is open: nobody could find it after a power cut, so that a sync has nothing to do.
    WhileOpen,
}

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The descriptor can't write, whatever goes wrong above it.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

/// Tells files apart whatever their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Device of the file system.
    pub device: u64,
    /// Inode number in it.
    pub inode: u64,
}

impl FileId {
    /// The file that `path` leads to, if it does.
    pub fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        Some(Self { device: metadata.dev(), inode: metadata.ino() })
    }
}

impl FileStore {
    /// Opens a file that exists.
    ///
    /// # Errors
    /// Without the file's name, which the caller knows better: [`Problem::NotFound`], [`Problem::NotARegularFile`] (directories, devices, pipes: opening these could block
    /// or have effects of its own), or the operating system's answer.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        // Opening a device or a pipe can have effects of its own, so that it is looked at before. What is then opened is
        // looked at once more.
        if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(Error::new(Problem::NotARegularFile));
        }
        let opened = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            // A pipe put where an image was expected must not hang the open.
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) => {
                let problem = match error.kind() {
                    ErrorKind::NotFound => Problem::NotFound,
                    ErrorKind::IsADirectory => Problem::NotARegularFile,
                    _ if error.raw_os_error() == Some(libc::ENXIO) => Problem::NotARegularFile,
                    _ => Problem::Io { action: "open it", source: error },
                };
                return Err(Error::new(problem));
            }
        };
        Self::from_file(file, Lasting::Forever)
    }

    /// Makes a new, empty file, open for writing.
    ///
    /// # Errors
    /// [`Problem::Exists`] rather than overwriting anything.
    pub fn create_new(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(
            |error| {
                let problem = match error.kind() {
                    ErrorKind::AlreadyExists => Problem::Exists,
                    _ => Problem::Io { action: "create it", source: error },
                };
                Error::new(problem)
            },
        )?;
        Self::from_file(file, Lasting::Forever)
    }

    pub(super) fn from_file(file: File, lasting: Lasting) -> Result<Self> {
        let metadata = file.metadata().doing("look at it")?;
        if !metadata.is_file() {
            return Err(Error::new(Problem::NotARegularFile));
        }
        let id = FileId { device: metadata.dev(), inode: metadata.ino() };
        let least_len = AtomicU64::new(metadata.len());
        let (mapping, write_behind) = (OnceLock::new(), OnceLock::new());
        Ok(Self { file: Arc::new(file), id, least_len, mapping, lasting, write_behind })
    }

    /// Takes QEMU's image locks (see [`LockMode`]); they last as long as this value.
    ///
    /// # Errors
    /// [`Problem::Locked`] with the processes that hold the file.
    pub fn lock(&self, mode: LockMode) -> Result<()> {
        lock::take(&self.file, self.id, mode)
    }

    /// Goes over from [`LockMode::Write`] to [`LockMode::Read`], without a moment without locks.
    pub fn lock_for_reading_only(&self) {
        lock::stop_writing(&self.file);
    }

    /// Makes sure that a power cut does not take the file's name, `path`.
    ///
    /// # Errors
    /// The operating system's answer.
    pub fn make_name_durable(&self, path: &Path) -> io::Result<()> {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// Empties the file.
    ///
    /// # Errors
    /// The operating system's answer.
    pub fn clear(&self) -> io::Result<()> {
        self.set_len(0)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Which file this is.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// When the content changed last.
    ///
    /// # Errors
    /// The operating system's answer.
    pub fn modified(&self) -> io::Result<SystemTime> {
        self.file.metadata()?.modified()
    }

    /// Says when the content changed last.
    ///
    /// # Errors
    /// The operating system's answer, also where the file belongs to another user.
    pub fn set_modified(&self, time: SystemTime) -> io::Result<()> {
        self.file.set_modified(time)
    }

    /// What its file system counts in.
    ///
    /// # Errors
    /// The operating system's answer.
    pub fn block_size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blksize())
    }
}

impl Store for FileStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, mut buf: &mut [u8], offset: HostOffset) -> io::Result<()> {
        let mut at = offset.get();
        while !buf.is_empty() {
            match self.file.read_at(buf, at) {
                Ok(0) => {
                    self.check_is_uncut(at)?;
                    buf.fill(0);
                    break;
                }
                Ok(n) => {
                    buf = &mut buf[n..];
                    at += n as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut rest = &mut slices[..];
        let mut at = offset.get();
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let position =
                i64::try_from(at).map_err(|_| io::Error::from(ErrorKind::FileTooLarge))?;
            match uninterrupted(|| pwritev(&self.file, rest, position))? {
                0 => return Err(ErrorKind::WriteZero.into()),
                n => {
                    at += n as u64;
                    IoSlice::advance_slices(&mut rest, n);
                }
            }
        }
        self.least_len.fetch_max(at, Ordering::Relaxed);
        if at - offset.get() >= LARGE && self.lasting == Lasting::Forever {
            let behind = self.write_behind.get_or_init(|| WriteBehind::start(&self.file));
            behind.iter().for_each(|behind| behind.wrote(offset.get()..at));
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        // Before it is shorter: what is cut off now is nobody's.
        self.least_len.fetch_min(len, Ordering::Relaxed);
        self.file.set_len(len)?;
        self.least_len.fetch_max(len, Ordering::Relaxed);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        match self.lasting {
            Lasting::Forever => self.file.sync_data(),
            Lasting::WhileOpen => Ok(()),
        }
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let too_large = |_| io::Error::from(ErrorKind::FileTooLarge);
        let start = i64::try_from(offset.get()).map_err(too_large)?;
        let len_signed = i64::try_from(len).map_err(too_large)?;
        match uninterrupted(|| fallocate(&self.file, flags, start, len_signed)) {
            Err(nix::Error::EOPNOTSUPP) => self.write_zeroes(offset, len),
            result => Ok(result?),
        }
    }

    fn reserve(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        let too_large = |_| io::Error::from(ErrorKind::FileTooLarge);
        let start = i64::try_from(offset.get()).map_err(too_large)?;
        let len = i64::try_from(len).map_err(too_large)?;
        let flags = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match uninterrupted(|| fallocate(&self.file, flags, start, len)) {
            Err(nix::Error::EOPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    fn next_data(&self, from: HostOffset) -> io::Result<Option<Range<u64>>> {
        let len = self.len()?;
        let Ok(position) = i64::try_from(from.get()) else { return Ok(None) };
        // Nothing more up to the end is nothing at all only where that is the file's own end.
        let nothing = || self.check_is_uncut(len).map(|()| None);
        if from.get() >= len {
            return nothing();
        }
        match lseek(&self.file, position, Whence::SeekData) {
            Err(nix::Error::ENXIO) => nothing(),
            Err(nix::Error::EINVAL) => Ok(Some(from.get()..len)),
            Err(errno) => Err(errno.into()),
            Ok(data) => {
                let hole = lseek(&self.file, data, Whence::SeekHole)?;
                Ok(Some(data.cast_unsigned()..hole.cast_unsigned()))
            }
        }
    }

    fn mapped(&self, range: Range<u64>) -> Option<MappedRun> {
        // If the file was cut, reading says so in words, where a reply from its mapping would just fail.
        if self.file.metadata().ok()?.len() < range.end {
            return None;
        }
        self.mapping.get_or_init(|| Mapping::new(&self.file).ok()).as_ref()?.run(range)
    }

    fn share(&self, range: Range<u64>, target: &FileStore, at: HostOffset) -> io::Result<()> {
        share(&self.file, range, &target.file, at)
    }

    fn let_go(&self) {
        if let Some(Some(mapping)) = self.mapping.get() {
            mapping.let_go();
        }
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }
}

impl FileStore {
    /// Refuses a file that ends at `end` and was longer: what is missing may be anything but zeroes.
    fn check_is_uncut(&self, end: u64) -> io::Result<()> {
        let least = self.least_len.load(Ordering::Relaxed);
        if end >= least {
            return Ok(());
        }
        let message = format!("somebody has cut the file from {least} to {end} bytes");
        Err(io::Error::new(ErrorKind::UnexpectedEof, message))
    }

    /// The slow way to [`Store::punch_hole`], for file systems without holes.
    fn write_zeroes(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        static ZEROES: [u8; 65536] = [0; 65536];
        let len = len.min(self.len()?.saturating_sub(offset.get()));
        let mut done = 0;
        while done < len {
            let n = (len - done).min(ZEROES.len() as u64);
            self.write_at(&[&ZEROES[..n as usize]], offset + done)?;
            done += n;
        }
        Ok(())
    }
}

/// Makes a system call until no signal has interrupted it.
fn uninterrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(nix::Error::EINTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_off_by_somebody_else_does_not_read_as_zeroes_and_what_never_was_there_does() {
        let place = tempfile::NamedTempFile::new().unwrap();
        place.as_file().set_len(5000).unwrap();
        let store = FileStore::open(place.path(), Access::ReadWrite).unwrap();
        let read = |at: u64| store.read_at(&mut [1; 1000], HostOffset::new(at));
        read(4500).unwrap();
        store.write_at(&[&[7; 1000]], HostOffset::new(8000)).unwrap();
        place.as_file().set_len(8500).unwrap();
        assert!(read(8000).unwrap_err().to_string().contains("from 9000 to 8500 bytes"));
        assert_eq!(store.next_data(HostOffset::new(8200)).unwrap().unwrap().end, 8500);
        assert!(store.next_data(HostOffset::new(8500)).is_err());
        read(7500).unwrap();
        // What this program cuts itself nobody wants any more.
        store.set_len(6000).unwrap();
        read(5500).unwrap();
        assert_eq!(store.next_data(HostOffset::new(6000)).unwrap(), None);
        store.set_len(7000).unwrap();
        place.as_file().set_len(6500).unwrap();
        read(6400).unwrap_err();
    }

    #[test]
    fn a_system_call_that_a_signal_interrupts_is_made_again() {
        let answers = [Err(nix::Error::EINTR), Err(nix::Error::EINTR), Ok(7), Ok(8)];
        let mut left = answers.into_iter();
        assert_eq!(uninterrupted(|| left.next().unwrap()), Ok(7));
        assert_eq!(left.next(), Some(Ok(8)));
    }

    #[test]
    fn other_errors_of_a_system_call_are_told_at_once() {
        let mut calls = 0;
        let result: nix::Result<()> = uninterrupted(|| {
            calls += 1;
            Err(nix::Error::ENOSPC)
        });
        assert_eq!((result, calls), (Err(nix::Error::ENOSPC), 1));
    }
}
