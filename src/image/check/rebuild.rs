//! A new refcount table with new blocks, where the old ones can't be corrected.
//!
//! They are written behind the end of the file, where nothing is and nothing points to, and made durable; then one write
//! within a sector of the header names them. Until then a crash leaves a longer file and nothing else.

use super::counts::CountWriter;
use super::findings::{Coverage, Stage, Tally, Use, Watch};
use super::repair::Found;
use super::survey::{Area, Survey};
use super::{Limits, each_window};
use crate::error::{Doing, Error, Result};
use crate::image::layout::{Layout, Owner};
use crate::qcow2::{Geometry, MAX_REFTABLE_BYTES, offsets};
use crate::units::HostOffset;

/// Where the new structures go: blocks, and the table behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// The first block's cluster.
    first: u64,
    blocks: u64,
    table: u64,
}

impl Place {
    /// The smallest structures that describe all clusters before `first`, and themselves.
    fn from(first: u64, geometry: Geometry) -> Self {
        let mut place = Self { first, blocks: 0, table: 0 };
        loop {
            place.table = geometry.clusters(place.blocks * 8).max(1);
            let needed = place.end().div_ceil(geometry.refcounts_per_block());
            if needed == place.blocks {
                return place;
            }
            place.blocks = needed;
        }
    }

    /// Behind all that is there, and not where something that is not there is pointed to.
    fn find(survey: &Survey<'_>, found: &Found) -> Result<Self> {
        let geometry = survey.geometry;
        let used = geometry.clusters(found.report.image_end);
        let mut place = Self::from(survey.file_clusters.max(used), geometry);
        while let Some(hit) = found.dangling.range(place.first..place.end()).next_back() {
            place = Self::from(hit + 1, geometry);
        }
        if place.table * geometry.cluster_size() > MAX_REFTABLE_BYTES {
            let full = std::io::Error::from_raw_os_error(libc::EFBIG);
            return Err(Error::io("make it a new refcount table", full));
        }
        Ok(place)
    }

    fn end(self) -> u64 {
        self.first + self.blocks + self.table
    }
}

/// Writes new refcounts for the whole image and lets the header name them.
///
/// Where a table can't be followed, no cluster counts as free that has not been free before.
///
/// # Errors
/// Failing reads and writes; a file that is too long for a refcount table of 8 MiB.
pub(super) fn rebuild(
    old: &Survey<'_>,
    found: &Found,
    watch: &mut dyn Watch,
    limits: Limits,
) -> Result<()> {
    let geometry = old.geometry;
    let store = old.store;
    let mut tally = Tally::new(watch, Stage::Rebuild);
    let place = Place::find(old, found)?;
    let size = geometry.cluster_size();
    let host = |cluster: u64| HostOffset::new(cluster << geometry.cluster_bits());
    store.set_len(place.end() * size).doing("make it longer")?;

    let mut survey = Survey::new(store, &mut tally)?;
    // Of the old structures only what was there before: the longer file has nothing to add.
    survey.areas.retain(|area| !area.usage.is_refcounts());
    survey.blocks.clone_from(&old.blocks);
    if found.coverage == Coverage::Partial {
        forget_unreadable(&mut survey);
    }
    let blocks = Area::new(host(place.first), place.blocks * size, Use::RefcountBlock);
    let table_at = host(place.first + place.blocks);
    let table = Area::new(table_at, place.table * size, Use::RefcountTable);
    survey.areas.extend([blocks, table]);
    let mut writer = CountWriter::new(&survey)?;
    let per_block = geometry.refcounts_per_block();
    let block_of = |cluster: u64| host(place.first + cluster / per_block);
    let might_be_used = |cluster| {
        found.coverage == Coverage::Partial
            && cluster < old.file_clusters
            && survey.block_of(cluster).is_none()
    };
    if found.coverage == Coverage::Partial {
        for cluster in (0..old.file_clusters).filter(|&cluster| might_be_used(cluster)) {
            writer.set(cluster, block_of(cluster), 1)?;
        }
    }
    each_window(&survey, &mut tally, limits, None, |window, tally| {
        found.check_same_was_read(tally)?;
        for (cluster, slot) in window.clusters().filter(|(cluster, _)| *cluster < place.end()) {
            let references = u64::from(slot.references);
            let count = match found.coverage {
                // What the old counts say is no more to be trusted than the tables that can't be followed.
                Coverage::Partial if cluster < old.file_clusters && references > 0 => {
                    found.coverage.raised(references).max(slot.refcount)
                }
                Coverage::Partial => {
                    references.max(slot.refcount).max(u64::from(might_be_used(cluster)))
                }
                Coverage::Whole => references,
            };
            if count > 0 {
                writer.set(cluster, block_of(cluster), count)?;
            }
        }
        writer.write()
    })?;
    let mut bytes = vec![0; (place.table * size) as usize];
    let entries = bytes.as_chunks_mut::<8>().0.iter_mut();
    for (entry, cluster) in entries.zip(place.first..place.first + place.blocks) {
        *entry = host(cluster).get().to_be_bytes();
    }
    writer.write_table(table_at, bytes)?;
    store.sync().doing("make its refcount table durable")?;

    let mut field = table_at.get().to_be_bytes().to_vec();
    field.extend((place.table as u32).to_be_bytes());
    Layout::new(geometry).check(Owner::Header, offsets::REFTABLE, field)?.perform(store)?;
    store.sync().doing("make its header durable")
}

/// Treats refcount blocks that can't be read as if there were none: what they count might be in use.
fn forget_unreadable(survey: &mut Survey<'_>) {
    let (store, size) = (survey.store, survey.geometry.cluster_size());
    let mut bytes = vec![0; size as usize];
    for block in survey.blocks.iter_mut().filter(|block| **block != 0) {
        if store.read_at(&mut bytes, HostOffset::new(*block)).is_err() {
            *block = 0;
        }
    }
}
