//! Opening: everything that must be known before the first read, and for a writer, before the first write.

use std::sync::Arc;

use super::allocate::Allocator;
use super::cipher::{Encryption, GuestCipher};
use super::decompressed::Decompressed;
use super::layout::{Layout, Owner};
use super::metadata::Metadata;
use super::pages::Pages;
use super::ranges::RangeLocks;
use super::snapshots::{SnapshotTable, Watch};
use super::sync::atomic::{AtomicBool, AtomicU64};
use super::sync::{Mutex, RwLock};
use super::table::Table;
use super::{Image, Writability};
use crate::error::{Doing, Error, Problem, RepairMark, Result};
use crate::qcow2::encryption::{CRYPT_NONE, LuksArea};
use crate::qcow2::{AutoclearFeatures, DataPlace, Header, IncompatibleFeatures, L1Entry, offsets};
use crate::store::{Absent, Store};
use crate::units::HostOffset;

/// Bytes of clean metadata that an image keeps in memory at most: 16 GiB of disk at the default cluster size.
const WRITER_CACHE_BYTES: u64 = 2 << 20;
/// The same of an image that is only read: a chain keeps what its views need of it (`chain/resolved.rs`).
const READER_CACHE_BYTES: u64 = 64 << 10;

impl Image {
    /// Opens the image in `store`, which keeps its data to itself.
    ///
    /// # Errors
    /// As [`Image::open_with`].
    pub fn open(store: Arc<dyn Store>, writability: Writability) -> Result<Self> {
        Self::open_with(store, writability, Companions::default())
    }

    /// Opens the image in `store` with what else it needs.
    ///
    /// # Errors
    /// What [`Header::parse`], [`Header::refuse_unsupported`] and [`Header::check_tables`] refuse; for a writer also a dirty or corrupt image, features that are only read, and tables that overlap.
    pub fn open_with(
        store: Arc<dyn Store>,
        writability: Writability,
        companions: Companions,
    ) -> Result<Self> {
        let header = read_header(&*store)?;
        header.refuse_unsupported()?;
        header.check_tables()?;
        let data: Arc<dyn Store> = match (header.data_place(), companions.data_file) {
            (DataPlace::Internal, _) => store.clone(),
            (DataPlace::External, Some(data)) => data,
            (DataPlace::External, None) => Arc::new(Absent),
        };
        if writability == Writability::Writable {
            refuse_unwritable(&header)?;
        }
        let encryption = match (header.crypt_method, companions.cipher) {
            (CRYPT_NONE, _) => Encryption::None,
            (_, Some(cipher)) => Encryption::Unlocked(cipher),
            (_, None) => Encryption::Locked,
        };
        let geometry = header.geometry;
        let header_compression = header.compression();
        let header_data_place = header.data_place();
        let (read_table, cache_bytes): (fn(_, _, _) -> _, _) = match writability {
            Writability::ReadOnly | Writability::BesideWriter => (Table::read, READER_CACHE_BYTES),
            Writability::Writable => (Table::read_whole, WRITER_CACHE_BYTES),
        };
        let l1 = read_table(&*store, header.l1_offset, header.l1_entries as usize)?;
        let (snapshots, watch, allocator) = match writability {
            Writability::ReadOnly => (SnapshotTable::read(&*store, &header)?.trees, None, None),
            Writability::BesideWriter => {
                let (watch, trees) = Watch::begin(&*store, &header)?;
                (trees, Some(watch), None)
            }
            Writability::Writable => {
                let table = SnapshotTable::read(&*store, &header)?;
                let allocator = open_allocator(&*store, &header, &l1, &table)?;
                (table.trees, None, Some(allocator))
            }
        };
        Ok(Self {
            geometry,
            size: AtomicU64::new(header.size),
            writability,
            ranges: RangeLocks::default(),
            flushing: Mutex::new(()),
            metadata: Mutex::new(Metadata {
                geometry,
                rules: header.entry_rules(),
                data_file_is_raw: header.data_file_is_raw(),
                header,
                l1,
                pages: Pages::new(geometry.cluster_size(), cache_bytes),
                allocator,
                freeze: None,
            }),
            shape: RangeLocks::default(),
            snapshots: RwLock::new(snapshots),
            watch,
            unsynced: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            begun: Mutex::new(false),
            generation: AtomicU64::new(0),
            decompressed: Decompressed::new(header_compression, geometry),
            data,
            data_place: header_data_place,
            encryption,
            store,
        })
    }

    /// Called before each change: the first one prepares the header for a writer that does not maintain all features.
    pub(super) fn begin_change(&self) -> Result<()> {
        self.check_open_for_writing()?;
        let mut begun = self.begun.lock().unwrap_or_else(|lock| lock.into_inner());
        if *begun {
            return Ok(());
        }
        let mut metadata = self.metadata();
        if self.data_place == DataPlace::External {
            metadata.check_data_places(&*self.store)?;
        }
        // Autoclear bits say "no writer without this feature has been here".
        let maintained = metadata.header.autoclear & AutoclearFeatures::RAW_DATA_FILE;
        if metadata.header.autoclear != maintained {
            let bits = maintained.bits().to_be_bytes().to_vec();
            self.write_header_field(&mut metadata, offsets::AUTOCLEAR, bits)?;
            metadata.header.autoclear = maintained;
        }
        *begun = true;
        Ok(())
    }
}

/// What an image needs besides its own file.
#[derive(Default)]
pub struct Companions {
    /// The external data file, if [`Header::data_place`] says that there is one. Without it the image can be looked
    /// at, but not read.
    pub data_file: Option<Arc<dyn Store>>,
    /// The cipher with its key, if [`Header::crypt_method`] says that data is encrypted. Without it the image can be
    /// looked at and its snapshots be made and deleted, but its data neither be read nor written.
    pub cipher: Option<GuestCipher>,
}

/// Reads and checks the header, features and places of tables aside.
///
/// # Errors
/// As [`Header::parse`], besides failing reads.
pub fn read_header(store: &dyn Store) -> Result<Header> {
    let file_len = store.len().doing("find out its length")?;
    let read = |len: usize| -> Result<Vec<u8>> {
        let mut bytes = vec![0; len.min(file_len as usize)];
        store.read_at(&mut bytes, HostOffset::ZERO).doing("read its header")?;
        Ok(bytes)
    };
    let len = Header::first_cluster_len(&read(512)?)?;
    Header::parse(&read(len)?)
}

fn refuse_unwritable(header: &Header) -> Result<()> {
    if header.incompatible.contains(IncompatibleFeatures::CORRUPT) {
        return Err(Error::new(Problem::NeedsRepair { mark: RepairMark::Corrupt }));
    }
    if header.incompatible.contains(IncompatibleFeatures::DIRTY) {
        return Err(Error::new(Problem::NeedsRepair { mark: RepairMark::Dirty }));
    }
    if header.data_file_is_raw() && header.backing_name.is_some() {
        // A hole of such a file would show the backing file again. The format does not allow that.
        return Err(Error::new(Problem::ReadableOnly {
            feature: "an image with a raw data file and a backing file",
        }));
    }
    if header.autoclear.contains(AutoclearFeatures::BITMAPS) {
        return Err(Error::new(Problem::ReadableOnly {
            feature: "an image with persistent bitmaps",
        }));
    }
    Ok(())
}

/// Reads the refcount table and notes which clusters hold metadata.
fn open_allocator(
    store: &dyn Store,
    header: &Header,
    l1: &Table,
    snapshots: &SnapshotTable,
) -> Result<Allocator> {
    let geometry = header.geometry;
    let cluster_size = geometry.cluster_size();
    let file_len = store.len().doing("find out its length")?;
    let reftable_len = u64::from(header.reftable_clusters) * cluster_size;
    require_inside("refcount_table_offset", header.reftable_offset, reftable_len, file_len)?;
    require_inside("l1_table_offset", header.l1_offset, l1.byte_len(), file_len)?;
    let reftable = Table::read_whole(store, header.reftable_offset, reftable_len as usize / 8)?;

    let mut layout = Layout::new(geometry);
    layout.claim(header.l1_offset, l1.byte_len(), Owner::ActiveL1)?;
    layout.claim(header.reftable_offset, reftable_len, Owner::RefcountTable)?;
    for &entry in reftable.entries() {
        if entry != 0 {
            let block = HostOffset::new(entry & !0x1ff);
            require_inside("refcount block offset", block, cluster_size, file_len)?;
            layout.claim(block, cluster_size, Owner::RefcountBlock)?;
        }
    }
    for &entry in l1.entries() {
        if let L1Entry::Table { host, .. } = L1Entry::decode(entry, geometry)? {
            require_inside("L2 table offset", host, 1, file_len)?;
            layout.claim(host, cluster_size, Owner::ActiveL2)?;
        }
    }
    let table_len = snapshots.bytes.len() as u64;
    layout.claim(header.snapshots_offset, table_len, Owner::SnapshotTable)?;
    if let Some(area) = LuksArea::find(&header.extensions, geometry)? {
        layout.claim(area.offset, area.len, Owner::EncryptionHeader)?;
    }
    for snapshot in &snapshots.trees {
        snapshot.check_l1(geometry, file_len)?;
        let entry = snapshot.entry();
        layout.claim(entry.l1_offset, u64::from(entry.l1_entries) * 8, Owner::SnapshotL1)?;
    }
    Ok(Allocator::new(geometry, reftable, layout, file_len))
}

/// Refuses a table that a file of `file_len` bytes lacks: to a writer, refcounts that are not there mean that all is
/// free, and he would overwrite what a truncated file still has.
fn require_inside(field: &'static str, start: HostOffset, len: u64, file_len: u64) -> Result<()> {
    match start.checked_add(len) {
        Some(end) if end.get() <= file_len => Ok(()),
        _ => Err(Error::invalid(field, format!("{start} is behind the end of the file"))),
    }
}
