//! The FUSE face: views as files. Only this floor names `fuser`.
//!
//! `tree` is the file system without FUSE: names, inodes, reads and writes, testable by itself. `service` says what the kernel's
//! requests mean in its terms; they come by one of two ways (`transport`): from the device (`fuse`) or over io_uring (`ring`).
//! `attach` puts the connection onto a mountpoint, `session` runs it.

mod attach;
mod crew;
mod documents;
mod fuse;
mod in_use;
mod inode;
mod live;
mod mount_table;
mod names;
mod partitions;
mod quiesce;
mod ring;
mod service;
mod session;
mod stacked;
mod state;
mod transport;
mod tree;
mod twin;
mod view_files;

pub use attach::{Audience, Detach, MountFlag, detach, is_dead};
pub use inode::Inode;
pub use mount_table::{MountEntry, our_mount, our_mounts};
pub use session::{MountOptions, Session, Stop};
pub use state::{control_socket, open_process, server};
pub use transport::Way;
pub use tree::{
    Attributes, BesideWriter, Caching, Changed, DiscardMode, Entry, Growth, Handle, Kind, Layout,
    Lifetime, OpenFor, Outdated, Ownership, PastEnd, STILL_DISK, Statistics, Tree, TreeOptions,
};
