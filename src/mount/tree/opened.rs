//! What is open, and what keeps what from being opened.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::Window;
use super::handles::{Handle, OpenFor};
use crate::chain::View;
use crate::error::{Error, Problem, Result};
use crate::image::SnapshotTree;
use crate::mount::view_files::ViewFiles;

/// The open files of a tree.
#[derive(Default)]
pub(super) struct Handles {
    next: AtomicU64,
    open: RwLock<HashMap<u64, Arc<Open>>>,
    /// Nobody may open the active disk for writing. Changes under the lock of `open` only.
    writers_kept_out: AtomicBool,
}

/// Nobody opens the active disk for writing until this is dropped.
pub(super) struct NoWriters<'a>(&'a Handles);

impl Drop for NoWriters<'_> {
    fn drop(&mut self) {
        self.0.writers_kept_out.store(false, Ordering::Release);
    }
}

pub(super) enum Open {
    /// The active disk, whichever image is on top.
    Active {
        window: Window,
        purpose: OpenFor,
    },
    /// A view that stays what it is.
    Disk {
        view: View,
        window: Window,
    },
    /// A scratch twin. It stays that one, whatever becomes of the chain.
    Twin {
        files: Arc<ViewFiles>,
        window: Window,
        purpose: OpenFor,
    },
    /// A scratch twin that nobody else may write.
    StillTwin {
        files: Arc<ViewFiles>,
    },
    Document(Vec<u8>),
}

impl Open {
    fn can_write(&self) -> bool {
        matches!(self, Self::Active { purpose: OpenFor::Writing, .. })
    }

    /// What it writes to, if it can write to a twin.
    fn written_twin(&self) -> Option<&Arc<ViewFiles>> {
        match self {
            Self::Twin { files, purpose: OpenFor::Writing, .. } => Some(files),
            _ => None,
        }
    }

    /// Whether one of both writes a twin that the other keeps still.
    fn excludes(&self, other: &Self) -> bool {
        let is_written = |open: &Self, still: &ViewFiles| {
            let written = open.written_twin().and_then(|files| files.twin());
            written.zip(still.twin()).is_some_and(|(written, still)| Arc::ptr_eq(written, still))
        };
        match (self, other) {
            (Self::StillTwin { files }, open) | (open, Self::StillTwin { files }) => {
                is_written(open, files)
            }
            _ => false,
        }
    }

    /// The view of an open disk that is not the active one.
    fn fixed_view(&self) -> Option<&View> {
        match self {
            Self::Disk { view, .. } => Some(view),
            Self::Twin { files, .. } | Self::StillTwin { files } => Some(files.original()),
            Self::Active { .. } | Self::Document(_) => None,
        }
    }
}

impl Handles {
    pub fn add(&self, open: Open) -> Result<Handle> {
        let mut files = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.can_write() && self.writers_kept_out.load(Ordering::Acquire) {
            return Err(Error::new(Problem::Busy { holders: Vec::new() }));
        }
        if files.values().any(|other| other.excludes(&open)) {
            return Err(Error::new(Problem::Busy { holders: Vec::new() }));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        files.insert(number, Arc::new(open));
        Ok(Handle(number))
    }

    pub fn get(&self, handle: Handle) -> Result<Arc<Open>> {
        let files = self.open.read().unwrap_or_else(PoisonError::into_inner);
        files.get(&handle.0).cloned().ok_or_else(|| Error::usage("no such open file"))
    }

    pub fn remove(&self, handle: Handle) {
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&handle.0);
    }

    /// Keeps those out who want to write to the active disk, unless there are some.
    pub fn keep_writers_out(&self) -> Option<NoWriters<'_>> {
        let files = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if files.values().any(|open| open.can_write()) {
            return None;
        }
        self.writers_kept_out.store(true, Ordering::Release);
        Some(NoWriters(self))
    }

    /// Whether somebody has a disk of that snapshot open, or a twin's.
    pub fn has_open(&self, snapshot: &SnapshotTree) -> bool {
        let files = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let is_of = |view: &View| view.snapshot().is_some_and(|tree| std::ptr::eq(tree, snapshot));
        files.values().any(|open| open.fixed_view().is_some_and(is_of))
    }

    /// Whether somebody could write to a twin of a view that `is_of`.
    pub fn has_twin_writer(&self, is_of: impl Fn(&View) -> bool) -> bool {
        let files = self.open.read().unwrap_or_else(PoisonError::into_inner);
        files.values().filter_map(|open| open.written_twin()).any(|twin| is_of(twin.original()))
    }
}
