//! A mount from its beginning to its end.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::attach::{AttachOptions, Audience, Detach, MountFlag, attach, detach, layout_at};
use super::live::Live;
use super::mount_table::{MountEntry, our_mount};
use super::service::Service;
use super::state::State;
use super::transport::{Notifier, Transport, Way};
use super::tree::{Layout, Outdated, Tree, TreeOptions};
use crate::chain::{Chain, View};
use crate::control::Server;
use crate::error::{At, Doing, Error, Problem, Result};
use crate::image::Writability;
use crate::store::FileId;

/// What was written is made durable after this time, even if nobody asks.
const WRITE_BACK_EVERY: Duration = Duration::from_secs(2);

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Where; absolute. A regular file becomes the disk of the one view at the root.
    pub mountpoint: PathBuf,
    /// How the files look.
    pub tree: TreeOptions,
    /// Who may look inside.
    pub audience: Audience,
    /// Flags for the kernel.
    pub flags: Vec<MountFlag>,
    /// Threads that answer requests, at least 1; by default as many as are good for the way the requests come.
    pub threads: Option<usize>,
    /// By which way the requests come.
    pub way: Way,
}

/// A mount that answers.
pub struct Session {
    transport: Transport,
    tree: Arc<Tree>,
    mountpoint: PathBuf,
    /// Which mount is ours: another may be at the same place when this one ends.
    mount: Option<MountEntry>,
    /// Dropped before `_state`, which holds its place.
    control: Option<Server>,
    _state: Option<State>,
}

/// Ends a session from another thread.
#[derive(Clone)]
pub struct Stop {
    tree: Arc<Tree>,
    mountpoint: PathBuf,
    mount: Option<MountEntry>,
    requests: Arc<AtomicU32>,
}

impl Session {
    /// Mounts the tree with `root` at its root. When this returns, the mount answers as soon as [`Session::run`] is called.
    ///
    /// # Errors
    /// A mountpoint that can't be used, or no FUSE.
    pub fn mount(root: View, options: &MountOptions) -> Result<Self> {
        let chain = root.chain().clone();
        let layout = layout_at(&options.mountpoint)?;
        if options.tree.scratch.is_some() && layout == Layout::File {
            return Err(Error::usage("a mount that is a file has no room for scratch twins"));
        }
        // Twins can be written where the images are not.
        let writability = match root.is_writable() || options.tree.scratch.is_some() {
            true => Writability::Writable,
            false => Writability::ReadOnly,
        };
        check_is_no_member(&options.mountpoint, &chain)?;
        let tree = Arc::new(Tree::new(root, layout, options.tree.clone())?);
        let connection = attach(
            &options.mountpoint,
            &AttachOptions {
                source: options.tree.image.clone(),
                writability,
                audience: options.audience,
                flags: options.flags.clone(),
            },
        )?;
        let service = Arc::new(Service::new(tree.clone()));
        match Transport::start(service, connection, options.way, options.threads)
            .at(&options.mountpoint)
        {
            Ok(transport) => {
                tree.set_way(transport.way());
                let mountpoint = options.mountpoint.clone();
                let mount = our_mount(&mountpoint);
                let state = mount.as_ref().and_then(publish_state);
                let control = state.as_ref().and_then(|state| {
                    let notifier = transport.notifier();
                    let place = mount.as_ref().map_or(&mountpoint, |mount| &mount.mountpoint);
                    let forget = move |outdated: &Outdated| forget(&notifier, outdated);
                    let live = Live::new(tree.clone(), place.clone(), forget);
                    let server = listen(&state.socket(), live)?;
                    tree.set_control_socket(state.socket());
                    Some(server)
                });
                Ok(Self { transport, tree, mountpoint, mount, control, _state: state })
            }
            Err(error) => {
                // Nobody will answer there: a mount left behind would hang whoever touches it.
                if let Err(left) = detach(&options.mountpoint, Detach::Now) {
                    log::error!("{left}");
                }
                Err(error)
            }
        }
    }

    /// A way to end the session.
    pub fn stop(&self) -> Stop {
        Stop {
            tree: self.tree.clone(),
            mountpoint: self.mountpoint.clone(),
            mount: self.mount.clone(),
            requests: Arc::default(),
        }
    }

    /// Answers requests until the mount is gone, then closes the chain cleanly.
    ///
    /// # Errors
    /// A connection that breaks; changes that could not be made durable.
    pub fn run(self) -> Result<()> {
        let write_back = WriteBack::start(self.tree.clone())?;
        let served = self.transport.run().doing("answer the kernel's FUSE").at(&self.mountpoint);
        // What a client began is done before the image is closed, and nothing begins after.
        drop(self.control);
        write_back.finish();
        let closed = self.tree.chain().close();
        served.and(closed)
    }
}

impl Stop {
    /// Makes all that was written durable and unmounts. While somebody still uses the mount, it goes on for him alone;
    /// a second request ends it for him, too.
    pub fn request(&self) {
        let before = self.requests.fetch_add(1, Ordering::AcqRel);
        if let Err(error) = self.tree.sync() {
            log::error!("{error}");
        }
        if before > 0 {
            log::warn!("ending though the mount is in use");
            std::process::exit(1);
        }
        if !self.is_mounted() {
            log::warn!("unmounted already: it ends when the last who has it open is done");
            return;
        }
        let detached = match detach(&self.mountpoint, Detach::WhenIdle) {
            Err(error) => {
                log::warn!("{error}: it ends when the last of them is done");
                detach(&self.mountpoint, Detach::Now)
            }
            done => done,
        };
        if let Err(error) = detached {
            log::error!("{error}");
        }
    }
}

impl Stop {
    /// Whether the mount at our place is still ours. Where that can't be known, as with a passed descriptor, it is.
    fn is_mounted(&self) -> bool {
        let Some(mount) = &self.mount else { return true };
        our_mount(&self.mountpoint).is_some_and(|now| now.device == mount.device)
    }
}

/// A thread that flushes every now and then.
struct WriteBack {
    finish: Sender<()>,
    thread: JoinHandle<()>,
}

impl WriteBack {
    fn start(tree: Arc<Tree>) -> Result<Self> {
        let (finish, finished) = mpsc::channel();
        let work = move || {
            while finished.recv_timeout(WRITE_BACK_EVERY) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = tree.sync() {
                    log::debug!("write-back: {error}");
                }
                tree.chain().tidy();
            }
        };
        let thread = thread::Builder::new().name("write-back".into()).spawn(work);
        Ok(Self { finish, thread: thread.doing("start a thread")? })
    }

    fn finish(self) {
        drop(self.finish);
        if self.thread.join().is_err() {
            log::error!("the write-back thread ran into a bug");
        }
    }
}

/// A mount that hides a file of its own chain could not be found again by that file's name.
fn check_is_no_member(mountpoint: &Path, chain: &Chain) -> Result<()> {
    let Ok(place) = mountpoint.metadata() else { return Ok(()) };
    let id = FileId { device: place.dev(), inode: place.ino() };
    if chain.members().iter().all(|member| member.store().id() != id) {
        return Ok(());
    }
    let reason = "it is a file of the chain itself, which the mount would hide".to_owned();
    Err(Error::new(Problem::Mountpoint { reason }).at(mountpoint))
}

/// Takes commands for the mount. Without that it works, and only can't be managed.
fn listen(socket: &Path, live: Live) -> Option<Server> {
    match Server::start(socket, Arc::new(live)) {
        Ok(server) => Some(server),
        Err(error) => {
            log::warn!("{}: no control socket: {error}", socket.display());
            None
        }
    }
}

/// Tells the kernel what it can't rely on any more.
fn forget(notifier: &Notifier, outdated: &Outdated) {
    let told = notifier.forget(outdated);
    // What it does not know it need not forget.
    if let Err(error) = told
        && error.kind() != ErrorKind::NotFound
    {
        log::warn!("the kernel could not be told of a change: {error}");
    }
}

/// Says who serves the mount. Without that it works, and only `umount` can't wait for us on a mount that is a file.
fn publish_state(mount: &MountEntry) -> Option<State> {
    match State::publish(mount) {
        Ok(state) => Some(state),
        Err(error) => {
            log::info!("{}: no state file: {error}", mount.mountpoint.display());
            None
        }
    }
}
