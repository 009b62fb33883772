//! Repairs what a check has found, so that a crash at any moment leaves the image no worse than it was.
//!
//! Refcounts are set to what was counted, and synced; then COPIED flags to what the refcounts say, and synced; then the
//! image is checked again, and only if it is sound the dirty and corrupt marks are cleared. Each of these writes is right
//! by itself, whichever others a power cut takes: a refcount that equals the references neither leaks nor gives away
//! what is in use. Guest data, pointers to it and tables other than these are never written.
//!
//! This is the second place that changes refcounts, beside the allocator, which believes them. It works on an image
//! that nobody has open.

use std::collections::BTreeSet;

use super::counts::CountWriter;
use super::findings::{Coverage, Finding, Refcounts, Report, Stage, Tally, Watch};
use super::flags::FlagWriter;
use super::rebuild::rebuild;
use super::survey::Survey;
use super::{Limits, each_window, examine};
use crate::error::{Doing, Error, Result};
use crate::image::layout::{Layout, Owner};
use crate::image::open::read_header;
use crate::qcow2::{AutoclearFeatures, Geometry, IncompatibleFeatures, offsets};
use crate::store::Store;
use crate::units::HostOffset;

/// What to repair. COPIED flags are corrected in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Refcounts that are too high.
    Leaks,
    /// All refcounts; where the refcount table or blocks are broken, new ones are made.
    All,
}

/// What was repaired.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fixed {
    /// Refcounts that were too high.
    pub leaks: u64,
    /// Refcounts that were too low, and COPIED flags.
    pub corruptions: u64,
}

impl Fixed {
    /// Whether nothing was repaired.
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// Repairs the image in `store`, and says what it is like then. What can't be repaired is left as it is.
///
/// Nothing is counted as free while a table can't be followed: what it refers to is not known.
///
/// # Errors
/// As [`super::check`], and failing writes: what was written until then is sound.
pub fn repair(store: &dyn Store, extent: Extent, watch: &mut dyn Watch) -> Result<(Report, Fixed)> {
    repair_within(store, extent, watch, Limits::default())
}

/// As [`repair`] with less memory.
pub(in crate::image) fn repair_within(
    store: &dyn Store,
    extent: Extent,
    watch: &mut dyn Watch,
    limits: Limits,
) -> Result<(Report, Fixed)> {
    let mut tally = Tally::new(&mut *watch, Stage::Check);
    let survey = examine(store, &mut tally, limits)?;
    let found = Found::take(tally);
    let mut fixed = Fixed::default();
    let can_count = match found.refcounts {
        Refcounts::Usable => true,
        Refcounts::Broken => extent == Extent::All,
        Refcounts::Hopeless => false,
    };
    if !found.report.is_clean() && can_count {
        clear_unknown_autoclear_bits(&survey)?;
        let quiet = &mut Quiet(&mut *watch);
        match found.refcounts {
            Refcounts::Usable => {
                fixed = correct_counts(&survey, &found, extent, quiet, limits)?;
            }
            Refcounts::Broken | Refcounts::Hopeless => {
                rebuild(&survey, &found, quiet, limits)?;
                fixed.corruptions = found.too_low;
                if found.coverage == Coverage::Whole {
                    fixed.leaks = found.report.leaks;
                }
            }
        }
        // A count that stays too low does not say that its cluster may be written in place.
        let coverage = match extent {
            Extent::Leaks if found.too_low > 0 => Coverage::Partial,
            _ => found.coverage,
        };
        fixed.corruptions += correct_flags(store, &found, coverage, quiet, limits)?;
    }
    let mut report = found.report;
    if !fixed.is_nothing() || (can_count && found.refcounts != Refcounts::Usable) {
        let mut last = Tally::new(watch, Stage::Verify);
        examine(store, &mut last, limits)?;
        report = last.report;
    }
    if report.is_sound() {
        clear_marks(store)?;
    }
    Ok((report, fixed))
}

/// What a check has found, as far as a repair must know it.
pub(super) struct Found {
    pub report: Report,
    pub refcounts: Refcounts,
    pub coverage: Coverage,
    too_low: u64,
    contested: BTreeSet<u64>,
    /// Clusters behind the end of the file that something points to.
    pub dangling: BTreeSet<u64>,
}

impl Found {
    fn take(tally: Tally<'_>) -> Self {
        Self {
            report: tally.report,
            refcounts: tally.refcounts,
            coverage: tally.coverage,
            too_low: tally.too_low,
            contested: tally.contested,
            dangling: tally.dangling,
        }
    }

    /// Refuses to go by what `again` has counted, if that pass could not read what the check has read.
    ///
    /// # Errors
    /// It could not: a disk that fails may answer once and not again.
    pub fn check_same_was_read(&self, again: &Tally<'_>) -> Result<()> {
        if again.coverage > self.coverage || again.report.errors > self.report.errors {
            let failed = std::io::Error::from_raw_os_error(libc::EIO);
            return Err(Error::io("read once more what the check has read", failed));
        }
        Ok(())
    }
}

/// Shows progress only: what is found on the way to a repair has been told before.
struct Quiet<'w>(&'w mut dyn Watch);

impl Watch for Quiet<'_> {
    fn found(&mut self, _stage: Stage, _finding: &Finding) {}

    fn progress(&mut self, stage: Stage, done: u64, total: u64) {
        self.0.progress(stage, done, total);
    }
}

/// Sets refcounts in place, where the blocks are, to the references.
fn correct_counts(
    survey: &Survey<'_>,
    found: &Found,
    extent: Extent,
    watch: &mut dyn Watch,
    limits: Limits,
) -> Result<Fixed> {
    let mut fixed = Fixed::default();
    let mut writer = CountWriter::new(survey)?;
    let mut tally = Tally::new(watch, Stage::Counts);
    each_window(survey, &mut tally, limits, None, |window, tally| {
        found.check_same_was_read(tally)?;
        for (cluster, slot) in window.clusters() {
            let references = u64::from(slot.references);
            let Some(block) = survey.block_of(cluster) else { continue };
            let count = if slot.refcount < references && extent == Extent::All {
                fixed.corruptions += 1;
                found.coverage.raised(references)
            } else if slot.refcount > references && found.coverage == Coverage::Whole {
                fixed.leaks += 1;
                references
            } else {
                continue;
            };
            writer.set(cluster, block, count)?;
        }
        writer.write()
    })?;
    if !fixed.is_nothing() {
        survey.store.sync().doing("make its refcounts durable")?;
    }
    Ok(fixed)
}

/// Sets the COPIED flags of the active tables to what the refcounts, corrected by now, say.
fn correct_flags(
    store: &dyn Store,
    found: &Found,
    coverage: Coverage,
    watch: &mut dyn Watch,
    limits: Limits,
) -> Result<u64> {
    let mut tally = Tally::new(watch, Stage::Flags);
    let survey = Survey::new(store, &mut tally)?;
    let contested = found.contested.clone();
    let mut flags = FlagWriter::new(store, survey.geometry, contested, coverage);
    each_window(&survey, &mut tally, limits, Some(&mut flags), |_, _| Ok(()))?;
    if flags.corrected > 0 {
        store.sync().doing("make its COPIED flags durable")?;
    }
    Ok(flags.corrected)
}

/// A bit that nobody knows may stand for clusters that nobody has counted: as with any writer, it is cleared first.
fn clear_unknown_autoclear_bits(survey: &Survey<'_>) -> Result<()> {
    let kept = AutoclearFeatures::BITMAPS | AutoclearFeatures::RAW_DATA_FILE;
    let known = survey.header.autoclear & kept;
    if known == survey.header.autoclear {
        return Ok(());
    }
    write_header(survey.store, survey.geometry, offsets::AUTOCLEAR, known.bits())
}

/// Clears the marks that keep others from writing to the image.
fn clear_marks(store: &dyn Store) -> Result<()> {
    let header = read_header(store)?;
    let marks = IncompatibleFeatures::DIRTY | IncompatibleFeatures::CORRUPT;
    if !header.incompatible.intersects(marks) {
        return Ok(());
    }
    let bits = (header.incompatible - marks).bits();
    write_header(store, header.geometry, offsets::INCOMPATIBLE, bits)
}

fn write_header(store: &dyn Store, geometry: Geometry, field: HostOffset, bits: u64) -> Result<()> {
    let layout = Layout::new(geometry);
    layout.check(Owner::Header, field, bits.to_be_bytes().to_vec())?.perform(store)?;
    store.sync().doing("make its header durable")
}
