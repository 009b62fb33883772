//! What clients of the control socket ask of a mount.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::quiesce::Frozen;
use super::stacked::lies_on;
use super::tree::{Changed, Outdated, Tree};
use crate::chain::{Chain, Member};
use crate::control::{
    Command, DEVICE, NODE_PREFIX, NewOverlay, Quiesce, Revert, Target, snapshot_info,
};
use crate::error::{Error, Result};

/// A mount that takes commands.
pub(super) struct Live {
    tree: Arc<Tree>,
    /// Where it is mounted, resolved.
    mountpoint: PathBuf,
    /// Makes the kernel forget.
    forget: Box<dyn Fn(&Outdated) + Send + Sync>,
}

impl Live {
    pub fn new(
        tree: Arc<Tree>,
        mountpoint: PathBuf,
        forget: impl Fn(&Outdated) + Send + Sync + 'static,
    ) -> Self {
        Self { tree, mountpoint, forget: Box::new(forget) }
    }

    /// Tells the kernel about a change, and answers what came of it.
    fn tell<T>(&self, changed: Changed<T>) -> T {
        changed.outdated.iter().for_each(&self.forget);
        changed.value
    }

    fn overlay(&self, new: &NewOverlay) -> Result<Value> {
        self.refuse_on_this_disk(&new.file)?;
        self.while_quiesced(new.quiesce, || self.tree.overlay(&new.file, new.existing))?;
        Ok(json!({}))
    }

    /// Makes a change while file systems on the disk hold still, if they are to.
    fn while_quiesced<T>(
        &self,
        quiesce: Quiesce,
        change: impl FnOnce() -> Result<Changed<T>>,
    ) -> Result<T> {
        let frozen = match quiesce {
            Quiesce::No => None,
            Quiesce::Yes => Some(Frozen::all_on(&self.mountpoint)?),
        };
        let changed = change();
        // Thawed before anybody is told anything: who waits for a frozen file system may be the kernel.
        drop(frozen);
        Ok(self.tell(changed?))
    }

    fn refuse_on_this_disk(&self, new: &Path) -> Result<()> {
        match lies_on(new, &self.mountpoint) {
            false => Ok(()),
            true => Err(Error::usage(format!(
                "{} lies on a file system that is on this very disk: neither could be written without the other",
                new.display()
            ))),
        }
    }
}

impl Target for Live {
    fn execute(&self, command: &Command) -> Result<Value> {
        match command {
            Command::QueryNodes => Ok(nodes(&self.tree.chain())),
            Command::QueryBlock => {
                let inserted = nodes(&self.tree.chain())[0].take();
                Ok(json!([{
                    "device": DEVICE,
                    "type": "unknown",
                    "locked": false,
                    "removable": false,
                    "inserted": inserted,
                }]))
            }
            Command::CreateSnapshot { name, quiesce } => {
                self.while_quiesced(*quiesce, || self.tree.create_snapshot(name))?;
                Ok(json!({}))
            }
            Command::DeleteSnapshot(choice) => {
                let deleted = self.tell(self.tree.delete_snapshot(choice, &self.mountpoint)?)?;
                Ok(snapshot_info(deleted.entry()))
            }
            Command::ApplySnapshot(choice) => {
                let applied = self.tell(self.tree.apply_snapshot(choice, &self.mountpoint)?);
                Ok(snapshot_info(applied.entry()))
            }
            Command::Overlay(new) => self.overlay(new),
            Command::Revert(Revert { member, file, existing }) => {
                self.refuse_on_this_disk(file)?;
                self.tell(self.tree.revert(member, file, *existing, &self.mountpoint)?);
                Ok(json!({}))
            }
            Command::Resize { size } => {
                self.tree.grow(*size)?;
                Ok(json!({}))
            }
        }
    }
}

/// The members of `chain` as QEMU's `BlockDeviceInfo`.
fn nodes(chain: &Chain) -> Value {
    let members = chain.members();
    let node = |(index, member): (usize, &Arc<Member>)| {
        let below = members.len() - 1 - index;
        let file = name_of(member);
        let mut info = json!({
            "node-name": format!("{NODE_PREFIX}{index}"),
            "drv": member.format().to_string(),
            "file": file,
            "ro": index > 0 || !chain.is_writable(),
            "encrypted": member.image().is_some_and(|image| image.is_encrypted()),
            "backing_file_depth": below,
            "image": {
                "filename": file,
                "format": member.format().to_string(),
                "virtual-size": member.size(),
            },
        });
        if let Some(below) = members.get(index + 1) {
            info["backing_file"] = json!(name_of(below));
        }
        let snapshots = member.image().map(|image| image.snapshots()).unwrap_or_default();
        if !snapshots.is_empty() {
            let snapshots = snapshots.iter().map(|snapshot| snapshot_info(snapshot.entry()));
            info["image"]["snapshots"] = snapshots.collect();
        }
        info
    };
    members.iter().enumerate().map(node).collect()
}

/// The name of a member's file as JSON can hold it: bytes that are no UTF-8 are replaced.
fn name_of(member: &Member) -> String {
    member.path().display().to_string()
}
