//! Changes of the chain while it is mounted: a new shape takes the place of the old one.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::build::{CHAIN, SNAPSHOTS};
use super::opened::NoWriters;
use super::scratch::TWINS;
use super::shape::Shape;
use super::{Outdated, Tree, What};
use crate::chain::{Chain, Existing, Member, View};
use crate::control::SnapshotName;
use crate::error::{At, Error, Problem, Result};
use crate::image::{Image, SnapshotTree};
use crate::mount::in_use::{TWIN, Use, holders_of, loop_devices_of};
use crate::mount::view_files::ViewFiles;
use crate::store::Access;

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

    /// Deletes an internal snapshot of the active layer. It is not shown any more before that.
    ///
    /// # Errors
    /// [`Problem::NoSuchSnapshot`]; [`Problem::SnapshotInUse`] while somebody has its disk open (`mountpoint` is where to
    /// look for him), or while its scratch twin holds changes. Inside: as [`Image::delete_snapshot`], which may fail when the snapshot is
    /// gone already, and the kernel is to be told of that, too.
    pub fn delete_snapshot(
        &self,
        choice: &SnapshotName,
        mountpoint: &Path,
    ) -> Result<Changed<Result<Arc<SnapshotTree>>>> {
        let _change = self.change();
        let chain = self.chain();
        let image = writable(&chain)?;
        let path = chain.members()[0].path();
        let value = find(image, choice).at(path)?;
        let mut outdated = self.hide(&chain, &value, mountpoint)?;
        let deleted = image.delete_snapshot(&value.entry().id).at(path);
        // Where that failed it is there again, and else not.
        outdated.extend(self.show(chain.view(0)?, None)?);
        Ok(Changed { value: deleted.map(|()| value), outdated })
    }

    /// Takes the disk back to an internal snapshot of the active layer.
    ///
    /// # Errors
    /// [`Problem::NoSuchSnapshot`]; [`Problem::OpenForWriting`] while somebody could write to the disk; as
    /// [`Image::apply_snapshot`].
    pub fn apply_snapshot(
        &self,
        choice: &SnapshotName,
        mountpoint: &Path,
    ) -> Result<Changed<Arc<SnapshotTree>>> {
        let _change = self.change();
        let chain = self.chain();
        let image = writable(&chain)?;
        let path = chain.members()[0].path();
        let value = find(image, choice).at(path)?;
        let no_writers = self.keep_writers_out(&chain, mountpoint)?;
        let applied = image.apply_snapshot(&value.entry().id).at(path);
        drop(no_writers);
        self.writes.fetch_add(1, Ordering::AcqRel);
        applied?;
        let mut outdated = self.show(chain.view(0)?, None)?;
        outdated.extend(self.active_disks());
        Ok(Changed { value, outdated })
    }

    /// Puts the new image `file` on top of the chain: what was written so far is `chain/1` from now on.
    ///
    /// # Errors
    /// As [`Chain::prepare_overlay`] and [`crate::chain::Overlay::put_on_top`]; a mount that can't write.
    pub fn overlay(&self, file: &Path, existing: Existing) -> Result<Changed<()>> {
        let _change = self.change();
        let chain = self.chain();
        writable(&chain)?;
        let overlay = chain.prepare_overlay(0, file, existing)?;
        let outdated = overlay.put_on_top(|chain| self.show(chain.view(0)?, None))?;
        Ok(Changed { value: (), outdated })
    }

    /// Takes the disk back to the member whose file the chain knows as `member`: the new image `file` goes on top of it,
    /// and the images above it are no longer part of the chain. Their files stay as they are.
    ///
    /// # Errors
    /// [`Problem::NoSuchMember`], also for the active layer; [`Problem::OpenForWriting`] while somebody could write to the
    /// disk; [`Problem::Busy`] where a scratch twin that holds changes would be gone; as [`Tree::overlay`].
    pub fn revert(
        &self,
        member: &Path,
        file: &Path,
        existing: Existing,
        mountpoint: &Path,
    ) -> Result<Changed<()>> {
        let _change = self.change();
        let chain = self.chain();
        writable(&chain)?;
        let mut below = chain.members().iter().skip(1);
        let Some(below) = below.position(|below| below.path() == member) else {
            let (wanted, count) = (member.display().to_string(), chain.members().len());
            let error = Error::new(Problem::NoSuchMember { wanted, count });
            return Err(error.at(chain.members()[0].path()));
        };
        let _no_writers = self.keep_writers_out(&chain, mountpoint)?;
        let (lost, _) = chain.members().split_at(below + 1);
        self.check_twins_of(lost, &self.shape())?;
        let overlay = chain.prepare_overlay(below + 1, file, existing)?;
        let switched = overlay.put_on_top(|chain| {
            let old = self.shape();
            let new = Arc::new(self.plan.build(chain.view(0)?, Some(&old), None)?);
            let mut shape = self.shape.write().unwrap_or_else(PoisonError::into_inner);
            // Once more, now that nobody opens any: the image was not made in an instant.
            self.check_twins_of(lost, &old)?;
            *shape = new.clone();
            Ok(old.outdated_by(&new))
        });
        self.writes.fetch_add(1, Ordering::AcqRel);
        let mut outdated = switched?;
        outdated.extend(self.active_disks());
        Ok(Changed { value: (), outdated })
    }

    /// Nobody writes to the disk while what this returns lives. Who writes relies on what he has read, and it must not
    /// become something else under him. Nor is there a loop device over it, which remembers what it has read, and is not told.
    fn keep_writers_out(&self, chain: &Chain, mountpoint: &Path) -> Result<NoWriters<'_>> {
        let is_active = |used: &Use<'_>| {
            [CHAIN, SNAPSHOTS, TWINS].iter().all(|other| !used.file.starts_with(other))
        };
        let holders =
            loop_devices_of(mountpoint, |used| used.access == Access::ReadOnly && is_active(used));
        if !holders.is_empty() {
            return Err(Error::new(Problem::Busy { holders }).at(chain.members()[0].path()));
        }
        self.handles.keep_writers_out().ok_or_else(|| {
            let holders = holders_of(mountpoint, |used| {
                used.access == Access::ReadWrite && !used.file.starts_with(TWINS)
            });
            Error::new(Problem::OpenForWriting { holders }).at(chain.members()[0].path())
        })
    }

    /// Refuses to let `members` go while there are changes in scratch twins of them and of their snapshots, or writers.
    fn check_twins_of(&self, members: &[Arc<Member>], shape: &Shape) -> Result<()> {
        let is_lost = |view: &View| {
            let member = &view.chain().members()[view.member()];
            members.iter().any(|lost| Arc::ptr_eq(lost, member))
        };
        if has_changed_twin(shape, is_lost) || self.handles.has_twin_writer(is_lost) {
            let holders = vec![TWIN.to_owned()];
            return Err(Error::new(Problem::Busy { holders }).at(shape.chain.members()[0].path()));
        }
        Ok(())
    }

    /// Shows the snapshots as they are by now, where another process makes and deletes them. The kernel need not be told: it
    /// believes nothing of such a mount for longer than a moment.
    pub(super) fn follow(&self) {
        let chain = self.chain();
        let Some(image) = chain.active_image().filter(|image| image.is_beside_writer()) else {
            return;
        };
        if let Err(error) = image.follow() {
            // What is shown already is asked for with each read.
            log::warn!("the snapshots can't be looked at: {}", error.at(chain.members()[0].path()));
            return;
        }
        let is_shown = || self.shape().snapshot_generation == image.snapshot_generation();
        if is_shown() {
            return;
        }
        let _change = self.change();
        if is_shown() {
            return;
        }
        if let Err(error) = self.show(self.shape().root().clone(), None) {
            log::error!("{error}");
            return;
        }
        let shape = self.shape();
        let mut partitions = self.partitions.write().unwrap_or_else(PoisonError::into_inner);
        partitions.nodes.retain(|_, node| shape.nodes.contains_key(&node.parent));
        partitions.inodes.retain(|(parent, _), _| shape.nodes.contains_key(parent));
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

    /// Shows the tree without `snapshot` from now on, unless somebody has it open.
    fn hide(
        &self,
        chain: &Arc<Chain>,
        snapshot: &Arc<SnapshotTree>,
        mountpoint: &Path,
    ) -> Result<Vec<Outdated>> {
        let old = self.shape();
        let new = Arc::new(self.plan.build(chain.view(0)?, Some(&old), Some(snapshot))?);
        let mut shape = self.shape.write().unwrap_or_else(PoisonError::into_inner);
        let changed_twin = has_changed_twin(&old, |view| {
            view.snapshot().is_some_and(|tree| std::ptr::eq(tree, &**snapshot))
        });
        if changed_twin || self.handles.has_open(snapshot) {
            drop(shape);
            let directory = old.snapshot_directory(snapshot);
            let mut holders = holders_of(mountpoint, |used| {
                let file = used.file.strip_prefix(TWINS).unwrap_or(used.file);
                directory.as_ref().is_some_and(|directory| file.starts_with(directory))
            });
            holders.extend(changed_twin.then(|| TWIN.to_owned()));
            let name = snapshot.entry().name.clone();
            let problem = Problem::SnapshotInUse { name, holders };
            return Err(Error::new(problem).at(chain.members()[0].path()));
        }
        *shape = new.clone();
        Ok(old.outdated_by(&new))
    }

    /// The content of the active disk under all its names.
    fn active_disks(&self) -> Vec<Outdated> {
        let shape = self.shape();
        let disks = shape.nodes.values().filter(|node| node.view == 0);
        let disks = disks.filter(|node| matches!(node.what, What::Disk(_)));
        let mut disks: Vec<_> = disks.map(|node| Outdated::Content(node.inode)).collect();
        let partitions = self.partitions.read().unwrap_or_else(PoisonError::into_inner);
        for node in partitions.nodes.values() {
            let parent = shape.nodes.get(&node.parent);
            if parent.is_some_and(|parent| parent.view == 0) {
                disks.push(Outdated::Content(node.inode));
            }
        }
        disks
    }
}

fn writable(chain: &Chain) -> Result<&Image> {
    let image = chain.active_image().filter(|image| image.is_writable());
    image.ok_or_else(|| {
        let problem =
            if chain.is_beside_writer() { Problem::BesideWriter } else { Problem::ReadOnly };
        Error::new(problem).at(chain.members()[0].path())
    })
}

/// Whether a scratch twin of a view that `is_lost` holds changes.
fn has_changed_twin(shape: &Shape, is_lost: impl Fn(&View) -> bool) -> bool {
    let changed = |files: &ViewFiles| files.twin().is_some_and(|twin| twin.is_changed());
    shape.views.iter().any(|files| changed(files) && is_lost(files.original()))
}

/// The one snapshot of `image` of which all that `choice` says is true.
fn find(image: &Image, choice: &SnapshotName) -> Result<Arc<SnapshotTree>> {
    let snapshots = image.snapshots();
    let fits = |tree: &&Arc<SnapshotTree>| {
        let entry = tree.entry();
        choice.id.as_ref().is_none_or(|id| *id == entry.id)
            && choice.name.as_ref().is_none_or(|name| *name == entry.name)
    };
    let found: Vec<_> = snapshots.iter().filter(fits).collect();
    match found[..] {
        [one] => Ok(one.clone()),
        [] => {
            let wanted = choice.name.as_ref().or(choice.id.as_ref()).cloned().unwrap_or_default();
            let present = snapshots.iter().map(|tree| tree.entry().name.clone()).collect();
            Err(Error::new(Problem::NoSuchSnapshot { wanted, present }))
        }
        _ => {
            let wanted = choice.name.clone().unwrap_or_default();
            let ids = found.iter().map(|tree| tree.entry().id.clone()).collect();
            Err(Error::new(Problem::AmbiguousSnapshot { wanted, ids }))
        }
    }
}
