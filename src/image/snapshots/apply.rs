//! Going back to a snapshot: a new L1 table with what it holds, and one write of the header that names it.

use std::collections::BTreeSet;

use crate::error::Result;
use crate::image::Image;
use crate::image::allocate::Clusters;
use crate::image::layout::Owner;
use crate::image::metadata::Metadata;
use crate::image::pages::Kind;
use crate::image::sync::atomic::Ordering;
use crate::image::table::Table;
use crate::qcow2::{L1Entry, offsets};
use crate::store::Store;
use crate::units::HostOffset;

impl Image {
    /// Makes the disk what it was at the snapshot with this id, its size included. The snapshot stays.
    ///
    /// What was written since is lost, unless another snapshot holds it. A machine's state stays with the snapshot.
    /// Readers and writers of the disk wait; they find the new disk.
    ///
    /// # Errors
    /// As [`Image::delete_snapshot`]; another size in an image of version 2, whose other snapshots would not know their
    /// own; refcounts too narrow for one more owner. The disk is then as before.
    pub fn apply_snapshot(&self, id: &str) -> Result<()> {
        self.go_back(id).map_err(|error| self.note(error))
    }

    fn go_back(&self, id: &str) -> Result<()> {
        self.check_has_snapshots()?;
        let _shape = self.keep_shape();
        self.begin_change()?;
        let (_, tree) = self.find_snapshot(id)?;
        if tree.size() != self.size() {
            self.check_snapshots_know_their_size("another size of")?;
        }
        let mut l1 = self.read_l1(&tree)?;
        // What is behind the disk is the state of a machine.
        l1.resize((self.geometry.l1_entries(tree.size()) as usize).max(1), 0);
        self.check_tree(&tree, &l1)?;

        let disk = self.claim_disk();
        // No table of today may wait to be written, nor a count: all that is dirty below is of the new disk.
        self.flush_all()?;
        let place = self.allocate_contiguous(self.geometry.clusters(l1.len() as u64 * 8))?;
        let mut adopted = Vec::new();
        if let Err(error) = self.adopt_tables(&l1, &mut adopted) {
            // Should that fail, too, clusters leak, which whoever opens the image anew can find.
            self.closing_on_error(self.undo_adoption(adopted, place))?;
            return Err(error);
        }
        let new = Table::new(place.start, self.shared_entries(&l1)?);
        let bytes = new.entries().iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.write_table(place, Owner::ActiveL1, bytes)?;
        // What the new table names is counted and durable before the header names the table.
        self.flush()?;
        let old = self.switch_l1(new, tree.size())?;
        drop(disk);

        // The disk is what it was. To give back what it has been meanwhile is nothing to wait for, and should it fail,
        // no reason to say that the disk is not the snapshot's.
        if let Err(error) = self.abandon_tree(&old, &l1) {
            let error = self.note(error);
            log::warn!(
                "clusters leak that the disk had before it went back to a snapshot: {error}"
            );
        }
        Ok(())
    }

    /// Gives back what the active layer held through the L1 table `old`, of which it has `kept` now.
    fn abandon_tree(&self, old: &Table, kept: &[u64]) -> Result<()> {
        let kept: BTreeSet<u64> = kept.iter().map(|raw| L1Entry::table_offset(*raw)).collect();
        for &raw in old.entries() {
            let L1Entry::Table { host, .. } = L1Entry::decode(raw, self.geometry)? else {
                continue;
            };
            let claim = if kept.contains(&host.get()) { Claim::Stays } else { Claim::Ends };
            self.abandon_table(Adopted { table: host, claim })?;
        }
        self.flush_all()
    }

    /// Gives back all that was adopted for a table that there will not be.
    fn undo_adoption(&self, adopted: Vec<Adopted>, place: Clusters) -> Result<()> {
        adopted.into_iter().try_for_each(|table| self.abandon_table(table))?;
        self.take_back(place)?;
        self.flush_all()
    }

    /// Makes the active layer one more owner of all that `l1` names; notes in `adopted` how far it came.
    fn adopt_tables(&self, l1: &[u64], adopted: &mut Vec<Adopted>) -> Result<()> {
        for &raw in l1 {
            let L1Entry::Table { host, .. } = L1Entry::decode(raw, self.geometry)? else {
                continue;
            };
            self.load_table(host)?;
            let claim = self.metadata().adopt_table(&*self.store, host)?;
            adopted.push(Adopted { table: host, claim });
            self.bound_metadata_beside_writers()?;
        }
        Ok(())
    }

    /// Gives back what the active layer holds, or would have held, through a table.
    fn abandon_table(&self, Adopted { table, claim }: Adopted) -> Result<()> {
        self.load_table(table)?;
        let mut metadata = self.metadata();
        let references = metadata.references(&*self.store, table)?;
        let (allocator, _) = metadata.writer()?;
        for host in references {
            match claim {
                Claim::Ends if host == table => allocator.drop_table(table),
                _ => allocator.unreference_later(host),
            }
        }
        drop(metadata);
        self.bound_metadata_beside_writers()
    }

    /// The entries of an L1 table that shares all its tables.
    fn shared_entries(&self, l1: &[u64]) -> Result<Vec<u64>> {
        let shared = |&raw: &u64| {
            Ok(match L1Entry::decode(raw, self.geometry)? {
                L1Entry::Table { host, .. } => L1Entry::Table { host, copied: false }.encode(),
                L1Entry::Unallocated => L1Entry::Unallocated.encode(),
            })
        };
        l1.iter().map(shared).collect()
    }

    /// Lets the header name the L1 table `new`, which is durable, for a disk of `size` bytes; answers the old table. The
    /// caller holds the whole disk.
    fn switch_l1(&self, new: Table, size: u64) -> Result<Table> {
        let _one_at_a_time = self.flushing.lock().unwrap_or_else(|lock| lock.into_inner());
        let header = self.header();
        let entries = new.entries().len() as u32;
        // From the size to the L1 table's offset: 24 bytes of one sector, all of it or nothing.
        let mut fields = size.to_be_bytes().to_vec();
        fields.extend(header.crypt_method.to_be_bytes());
        fields.extend(entries.to_be_bytes());
        fields.extend(new.offset().get().to_be_bytes());
        debug_assert_eq!(offsets::SIZE + fields.len() as u64, offsets::L1 + 12);
        self.switch_header_field(offsets::SIZE, fields)?;

        let mut metadata = self.metadata();
        metadata.header.size = size;
        metadata.header.l1_entries = entries;
        metadata.header.l1_offset = new.offset();
        let old = std::mem::replace(&mut metadata.l1, new);
        let (allocator, _) = metadata.writer()?;
        allocator.layout.release(old.offset(), old.byte_len());
        allocator.unreference_all_later(old.offset(), old.byte_len());
        drop(metadata);
        self.size.store(size, Ordering::Release);
        self.mapping_changed();
        Ok(old)
    }
}

/// An L2 table of which the active layer became one more owner.
struct Adopted {
    table: HostOffset,
    claim: Claim,
}

/// Whether a table ceases to be the active layer's when one reference of it is given back.
#[derive(Clone, Copy)]
enum Claim {
    Ends,
    Stays,
}

impl Metadata {
    /// Adds the active layer to the owners of all that the L2 table at `table` holds, or changes nothing.
    fn adopt_table(&mut self, store: &dyn Store, table: HostOffset) -> Result<Claim> {
        let references = self.references(store, table)?;
        let mut changes = Vec::new();
        for (at, page) in self.table_pages(store, table)? {
            // Flags of tables that were not the active layer's mean nothing.
            changes.extend(self.shared_page(&page)?.map(|new| (at, new)));
        }
        let cluster_size = self.geometry.cluster_size();
        let (allocator, pages) = self.writer()?;
        let claim = match allocator.layout.owner(table) {
            Some(_) => Claim::Stays,
            None => Claim::Ends,
        };
        allocator.reference_all(pages, store, &references)?;
        if matches!(claim, Claim::Ends) {
            allocator.layout.claim(table, cluster_size, Owner::ActiveL2)?;
        }
        changes.into_iter().for_each(|(at, new)| self.pages.change(at, new, Kind::L2));
        Ok(claim)
    }
}
