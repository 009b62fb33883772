//! Host files behind one small trait: the only floor with raw file descriptors.

mod absent;
#[cfg(test)]
pub(crate) mod fault;
mod file;
mod lock;
mod mapping;
#[cfg(test)]
pub(crate) mod memory;
mod new_file;
mod reflink;
mod request_ring;
mod temporary;
mod write_behind;

pub use absent::Absent;
pub use file::{Access, FileId, FileStore};
pub use lock::{LockMode, holders};
pub use mapping::MappedRun;
pub use new_file::NewFile;
pub use reflink::cannot_share;
pub use request_ring::{Request, RequestHeader, RequestRing};
pub use temporary::TemporaryDirectory;

use std::io;
use std::ops::Range;

use crate::units::HostOffset;

/// Random access to the bytes of one image file.
///
/// All methods take `&self` and may be called from any thread; there is no cursor.
#[allow(clippy::len_without_is_empty, reason = "a file is not a collection")]
pub trait Store: Send + Sync {
    /// Current length in bytes.
    ///
    /// # Errors
    /// The operating system's answer, as from all methods.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset` on. Bytes behind the end of the file read as zero.
    ///
    /// # Errors
    /// A failing read.
    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> io::Result<()>;

    /// Writes the pieces one behind the other from `offset` on, all of them or an error.
    ///
    /// # Errors
    /// No space, or a failing write; a part may have been written.
    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> io::Result<()>;

    /// Cuts or grows the file; new bytes read as zero.
    ///
    /// # Errors
    /// No space, or a size that the file system does not allow.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Returns when all that was written before is on stable storage (`fdatasync`).
    ///
    /// # Errors
    /// What was written before may or may not be durable, and a second call won't tell.
    fn sync(&self) -> io::Result<()>;

    /// Makes a range read as zero and gives its space back where the file system can.
    ///
    /// # Errors
    /// A failing write.
    fn punch_hole(&self, offset: HostOffset, len: u64) -> io::Result<()>;

    /// Makes sure that later writes to a range find space, where the file system can.
    ///
    /// # Errors
    /// No space.
    fn reserve(&self, offset: HostOffset, len: u64) -> io::Result<()>;

    /// The first run of bytes at or behind `from` that may hold data, or `None` if only a hole follows.
    ///
    /// A store that can't tell answers "all of it".
    ///
    /// # Errors
    /// The operating system's answer.
    fn next_data(&self, from: HostOffset) -> io::Result<Option<Range<u64>>>;

    /// The bytes of a range without copying them, of a file that nobody changes; `None` where that can't be had.
    fn mapped(&self, _range: Range<u64>) -> Option<MappedRun> {
        None
    }

    /// Lets the file `target` have the bytes of a range from `at` on, without copying them. All three are multiples of
    /// [`FileStore::block_size`] of `target`.
    ///
    /// # Errors
    /// [`cannot_share`] tells which of them say that this can't be had.
    fn share(&self, _range: Range<u64>, _target: &FileStore, _at: HostOffset) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Gives back the address space's hold on what [`Store::mapped`] has mapped.
    fn let_go(&self) {}

    /// Bytes of storage that the file occupies.
    ///
    /// # Errors
    /// The operating system's answer.
    fn allocated(&self) -> io::Result<u64>;
}
