//! The qcow2 format: bytes to types and back, and no I/O.
//!
//! Section names in the comments are those of the public qcow2 specification (QEMU's `docs/interop/qcow2`).
//! Nothing here panics on hostile bytes.

pub mod anatomy;
mod base_record;
mod bitmap;
mod compression;
pub mod encryption;
mod entry;
mod extension;
mod features;
mod geometry;
mod header;
pub mod refcount;
mod snapshot;

pub use base_record::{BASE_RECORD, BaseRecord};
pub use bitmap::{Bitmap, BitmapDirectory, BitmapFlags};
pub use compression::{Compression, decompress};
pub use entry::{
    CompressedCluster, DataPlace, EntryRules, ExtendedL2Entry, L1Entry, L2Entry, ZeroFlag,
};
pub use extension::Extension;
pub use features::{AutoclearFeatures, CompatibleFeatures, IncompatibleFeatures};
pub use geometry::{Geometry, L2Form};
pub use header::{Header, MAGIC, MAX_BACKING_NAME, Version, offsets};
pub use snapshot::{SNAPSHOT_FIXED_LEN, Snapshot, SnapshotLengths};

/// Greatest size of an L1 table in bytes that QEMU opens, and so do we.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Greatest size of a refcount table in bytes that QEMU opens, and so do we.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Greatest number of internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Greatest size of the snapshot table in bytes.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;

/// No file is longer, for QEMU.
pub const MAX_FILE_LEN: u64 = (i64::MAX as u64) & !((1 << 30) - 1);

/// The big-endian number at `index`, counted in numbers; 0 behind the end.
pub(crate) fn be_u64(bytes: &[u8], index: usize) -> u64 {
    let number = bytes.chunks_exact(8).nth(index);
    number.and_then(|number| number.try_into().ok()).map_or(0, u64::from_be_bytes)
}
