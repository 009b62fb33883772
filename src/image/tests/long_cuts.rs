//! The power goes before every operation of the store in long random runs over images of every kind.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::random::seeds;
use crate::store::fault::{FaultStore, Operation, Survivors};
use checker::{Findings, check};
use history::{History, SECTOR};

const STEPS: u64 = 60;
const MAX_SNAPSHOTS: usize = 3;
const QEMU_LOOKS_AT_ONE_OF: u64 = 40;

/// Judges what a power cut would leave.
struct Judge {
    shape: Shape,
    seed: u64,
    history: Mutex<History>,
    moments: AtomicU64,
}

impl Judge {
    fn history(&self) -> std::sync::MutexGuard<'_, History> {
        self.history.lock().expect("no verdict before this one")
    }

    fn look_at(&self, store: &FaultStore) {
        if std::thread::panicking() {
            return;
        }
        let moment = self.moments.fetch_add(1, Ordering::SeqCst);
        let number = self.seed * 100_000 + moment * 3;
        for survivors in [
            Survivors::Nothing,
            Survivors::All,
            Survivors::Some(number),
            Survivors::Torn(number + 1),
            Survivors::Torn(number + 2),
        ] {
            let Self { shape, seed, .. } = self;
            let context = format!("seed {seed}, {shape:?}, cut at {moment}, {survivors:?}");
            let bytes = store.after_power_cut(survivors);
            if number.is_multiple_of(QEMU_LOOKS_AT_ONE_OF) {
                qemu::finds_at_most_leaks(&bytes, &context);
            }
            self.judge(bytes, &context, &mut Random::new(number));
        }
    }

    fn judge(&self, bytes: Vec<u8>, context: &str, random: &mut Random) {
        let history = self.history();
        let below = self.shape.below();
        let leaked = check(&bytes);
        assert_eq!(leaked.corruptions, Vec::<String>::new(), "{context}");
        let store = Arc::new(MemoryStore::new(bytes));
        let image = open(store.clone()).unwrap();
        let mut disk = read_all(&image, &*below);
        history.assert_allows(&disk, context);
        history.assert_snapshots(&image, &*below, context);
        // Life goes on.
        for _ in 0..3 {
            let change = Change::of_sectors(random, image.size());
            change.apply_to_image(&image, &*below).unwrap();
            change.apply_to_model(&mut disk);
        }
        image.flush_all().unwrap();
        assert_same(&read_all(&image, &*below), &disk, context);
        history.assert_snapshots(&image, &*below, context);
        let later = check(&store.bytes());
        assert_eq!(later.corruptions, Vec::<String>::new(), "{context}, written again");
        let (before, after) = (leaked.leaks.len(), later.leaks.len());
        assert!(after <= before, "{context}: {before} leaks became {after}");
    }
}

/// One step of a long run.
fn step(image: &Image, below: &dyn Below, judge: &Judge, random: &mut Random) {
    let snapshots = image.snapshots().len();
    match random.below(24) {
        0 if snapshots < MAX_SNAPSHOTS => {
            let name = format!("s{snapshots}");
            judge.history().begins_snapshot(&name);
            let made = image.create_snapshot(&name);
            judge.history().ends_snapshot(&made);
            // One bit counts no second reference, four bits no second one of many compressed clusters.
            if let Err(error) = made.map(drop) {
                assert!(format!("{error:?}").contains("bit refcounts can count"), "{error:?}");
            }
        }
        1 if judge.shape.version == Version::V3 || snapshots == 0 => {
            let most = [SECTOR as u64, 40_000, 300_000][random.below(3) as usize];
            let more = random.below(most) + 1;
            let size = (image.size() + more).next_multiple_of(SECTOR as u64);
            judge.history().resizes(size);
            image.grow(below, size).unwrap();
            judge.history().flushed();
        }
        2 if judge.shape.version == Version::V3 || snapshots == 0 => {
            let sectors = image.size() / SECTOR as u64;
            let size = (1 + random.below(sectors)) * SECTOR as u64;
            judge.history().resizes(size);
            image.shrink(below, size).unwrap();
            judge.history().flushed();
        }
        3 | 4 => {
            image.flush().unwrap();
            judge.history().flushed();
        }
        _ => {
            let change = Change::of_sectors(random, image.size());
            judge.history().changes(change);
            change.apply_to_image(image, below).unwrap();
            if matches!(change, Change::Flush) {
                judge.history().flushed();
            }
        }
    }
}

/// What a run begins with: the image and its disk.
fn beginning(shape: Shape, random: &mut Random) -> (Vec<u8>, Vec<u8>) {
    let mut disk = shape.empty_disk();
    match random.below(3) {
        0 => (shape.create(), disk),
        1 if shape.backing_len == 0 => {
            for number in 0..shape.size / 100 {
                disk[number as usize * 100] = random.below(256) as u8;
            }
            (qemu::packed(&disk, &shape.qemu_options()), disk)
        }
        _ => {
            let store = Arc::new(MemoryStore::new(shape.create()));
            let (image, below) = (open(store.clone()).unwrap(), shape.below());
            for _ in 0..30 {
                let change = Change::of_sectors(random, shape.size);
                change.apply_to_image(&image, &*below).unwrap();
                change.apply_to_model(&mut disk);
            }
            image.flush_all().unwrap();
            drop(image);
            (store.bytes(), disk)
        }
    }
}

/// The number of moments that were judged.
fn run(seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let shape = Shape::random(&mut random);
    let below = shape.below();
    let (bytes, disk) = beginning(shape, &mut random);
    let history = Mutex::new(History::new(disk, SECTOR));
    let judge = Arc::new(Judge { shape, seed, history, moments: AtomicU64::new(0) });
    let watching = judge.clone();
    let observer = move |store: &FaultStore, operation| {
        if operation != Operation::Read {
            watching.look_at(store);
        }
    };
    let store = Arc::new(FaultStore::observed(bytes, Box::new(observer)));
    let image = open(store.clone()).unwrap();
    for _ in 0..STEPS {
        step(&image, &*below, &judge, &mut random);
    }
    image.flush_all().unwrap();
    judge.history().flushed();
    drop(image);
    let bytes = store.after_power_cut(Survivors::Nothing);
    let context = format!("seed {seed}, {shape:?}, after a clean end");
    assert_eq!(check(&bytes), Findings::default(), "{context}");
    judge.judge(bytes, &context, &mut random);
    judge.moments.load(Ordering::SeqCst)
}

#[test]
fn a_power_cut_at_any_moment_of_a_long_run_corrupts_nothing_and_loses_nothing_flushed() {
    let moments: u64 = seeds(5).map(run).sum();
    eprintln!("{moments} moments, five cuts each");
    assert!(moments >= 100, "only {moments} moments were judged");
}
