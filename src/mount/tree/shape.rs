//! What a tree shows at one time: its views, and the inodes that are there as long as they are.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::build::SNAPSHOTS;
use super::{Node, What};
use crate::chain::{Chain, View};
use crate::image::SnapshotTree;
use crate::mount::inode::Inode;
use crate::mount::view_files::ViewFiles;

/// A tree at one time. It never changes: when the chain does, another one takes its place.
pub(super) struct Shape {
    pub chain: Arc<Chain>,
    /// Index 0 is the active layer's.
    pub views: Vec<Arc<ViewFiles>>,
    pub nodes: HashMap<Inode, Node>,
    /// The snapshots of member 0 that are shown: see [`crate::image::Image::snapshot_generation`].
    pub snapshot_generation: u64,
}

/// Something that the kernel may remember of a tree and that is no longer so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outdated {
    /// The directory `parent` has another file of that name, or none.
    Name {
        /// The directory.
        parent: Inode,
        /// The name.
        name: String,
    },
    /// The inode's content or attributes.
    Content(Inode),
}

impl Shape {
    /// The view at the root.
    pub fn root(&self) -> &View {
        self.views[0].view()
    }

    /// The directory of a snapshot of the active layer, seen from the root.
    pub fn snapshot_directory(&self, snapshot: &SnapshotTree) -> Option<PathBuf> {
        let children = |inode: Inode| match self.nodes.get(&inode).map(|node| &node.what) {
            Some(What::Directory(directory)) => Some(&directory.children),
            _ => None,
        };
        let is_of = |inode: &Inode| {
            let view = self.nodes.get(inode).map(|node| self.views[node.view].original());
            let tree = view.and_then(View::snapshot);
            tree.is_some_and(|tree| std::ptr::eq(tree, snapshot))
        };
        let snapshots = *children(Inode::ROOT)?.get(SNAPSHOTS)?;
        let (name, _) = children(snapshots)?.iter().find(|(_, inode)| is_of(inode))?;
        Some(Path::new(SNAPSHOTS).join(name))
    }

    /// What the kernel must forget when `new` takes the place of this.
    pub fn outdated_by(&self, new: &Self) -> Vec<Outdated> {
        let mut outdated = Vec::new();
        for (&inode, node) in &self.nodes {
            let successor = new.nodes.get(&inode).map(|node| &node.what);
            match (&node.what, successor) {
                (What::Directory(old), _) => {
                    let children = match successor {
                        Some(What::Directory(new)) => &new.children,
                        _ => &BTreeMap::new(),
                    };
                    let gone = old
                        .children
                        .iter()
                        .filter(|&(name, child)| children.get(name) != Some(child));
                    outdated.extend(
                        gone.map(|(name, _)| Outdated::Name { parent: inode, name: name.clone() }),
                    );
                }
                (What::Link(old), Some(What::Link(new))) if old == new => {}
                (What::Disk(_), Some(What::Disk(_))) | (What::ControlSocket, _) => {}
                (What::Link(_) | What::Document(_) | What::Disk(_) | What::StillDisk, _) => {
                    outdated.push(Outdated::Content(inode))
                }
            }
        }
        outdated
    }
}
