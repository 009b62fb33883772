//! Members in order, from the active layer (index 0) down to the base, and the views that they make.

mod address;
mod backing_name;
mod base_record;
mod compose;
mod copy;
mod diff;
mod extents;
mod member;
mod open;
mod overlay;
mod policy;
mod resolved;
mod secrets;
#[cfg(test)]
mod tests;
mod together;
mod twin;
mod unlock;
mod view;

pub use address::{Address, MemberChoice, SnapshotChoice};
pub use backing_name::{BackingName, resolve as resolve_backing_name};
pub use base_record::Closeness;
pub use compose::Layer;
pub use copy::Reflink;
pub use diff::Differences;
pub use extents::Extent;
pub use member::{Disk, Format, Member, RawDisk};
pub use open::{Depth, OpenOptions, Sharing};
pub use overlay::{Existing, Overlay, check_place};
pub use policy::{BackingPolicy, OpenPolicy};
pub use secrets::{SecretFor, SecretSource, Secrets};
pub use view::View;

use std::sync::Arc;

use self::resolved::ResolvedMaps;
use crate::error::{Error, Problem, Result};
use crate::image::{Image, SnapshotTree, Tree};

/// An open chain. It has at least one member.
pub struct Chain {
    /// A chain that grows out of this one shares them.
    members: Vec<Arc<Member>>,
    /// What shows through the top is this snapshot of member 1 rather than its present: the chain of a scratch twin.
    below_top: Option<Arc<SnapshotTree>>,
    resolved: ResolvedMaps,
}

impl Chain {
    fn new(members: Vec<Member>) -> Self {
        Self::of_shared(members.into_iter().map(Arc::new).collect())
    }

    fn of_shared(members: Vec<Arc<Member>>) -> Self {
        Self { resolved: ResolvedMaps::new(members.len()), below_top: None, members }
    }

    fn resolved(&self) -> &ResolvedMaps {
        &self.resolved
    }

    /// All members; index 0 is the active layer.
    pub fn members(&self) -> &[Arc<Member>] {
        &self.members
    }

    /// The chain from member `index` down, as if that were the top; those above it are closed.
    ///
    /// # Errors
    /// [`Problem::NoSuchMember`].
    pub fn from_member(mut self, index: usize) -> Result<Self> {
        self.check_member(index)?;
        self.members.drain(..index);
        Ok(Self::of_shared(self.members))
    }

    /// Whether the active layer takes writes.
    pub fn is_writable(&self) -> bool {
        self.active_image().is_some_and(Image::is_writable)
    }

    /// Whether another process may write the active layer, which then is nothing to rely on.
    pub fn is_beside_writer(&self) -> bool {
        self.active_image().is_some_and(Image::is_beside_writer)
    }

    /// The active layer, where it is a qcow2 image.
    pub fn active_image(&self) -> Option<&Image> {
        self.members.first().and_then(|top| top.image())
    }

    /// The view of member `index` together with all below it.
    ///
    /// # Errors
    /// [`Problem::NoSuchMember`].
    pub fn view(self: &Arc<Self>, index: usize) -> Result<View> {
        self.check_member(index)?;
        let snapshot = self.below_top.clone().filter(|_| index == 1);
        Ok(View::new(self.clone(), index, snapshot))
    }

    /// The view of an internal snapshot of member `index`.
    ///
    /// # Errors
    /// [`Problem::NoSuchMember`].
    pub fn snapshot_view(
        self: &Arc<Self>,
        index: usize,
        snapshot: Arc<SnapshotTree>,
    ) -> Result<View> {
        self.check_member(index)?;
        Ok(View::new(self.clone(), index, Some(snapshot)))
    }

    /// What shows through the members above `index`: its tree, and that one's size in bytes.
    fn below(&self, index: usize) -> Option<(Tree<'_>, u64)> {
        match &self.below_top {
            Some(snapshot) if index == 1 => Some((Tree::Snapshot(snapshot), snapshot.size())),
            _ => self.members.get(index).map(|member| (Tree::Active, member.size())),
        }
    }

    fn check_member(&self, index: usize) -> Result<()> {
        if index < self.members.len() {
            return Ok(());
        }
        let error = Error::new(Problem::NoSuchMember {
            wanted: index.to_string(),
            count: self.members.len(),
        });
        Err(match self.members.first() {
            Some(top) => error.at(top.path()),
            None => error,
        })
    }

    /// Returns when all that was written before is on stable storage.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn flush(&self) -> Result<()> {
        match self.active_image() {
            Some(image) if image.is_writable() => image.flush(),
            _ => Ok(()),
        }
    }

    /// Gives back memory that only speeds up what is going on: to be called now and then.
    pub fn tidy(&self) {
        self.members.iter().for_each(|member| member.data_store().let_go());
    }

    /// Leaves the active layer as a clean close does: all durable, no cluster leaked.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn close(&self) -> Result<()> {
        match self.active_image() {
            Some(image) if image.is_writable() => image.flush_all(),
            _ => Ok(()),
        }
    }
}
