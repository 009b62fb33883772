//! The instant of a snapshot: all tables of the active layer stand still, and each is counted for the snapshot before the
//! first change of it.
//!
//! To freeze takes no I/O: it is a copy of the L1 table and the rule that what a frozen table names is shared, whatever
//! the flags say. Under one hold of the metadata lock a table is then counted: each reference that it holds gets a
//! second owner, COPIED goes. Who makes the snapshot does that table by table; a writer who comes first to a table does
//! it himself, and then copies it, as every shared table. So there is no time at which the counts, the flags and the
//! pointers in memory do not agree, and a flush may come at any moment.

use crate::error::{Error, Result};
use crate::image::metadata::Metadata;
use crate::image::pages::Kind;
use crate::qcow2::L1Entry;
use crate::store::Store;
use crate::units::HostOffset;

use std::sync::Arc;

/// The tree of a snapshot that is being made.
pub(in crate::image) struct Freeze {
    /// The active L1 table at the instant of the snapshot.
    l1: Arc<[u64]>,
    /// Which of its tables have been counted for the snapshot.
    counted: Vec<bool>,
    /// Whether there can't be a snapshot. Nothing is frozen any more then, nor will be: writers may have copied tables
    /// that were not counted.
    failed: bool,
    /// Why, until somebody has been told.
    failure: Option<Error>,
}

impl Freeze {
    /// Which tables were counted.
    pub fn counted(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.l1.iter().copied().enumerate().filter(|(index, _)| self.counted[*index])
    }
}

impl Metadata {
    /// Freezes the active tree; answers its L1 table.
    pub(super) fn freeze(&mut self) -> Arc<[u64]> {
        let l1: Arc<[u64]> = self.l1.entries().into();
        let counted = vec![false; l1.len()];
        self.freeze = Some(Freeze { l1: l1.clone(), counted, failed: false, failure: None });
        l1
    }

    /// Why the snapshot that is being made can't be made, if that is so.
    pub(super) fn take_failure(&mut self) -> Option<Error> {
        self.freeze.as_mut().and_then(|freeze| freeze.failure.take())
    }

    /// Whether the table that the L1 entry `index` names belongs to a snapshot that has not counted it yet.
    pub(in crate::image) fn is_frozen(&self, index: usize) -> bool {
        self.freeze.as_ref().is_some_and(|freeze| {
            !freeze.failed
                && freeze.l1.get(index).is_some_and(|&entry| entry != 0)
                && !freeze.counted[index]
        })
    }

    /// Counts the table that the L1 entry `index` names for the snapshot that is being made, if it has to be.
    ///
    /// Should that be impossible, there will be no snapshot: that is no trouble of the writer who came here first.
    pub(in crate::image) fn count_frozen(&mut self, store: &dyn Store, index: usize) {
        if !self.is_frozen(index) {
            return;
        }
        let counted = self.share_table(store, index);
        if let Some(freeze) = &mut self.freeze {
            match counted {
                Ok(()) => freeze.counted[index] = true,
                Err(error) => (freeze.failed, freeze.failure) = (true, Some(error)),
            }
        }
    }

    /// Adds an owner to all that the active layer holds through the L1 entry `index`, or changes nothing.
    fn share_table(&mut self, store: &dyn Store, index: usize) -> Result<()> {
        let entry = L1Entry::decode(self.l1.get(index), self.geometry)?;
        let L1Entry::Table { host: table, .. } = entry else { return Ok(()) };
        let mut references = vec![table];
        let mut changes: Vec<(HostOffset, Arc<[u8]>)> = Vec::new();
        for (at, page) in self.table_pages(store, table)? {
            self.references_of_page(&page, &mut references)?;
            changes.extend(self.shared_page(&page)?.map(|new| (at, new)));
        }
        references.sort_unstable();
        let (allocator, pages) = self.writer()?;
        allocator.reference_all(pages, store, &references)?;
        for (at, new) in changes {
            self.pages.change(at, new, Kind::L2);
        }
        self.l1.set(index, L1Entry::Table { host: table, copied: false }.encode());
        Ok(())
    }
}
