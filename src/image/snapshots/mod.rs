//! Internal snapshots: the table, their trees; making, deleting and going back to one.
//!
//! All three hold the shape of the image (`Image::keep_shape`) from beginning to end, so that there is one at a time.

mod apply;
mod create;
mod delete;
mod freeze;
mod references;
mod table;
mod watch;

use std::sync::{Arc, PoisonError};

pub(super) use freeze::Freeze;
pub(super) use table::SnapshotTable;
pub(super) use watch::Watch;

use super::Image;
use super::sync::{Condvar, Mutex};
use super::table::Table;
use crate::error::{Error, Problem, Result};
use crate::qcow2::{DataPlace, Geometry, Header, MAX_FILE_LEN, MAX_L1_BYTES, Snapshot, Version};
use crate::units::HostOffset;

/// An internal snapshot of an open image.
///
/// While it exists its content can't change: whoever writes to the image leaves its clusters alone.
pub struct SnapshotTree {
    entry: Snapshot,
    size: u64,
    users: Mutex<Users>,
    left: Condvar,
}

/// Who looks at a snapshot.
#[derive(Default)]
struct Users {
    count: u64,
    /// It is deleted: nobody may begin to look.
    gone: bool,
}

/// A snapshot stays whole until this is dropped.
#[must_use]
pub struct SnapshotInUse<'a>(&'a SnapshotTree);

impl Drop for SnapshotInUse<'_> {
    fn drop(&mut self) {
        let mut users = self.0.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.count -= 1;
        if users.gone && users.count == 0 {
            self.0.left.notify_all();
        }
    }
}

impl SnapshotTree {
    fn new(entry: Snapshot, header: &Header) -> Self {
        let size = entry.disk_size.unwrap_or(header.size) & !511;
        Self { entry, size, users: Mutex::default(), left: Condvar::default() }
    }

    /// What the snapshot table says of it.
    pub fn entry(&self) -> &Snapshot {
        &self.entry
    }

    /// Size of the disk in bytes at the time of the snapshot.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Keeps the snapshot from being deleted: hold it from looking up where its bytes are to the end of reading them.
    ///
    /// # Errors
    /// [`Problem::SnapshotGone`].
    pub fn keep(&self) -> Result<SnapshotInUse<'_>> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if users.gone {
            return Err(self.gone());
        }
        users.count += 1;
        Ok(SnapshotInUse(self))
    }

    /// Lets nobody look at the snapshot any more, and waits for those who do.
    fn retire(&self) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.gone = true;
        while users.count > 0 {
            users = self.left.wait(users).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets nobody look at the snapshot any more. Those who do look find out afterwards.
    fn vanish(&self) {
        self.users.lock().unwrap_or_else(PoisonError::into_inner).gone = true;
    }

    fn check_is_there(&self) -> Result<()> {
        match self.users.lock().unwrap_or_else(PoisonError::into_inner).gone {
            true => Err(self.gone()),
            false => Ok(()),
        }
    }

    fn gone(&self) -> Error {
        Error::new(Problem::SnapshotGone { name: self.entry.name.clone() })
    }

    /// Where the L1 table is.
    pub(in crate::image) fn l1(&self) -> SnapshotL1 {
        SnapshotL1 { offset: self.entry.l1_offset, entries: self.entry.l1_entries as usize }
    }

    /// Checks that the L1 table can be used.
    ///
    /// # Errors
    /// As [`SnapshotL1::check`]; a table behind the end of a file of `file_len` bytes.
    pub(in crate::image) fn check_l1(&self, geometry: Geometry, file_len: u64) -> Result<()> {
        let l1 = self.l1();
        l1.check(geometry)?;
        if l1.offset.get() + l1.byte_len() > file_len {
            return Err(Error::invalid(
                "snapshot's l1_table_offset",
                "the L1 table lies behind the end of the file",
            ));
        }
        Ok(())
    }
}

/// The L1 table of a snapshot. It is read page by page: an image may have many, each of megabytes.
#[derive(Debug, Clone, Copy)]
pub(in crate::image) struct SnapshotL1 {
    pub offset: HostOffset,
    pub entries: usize,
}

impl SnapshotL1 {
    fn byte_len(self) -> u64 {
        self.entries as u64 * 8
    }

    /// Checks that there can be such a table. Not at open: a snapshot that nobody uses may be broken.
    ///
    /// # Errors
    /// A table that is not cluster-aligned, above 32 MiB, or where no file reaches.
    pub fn check(self, geometry: Geometry) -> Result<()> {
        if self.byte_len() > MAX_L1_BYTES {
            return Err(Error::invalid("snapshot's l1_size", "the L1 table is above 32 MiB"));
        }
        if !self.offset.is_aligned(geometry.cluster_size()) {
            return Err(Error::invalid("snapshot's l1_table_offset", "it is not cluster-aligned"));
        }
        if self.offset.get() > MAX_FILE_LEN - MAX_L1_BYTES {
            return Err(Error::invalid("snapshot's l1_table_offset", "no file reaches so far"));
        }
        Ok(())
    }
}

impl Image {
    /// Refuses what snapshots can't be made of.
    fn check_has_snapshots(&self) -> Result<()> {
        match self.data_place {
            DataPlace::Internal => Ok(()),
            DataPlace::External => {
                Err(Error::unsupported("snapshots of an image with an external data file"))
            }
        }
    }

    /// Refuses `what` changes the size of the disk where a snapshot may have that size for want of its own.
    ///
    /// Version 2 does not demand that an entry has it, and version 3 is not always obeyed.
    pub(super) fn check_snapshots_know_their_size(&self, what: &str) -> Result<()> {
        let snapshots = self.snapshots();
        match self.header().version {
            Version::V2 if !snapshots.is_empty() => {
                Err(Error::unsupported(format!("{what} a version 2 image that has snapshots")))
            }
            Version::V3 if snapshots.iter().any(|tree| tree.entry.disk_size.is_none()) => {
                Err(Error::unsupported(format!(
                    "{what} an image with a snapshot that does not say how large it is"
                )))
            }
            _ => Ok(()),
        }
    }

    /// The snapshot with this id and its place in the table.
    ///
    /// # Errors
    /// [`Problem::NoSuchSnapshot`]; two snapshots with one id, which the format does not allow.
    fn find_snapshot(&self, id: &str) -> Result<(usize, Arc<SnapshotTree>)> {
        let snapshots = self.snapshots();
        let mut found = snapshots.iter().enumerate().filter(|(_, tree)| tree.entry.id == id);
        match (found.next(), found.next()) {
            (Some((index, tree)), None) => Ok((index, tree.clone())),
            (Some(_), Some(_)) => {
                Err(Error::invalid("snapshot table", format!("several snapshots have the id {id}")))
            }
            (None, _) => Err(Error::new(Problem::NoSuchSnapshot {
                wanted: format!("#{id}"),
                present: snapshots.iter().map(|tree| tree.entry.name.clone()).collect(),
            })),
        }
    }

    /// The L1 table of a snapshot, whole.
    fn read_l1(&self, tree: &SnapshotTree) -> Result<Vec<u64>> {
        let l1 = tree.l1();
        l1.check(self.geometry)?;
        let table = Table::read_whole(&*self.store, l1.offset, l1.entries)?;
        Ok(table.entries().to_vec())
    }
}
