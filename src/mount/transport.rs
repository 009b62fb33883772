//! The ways by which the kernel's requests come.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use fuser::{Config, INodeNo, SessionACL};

use super::fuse::Fuse;
use super::ring::{self, RingSession};
use super::service::Service;
use super::tree::Outdated;
use crate::error::{Doing, Result};
use crate::processors;

/// How the kernel's requests reach us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Way {
    /// Over io_uring where the kernel offers it, else from the device.
    #[default]
    Best,
    /// From the device.
    Device,
}

/// A connection to the kernel that is ready to be served.
pub(super) enum Transport {
    Ring(RingSession),
    Device(Box<fuser::Session<Fuse>>),
}

/// Tells the kernel something unasked.
pub(super) enum Notifier {
    Ring(ring::Notifier),
    Device(fuser::Notifier),
}

impl Transport {
    /// Answers the kernel's first request.
    ///
    /// # Errors
    /// A kernel that speaks otherwise.
    pub fn start(
        service: Arc<Service>,
        connection: OwnedFd,
        way: Way,
        threads: Option<usize>,
    ) -> Result<Self> {
        let action = "talk to the kernel's FUSE";
        if way == Way::Best
            && let Some(ring) = RingSession::prepare(&service, connection.as_fd(), threads)
        {
            return ring.begin().map(|()| Self::Ring(ring)).doing(action);
        }
        let mut config = Config::default();
        let threads = threads.unwrap_or_else(threads_by_device);
        config.n_threads = Some(threads);
        config.clone_fd = may_clone(threads);
        // The kernel itself keeps out whom it should; a loop device's requests come from root.
        let fuse = Fuse::new(service);
        let session = fuser::Session::from_fd(fuse, connection, SessionACL::All, config);
        session.map(Box::new).map(Self::Device).doing(action)
    }

    /// A way to tell the kernel something.
    pub fn notifier(&self) -> Notifier {
        match self {
            Self::Ring(ring) => Notifier::Ring(ring.notifier()),
            Self::Device(session) => Notifier::Device(session.notifier()),
        }
    }

    /// The way that was taken, in a word.
    pub fn way(&self) -> &'static str {
        match self {
            Self::Ring(_) => "io_uring",
            Self::Device(_) => "device",
        }
    }

    /// Answers requests until the mount is gone.
    ///
    /// # Errors
    /// A connection that breaks.
    pub fn run(self) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.run(),
            Self::Device(session) => session.run(),
        }
    }
}

impl Notifier {
    /// Makes the kernel forget what it can't rely on any more.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if it didn't know it.
    pub fn forget(&self, outdated: &Outdated) -> io::Result<()> {
        match (self, outdated) {
            (Self::Ring(ring), outdated) => ring.forget(outdated),
            (Self::Device(device), Outdated::Name { parent, name }) => {
                device.inval_entry(INodeNo(parent.0), name.as_ref())
            }
            (Self::Device(device), Outdated::Content(inode)) => {
                device.inval_inode(INodeNo(inode.0), 0, 0)
            }
        }
    }
}

/// A thread that waits for a disk does not answer: there are more than processors.
fn threads_by_device() -> usize {
    (processors::usable() * 2).clamp(4, 16)
}

/// Whether each of so many threads can have a connection of its own to the kernel's queue: that takes access to the device, and
/// room for that many descriptors.
fn may_clone(threads: usize) -> bool {
    let open = |_| OpenOptions::new().read(true).write(true).open("/dev/fuse");
    (0..threads).map(open).collect::<io::Result<Vec<_>>>().is_ok()
}
