//! What the L2 tables of a tree refer to: checked, counted, given back.

use crate::error::{Error, Problem, Result};
use crate::image::Image;
use crate::image::entry::ClusterEntry;
use crate::image::metadata::Metadata;
use crate::image::pages::{Kind, read_page};
use crate::image::snapshots::SnapshotTree;
use crate::qcow2::L1Entry;
use crate::store::Store;
use crate::units::HostOffset;

use std::sync::Arc;

impl Image {
    /// Reads the L2 table at `table` into memory, without a lock over the reads.
    pub(super) fn load_table(&self, table: HostOffset) -> Result<()> {
        let page_size = self.metadata().pages.page_size();
        for at in (0..self.geometry.cluster_size()).step_by(page_size as usize) {
            let epoch = {
                let mut metadata = self.metadata();
                if metadata.pages.get(table + at).is_some() {
                    continue;
                }
                metadata.pages.epoch()
            };
            let bytes = read_page(&*self.store, table + at, page_size)?;
            let mut metadata = self.metadata();
            // If a flush came between, whoever needs the page reads it again.
            if metadata.pages.epoch() == epoch {
                metadata.pages.insert_clean(table + at, bytes);
            }
        }
        Ok(())
    }

    /// Checks that what `l1` of a snapshot names can be followed, and that it is counted.
    ///
    /// # Errors
    /// What is wrong, by the name of the snapshot: the image as such may be sound.
    pub(super) fn check_tree(&self, tree: &SnapshotTree, l1: &[u64]) -> Result<()> {
        check_tables_differ(tree, l1)?;
        let checked = l1.iter().enumerate().try_for_each(|(index, &raw)| {
            match L1Entry::decode(raw, self.geometry)? {
                L1Entry::Unallocated => Ok(()),
                L1Entry::Table { host, .. } => {
                    self.load_table(host)?;
                    self.metadata().check_table(&*self.store, index, host)
                }
            }
        });
        checked.map_err(|error| match error.problem() {
            Problem::Corrupt { what } => {
                Error::invalid("snapshot", format!("\"{}\": {what}", tree.entry().name))
            }
            _ => error,
        })
    }

    /// Gives back what a tree that is no more held through the L1 entry `index` with the value `raw`. Entries of the
    /// active layer that are alone with their clusters then say so.
    pub(super) fn release_table(&self, index: usize, raw: u64) -> Result<()> {
        let L1Entry::Table { host, .. } = L1Entry::decode(raw, self.geometry)? else {
            return Ok(());
        };
        self.load_table(host)?;
        self.metadata().release_table(&*self.store, index, host)?;
        self.bound_metadata_beside_writers()
    }
}

/// Refuses a snapshot that has one L2 table twice: what it names would be given back twice.
fn check_tables_differ(tree: &SnapshotTree, l1: &[u64]) -> Result<()> {
    let mut tables: Vec<u64> = l1.iter().map(|raw| L1Entry::table_offset(*raw)).collect();
    tables.retain(|&table| table != 0);
    tables.sort_unstable();
    match tables.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(Error::invalid(
            "snapshot",
            format!("\"{}\": its L1 table names {:#x} twice", tree.entry().name, pair[0]),
        )),
    }
}

impl Metadata {
    /// The pages of the L2 table at `table`, with their places.
    pub(super) fn table_pages(
        &mut self,
        store: &dyn Store,
        table: HostOffset,
    ) -> Result<Vec<(HostOffset, Arc<[u8]>)>> {
        let page_size = self.pages.page_size();
        (0..self.geometry.cluster_size())
            .step_by(page_size as usize)
            .map(|at| Ok((table + at, self.pages.load(store, table + at)?)))
            .collect()
    }

    /// Every reference that a tree holds through the L2 table at `table`, that to the table included; sorted, one
    /// mention each.
    pub(super) fn references(
        &mut self,
        store: &dyn Store,
        table: HostOffset,
    ) -> Result<Vec<HostOffset>> {
        let mut references = vec![table];
        for (_, page) in self.table_pages(store, table)? {
            self.references_of_page(&page, &mut references)?;
        }
        references.sort_unstable();
        Ok(references)
    }

    /// Appends the references that the entries of a page of an L2 table hold.
    pub(super) fn references_of_page(&self, page: &[u8], to: &mut Vec<HostOffset>) -> Result<()> {
        for raw in page.chunks_exact(self.geometry.l2_entry_len() as usize) {
            // Most entries of most tables.
            if raw.iter().all(|&byte| byte == 0) {
                continue;
            }
            let entry = ClusterEntry::decode(raw, self.geometry, self.rules)?;
            to.extend(entry.host_clusters(self.geometry));
        }
        Ok(())
    }

    /// A page of an L2 table after `change` of each entry; `None` if that changes nothing.
    fn changed_page(
        &self,
        page: &[u8],
        change: impl Fn(ClusterEntry) -> ClusterEntry,
    ) -> Result<Option<Arc<[u8]>>> {
        let mut new: Option<Vec<u8>> = None;
        let len = self.geometry.l2_entry_len() as usize;
        for (at, raw) in page.chunks_exact(len).enumerate() {
            let entry = ClusterEntry::decode(raw, self.geometry, self.rules)?;
            let changed = change(entry);
            if changed != entry {
                let new = new.get_or_insert_with(|| page.to_vec());
                changed.encode(&mut new[at * len..], self.geometry);
            }
        }
        Ok(new.map(Into::into))
    }

    /// A page of an L2 table that others share, too; `None` if it says so already.
    pub(in crate::image) fn shared_page(&self, page: &[u8]) -> Result<Option<Arc<[u8]>>> {
        self.changed_page(page, ClusterEntry::shared)
    }

    /// Checks that the table at `table`, which a snapshot has at `index`, can be one, that no table is among the data
    /// it names, and that the counts have room for the references of the snapshot and of the active layer.
    fn check_table(&mut self, store: &dyn Store, index: usize, table: HostOffset) -> Result<()> {
        let mut references = self.references(store, table)?;
        let (allocator, _) = self.writer()?;
        allocator.check_table_place(table)?;
        for &host in references.iter().filter(|&&host| host != table) {
            allocator.check_data_place(host)?;
        }
        if let L1Entry::Table { host: active, .. } =
            L1Entry::decode(self.l1.get(index), self.geometry)?
        {
            let of_active = self.references(store, active)?;
            references.extend(of_active);
            references.sort_unstable();
        }
        let (allocator, pages) = self.writer()?;
        for (host, mentions, count) in allocator.counts(pages, store, &references)? {
            if count < mentions {
                return Err(Error::corrupt(format!(
                    "cluster {host} has {mentions} references and is counted {count} times"
                )));
            }
        }
        Ok(())
    }

    /// See [`Image::release_table`]. The flags reach the disk before the counts do: in between the counts are too high,
    /// which is a leak.
    fn release_table(&mut self, store: &dyn Store, index: usize, table: HostOffset) -> Result<()> {
        let lost = self.references(store, table)?;
        self.flag_own(store, index, &lost)?;
        let (allocator, _) = self.writer()?;
        lost.into_iter().for_each(|cluster| allocator.unreference_later(cluster));
        Ok(())
    }

    /// Sets COPIED in the active entries below the L1 entry `index` whose clusters have one reference once each mention
    /// of them in `lost` (sorted) has been given back.
    ///
    /// Only a cluster of the same guest offset can be shared, so that no other entry is concerned.
    fn flag_own(&mut self, store: &dyn Store, index: usize, lost: &[HostOffset]) -> Result<()> {
        let entry = L1Entry::decode(self.l1.get(index), self.geometry)?;
        let L1Entry::Table { host: active, copied } = entry else { return Ok(()) };
        let (allocator, pages) = self.writer()?;
        let counts = allocator.counts(pages, store, lost)?;
        let is_last = |host: HostOffset| {
            let at = counts.binary_search_by_key(&host, |(counted, ..)| *counted);
            at.is_ok_and(|at| counts[at].2 == counts[at].1 + 1)
        };
        if !copied && !is_last(active) {
            // Another snapshot has this table, and with it all that it names.
            return Ok(());
        }
        for (at, page) in self.table_pages(store, active)? {
            let own = |entry: ClusterEntry| match entry {
                ClusterEntry::Plain { host: Some(place), .. } if is_last(place.host) => {
                    entry.unshared()
                }
                other => other,
            };
            if let Some(new) = self.changed_page(&page, own)? {
                self.pages.change(at, new, Kind::L2);
            }
        }
        if !copied {
            self.l1.set(index, L1Entry::Table { host: active, copied: true }.encode());
        }
        Ok(())
    }
}
