//! From a chain to directories.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use super::opened::Handles;
use super::scratch::{STILL_DISK, Side, TWINS, Twins};
use super::shape::Shape;
use super::{
    BesideWriter, Directory, Document, Layout, Node, Partitions, Tree, TreeOptions, What, Window,
};
use crate::chain::{Chain, Member, SnapshotChoice, View};
use crate::error::{Error, Result};
use crate::image::{Image, SnapshotTree};
use crate::mount::inode::Inode;
use crate::mount::names::{file_name, insert_unique};
use crate::mount::view_files::ViewFiles;

impl Tree {
    /// The tree whose root shows `root`, a view of member 0 of its chain, as a directory or as the disk itself.
    ///
    /// # Errors
    /// A view of another member.
    pub fn new(root: View, layout: Layout, options: TreeOptions) -> Result<Self> {
        if root.member() != 0 {
            return Err(Error::usage("the root of a tree is a view of member 0"));
        }
        let root_identity = member_identity(root.chain(), 0);
        let twins = Twins::of(&options);
        let (first_member, beside_writer) = (options.first_member, options.beside_writer);
        let plan = Plan { layout, twins, first_member, root_identity, beside_writer };
        if layout == Layout::File && !plan.shows(&root) {
            return Err(Error::usage(
                "a mount with -U on a file needs the address of a snapshot or of a backing file, or -o active",
            ));
        }
        let shape = plan.build(root, None, None)?;
        Ok(Self {
            options,
            plan,
            shape: RwLock::new(Arc::new(shape)),
            changing: Mutex::default(),
            partitions: RwLock::default(),
            handles: Handles::default(),
            writes: AtomicU64::new(0),
            control_socket: OnceLock::new(),
            way: OnceLock::new(),
        })
    }
}

/// What stays the same of a tree, whatever becomes of its chain.
pub(super) struct Plan {
    layout: Layout,
    twins: Twins,
    /// What member 0 of the chain is called in addresses.
    first_member: usize,
    /// The identity of the active disk is that of the first one: its inode goes on when another image takes over.
    root_identity: Vec<u8>,
    beside_writer: BesideWriter,
}

impl Plan {
    /// Whether the root has the files of its view.
    fn shows(&self, root: &View) -> bool {
        !root.is_torn() || self.beside_writer == BesideWriter::Everything
    }

    /// The shape with `root` at its root. What has been found out about views of `previous` is kept where they are the same;
    /// `hidden` is not shown.
    pub fn build(
        &self,
        root: View,
        previous: Option<&Shape>,
        hidden: Option<&Arc<SnapshotTree>>,
    ) -> Result<Shape> {
        let chain = root.chain().clone();
        // Before the snapshots are listed: should there be others by then, they are listed once more.
        let snapshot_generation = chain.active_image().map_or(0, Image::snapshot_generation);
        let views = previous.map(|previous| &previous.views[..]).unwrap_or_default();
        let mut builder = Builder {
            plan: self,
            chain: chain.clone(),
            known: views.iter().map(|files| (ViewKey::of(files), files.clone())).collect(),
            hidden,
            views: Vec::new(),
            nodes: HashMap::new(),
        };
        match self.layout {
            Layout::Directory => builder.root(root)?,
            Layout::File => {
                let view = builder.add_view(root);
                builder.put(Inode::ROOT, Inode::ROOT, view, What::Disk(Window::Whole));
            }
        }
        Ok(Shape { chain, views: builder.views, nodes: builder.nodes, snapshot_generation })
    }
}

/// The directory of the members.
pub(super) const CHAIN: &str = "chain";
/// The directory of a member's internal snapshots.
pub(super) const SNAPSHOTS: &str = "snapshots";

pub(super) struct Builder<'a> {
    plan: &'a Plan,
    pub chain: Arc<Chain>,
    /// What was there before.
    known: HashMap<ViewKey, Arc<ViewFiles>>,
    hidden: Option<&'a Arc<SnapshotTree>>,
    pub views: Vec<Arc<ViewFiles>>,
    nodes: HashMap<Inode, Node>,
}

/// Tells views and twins apart, wherever in a chain their members are.
#[derive(PartialEq, Eq, Hash)]
struct ViewKey {
    side: Side,
    member: *const Member,
    snapshot: Option<*const SnapshotTree>,
}

impl ViewKey {
    fn of(files: &ViewFiles) -> Self {
        let side = if files.twin().is_some() { Side::Twins } else { Side::Views };
        Self::new(side, files.original())
    }

    fn new(side: Side, view: &View) -> Self {
        let member = Arc::as_ptr(&view.chain().members()[view.member()]);
        Self { side, member, snapshot: view.snapshot().map(std::ptr::from_ref) }
    }
}

impl Builder<'_> {
    fn root(&mut self, view: View) -> Result<()> {
        let shown = self.plan.shows(&view);
        let active = self.add_view(view);
        let mut root = match shown {
            true => self.view_directory(active, Inode::ROOT),
            false => Directory::default(),
        };
        root.children.insert(CHAIN.into(), self.chain_directory(active)?);
        let snapshots = self.snapshots_directory(Side::Views, 0, active, Inode::ROOT)?;
        root.children.insert(SNAPSHOTS.into(), snapshots);
        if self.plan.twins == Twins::Shown {
            root.children.insert(TWINS.into(), self.scratch_directory(active)?);
        }
        root.hidden.insert(".qchainfs".into(), self.hidden_directory(active));
        let what = What::Directory(root);
        let node = Node { inode: Inode::ROOT, parent: Inode::ROOT, view: active, what };
        self.nodes.insert(Inode::ROOT, node);
        Ok(())
    }

    fn chain_directory(&mut self, active: usize) -> Result<Inode> {
        let inode = self.reserve(&[b"chain"]);
        let mut children = BTreeMap::new();
        children.insert("0".to_owned(), self.links_to_root(active, inode));
        self.member_directories(Side::Views, inode, &mut children)?;
        children.insert("by-name".to_owned(), self.by_name_directory(active, inode));
        let directory = Directory { children, ..Directory::default() };
        self.put(inode, Inode::ROOT, active, What::Directory(directory));
        Ok(inode)
    }

    /// The directories of all members but the active layer.
    ///
    /// Files that look alike get neighbouring numbers in the order in which they come. A chain changes at its top, so that the
    /// base comes first, and what is in the active layer last: a number that is somebody's stays his, and the kernel, which
    /// remembers his bytes by it, never shows them as another's.
    pub fn member_directories(
        &mut self,
        side: Side,
        parent: Inode,
        children: &mut BTreeMap<String, Inode>,
    ) -> Result<()> {
        for index in (1..self.chain.members().len()).rev() {
            let view = self.add(side, self.chain.view(index)?);
            let identity = side.mark(self.member_identity(index));
            let member = self.reserve(&[&identity, b"directory"]);
            let mut directory = self.view_directory(view, member);
            let snapshots = self.snapshots_directory(side, index, view, member)?;
            directory.children.insert(SNAPSHOTS.into(), snapshots);
            self.put(member, parent, view, What::Directory(directory));
            children.insert(index.to_string(), member);
        }
        Ok(())
    }

    /// `chain/0`: links, so that no byte has two inodes and no directory contains itself.
    fn links_to_root(&mut self, active: usize, parent: Inode) -> Inode {
        let inode = self.reserve(&[b"chain", b"0"]);
        let mut children = BTreeMap::new();
        let shown = self.plan.shows(self.views[active].view());
        let names: &[&str] =
            if shown { &["disk.raw", "info.json", SNAPSHOTS] } else { &[SNAPSHOTS] };
        for &name in names {
            let target = Path::new("../..").join(name);
            let link = self.link(&[b"chain", b"0", name.as_bytes()], inode, active, target);
            children.insert(name.to_owned(), link);
        }
        let partitions = if shown { Partitions::Links } else { Partitions::Absent };
        let directory = Directory { children, partitions, ..Directory::default() };
        self.put(inode, parent, active, What::Directory(directory));
        inode
    }

    fn by_name_directory(&mut self, active: usize, parent: Inode) -> Inode {
        let inode = self.reserve(&[b"chain", b"by-name"]);
        let mut children = BTreeMap::new();
        for index in 0..self.chain.members().len() {
            let path = self.chain.members()[index].path().to_path_buf();
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
            let identity = [self.member_identity(index), b"link".to_vec()];
            let target = Path::new("..").join(index.to_string());
            let link = self.link(&[&identity[0], &identity[1]], inode, active, target);
            insert_unique(&mut children, file_name(&name), &index.to_string(), link);
        }
        let directory = Directory { children, ..Directory::default() };
        self.put(inode, parent, active, What::Directory(directory));
        inode
    }

    fn hidden_directory(&mut self, active: usize) -> Inode {
        let inode = self.reserve(&[b".qchainfs"]);
        let mut children = BTreeMap::new();
        for (name, document) in [
            ("chain.json", Document::Chain),
            ("daemon.json", Document::Daemon),
            ("version", Document::Version),
        ] {
            let file = self.reserve(&[b".qchainfs", name.as_bytes()]);
            self.put(file, inode, active, What::Document(document));
            children.insert(name.to_owned(), file);
        }
        let socket = self.reserve(&[b".qchainfs", b"control.sock"]);
        self.put(socket, inode, active, What::ControlSocket);
        children.insert("control.sock".to_owned(), socket);
        let directory = Directory { children, ..Directory::default() };
        self.put(inode, Inode::ROOT, active, What::Directory(directory));
        inode
    }

    pub fn snapshots_directory(
        &mut self,
        side: Side,
        index: usize,
        view: usize,
        parent: Inode,
    ) -> Result<Inode> {
        let identity = side.mark(self.member_identity(index));
        let inode = self.reserve(&[&identity, b"snapshots"]);
        let mut children = BTreeMap::new();
        let snapshots = self.chain.members()[index].image().map(|image| image.snapshots());
        for snapshot in snapshots.unwrap_or_default() {
            if self.hidden.is_some_and(|hidden| Arc::ptr_eq(hidden, &snapshot)) {
                continue;
            }
            let entry = snapshot.entry().clone();
            let view = self.add(side, self.chain.snapshot_view(index, snapshot)?);
            let directory = self.reserve(&[&self.view_identity(view), b"directory"]);
            let files = self.view_directory(view, directory);
            self.put(directory, inode, view, What::Directory(files));
            insert_unique(&mut children, file_name(&entry.name), &entry.id, directory);
        }
        let directory = Directory { children, ..Directory::default() };
        self.put(inode, parent, view, What::Directory(directory));
        Ok(inode)
    }

    /// The files that every view has; `inode` is the directory they are in.
    pub fn view_directory(&mut self, view: usize, inode: Inode) -> Directory {
        let identity = self.view_identity(view);
        let disk = self.reserve(&[&identity, b"disk.raw"]);
        self.put(disk, inode, view, What::Disk(Window::Whole));
        let info = self.reserve(&[&identity, b"info.json"]);
        self.put(info, inode, view, What::Document(Document::ViewInfo));
        let children =
            BTreeMap::from([("disk.raw".to_owned(), disk), ("info.json".to_owned(), info)]);
        let mut hidden = BTreeMap::new();
        if self.views[view].twin().is_some() {
            let still = self.reserve(&[&identity, STILL_DISK.as_bytes()]);
            self.put(still, inode, view, What::StillDisk);
            hidden.insert(STILL_DISK.to_owned(), still);
        }
        Directory { children, hidden, partitions: Partitions::Files }
    }

    fn link(&mut self, identity: &[&[u8]], parent: Inode, view: usize, target: PathBuf) -> Inode {
        let inode = self.reserve(identity);
        self.put(inode, parent, view, What::Link(target));
        inode
    }

    fn add_view(&mut self, view: View) -> usize {
        self.add(Side::Views, view)
    }

    pub fn add(&mut self, side: Side, view: View) -> usize {
        let known = self.known.remove(&ViewKey::new(side, &view));
        let member = match self.plan.first_member + view.member() {
            0 => String::new(),
            index => format!("[{index}]"),
        };
        let address = match view.snapshot() {
            None => member,
            Some(snapshot) => {
                let image = self.chain.members()[view.member()].image();
                let snapshots = image.map(|image| image.snapshots()).unwrap_or_default();
                format!("{member}@{}", SnapshotChoice::of(snapshot, &snapshots))
            }
        };
        let files = match (known, side) {
            (Some(known), _) if Arc::ptr_eq(known.original().chain(), &self.chain) => known,
            (_, Side::Views) => Arc::new(ViewFiles::new(view, address)),
            (known, Side::Twins) => {
                // It goes on in another chain: what was written to it is nowhere else.
                let twin = known.and_then(|known| known.twin().cloned()).unwrap_or_default();
                Arc::new(ViewFiles::of_twin(view, address, twin))
            }
        };
        self.views.push(files);
        self.views.len() - 1
    }

    /// A free inode number for `identity`, taken until [`Self::put`] fills it.
    pub fn reserve(&mut self, identity: &[&[u8]]) -> Inode {
        let mut inode = Inode::of(identity);
        while self.nodes.contains_key(&inode) {
            inode = inode.next();
        }
        let what = What::Directory(Directory::default());
        self.nodes.insert(inode, Node { inode, parent: Inode::ROOT, view: 0, what });
        inode
    }

    pub fn put(&mut self, inode: Inode, parent: Inode, view: usize, what: What) {
        self.nodes.insert(inode, Node { inode, parent, view, what });
    }

    fn member_identity(&self, index: usize) -> Vec<u8> {
        member_identity(&self.chain, index)
    }

    /// What makes a view the same from mount to mount.
    fn view_identity(&self, view: usize) -> Vec<u8> {
        let is_root = view == 0;
        let files = &self.views[view];
        let view = files.original();
        let mut identity = match is_root {
            true => self.plan.root_identity.clone(),
            false => self.member_identity(view.member()),
        };
        if let Some(snapshot) = view.snapshot() {
            let entry = snapshot.entry();
            identity.push(0);
            identity.extend(entry.id.as_bytes());
            identity.push(0);
            identity.extend(entry.name.as_bytes());
            // One that takes the name and the id of one that is gone is another file: the kernel may still have the old one.
            identity.extend(entry.date_seconds.to_be_bytes());
            identity.extend(entry.date_nanoseconds.to_be_bytes());
        }
        match files.twin() {
            None => Side::Views.mark(identity),
            Some(_) => Side::Twins.mark(identity),
        }
    }
}

/// What makes a member the same from mount to mount: its file, whatever its place in the chain.
///
/// Not the device number: that can change with every boot. So two members can have one identity.
fn member_identity(chain: &Chain, index: usize) -> Vec<u8> {
    let member = &chain.members()[index];
    let mut identity = member.store().id().inode.to_be_bytes().to_vec();
    identity.extend(member.path().file_name().unwrap_or_default().as_bytes());
    identity
}
