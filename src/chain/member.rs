//! One file of a chain.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Doing, Result};
use crate::image::{Content, Image, Place, Run, Tree};
use crate::store::{FileId, FileStore, MappedRun, Store};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// A member of a chain: its file and how to read it.
pub struct Member {
    path: PathBuf,
    data_file: Option<DataFile>,
    store: Arc<FileStore>,
    disk: Disk,
}

/// The external data file of a member.
pub struct DataFile {
    /// Its place, resolved against the member.
    pub path: PathBuf,
    /// Which file it is.
    pub id: FileId,
}

/// A member by its format.
pub enum Disk {
    /// A qcow2 image.
    Qcow2(Box<Image>),
    /// A file that is the disk.
    Raw(RawDisk),
}

/// Formats of members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A qcow2 image.
    Qcow2,
    /// A file that is the disk.
    Raw,
}

impl Format {
    /// The format that headers and users call `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "qcow2" => Some(Self::Qcow2),
            "raw" => Some(Self::Raw),
            _ => None,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        })
    }
}

impl Member {
    /// The member in `store`, which the chain knows as `path`.
    pub fn new(
        path: PathBuf,
        data_file: Option<DataFile>,
        store: Arc<FileStore>,
        disk: Disk,
    ) -> Self {
        Self { path, data_file, store, disk }
    }

    /// Whether it consists of that file, be it as its data file.
    pub fn has_file(&self, id: FileId) -> bool {
        self.store.id() == id || self.data_file.as_ref().is_some_and(|data| data.id == id)
    }

    /// Its name as the user or the member above gave it, resolved against the member above.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that holds its data: the member itself, or its external data file.
    pub fn data_path(&self) -> &Path {
        self.data_file.as_ref().map_or(&self.path, |data| &data.path)
    }

    /// Its data, as a file.
    pub fn data_store(&self) -> &dyn Store {
        match &self.disk {
            Disk::Qcow2(image) => image.data_store(),
            Disk::Raw(_) => &*self.store,
        }
    }

    /// Its file.
    pub fn store(&self) -> &FileStore {
        &self.store
    }

    /// Its content.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Its qcow2 image, if it is one.
    pub fn image(&self) -> Option<&Image> {
        match &self.disk {
            Disk::Qcow2(image) => Some(image),
            Disk::Raw(_) => None,
        }
    }

    /// Its format.
    pub fn format(&self) -> Format {
        match self.disk {
            Disk::Qcow2(_) => Format::Qcow2,
            Disk::Raw(_) => Format::Raw,
        }
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        match &self.disk {
            Disk::Qcow2(image) => image.size(),
            Disk::Raw(raw) => raw.size,
        }
    }

    /// The first run of `range`, which must not be empty nor end behind the disk, at this member alone.
    pub(super) fn map(&self, tree: Tree<'_>, range: GuestRange) -> Result<Run> {
        match &self.disk {
            Disk::Qcow2(image) => image.map(tree, range),
            Disk::Raw(_) => self.map_raw(range),
        }
    }

    /// See [`Image::read_content`].
    pub(super) fn read_content(
        &self,
        at: GuestOffset,
        content: Content,
        buf: &mut [u8],
    ) -> Result<()> {
        match (&self.disk, content) {
            (Disk::Qcow2(image), content) => image.read_content(at, content, buf),
            (Disk::Raw(_), Content::Data(place)) => {
                self.store.read_at(buf, place.host).doing("read its data")
            }
            (Disk::Raw(_), _) => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    /// See [`Image::mapped_content`].
    pub(super) fn mapped_content(&self, content: Content, len: u64) -> Option<MappedRun> {
        match (&self.disk, content) {
            (Disk::Qcow2(image), content) => image.mapped_content(content, len),
            (Disk::Raw(_), Content::Data(place)) => {
                let start = place.host.get();
                self.store.mapped(start..start.checked_add(len)?)
            }
            (Disk::Raw(_), _) => None,
        }
    }

    fn map_raw(&self, range: GuestRange) -> Result<Run> {
        let place = Place { host: HostOffset::new(range.start.get()), copied: true };
        let (start, end) = (range.start.get(), range.end().get());
        let data = self.store.next_data(place.host).doing("look for holes")?;
        Ok(match data {
            Some(data) if data.start <= start => {
                Run { len: data.end.min(end) - start, content: Content::Data(place) }
            }
            hole => {
                let hole_end = hole.map_or(end, |data| data.start.min(end));
                Run { len: hole_end - start, content: Content::Zero { kept: Some(place) } }
            }
        })
    }
}

/// A raw disk.
pub struct RawDisk {
    /// Length of the file in bytes, rounded up to 512 as QEMU does.
    size: u64,
}

impl RawDisk {
    /// The disk in `store`.
    ///
    /// # Errors
    /// The file can't be looked at.
    pub fn open(store: &dyn Store) -> Result<Self> {
        let len = store.len().doing("find out its length")?;
        Ok(Self { size: len.next_multiple_of(512) })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}
