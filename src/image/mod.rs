//! One qcow2 file as a disk with snapshots.
//!
//! The order in which locks are taken: the shape, range locks (`ranges`), then the flush lock, then the metadata lock. The
//! metadata lock is held over reads of metadata by writers, and never over guest data. Nothing here knows the chain:
//! what lies under the active layer is handed in as [`Below`].

mod allocate;
mod base_record;
mod below;
mod bitmaps;
pub mod check;
mod cipher;
mod create;
mod decompressed;
mod entry;
mod flush;
mod grow;
mod layout;
mod map;
mod metadata;
mod open;
mod pages;
mod preallocation;
mod ranges;
mod read;
mod retire;
mod shrink;
mod snapshots;
mod sync;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod write;
mod zero;

pub use below::{Below, Nothing};
pub use cipher::{GuestCipher, SectorNumbering, read_luks_area};
pub use create::{CreateOptions, NewBacking, NewImage};
pub use map::{Content, Place, Run, Tree};
pub use open::{Companions, read_header};
pub use ranges::RangeGuard;
pub use retire::Retirement;
pub use snapshots::{SnapshotInUse, SnapshotTree};
pub use zero::ZeroMode;

use std::sync::{Arc, PoisonError};

use self::cipher::Encryption;
use self::decompressed::Decompressed;
use self::metadata::Metadata;
use self::ranges::{Mode, RangeLocks};
use self::snapshots::Watch;
use self::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use self::sync::{Mutex, MutexGuard, RwLock};
use crate::error::{Error, Problem, Result};
use crate::qcow2::{DataPlace, Geometry, Header};
use crate::store::Store;
use crate::units::{GuestOffset, GuestRange};

/// An open qcow2 image.
///
/// All methods take `&self`; any number of threads may call them at once.
pub struct Image {
    store: Arc<dyn Store>,
    /// Where guest data is: `store` itself, or an external data file.
    data: Arc<dyn Store>,
    data_place: DataPlace,
    decompressed: Decompressed,
    encryption: Encryption,
    geometry: Geometry,
    /// Virtual size in bytes.
    size: AtomicU64,
    writability: Writability,
    ranges: RangeLocks,
    /// Held while a flush is under way: flushes must reach the disk in order.
    flushing: Mutex<()>,
    metadata: Mutex<Metadata>,
    snapshots: RwLock<Vec<Arc<SnapshotTree>>>,
    /// Only where another process may write the image.
    watch: Option<Watch>,
    /// Held by who changes the size of the disk or which snapshots there are: one of them at a time.
    shape: RangeLocks,
    /// Guest data was written since the last sync.
    unsynced: AtomicBool,
    /// A write of metadata failed, or corruption was found: no more writes.
    closed: AtomicBool,
    /// Another image is the active layer now.
    retired: AtomicBool,
    /// The first change has prepared the header.
    begun: Mutex<bool>,
    /// Counts changes of the active mapping.
    generation: AtomicU64,
}

/// Whether an image may be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writability {
    /// Nothing of it is ever written.
    ReadOnly,
    /// Nothing of it is ever written here, but another process may write it.
    BesideWriter,
    /// The active layer takes writes.
    Writable,
}

impl Image {
    /// Virtual size of the active disk in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Cluster size and refcount width.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// A copy of the header as it is now.
    pub fn header(&self) -> Header {
        self.metadata().header.clone()
    }

    /// The file behind the image.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Where guest data is: the image's own file, or its external data file.
    pub fn data_store(&self) -> &dyn Store {
        &*self.data
    }

    /// Whether guest data is encrypted, so that the bytes of the file are not those of the disk.
    pub fn is_encrypted(&self) -> bool {
        !matches!(self.encryption, Encryption::None)
    }

    /// The internal snapshots in the order of the table.
    pub fn snapshots(&self) -> Vec<Arc<SnapshotTree>> {
        self.snapshots.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it was the active layer until another image was put on top of it.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Whether the image was opened for writing, and is still the active layer.
    pub fn is_writable(&self) -> bool {
        self.writability == Writability::Writable && !self.is_retired()
    }

    /// Writes nothing any more, also not what is in memory: nobody is ever going to open the image again.
    pub fn abandon(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Grows whenever the mapping of the active layer changes.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Keeps the mapping of `range` as it is until the guard is dropped: hold it over a read of the active layer.
    pub fn keep_mapping(&self, range: GuestRange) -> RangeGuard<'_> {
        self.ranges.lock(range.widen(self.geometry.cluster_size()), Mode::Shared)
    }

    /// Keeps everybody else off `range` until the guard is dropped.
    fn claim_range(&self, range: GuestRange) -> RangeGuard<'_> {
        self.ranges.lock(range.widen(self.geometry.cluster_size()), Mode::Exclusive)
    }

    /// Keeps the size of the disk and its snapshots as they are, but for the holder, until the guard is dropped.
    fn keep_shape(&self) -> RangeGuard<'_> {
        self.shape.lock(GuestRange::new(GuestOffset::ZERO, u64::MAX), Mode::Exclusive)
    }

    /// Keeps everybody off the whole disk until the guard is dropped.
    fn claim_disk(&self) -> RangeGuard<'_> {
        self.ranges.lock(GuestRange::new(GuestOffset::ZERO, u64::MAX), Mode::Exclusive)
    }

    fn metadata(&self) -> MutexGuard<'_, Metadata> {
        // A panic with the lock held is a bug; what it left behind must at least not reach the disk.
        self.metadata.lock().unwrap_or_else(|poisoned| {
            self.closed.store(true, Ordering::Release);
            poisoned.into_inner()
        })
    }

    fn check_open_for_writing(&self) -> Result<()> {
        if self.is_retired() {
            return Err(Error::new(Problem::Retired));
        }
        if !self.is_writable() {
            return Err(Error::new(Problem::ReadOnly));
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(Problem::ClosedForWriting));
        }
        Ok(())
    }

    fn check_inside(&self, range: GuestRange) -> Result<()> {
        let size = self.size();
        match range.start.checked_add(range.len) {
            Some(end) if end.get() <= size => Ok(()),
            _ => Err(Error::new(Problem::OutOfRange {
                offset: range.start.get(),
                len: range.len,
                size,
            })),
        }
    }

    /// To be called again by a writer who has waited for its range: meanwhile the disk may have become smaller, or that of
    /// another image.
    fn check_still_inside(&self, range: GuestRange) -> Result<()> {
        self.check_open_for_writing()?;
        self.check_inside(range)
    }

    fn mapping_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.is_writable() && self.has_unwritten() && !self.closed.load(Ordering::Acquire) {
            // Whoever cares about errors calls `flush_all` first; this is for the others.
            if let Err(error) = self.flush_all() {
                log::error!("not all changes reached the image: {error}");
            }
        }
    }
}
