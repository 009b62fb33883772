//! Corrects COPIED flags in the active tables.

use std::collections::BTreeSet;

use super::findings::{Coverage, Target};
use crate::error::{Doing, Result};
use crate::image::layout::{Layout, Owner};
use crate::qcow2::Geometry;
use crate::qcow2::anatomy::{is_copied, toggle_copied};
use crate::store::Store;
use crate::units::HostOffset;

/// Bytes that a disk writes whole or not at all.
const SECTOR: u64 = 512;

/// An active entry with a COPIED flag.
#[derive(Clone, Copy)]
pub(super) struct Flag {
    /// Where the entry is.
    pub place: HostOffset,
    /// What it holds.
    pub raw: u64,
    pub target: Target,
    /// Where it points to.
    pub host: HostOffset,
}

/// Writes the entries of one table after the other.
pub(super) struct FlagWriter<'s> {
    store: &'s dyn Store,
    geometry: Geometry,
    /// Clusters that are not only tables: nothing is written there.
    contested: BTreeSet<u64>,
    /// Where some references are not known or not counted, a flag is only taken away.
    coverage: Coverage,
    noted: Vec<Flag>,
    /// Entries that were corrected.
    pub corrected: u64,
}

impl<'s> FlagWriter<'s> {
    pub fn new(
        store: &'s dyn Store,
        geometry: Geometry,
        contested: BTreeSet<u64>,
        coverage: Coverage,
    ) -> Self {
        Self { store, geometry, contested, coverage, noted: Vec::new(), corrected: 0 }
    }

    /// Notes an entry, of which the flag is wrong.
    pub fn note(&mut self, flag: Flag) {
        let cluster = flag.place.get() >> self.geometry.cluster_bits();
        let is_safe = self.coverage == Coverage::Whole || is_copied(flag.raw);
        if is_safe && !self.contested.contains(&cluster) {
            self.noted.push(flag);
        }
    }

    /// Writes what was noted of a table of `owner`, sector by sector.
    ///
    /// # Errors
    /// A failing read or write.
    pub fn write(&mut self, owner: Owner) -> Result<()> {
        let noted = std::mem::take(&mut self.noted);
        let sector_of = |flag: &Flag| flag.place.align_down(SECTOR);
        for flags in noted.chunk_by(|a, b| sector_of(a) == sector_of(b)) {
            let sector = sector_of(&flags[0]);
            let mut bytes = vec![0; SECTOR as usize];
            self.store.read_at(&mut bytes, sector).doing("read its metadata")?;
            for flag in flags {
                let at = (flag.place - sector) as usize;
                bytes[at..at + 8].copy_from_slice(&toggle_copied(flag.raw).to_be_bytes());
            }
            // The walk has found the table here, and nothing else.
            let mut layout = Layout::new(self.geometry);
            layout.claim(sector, SECTOR, owner)?;
            layout.check(owner, sector, bytes)?.perform(self.store)?;
            self.corrected += flags.len() as u64;
        }
        Ok(())
    }
}
