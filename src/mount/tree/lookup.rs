//! Names to inodes, inodes to attributes.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::shape::Shape;
use super::{Attributes, Directory, Kind, Node, Partitions, Tree, What, Window};
use crate::error::{Error, Problem, Result};
use crate::mount::inode::Inode;
use crate::mount::partitions::Partition;

/// A line of a directory listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: OsString,
    /// What it names.
    pub inode: Inode,
    /// Its kind.
    pub kind: Kind,
}

impl Tree {
    /// The attributes of `name` in the directory `parent`.
    ///
    /// # Errors
    /// [`Problem::NotFound`]; failing reads where the file's size has to be found out.
    pub fn lookup(&self, parent: Inode, name: &OsStr) -> Result<Attributes> {
        self.follow();
        let shape = self.shape();
        let node = self.child(&shape, parent, name);
        self.attributes_of(&shape, &node.ok_or_else(|| Error::new(Problem::NotFound))?)
    }

    /// The attributes of an inode.
    ///
    /// # Errors
    /// As [`Tree::lookup`].
    pub fn attributes(&self, inode: Inode) -> Result<Attributes> {
        self.follow();
        let shape = self.shape();
        self.attributes_of(&shape, &self.node(&shape, inode)?)
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// Anything but a link.
    pub fn link_target(&self, inode: Inode) -> Result<PathBuf> {
        match self.node(&self.shape(), inode)?.what {
            What::Link(target) => Ok(target),
            What::ControlSocket => self.control_socket().map(Path::to_path_buf),
            _ => Err(Error::usage("not a symbolic link")),
        }
    }

    /// What a directory lists, `.` and `..` included.
    ///
    /// # Errors
    /// Anything but a directory.
    pub fn list(&self, inode: Inode) -> Result<Vec<Entry>> {
        self.follow();
        let shape = self.shape();
        let node = self.node(&shape, inode)?;
        let What::Directory(directory) = &node.what else {
            return Err(Error::usage("not a directory"));
        };
        let kind = Kind::Directory;
        let mut entries = vec![
            Entry { name: ".".into(), inode, kind },
            Entry { name: "..".into(), inode: node.parent, kind },
        ];
        for (name, &child) in &directory.children {
            let kind = self.node(&shape, child)?.kind();
            entries.push(Entry { name: name.into(), inode: child, kind });
        }
        for partition in self.partitions_in(&shape, &node, directory) {
            let child = self.partition_node(&shape, &node, directory, partition);
            let name = format!("p{}", partition.number).into();
            entries.push(Entry { name, inode: child.inode, kind: child.kind() });
        }
        Ok(entries)
    }

    pub(super) fn node(&self, shape: &Shape, inode: Inode) -> Result<Node> {
        if let Some(node) = shape.nodes.get(&inode) {
            return Ok(node.clone());
        }
        let partitions = self.partitions.read().unwrap_or_else(PoisonError::into_inner);
        let node = partitions.nodes.get(&inode).cloned();
        let mut node = node.ok_or_else(|| Error::new(Problem::NotFound))?;
        // It belongs to the view of its directory, whichever number that has by now.
        let parent = shape.nodes.get(&node.parent);
        node.view = parent.ok_or_else(|| Error::new(Problem::NotFound))?.view;
        Ok(node)
    }

    fn child(&self, shape: &Shape, parent: Inode, name: &OsStr) -> Option<Node> {
        let node = self.node(shape, parent).ok()?;
        let What::Directory(directory) = &node.what else { return None };
        let name = name.to_str()?;
        if let Some(&inode) = directory.children.get(name).or(directory.hidden.get(name)) {
            return self.node(shape, inode).ok();
        }
        let number: u32 = name.strip_prefix('p')?.parse().ok()?;
        let mut partitions = self.partitions_in(shape, &node, directory).into_iter();
        let partition = partitions.find(|partition| partition.number == number)?;
        // "p01" is not a name of p1.
        (name == format!("p{number}"))
            .then(|| self.partition_node(shape, &node, directory, partition))
    }

    fn partitions_in(&self, shape: &Shape, node: &Node, directory: &Directory) -> Vec<Partition> {
        match directory.partitions {
            Partitions::Absent => Vec::new(),
            Partitions::Files | Partitions::Links => {
                shape.views[node.view].partitions(self.writes(shape, node.view))
            }
        }
    }

    /// The inode of a partition as it is now.
    fn partition_node(
        &self,
        shape: &Shape,
        parent: &Node,
        directory: &Directory,
        partition: Partition,
    ) -> Node {
        let name = format!("p{}", partition.number);
        let what = match directory.partitions {
            Partitions::Links => What::Link(Path::new("../..").join(&name)),
            _ => What::Disk(Window::Part(partition.range)),
        };
        let mut partitions = self.partitions.write().unwrap_or_else(PoisonError::into_inner);
        let key = (parent.inode, partition.number);
        let inode = partitions.inodes.get(&key).copied().unwrap_or_else(|| {
            // The disk beside it has a number that is its own, and the same at every mount.
            let disk = directory.children.get("disk.raw").copied().unwrap_or(parent.inode);
            let mut inode = Inode::of(&[&disk.0.to_be_bytes(), name.as_bytes()]);
            while shape.nodes.contains_key(&inode) || partitions.nodes.contains_key(&inode) {
                inode = inode.next();
            }
            inode
        });
        let node = Node { inode, parent: parent.inode, view: parent.view, what };
        partitions.inodes.insert(key, inode);
        partitions.nodes.insert(inode, node.clone());
        node
    }
}

impl Node {
    fn kind(&self) -> Kind {
        match self.what {
            What::Directory(_) => Kind::Directory,
            What::Link(_) | What::ControlSocket => Kind::Link,
            What::Disk(_) | What::StillDisk | What::Document(_) => Kind::File,
        }
    }
}
