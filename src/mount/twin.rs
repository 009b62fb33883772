//! The scratch twin of a view: the view itself until somebody opens it for writing, from then on a chain of its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::chain::View;
use crate::error::Result;
use crate::image::Image;
use crate::store::TemporaryDirectory;

/// What makes a view's files writable.
#[derive(Default)]
pub struct Twin {
    view: OnceLock<View>,
    /// Held while the view is made.
    making: Mutex<()>,
    /// Counts what changes its content.
    writes: AtomicU64,
}

impl Twin {
    /// The writable view, if it was needed so far.
    pub fn view(&self) -> Option<&View> {
        self.view.get()
    }

    /// Makes the writable view, unless it is there.
    ///
    /// # Errors
    /// As [`View::twin`].
    pub fn make(&self, of: &View, directory: &TemporaryDirectory) -> Result<()> {
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if self.view.get().is_none() {
            let view = of.twin(directory)?;
            self.view.get_or_init(|| view);
        }
        Ok(())
    }

    /// Grows with every write.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Acquire)
    }

    /// To be called after every write, failed ones too.
    pub fn wrote(&self) {
        self.writes.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether it may differ from what it is a twin of.
    pub fn is_changed(&self) -> bool {
        self.writes() > 0
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        if let Some(image) = self.view.get().and_then(|view| view.chain().active_image()) {
            Image::abandon(image);
        }
    }
}
