//! Checks an image that nobody has open, and repairs it.
//!
//! A check finds the tables ([`survey`]), walks through all of them ([`walk`]) and counts the references to each host
//! cluster, over all snapshots and bitmaps, for as many clusters at a time as fit into a [`window`]: a larger file takes
//! more passes, not more memory. An L2 table that snapshots share is read once a pass.
//!
//! Time is bounded, too, by what a file really holds: holes are skipped, overlapping tables are followed once, and parts
//! of a file that nothing refers to cost no pass.

mod counts;
mod findings;
mod flags;
mod rebuild;
pub(super) mod repair;
mod survey;
mod walk;
mod window;

pub use findings::{Class, Finding, Report, Stage, Target, Use, Watch};
pub use repair::{Extent, Fixed, repair};

use self::findings::{Refcounts, Tally};
use self::flags::FlagWriter;
use self::survey::Survey;
use self::walk::{Structure, Walk};
use self::window::Window;
use crate::error::{Error, Result};
use crate::store::Store;

/// Most passes of a check: more than an image of 2 PiB needs, and an end to one that is made to take for ever.
const MAX_PASSES: u64 = 1 << 14;

/// What is kept in memory at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Host clusters in a window.
    pub clusters: u64,
    /// L2 tables.
    pub tables: usize,
}

impl Default for Limits {
    /// Together less than 64 MiB. The refcount table has up to 8 MiB.
    fn default() -> Self {
        Self { clusters: window::MAX_CLUSTERS, tables: 1 << 18 }
    }
}

/// Checks the image in `store`, and tells `watch` of each finding.
///
/// # Errors
/// An image that can't be checked at all: a broken header, features that are not supported. Whatever is wrong behind
/// the header is a finding.
pub fn check(store: &dyn Store, watch: &mut dyn Watch) -> Result<Report> {
    check_within(store, watch, Limits::default())
}

/// As [`check`] with less memory.
pub(super) fn check_within(
    store: &dyn Store,
    watch: &mut dyn Watch,
    limits: Limits,
) -> Result<Report> {
    let mut tally = Tally::new(watch, Stage::Check);
    examine(store, &mut tally, limits)?;
    Ok(tally.report)
}

/// Checks the image in `store` and leaves what was found in `tally`.
fn examine<'s>(store: &'s dyn Store, tally: &mut Tally<'_>, limits: Limits) -> Result<Survey<'s>> {
    let survey = Survey::new(store, tally)?;
    tally.report.total_clusters = survey.geometry.clusters(survey.header.size);
    each_window(&survey, tally, limits, None, |window, tally| {
        compare(window, &survey, tally);
        Ok(())
    })?;
    tally.progress(survey.limit(), survey.limit());
    Ok(survey)
}

/// Counts the references to all clusters, a window at a time; `done` sees each when it is complete.
fn each_window<'s>(
    survey: &Survey<'s>,
    tally: &mut Tally<'_>,
    limits: Limits,
    mut flags: Option<&mut FlagWriter<'s>>,
    mut done: impl FnMut(&Window, &mut Tally<'_>) -> Result<()>,
) -> Result<()> {
    let limit = survey.limit();
    let mut next = Some(0);
    let mut structure = Structure::Unknown;
    for _ in 0..MAX_PASSES {
        let Some(first) = next else { return Ok(()) };
        let (mut window, read) = Window::load(survey, first, limits.clusters);
        if let Err(error) = read {
            tally.worsen(Refcounts::Broken);
            tally.add(Finding::Unreadable { what: format!("a refcount block: {error}") });
        }
        let mut walk = Walk {
            survey,
            window: &mut window,
            tally: &mut *tally,
            structure,
            flags: flags.as_deref_mut(),
            max_tables: limits.tables,
            limit,
        };
        walk.run()?;
        structure = Structure::Reported;
        done(&window, tally)?;
        next = window.next(survey);
    }
    let reason = "its clusters are spread over more of the file than any image needs";
    Err(Error::invalid("layout", reason))
}

/// Compares the refcounts of a window with its references.
fn compare(window: &Window, survey: &Survey<'_>, tally: &mut Tally<'_>) {
    for (cluster, slot) in window.clusters() {
        let (refcount, references) = (slot.refcount, u64::from(slot.references));
        let is_in_use = match cluster < survey.file_clusters {
            true => references > 0 || refcount > 0,
            false => references > 0 && !tally.dangling.contains(&cluster),
        };
        if is_in_use {
            tally.report.image_end = (cluster + 1) << survey.geometry.cluster_bits();
        }
        if refcount > references {
            tally.add(Finding::Leak { cluster, refcount, references });
        } else if refcount < references {
            tally.add(Finding::TooLow { cluster, refcount, references });
            if survey.block_of(cluster).is_none() {
                tally.worsen(Refcounts::Broken);
            }
        }
    }
}
