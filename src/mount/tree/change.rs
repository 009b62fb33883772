//! Changes of the chain while it is mounted: a new shape takes the place of the old one.

use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::{Outdated, Tree};
use crate::chain::{Chain, Existing, View};
use crate::error::{At, Error, Problem, Result};
use crate::image::{Image, SnapshotTree};

/// A change that was made.
pub struct Changed<T> {
    /// What came of it.
    pub value: T,
    /// What the kernel must be told to forget. Not by a thread that answers requests: the kernel may wait for these.
    pub outdated: Vec<Outdated>,
}

impl Tree {
    /// Makes an internal snapshot of the active layer, and shows it.
    ///
    /// # Errors
    /// As [`Image::create_snapshot`]; a mount that can't write.
    pub fn create_snapshot(&self, name: &str) -> Result<Changed<Arc<SnapshotTree>>> {
        let _change = self.change();
        let chain = self.chain();
        let value = writable(&chain)?.create_snapshot(name).at(chain.members()[0].path())?;
        Ok(Changed { value, outdated: self.show(chain.view(0)?, None)? })
    }

    /// Puts the new image `file` on top of the chain: what was written so far is `chain/1` from now on.
    ///
    /// # Errors
    /// As [`Chain::prepare_overlay`] and [`crate::chain::Overlay::put_on_top`]; a mount that can't write.
    pub fn overlay(&self, file: &Path, existing: Existing) -> Result<Changed<()>> {
        let _change = self.change();
        let chain = self.chain();
        writable(&chain)?;
        let overlay = chain.prepare_overlay(file, existing)?;
        let outdated = overlay.put_on_top(|chain| self.show(chain.view(0)?, None))?;
        Ok(Changed { value: (), outdated })
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the tree with `root` at its root from now on.
    fn show(&self, root: View, hidden: Option<&Arc<SnapshotTree>>) -> Result<Vec<Outdated>> {
        let old = self.shape();
        let new = Arc::new(self.plan.build(root, Some(&old), hidden)?);
        *self.shape.write().unwrap_or_else(PoisonError::into_inner) = new.clone();
        Ok(old.outdated_by(&new))
    }
}

fn writable(chain: &Chain) -> Result<&Image> {
    let image = chain.active_image().filter(|image| image.is_writable());
    image.ok_or_else(|| Error::new(Problem::ReadOnly).at(chain.members()[0].path()))
}
