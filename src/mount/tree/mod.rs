//! The file system without FUSE: names, inodes, attributes, and reads and writes of disks.

mod build;
mod change;
mod handles;
mod lookup;
mod opened;
mod scratch;
mod shape;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::SystemTime;

use self::build::Plan;
pub use self::change::Changed;
pub use self::handles::{Caching, Handle, OpenFor, PastEnd};
pub use self::lookup::Entry;
use self::opened::Handles;
pub use self::scratch::STILL_DISK;
pub use self::shape::Outdated;
use self::shape::Shape;
use super::documents;
use super::inode::Inode;
use crate::chain::{Chain, View};
use crate::error::{Error, Problem, Result};
use crate::store::TemporaryDirectory;
use crate::units::GuestRange;

/// All that a mount shows.
pub struct Tree {
    options: TreeOptions,
    plan: Plan,
    /// Held for reading where a file is opened, so that none is opened of what a change takes away; never over I/O.
    shape: RwLock<Arc<Shape>>,
    /// One change of the chain at a time.
    changing: Mutex<()>,
    /// Partitions: they come and go with what is written to the disk.
    partitions: RwLock<PartitionNodes>,
    handles: Handles,
    /// Counts writes to the active layer.
    writes: AtomicU64,
    control_socket: OnceLock<PathBuf>,
    /// By which way the kernel's requests come, in a word.
    way: OnceLock<&'static str>,
}

/// How a tree looks to its users.
#[derive(Debug, Clone)]
pub struct TreeOptions {
    /// The top image as the user named it.
    pub image: PathBuf,
    /// What member 0 of the chain is called in addresses: more than 0 if the chain is a part of another.
    pub first_member: usize,
    /// Owner and modes of everything.
    pub ownership: Ownership,
    /// Whether `truncate` may make the active disk larger.
    pub growth: Growth,
    /// What a discard does with host space.
    pub discard: DiscardMode,
    /// Where what is written to scratch twins goes, if there are any.
    pub scratch: Option<Arc<TemporaryDirectory>>,
    /// What to show of an image that another process may write.
    pub beside_writer: BesideWriter,
}

/// What a mount shows of an image that another process may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BesideWriter {
    /// What does not change while it is there: backing members and internal snapshots.
    Immutable,
    /// The active layer, too, whatever its bytes are worth.
    Everything,
}

/// What a mount shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A directory with every view of the chain.
    Directory,
    /// The disk of one view, and nothing else.
    File,
}

/// Owner and modes of everything in a mount.
#[derive(Debug, Clone, Copy)]
pub struct Ownership {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Mode bits to clear: read-only files begin with 0444, writable ones with 0666, directories with 0555.
    pub umask: u16,
}

/// Whether a disk can be made larger through the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Growth {
    /// Its size is as fixed as a block device's.
    Fixed,
    /// `truncate` makes it larger, never smaller.
    Growable,
}

/// What a discard does with host space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiscardMode {
    /// It is given back.
    Unmap,
    /// It stays allocated.
    Ignore,
}

/// One inode.
#[derive(Clone)]
struct Node {
    inode: Inode,
    parent: Inode,
    /// Index of the view that it belongs to: its times are those of the view.
    view: usize,
    what: What,
}

#[derive(Clone)]
enum What {
    Directory(Directory),
    Link(PathBuf),
    /// A link to the control socket.
    ControlSocket,
    Disk(Window),
    /// The disk of a scratch twin that nobody writes while this is open.
    StillDisk,
    Document(Document),
}

#[derive(Clone, Default)]
struct Directory {
    children: BTreeMap<String, Inode>,
    /// Found by name but not listed.
    hidden: BTreeMap<String, Inode>,
    partitions: Partitions,
}

/// The inodes of partitions and of links to them.
#[derive(Default)]
struct PartitionNodes {
    nodes: HashMap<Inode, Node>,
    /// By the directory and the partition's number: what has an inode keeps it.
    inodes: HashMap<(Inode, u32), Inode>,
}

/// How a directory shows the partitions of its view.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Partitions {
    /// Not at all.
    #[default]
    Absent,
    /// As files.
    Files,
    /// As links to the files in the mountpoint.
    Links,
}

/// The part of a view's disk that a file shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Window {
    /// All of it.
    Whole,
    /// A partition.
    Part(GuestRange),
}

impl Window {
    fn range(self, view: &View) -> GuestRange {
        match self {
            Self::Whole => view.range(),
            Self::Part(range) => range,
        }
    }
}

#[derive(Clone, Copy)]
enum Document {
    ViewInfo,
    Chain,
    Daemon,
    Version,
}

/// What `stat` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub inode: Inode,
    /// Kind of file.
    pub kind: Kind,
    /// Size in bytes.
    pub size: u64,
    /// Allocated bytes.
    pub allocated: u64,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change, of content and of attributes.
    pub time: SystemTime,
    /// Whether they never change.
    pub lifetime: Lifetime,
}

/// Kinds of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
}

/// How long an answer stays true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// As long as the mount.
    Forever,
    /// Until the next write.
    Moment,
}

/// What `statfs` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// Size of the active disk in bytes.
    pub size: u64,
    /// Number of files.
    pub files: u64,
}

impl Tree {
    /// The chain that is shown.
    pub fn chain(&self) -> Arc<Chain> {
        self.shape().chain.clone()
    }

    /// What `statfs` says.
    pub fn statistics(&self) -> Statistics {
        let shape = self.shape();
        Statistics { size: shape.root().size(), files: shape.nodes.len() as u64 }
    }

    /// Makes all that was written durable. What was written to scratch twins reaches their files, which last as long as
    /// this process.
    ///
    /// # Errors
    /// As [`Chain::flush`].
    pub fn sync(&self) -> Result<()> {
        let shape = self.shape();
        let made = shape.views.iter().filter_map(|files| files.twin()?.view());
        let twins = made.map(|view| view.chain().flush());
        // One that fails does not keep the others from it.
        twins.fold(shape.chain.flush(), Result::and)
    }

    /// Says where the control socket is. It can't be known before the tree is mounted.
    pub fn set_control_socket(&self, socket: PathBuf) {
        // It is said once.
        let _ = self.control_socket.set(socket);
    }

    /// Says by which way requests come. That, too, is known late.
    pub fn set_way(&self, way: &'static str) {
        let _ = self.way.set(way);
    }

    fn control_socket(&self) -> Result<&Path> {
        let socket = self.control_socket.get();
        socket.map(PathBuf::as_path).ok_or_else(|| Error::new(Problem::NotFound))
    }

    fn shape(&self) -> Arc<Shape> {
        self.shape.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn attributes_of(&self, shape: &Shape, node: &Node) -> Result<Attributes> {
        let files = &shape.views[node.view];
        let Ownership { uid, gid, umask } = self.options.ownership;
        let writable = files.is_writable();
        let (kind, size, allocated, mode) = match &node.what {
            What::Directory(_) => (Kind::Directory, 0, 0, 0o555),
            What::Link(target) => (Kind::Link, target.as_os_str().len() as u64, 0, 0o777),
            What::ControlSocket => {
                (Kind::Link, self.control_socket()?.as_os_str().len() as u64, 0, 0o777)
            }
            What::Document(document) => {
                let size = self.content(shape, *document, node.view)?.len() as u64;
                (Kind::File, size, size, 0o444)
            }
            What::StillDisk => {
                let range = files.view().range();
                (Kind::File, range.len, files.allocated(range).unwrap_or(range.len), 0o444)
            }
            What::Disk(window) => {
                let range = window.range(files.view());
                let mode = if writable { 0o666 } else { 0o444 };
                // Where that can't be counted: no holes, so that nobody who copies the file looks for any.
                let allocated = files.allocated(range).unwrap_or(range.len);
                (Kind::File, range.len, allocated, mode)
            }
        };
        let mode = if kind == Kind::Link { mode } else { mode & !umask };
        let changes = writable && kind == Kind::File;
        let changes = changes || shape.chain.is_beside_writer();
        let lifetime = if changes { Lifetime::Moment } else { Lifetime::Forever };
        let time = files.view().time()?;
        Ok(Attributes { inode: node.inode, kind, size, allocated, mode, uid, gid, time, lifetime })
    }

    fn content(&self, shape: &Shape, document: Document, view: usize) -> Result<Vec<u8>> {
        match document {
            Document::ViewInfo => documents::view_info(&shape.views[view], self.image(shape)),
            Document::Chain => Ok(documents::chain_info(&shape.chain, self.options.first_member)),
            Document::Daemon => {
                Ok(documents::daemon_info(self.image(shape), self.way.get().copied()))
            }
            Document::Version => Ok(documents::version()),
        }
    }

    /// The top image of the chain that addresses count from.
    fn image<'a>(&'a self, shape: &'a Shape) -> &'a Path {
        match self.options.first_member {
            0 => shape.chain.members()[0].path(),
            _ => &self.options.image,
        }
    }

    fn writes(&self, shape: &Shape, view: usize) -> u64 {
        match shape.views[view].twin() {
            Some(twin) => twin.writes(),
            None if view == 0 => self.writes.load(Ordering::Acquire),
            None => 0,
        }
    }
}
