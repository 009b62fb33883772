//! Every operation of writes, discards and flushes fails in turn, each read among them.

use std::sync::atomic::Ordering;

use super::failing::{Cache, Length, Outcomes, Subject};
use super::*;
use crate::random::seeds;
use crate::store::fault::{Operation, Survivors};
use checker::check;

/// What is done to each image; the second half meets what the first has left.
const STEPS: u64 = 14;

fn changes(seed: u64, size: u64) -> Vec<Change> {
    let mut random = Random::new(seed);
    let mut changes: Vec<_> = (0..STEPS).map(|_| Change::of_sectors(&mut random, size)).collect();
    changes.insert(STEPS as usize / 2, Change::Flush);
    changes.push(Change::Flush);
    changes
}

/// Whether a failure of `operation` within `change` may close the image for writing: only where metadata is written.
fn may_close(change: Change, operation: Option<Operation>) -> bool {
    matches!(change, Change::Flush) || operation != Some(Operation::Read)
}

/// What is done to an image, and what it held before.
struct Scene {
    subject: Subject,
    disk: Vec<u8>,
    snapshots: Vec<Vec<u8>>,
    changes: Vec<Change>,
}

impl Scene {
    fn new(subject: Subject, changes: impl FnOnce(u64) -> Vec<Change>) -> Self {
        let (disk, snapshots) = (subject.disk(), subject.snapshots());
        let changes = changes(disk.len() as u64);
        Self { subject, disk, snapshots, changes }
    }
}

/// One run with a failure; answers what failed, if anything did.
fn run(scene: &Scene, failing: u64, length: Length) -> Option<Operation> {
    let Scene { subject, disk, snapshots, changes } = scene;
    let context = format!("{}, {length:?}, operation {failing} of {changes:?}", subject.name);
    let files = subject.files();
    let image = subject.open(&files);
    let mut outcomes = Outcomes::new(disk.clone());
    files.fail(failing, length);
    for &change in changes {
        let before = files.failed();
        let was_closed = image.closed.load(Ordering::Acquire);
        let done = change.apply_to_image(&image, &files.below);
        outcomes.after(change, &done);
        let is_closed = image.closed.load(Ordering::Acquire);
        if length == Length::ForEver {
            continue;
        }
        if before.is_none() && files.failed().is_some() {
            let failed = files.failed();
            // Space that can't be given back to the host is no reason to let a flush fail.
            let quiet = failed == Some(Operation::Change) && matches!(change, Change::Flush);
            assert!(done.is_err() || quiet, "{context}: nobody was told of a failed {failed:?}");
            assert!(!is_closed || may_close(change, failed), "{context}: closed by {failed:?}");
        } else {
            assert_eq!(done.is_err(), was_closed, "{context}: {change:?}: {done:?}");
        }
    }
    files.fail_no_more();
    let failed = files.failed();
    outcomes.assert_now(&read_all(&image, &files.below), &context);
    let closed = image.closed.load(Ordering::Acquire);
    let flushed = image.flush_all();
    assert_eq!(flushed.is_err(), closed, "{context}: {flushed:?}");
    outcomes.after(Change::Flush, &flushed);
    drop(image);
    for survivors in [Survivors::Nothing, Survivors::All, Survivors::Torn(failing)] {
        let context = format!("{context}, {survivors:?}");
        let left = subject.after_power_cut(&files, survivors, &context);
        let disk = left.disk();
        outcomes.assert_durable(&disk, &context);
        assert!(left.snapshots() == *snapshots, "{context}: a snapshot has changed");
        if failed == Some(Operation::Read) && !closed {
            let leaks = check(&left.image).leaks;
            assert!(survivors != Survivors::Nothing || leaks.is_empty(), "{context}: {leaks:?}");
        }
        if survivors == Survivors::All {
            goes_on(&left, disk, &context);
        }
    }
    failed
}

/// A writer takes the image that is left as any other.
fn goes_on(left: &Subject, mut disk: Vec<u8>, context: &str) {
    let files = left.files();
    let image = left.open(&files);
    let change = Change::Write { at: 1024, len: 40 << 10, byte: 0x77 };
    change.apply_to_image(&image, &files.below).unwrap();
    change.apply_to_model(&mut disk);
    image.flush_all().unwrap();
    assert_same(&read_all(&image, &files.below), &disk, context);
    drop(image);
    left.after_power_cut(&files, Survivors::Nothing, context);
}

/// Lets each operation of a scene fail. Answers how many reads failed, and how many others.
fn fail_each(scene: &Scene, length: Length) -> [u64; 2] {
    let mut failed = [0; 2];
    for failing in 0.. {
        match run(scene, failing, length) {
            Some(Operation::Read) => failed[0] += 1,
            Some(Operation::Change | Operation::Sync) => failed[1] += 1,
            None => break,
        }
    }
    failed
}

/// Lets each operation fail on images of every kind.
fn fail_everywhere(length: Length, runs: u64) {
    let mut failed = [0; 2];
    for seed in seeds(runs) {
        for subject in Subject::all() {
            for subject in [subject.used(seed, 1 + seed as usize % 2), subject] {
                let scene = Scene::new(subject, |size| changes(seed, size));
                let here = fail_each(&scene, length);
                failed.iter_mut().zip(here).for_each(|(sum, more)| *sum += more);
            }
        }
    }
    let [reads, others] = failed;
    eprintln!("{length:?}: {reads} reads and {others} other operations failed");
    assert!(reads > 500 && others > 500, "only {reads} reads and {others} others failed");
}

#[test]
fn whatever_operation_fails_once_is_told_and_the_image_goes_on_or_takes_no_more_writes() {
    fail_everywhere(Length::Once, 2);
}

#[test]
fn whatever_operation_fails_for_ever_loses_nothing_that_was_flushed() {
    fail_everywhere(Length::ForEver, 1);
}

#[test]
fn whatever_operation_fails_while_the_refcount_table_becomes_longer_loses_nothing() {
    let subject = Subject::with_a_full_refcount_table(Cache::TwoPages);
    let changes = vec![
        Change::Write { at: 1890 << 10, len: 64 << 10, byte: 1 },
        Change::Zero { at: 1800 << 10, len: 20 << 10, mode: ZeroMode::Unmap },
        Change::Write { at: 1954 << 10, len: 94 << 10, byte: 2 },
        Change::Flush,
        Change::Write { at: 1780 << 10, len: 64 << 10, byte: 3 },
    ];
    let files = subject.files();
    let image = subject.open(&files);
    let before = image.header().reftable_clusters;
    changes.iter().for_each(|one| one.apply_to_image(&image, &files.below).unwrap());
    assert!(image.header().reftable_clusters > before, "the table had room");
    drop(image);
    let [reads, others] = fail_each(&Scene::new(subject, |_| changes), Length::Once);
    eprintln!("{reads} reads and {others} other operations failed");
    assert!(reads > 10 && others > 30, "only {reads} reads and {others} others failed");
}
