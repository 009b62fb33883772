//! `scratch/`: the tree of the writable twins, of the same form as that of the views.

use std::collections::BTreeMap;

use super::build::{Builder, SNAPSHOTS};
use super::{Directory, TreeOptions, What};
use crate::error::Result;
use crate::mount::inode::Inode;

/// The name of a file in the directory of each twin that is not listed: its disk, which nobody can write while it is open.
pub const STILL_DISK: &str = ".still.raw";

/// The directory of the twins.
pub(super) const TWINS: &str = "scratch";

/// Whether there is `scratch/`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Twins {
    Shown,
    Absent,
}

impl Twins {
    pub fn of(options: &TreeOptions) -> Self {
        if options.scratch.is_some() { Self::Shown } else { Self::Absent }
    }
}

/// Which of two trees of the same form a directory is in.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Side {
    /// The views.
    Views,
    /// Their writable twins, below `scratch/`.
    Twins,
}

impl Side {
    /// `identity` as something on this side.
    pub fn mark(self, identity: Vec<u8>) -> Vec<u8> {
        match self {
            Self::Views => identity,
            Self::Twins => [b"scratch\0", &identity[..]].concat(),
        }
    }
}

impl Builder<'_> {
    /// `scratch/`: a twin of every view that can't change. So the active layer has one only where nobody writes it.
    pub fn scratch_directory(&mut self, active: usize) -> Result<Inode> {
        let inode = self.reserve(&[b"scratch"]);
        let root = self.views[active].original().clone();
        let mut directory = match root.is_writable() {
            true => Directory::default(),
            false => {
                let twin = self.add(Side::Twins, root);
                self.view_directory(twin, inode)
            }
        };
        let view = self.views.len() - 1;
        let chain = self.reserve(&[b"scratch", b"chain"]);
        let mut children = BTreeMap::new();
        self.member_directories(Side::Twins, chain, &mut children)?;
        let members = Directory { children, ..Directory::default() };
        self.put(chain, inode, active, What::Directory(members));
        directory.children.insert("chain".into(), chain);
        let snapshots = self.snapshots_directory(Side::Twins, 0, view, inode)?;
        directory.children.insert(SNAPSHOTS.into(), snapshots);
        self.put(inode, Inode::ROOT, view, What::Directory(directory));
        Ok(inode)
    }
}
