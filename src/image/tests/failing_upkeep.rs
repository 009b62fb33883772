//! Every operation of making a snapshot, a larger or a smaller disk fails in turn, each read among them.

use std::sync::atomic::Ordering;

use super::failing::{Files, Length, Outcomes, Subject, assert_sectors_of};
use super::kinds::Data;
use super::*;
use crate::random::seeds;
use crate::store::fault::{Operation, Survivors};
use checker::{Findings, check};

#[derive(Debug, Clone, Copy)]
enum Act {
    Snapshot,
    Resize(u64),
}

impl Act {
    fn perform(self, image: &Image, below: &dyn Below) -> Result<()> {
        match self {
            Self::Snapshot => image.create_snapshot("new").map(drop),
            Self::Resize(size) if size < image.size() => image.shrink(below, size),
            Self::Resize(size) => image.grow(below, size),
        }
    }
}

/// An image, what is done to it, and what it held before.
struct Scene {
    subject: Subject,
    act: Act,
    disk: Vec<u8>,
    snapshots: Vec<Vec<u8>>,
}

/// What was not flushed when the act began.
const BEFORE: Change = Change::Write { at: 7168, len: 3584, byte: 0x55 };

impl Scene {
    fn new(subject: Subject, act: Act) -> Self {
        let (disk, snapshots) = (subject.disk(), subject.snapshots());
        Self { subject, act, disk, snapshots }
    }

    fn context(&self) -> String {
        format!("{:?} of {}", self.act, self.subject.name)
    }

    /// The disk when the act began.
    fn present(&self) -> Vec<u8> {
        let mut disk = self.disk.clone();
        BEFORE.apply_to_model(&mut disk);
        disk
    }

    /// Lets the operation with this number fail. Answers what failed, if anything did, and whether that has closed the
    /// image for writing.
    fn run(&self, failing: u64, length: Length) -> Option<(Operation, bool)> {
        let context = format!("{}, {length:?}, operation {failing}", self.context());
        let files = self.subject.files();
        let image = self.subject.open(&files);
        BEFORE.apply_to_image(&image, &files.below).unwrap();
        let mut outcomes = Outcomes::new(self.disk.clone());
        outcomes.after(BEFORE, &Ok(()));
        files.fail(failing, length);
        let done = self.act.perform(&image, &files.below);
        files.fail_no_more();
        let failed = files.failed();
        // Space that can't be given back to the host is no reason to fail.
        let told = done.is_err() || matches!(failed, None | Some(Operation::Change));
        assert!(told, "{context}: nobody was told of a failed {failed:?}");
        assert!(done.is_ok() || failed.is_some(), "{context}: {done:?}");
        self.has_happened(&mut outcomes, &done);
        self.judge(&files, &outcomes, done.is_ok(), &context);

        assert!(done.is_err() || self.has_changed(&image), "{context}: it is as before");
        outcomes.has_size(image.size() as usize);
        outcomes.assert_now(&read_all(&image, &files.below), &context);
        let closed = image.closed.load(Ordering::Acquire);
        if closed {
            assert!(image.write(&files.below, GuestOffset::ZERO, &[1; 512]).is_err(), "{context}");
            assert!(image.flush_all().is_err(), "{context}");
            drop(image);
            self.judge(&files, &outcomes, false, &context);
        } else {
            self.go_on(&files, image, outcomes, done.is_ok(), &context);
        }
        failed.map(|failed| (failed, closed))
    }

    fn has_happened(&self, outcomes: &mut Outcomes, done: &Result<()>) {
        match (self.act, done) {
            (Act::Resize(size), done) => outcomes.resized(size, done),
            (Act::Snapshot, Ok(())) => outcomes.after(Change::Flush, &Ok(())),
            (Act::Snapshot, Err(_)) => {}
        }
    }

    fn has_changed(&self, image: &Image) -> bool {
        match self.act {
            Act::Snapshot => image.snapshots().len() == self.snapshots.len() + 1,
            Act::Resize(size) => image.size() == size,
        }
    }

    /// After the act has failed or not, an image that is not closed is as good as any.
    fn go_on(
        &self,
        files: &Files,
        image: Image,
        mut outcomes: Outcomes,
        done: bool,
        context: &str,
    ) {
        if !done {
            let done = self.act.perform(&image, &files.below);
            assert!(done.is_ok(), "{context}, again: {done:?}");
            self.has_happened(&mut outcomes, &done);
        }
        assert!(self.has_changed(&image), "{context}: it is as before");
        outcomes.has_size(image.size() as usize);
        for change in [
            Change::Write { at: 1024, len: 5120, byte: 0x66 },
            Change::Zero { at: 4096, len: 2560, mode: ZeroMode::Unmap },
        ] {
            let done = change.apply_to_image(&image, &files.below);
            assert!(done.is_ok(), "{context}, afterwards: {done:?}");
            outcomes.after(change, &done);
        }
        outcomes.assert_now(&read_all(&image, &files.below), context);
        image.flush_all().unwrap();
        outcomes.after(Change::Flush, &Ok(()));
        drop(image);
        self.judge(files, &outcomes, true, &format!("{context}, afterwards"));
        if files.failed() == Some(Operation::Read) {
            let left = self.subject.after_power_cut(files, Survivors::Nothing, context);
            assert_eq!(check(&left.image), Findings::default(), "{context}");
        }
    }

    /// Whatever a power cut leaves has the old state or the new, and if it is `done`, the new.
    fn judge(&self, files: &Files, outcomes: &Outcomes, done: bool, context: &str) {
        for survivors in [Survivors::Nothing, Survivors::All, Survivors::Torn(77)] {
            let context = format!("{context}, {survivors:?}");
            let left = self.subject.after_power_cut(files, survivors, &context);
            outcomes.assert_durable(&left.disk(), &context);
            let mut snapshots = left.snapshots();
            if let Act::Snapshot = self.act {
                let made = snapshots.len() > self.snapshots.len();
                assert!(made || !done, "{context}: the snapshot is not there");
                if made {
                    let newest = snapshots.pop().unwrap();
                    assert_sectors_of(&[self.present()], &newest, &context);
                }
            }
            assert!(snapshots == self.snapshots, "{context}: a snapshot has changed");
            if left.kind.data == Data::RawFile && left.kind.encrypted.is_none() {
                let mut raw = left.data.clone();
                raw.resize(left.disk().len(), 0);
                outcomes.assert_durable(&raw, &format!("{context}, the data file by itself"));
            }
            let store = MemoryStore::new(left.image);
            check::repair(&store, check::Extent::All, &mut Found::default()).unwrap();
            assert_eq!(judge(&store.bytes()), Findings::default(), "{context}, repaired");
        }
    }
}

/// How many reads and other operations failed, and how many of them closed an image for writing.
#[derive(Debug, Default)]
struct Failures {
    reads: [u64; 2],
    others: [u64; 2],
}

impl Failures {
    /// Lets each operation of `scene` fail.
    fn of(&mut self, scene: &Scene) {
        for length in [Length::Once, Length::ForEver] {
            for failing in 0.. {
                let Some((failed, closed)) = scene.run(failing, length) else { break };
                let counts = match failed {
                    Operation::Read => &mut self.reads,
                    Operation::Change | Operation::Sync => &mut self.others,
                };
                counts[usize::from(closed)] += 1;
            }
        }
    }

    fn assert_enough(&self) {
        eprintln!("[the image stays open, is closed]: {self:?}");
        let [reads, others] = [self.reads, self.others].map(|counts| counts.iter().sum::<u64>());
        assert!(reads > 200 && others > 500, "only {self:?}");
    }
}

#[test]
fn whatever_operation_of_a_snapshot_fails_leaves_the_old_state_or_the_new() {
    let mut failures = Failures::default();
    for seed in seeds(1) {
        for subject in Subject::all() {
            if subject.kind.data == Data::Inside {
                for subject in [subject.filled(), subject.used(seed, 1)] {
                    failures.of(&Scene::new(subject, Act::Snapshot));
                }
            }
        }
    }
    failures.assert_enough();
}

/// Images of every kind on their way to another size. Those of version 2 have no snapshots, which would forbid it.
fn resize(sizes: &[u64]) {
    let mut failures = Failures::default();
    for seed in seeds(1) {
        for subject in Subject::all() {
            let snapshots = usize::from(subject.version() == Version::V3);
            for &size in sizes {
                let subject = subject.used(seed, snapshots);
                failures.of(&Scene::new(subject, Act::Resize(size)));
            }
        }
    }
    failures.assert_enough();
}

#[test]
fn whatever_operation_of_growing_a_disk_fails_leaves_the_old_size_or_the_new() {
    resize(&[(128 << 10) + 1536, 400 << 10]);
}

#[test]
fn whatever_operation_of_shrinking_a_disk_fails_leaves_the_old_size_or_the_new() {
    resize(&[10_752, 33 << 10]);
}
