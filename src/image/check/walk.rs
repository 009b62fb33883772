//! One pass over all tables of an image, counting the references to the clusters of one window.

use std::collections::BTreeMap;

use super::findings::{Coverage, Finding, Refcounts, Tally, Target, Use};
use super::flags::{Flag, FlagWriter};
use super::survey::{Area, Survey};
use super::window::{Holder, Window};
use crate::error::Result;
use crate::image::layout::Owner;
use crate::qcow2::anatomy::{RawL1Entry, RawL2Entry, is_copied};
use crate::qcow2::{CompressedCluster, DataPlace, L2Form, ZeroFlag};
use crate::units::HostOffset;

/// Bits 9 to 55 of a bitmap table entry.
const BITMAP_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// A pass over all tables.
pub(super) struct Walk<'p, 's, 'w> {
    pub survey: &'p Survey<'s>,
    pub window: &'p mut Window,
    pub tally: &'p mut Tally<'w>,
    /// Whether this pass is the one that tells of what is not about a single cluster.
    pub structure: Structure,
    /// Corrects COPIED flags on the way.
    pub flags: Option<&'p mut FlagWriter<'s>>,
    /// L2 tables that are kept in mind at a time.
    pub max_tables: usize,
    /// The first cluster that is of no interest.
    pub limit: u64,
}

/// Whether the structure of tables has been reported before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Structure {
    Unknown,
    Reported,
}

/// An L2 table, which snapshots may share.
struct L2Table {
    /// L1 entries that name it.
    times: u32,
    l1_index: usize,
    belongs_to: Tree,
}

/// Whether the active L1 table names a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tree {
    Active,
    Snapshots,
}

/// An L2 entry and where it is.
#[derive(Clone, Copy)]
struct Entry {
    raw: RawL2Entry,
    /// Of its first word.
    place: HostOffset,
    guest_cluster: u64,
}

impl Walk<'_, '_, '_> {
    /// Walks through all tables.
    ///
    /// # Errors
    /// Those of writing corrected flags; what can't be read is a finding.
    pub fn run(&mut self) -> Result<()> {
        for area in &self.survey.areas {
            self.refer(*area, 1, Holder::table(area.usage));
        }
        for table in &self.survey.bitmap_tables {
            self.bitmap(*table);
        }
        for table in &self.survey.l1_tables {
            self.l1(*table)?;
        }
        let mut after = HostOffset::ZERO;
        loop {
            let tables = self.tables_behind(after);
            for (&host, table) in &tables {
                self.progress(host);
                self.l2(host, table)?;
            }
            match tables.last_key_value() {
                Some((&last, _)) if tables.len() == self.max_tables => after = last,
                _ => return Ok(()),
            }
        }
    }

    /// The table at `host` is next: they come in ascending order once for each window.
    fn progress(&mut self, host: HostOffset) {
        let at = host.get() >> self.survey.geometry.cluster_bits();
        let (first, len) = (self.window.first, self.window.end() - self.window.first);
        let share = u128::from(at) * u128::from(len) / u128::from(self.survey.file_clusters.max(1));
        self.tally.progress(first + (share as u64).min(len), self.limit);
    }

    fn found(&mut self, finding: Finding) {
        if self.structure == Structure::Unknown {
            self.tally.add(finding);
        }
    }

    fn broken(&mut self, what: String) {
        self.found(Finding::Broken { what });
    }

    fn unreadable(&mut self, what: Use, at: HostOffset, error: &std::io::Error) {
        self.tally.coverage = Coverage::Partial;
        self.found(Finding::Unreadable { what: format!("{what} at {at}: {error}") });
    }

    /// Counts references to the clusters of `area`, if the file has them.
    fn refer(&mut self, area: Area, times: u32, holder: Holder) {
        let Area { start, len, usage } = area;
        let bits = self.survey.geometry.cluster_bits();
        let end = start.get().saturating_add(len).div_ceil(1 << bits);
        if !self.survey.holds(start, len) {
            self.found(Finding::BehindTheEnd { what: usage, at: start, len });
            let clusters = start.get() >> bits..end;
            self.tally.note_dangling(clusters.clone());
            // The file may grow to there: what has a refcount must keep it, or it is given to another, too.
            for cluster in clusters.take_while(|&cluster| self.survey.block_of(cluster).is_some()) {
                self.count(cluster..cluster + 1, times, holder);
            }
            return;
        }
        self.count(start.get() >> bits..end, times, holder);
    }

    fn count(&mut self, clusters: std::ops::Range<u64>, times: u32, holder: Holder) {
        let tally = &mut *self.tally;
        self.window.refer(clusters, times, holder, |contest| {
            let (first, second) = (contest.first, contest.second);
            if first.is_refcounts() || second.is_refcounts() {
                tally.worsen(Refcounts::Broken);
            }
            if contest.cluster == 0 {
                // Somebody reads the header as something else: it must not change.
                tally.worsen(Refcounts::Hopeless);
            }
            if first.is_metadata() || second.is_metadata() {
                tally.note_contested(contest.cluster);
                if !first.is_refcounts() && !second.is_refcounts() {
                    // What leads there leads astray, and nobody knows where the table is that was meant.
                    tally.coverage = Coverage::Partial;
                }
            }
            tally.add(Finding::TwoOwners { cluster: contest.cluster, first, second });
        });
    }

    fn bitmap(&mut self, table: Area) {
        let survey = self.survey;
        let size = survey.geometry.cluster_size();
        let read = survey.each_word(table.start, table.len, |index, raw| {
            let host = HostOffset::new(raw & BITMAP_OFFSET_MASK);
            let flags = raw & !BITMAP_OFFSET_MASK;
            if flags > 1 || (flags == 1 && host != HostOffset::ZERO) {
                let at = table.start;
                self.broken(format!("bitmap table at {at}, entry {index}: reserved bits are set"));
            }
            if host == HostOffset::ZERO {
                return;
            }
            if !host.is_aligned(size) {
                self.broken(format!("bitmap data at {host} is not cluster aligned"));
            }
            let area = Area::new(host, size, Use::BitmapData);
            self.refer(area, 1, Holder::table(Use::BitmapData));
        });
        if let Err(error) = read {
            self.unreadable(Use::BitmapTable, table.start, &error);
        }
    }

    fn l1(&mut self, table: Area) -> Result<()> {
        let survey = self.survey;
        let size = survey.geometry.cluster_size();
        let active = table.usage == Use::ActiveL1;
        let read = survey.each_word(table.start, table.len, |index, raw| {
            let entry = RawL1Entry(raw);
            let host = entry.host();
            if entry.has_reserved_bits() {
                self.broken(format!("L1 entry {index} has reserved bits set: {raw:x}"));
            }
            if !survey.can_hold_table(host) {
                // Nobody knows what that table refers to.
                self.tally.coverage = Coverage::Partial;
            }
            if host == HostOffset::ZERO {
                return self.broken(format!("L1 entry {index} has no L2 table: {raw:x}"));
            }
            if !host.is_aligned(size) {
                self.broken(format!("L2 table at {host} is not cluster aligned"));
            }
            self.refer(Area::new(host, size, Use::L2), 1, Holder::l2(index));
            if active {
                let place = table.start + index as u64 * 8;
                self.flag(Flag { place, raw, target: Target::Table(index), host });
            }
        });
        if let Err(error) = read {
            self.unreadable(table.usage, table.start, &error);
        }
        self.write_flags(Owner::ActiveL1)
    }

    /// The L2 tables behind `after`, as many as are kept in mind at a time, by place.
    fn tables_behind(&mut self, after: HostOffset) -> BTreeMap<HostOffset, L2Table> {
        let survey = self.survey;
        let mut tables: BTreeMap<HostOffset, L2Table> = BTreeMap::new();
        for table in &survey.l1_tables {
            let belongs_to = match table.usage {
                Use::ActiveL1 => Tree::Active,
                _ => Tree::Snapshots,
            };
            let note = |l1_index, raw| {
                let host = RawL1Entry(raw).host();
                if host <= after || !survey.can_hold_table(host) {
                    return;
                }
                let new = L2Table { times: 0, l1_index, belongs_to };
                let table = tables.entry(host).or_insert(new);
                table.times = table.times.saturating_add(1);
                if belongs_to == Tree::Active {
                    table.belongs_to = Tree::Active;
                }
                if tables.len() > self.max_tables {
                    tables.pop_last();
                }
            };
            let read = survey.each_word(table.start, table.len, note);
            // What could not be read before either has been found.
            if let (Err(error), Coverage::Whole) = (read, self.tally.coverage) {
                self.unreadable(table.usage, table.start, &error);
            }
        }
        tables
    }

    fn l2(&mut self, host: HostOffset, table: &L2Table) -> Result<()> {
        let survey = self.survey;
        let geometry = survey.geometry;
        let words = RawL2Entry::words(geometry.l2_form());
        let first_guest = (table.l1_index as u64).wrapping_mul(geometry.l2_entries());
        let mut expected = None;
        let mut pending: Option<(usize, RawL2Entry)> = None;
        let mut entry = |walk: &mut Self, index: usize, raw: RawL2Entry| {
            let place = host + index as u64 * geometry.l2_entry_len();
            let guest_cluster = first_guest.wrapping_add(index as u64);
            walk.l2_entry(Entry { raw, place, guest_cluster }, table, &mut expected);
        };
        let read = survey.each_word(host, geometry.cluster_size(), |at, word| {
            // Words that are 0 are not shown: the two of an extended entry have to be put together.
            let (index, is_bitmap) = (at / words, at % words == 1);
            if let Some((before, mut raw)) = pending.take() {
                if before == index {
                    raw.bitmap = word;
                }
                entry(self, before, raw);
                if before == index {
                    return;
                }
            }
            match (geometry.l2_form(), is_bitmap) {
                (L2Form::Standard, _) => entry(self, index, RawL2Entry { word, bitmap: 0 }),
                (L2Form::Extended, true) => {
                    entry(self, index, RawL2Entry { word: 0, bitmap: word });
                }
                (L2Form::Extended, false) => {
                    pending = Some((index, RawL2Entry { word, bitmap: 0 }));
                }
            }
        });
        if let Some((index, raw)) = pending.take() {
            entry(self, index, raw);
        }
        if let Err(error) = read {
            self.unreadable(Use::L2, host, &error);
        }
        self.write_flags(Owner::ActiveL2)
    }

    /// `expected` is where the next cluster of the table is if nothing is fragmented.
    fn l2_entry(&mut self, entry: Entry, table: &L2Table, expected: &mut Option<HostOffset>) {
        let raw = entry.raw;
        if let Some(cluster) = raw.compressed(self.survey.geometry) {
            return self.compressed(entry, table, cluster);
        }
        let word = raw.word;
        let extended = self.survey.geometry.l2_form() == L2Form::Extended;
        if raw.has_reserved_bits() {
            self.broken(format!("L2 entry has reserved bits set: {word:x}"));
        }
        if raw.has_zero_flag() && (extended || self.survey.rules.zero_flag == ZeroFlag::Reserved) {
            self.broken(format!("L2 entry has a zero flag where there must be none: {word:x}"));
        }
        let host = raw.host();
        let external = self.survey.rules.data == DataPlace::External;
        if extended && raw.has_contradictory_subclusters() {
            self.broken(format!("cluster at {host} has a corrupted subcluster bitmap"));
        }
        // Zeroes with offset 0 have no cluster, not even the first one of a data file: so QEMU counts them.
        let is_first = external && raw.is_copied() && !raw.has_zero_flag();
        if host == HostOffset::ZERO && !is_first {
            if raw.has_allocated_subclusters() {
                self.broken("unallocated cluster with allocated subclusters".to_owned());
            }
            return;
        }
        let size = self.survey.geometry.cluster_size();
        if !host.is_aligned(size) {
            self.broken(format!("data cluster at {host} is not cluster aligned"));
        }
        let target = if external {
            let guest = entry.guest_cluster.wrapping_mul(size);
            if self.survey.header.data_file_is_raw() && host.get() != guest {
                self.broken(format!(
                    "guest offset {guest:#x} is at {host} in a data file that is to be raw"
                ));
            }
            Target::External
        } else {
            let holder = Holder::data(entry.guest_cluster);
            self.refer(Area::new(host, size, Use::Data), table.times, holder);
            Target::Data
        };
        if table.belongs_to == Tree::Active {
            if self.structure == Structure::Unknown {
                let report = &mut self.tally.report;
                report.allocated_clusters += 1;
                if expected.is_some_and(|expected| expected != host) {
                    report.fragmented_clusters += 1;
                }
                *expected = Some(host + size);
            }
            self.flag(Flag { place: entry.place, raw: word, target, host });
        }
    }

    fn compressed(&mut self, entry: Entry, table: &L2Table, cluster: CompressedCluster) {
        let (raw, host) = (entry.raw, cluster.host);
        if self.survey.rules.data == DataPlace::External {
            let word = raw.word;
            return self.broken(format!("compressed cluster with a data file: {word:x}"));
        }
        if raw.bitmap != 0 {
            self.broken(format!("compressed cluster at {host} with a subcluster bitmap"));
        }
        let area = Area::new(host, cluster.len, Use::Compressed);
        self.refer(area, table.times, Holder::compressed());
        if table.belongs_to == Tree::Active && self.structure == Structure::Unknown {
            let report = &mut self.tally.report;
            report.allocated_clusters += 1;
            report.fragmented_clusters += 1;
            report.compressed_clusters += 1;
        }
        if table.belongs_to == Tree::Active {
            let target = Target::Compressed;
            self.flag(Flag { place: entry.place, raw: raw.word, target, host });
        }
    }

    /// Compares the COPIED flag of an active entry with the refcount of its cluster.
    fn flag(&mut self, flag: Flag) {
        let cluster = flag.host.get() >> self.survey.geometry.cluster_bits();
        let refcount = match (flag.target, self.window.slot(cluster)) {
            (Target::External, _) if self.structure == Structure::Unknown => 1,
            (Target::Compressed, _) if self.structure == Structure::Unknown => 0,
            (Target::Table(_) | Target::Data, Some(slot)) => slot.refcount,
            (Target::Table(_) | Target::Data, None)
                if cluster > self.survey.file_clusters && self.structure == Structure::Unknown =>
            {
                0
            }
            _ => return,
        };
        if is_copied(flag.raw) == (refcount == 1) {
            return;
        }
        self.tally.add(Finding::Copied { raw: flag.raw, target: flag.target, refcount });
        // Without a count the cluster is nowhere, or its count is to be corrected first.
        let is_counted = refcount > 0 || flag.target == Target::Compressed;
        if let (Some(flags), true) = (&mut self.flags, is_counted) {
            flags.note(flag);
        }
    }

    fn write_flags(&mut self, owner: Owner) -> Result<()> {
        self.flags.as_mut().map_or(Ok(()), |flags| flags.write(owner))
    }
}
