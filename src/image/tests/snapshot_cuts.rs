//! The power goes at every operation of making, applying and deleting a snapshot, or each of them fails once.

use super::*;
use crate::random::seeds;
use crate::store::fault::{FaultStore, Survivors};
use checker::check;

const SURVIVORS: [Survivors; 6] = [
    Survivors::Nothing,
    Survivors::All,
    Survivors::Some(0x1234_5678_9abc_def1),
    Survivors::Some(0x0f1e_2d3c_4b5a_6979),
    Survivors::Torn(0x2468_ace0_1357_9bdf),
    Survivors::Torn(0x1b2d_3f48_5a6c_7e90),
];

const QEMU_LOOKS_AT_ONE_OF: u64 = 60;

/// What is done while the power goes.
#[derive(Debug, Clone, Copy)]
enum Deed {
    Create,
    Apply(&'static str),
    Delete(&'static str),
}

const DEEDS: [Deed; 5] =
    [Deed::Create, Deed::Apply("1"), Deed::Apply("2"), Deed::Delete("1"), Deed::Delete("2")];

/// All points in time of an image: the disk, and each snapshot by its id.
#[derive(Clone, PartialEq, Eq)]
struct Moments {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Moments {
    fn of(image: &Image, below: &dyn Below) -> Self {
        let snapshots = image.snapshots().into_iter();
        let snapshots = snapshots
            .map(|tree| (tree.entry().id.clone(), read_snapshot(image, &tree, below)))
            .collect();
        Self { disk: read_all(image, below), snapshots }
    }

    fn after(&self, deed: Deed) -> Self {
        let mut after = self.clone();
        match deed {
            Deed::Create => after.snapshots.push(("3".to_owned(), self.disk.clone())),
            Deed::Apply(id) => {
                let (_, disk) = self.snapshots.iter().find(|(one, _)| one == id).unwrap();
                after.disk = disk.clone();
            }
            Deed::Delete(id) => after.snapshots.retain(|(one, _)| one != id),
        }
        after
    }
}

impl Deed {
    fn perform(self, image: &Image) -> Result<()> {
        match self {
            Self::Create => image.create_snapshot("c").map(drop),
            Self::Apply(id) => image.apply_snapshot(id),
            Self::Delete(id) => image.delete_snapshot(id),
        }
    }
}

/// An image with two snapshots of different sizes, all of it durable.
fn prepare(shape: Shape, random: &mut Random) -> Vec<u8> {
    let store = Arc::new(MemoryStore::new(shape.create()));
    let (image, below) = (open(store.clone()).unwrap(), shape.below());
    let change = |random: &mut Random| {
        (0..8).for_each(|_| {
            Change::of_sectors(random, image.size()).apply_to_image(&image, &*below).unwrap();
        });
    };
    change(random);
    image.create_snapshot("a").unwrap();
    if shape.version == Version::V3 {
        image.grow(&*below, shape.size + (20 << 10)).unwrap();
    }
    change(random);
    image.create_snapshot("b").unwrap();
    change(random);
    image.flush_all().unwrap();
    drop(image);
    store.bytes()
}

fn shapes() -> [Shape; 3] {
    let shape = Shape {
        version: Version::V3,
        cluster_bits: 9,
        refcount_order: 4,
        l2_form: L2Form::Standard,
        size: 80 << 10,
        backing_len: 50_000,
    };
    [
        shape,
        Shape { version: Version::V2, backing_len: 0, ..shape },
        Shape { cluster_bits: 14, l2_form: L2Form::Extended, size: 300 << 10, ..shape },
    ]
}

#[test]
fn a_power_cut_while_a_snapshot_is_made_applied_or_deleted_leaves_all_as_before_or_all_done() {
    let mut judged = 0;
    for seed in seeds(2) {
        for shape in shapes() {
            let bytes = prepare(shape, &mut Random::new(seed));
            DEEDS.iter().for_each(|&deed| judged += cut_everywhere(shape, &bytes, deed, seed));
        }
    }
    assert!(judged > 1000, "only {judged} cuts were judged");
}

fn cut_everywhere(shape: Shape, bytes: &[u8], deed: Deed, seed: u64) -> u64 {
    let below = shape.below();
    let mut judged = 0;
    for cut in 0.. {
        let store = Arc::new(FaultStore::new(bytes.to_vec()));
        let image = open(store.clone()).unwrap();
        let before = Moments::of(&image, &*below);
        let after = before.after(deed);
        store.fail(cut..u64::MAX);
        let done = deed.perform(&image);
        for survivors in SURVIVORS {
            let context = format!("seed {seed}, {shape:?}, {deed:?}, cut {cut}, {survivors:?}");
            let left = store.after_power_cut(survivors);
            judged += 1;
            if judged % QEMU_LOOKS_AT_ONE_OF == 0 {
                qemu::finds_at_most_leaks(&left, &context);
            }
            let leaked = check(&left);
            assert_eq!(leaked.corruptions, Vec::<String>::new(), "{context}");
            let survived = Arc::new(MemoryStore::new(left));
            let image = open(survived.clone()).unwrap();
            let found = Moments::of(&image, &*below);
            let allowed = found == after || done.is_err() && found == before;
            assert!(allowed, "{context}: neither as before nor done");
            go_on(image, &survived, &*below, found, leaked.leaks.len(), &context);
        }
        if done.is_ok() {
            assert!(cut > 5, "only {cut} operations could fail");
            return judged;
        }
    }
    unreachable!("a deed has an end")
}

/// Life goes on after a power cut: nothing gets worse.
fn go_on(
    image: Image,
    store: &MemoryStore,
    below: &dyn Below,
    mut moments: Moments,
    leaks: usize,
    context: &str,
) {
    let change = Change::Write { at: 1024, len: 9000, byte: 0x77 };
    change.apply_to_image(&image, below).unwrap();
    change.apply_to_model(&mut moments.disk);
    image.delete_snapshot("2").or_else(|_| image.delete_snapshot("1")).unwrap();
    let kept: Vec<String> = image.snapshots().iter().map(|tree| tree.entry().id.clone()).collect();
    moments.snapshots.retain(|(id, _)| kept.contains(id));
    image.flush_all().unwrap();
    assert!(Moments::of(&image, below) == moments, "{context}: something changed later");
    let later = check(&store.bytes());
    assert_eq!(later.corruptions, Vec::<String>::new(), "{context}, later");
    assert!(later.leaks.len() <= leaks, "{context}: {leaks} leaks became {}", later.leaks.len());
}

#[test]
fn every_operation_of_making_applying_and_deleting_may_fail_once() {
    for shape in shapes() {
        let bytes = prepare(shape, &mut Random::new(1));
        for deed in DEEDS {
            fail_everywhere(shape, &bytes, deed);
        }
    }
}

fn fail_everywhere(shape: Shape, bytes: &[u8], deed: Deed) {
    let below = shape.below();
    for failing in 0.. {
        let context = format!("{shape:?}, {deed:?}, failing operation {failing}");
        let store = Arc::new(FaultStore::new(bytes.to_vec()));
        let image = open(store.clone()).unwrap();
        let before = Moments::of(&image, &*below);
        let mut after = before.after(deed);
        let mut not_done = before.clone();
        store.fail(failing..failing + 1);
        let done = deed.perform(&image);
        let ran_out = store.operations() <= failing;
        store.fail(u64::MAX..u64::MAX);
        let change = Change::Write { at: 512, len: 5000, byte: 0x55 };
        let written = change.apply_to_image(&image, &*below).is_ok();
        let flushed = image.flush_all().is_ok();
        drop(image);
        let left = store.after_power_cut(Survivors::All);
        assert_eq!(check(&left).corruptions, Vec::<String>::new(), "{context}");
        let image = open(Arc::new(MemoryStore::new(left))).unwrap();
        let found = Moments::of(&image, &*below);
        if written && flushed {
            change.apply_to_model(&mut after.disk);
            change.apply_to_model(&mut not_done.disk);
        }
        let allowed = found == after || done.is_err() && found == not_done;
        assert!(allowed, "{context}: neither as before nor done");
        if ran_out {
            assert!(done.is_ok(), "{context}");
            return;
        }
    }
}

#[test]
fn whoever_is_told_that_a_snapshot_was_not_applied_has_the_disk_as_it_was() {
    let shape = Shape { backing_len: 0, ..shapes()[0] };
    let store = Arc::new(MemoryStore::new(shape.create()));
    let image = open(store.clone()).unwrap();
    image.create_snapshot("empty").unwrap();
    let written = vec![1; shape.size as usize];
    image.write(&Nothing, GuestOffset::ZERO, &written).unwrap();
    image.flush_all().unwrap();
    drop(image);
    let bytes = store.bytes();
    let mut told = [0; 2];
    for failing in 0.. {
        let store = Arc::new(FaultStore::new(bytes.clone()));
        let image = open(store.clone()).unwrap();
        store.count_reads();
        store.fail(failing..failing + 1);
        let done = image.apply_snapshot("1");
        if store.failed().is_none() {
            break;
        }
        // Once a write or sync has failed nobody knows what the disk has.
        if image.check_open_for_writing().is_ok() {
            let expected = if done.is_ok() { vec![0; written.len()] } else { written.clone() };
            let context = format!("operation {failing}, {done:?}");
            assert_same(&read_all(&image, &Nothing), &expected, &context);
            told[usize::from(done.is_ok())] += 1;
        }
    }
    assert!(told.iter().all(|times| *times > 0), "told so or not: {told:?}");
}
