//! Random changes against a plain vector of bytes.

use super::*;
use crate::random::seeds;

const SHAPES: [Shape; 6] = [
    shape(Version::V3, 9, 4, 300 << 10, 0),
    shape(Version::V3, 9, 0, 1 << 20, 200_000),
    shape(Version::V2, 10, 4, 500_224, 300_000),
    shape(Version::V3, 12, 6, 700_416, 1 << 20),
    shape(Version::V3, 12, 1, 400 << 10, 0),
    shape(Version::V2, 16, 4, 1_000_448, 0),
];

const fn shape(
    version: Version,
    cluster_bits: u32,
    refcount_order: u32,
    size: u64,
    backing_len: u64,
) -> Shape {
    let l2_form = L2Form::Standard;
    Shape { version, cluster_bits, refcount_order, l2_form, size, backing_len }
}

#[test]
fn random_changes_read_back_and_leave_nothing_to_repair() {
    for (number, shape) in SHAPES.into_iter().enumerate() {
        for seed in seeds(6) {
            let seed = seed * 100 + number as u64;
            run(shape, &mut Random::new(seed), &format!("seed {seed}, {shape:?}"));
        }
    }
}

fn run(shape: Shape, random: &mut Random, context: &str) {
    let below = shape.below();
    let store = Arc::new(MemoryStore::new(shape.create()));
    let mut model = shape.empty_disk();
    for _ in 0..3 {
        let image = open(store.clone()).unwrap();
        for _ in 0..60 {
            let change = Change::random(random, shape.size);
            change.apply_to_image(&image, &*below).unwrap();
            change.apply_to_model(&mut model);
            assert_sound(&store, context);
        }
        assert_same(&read_all(&image, &*below), &model, context);
        image.flush_all().unwrap();
        drop(image);
        assert_eq!(judge(&store.bytes()), Findings::default(), "{context}");
        let image = Image::open(store.clone(), Writability::ReadOnly).unwrap();
        assert_same(&read_all(&image, &*below), &model, context);
    }
}

#[test]
fn snapshots_keep_what_they_saw_whatever_is_written_later() {
    for seed in seeds(12) {
        let mut random = Random::new(seed);
        let shape = SHAPES[[0, 2, 3, 5][seed as usize % 4]];
        let context = format!("seed {seed}, {shape:?}");
        let below = shape.below();
        let store = Arc::new(MemoryStore::new(shape.create()));
        let mut model = shape.empty_disk();
        let mut moments: Vec<Vec<u8>> = Vec::new();
        let image = open(store.clone()).unwrap();
        for round in 0..4 {
            for _ in 0..25 {
                let change = Change::random(&mut random, shape.size);
                change.apply_to_image(&image, &*below).unwrap();
                change.apply_to_model(&mut model);
                assert_sound(&store, &context);
            }
            image.create_snapshot(&format!("s{round}")).unwrap();
            assert_sound(&store, &context);
            moments.push(model.clone());
        }
        for _ in 0..25 {
            let change = Change::random(&mut random, shape.size);
            change.apply_to_image(&image, &*below).unwrap();
            change.apply_to_model(&mut model);
        }
        image.flush_all().unwrap();
        assert_eq!(judge(&store.bytes()), Findings::default(), "{context}");
        let image = Image::open(store, Writability::ReadOnly).unwrap();
        assert_same(&read_all(&image, &*below), &model, &context);
        for (tree, moment) in image.snapshots().iter().zip(&moments) {
            let found = read_snapshot(&image, tree, &*below);
            assert_same(&found, moment, &format!("{context}, {}", tree.entry().name));
        }
    }
}

#[test]
fn a_disk_grows_beyond_its_l1_table_and_the_backing_file_stays_hidden() {
    let shape = shape(Version::V3, 9, 4, 30 << 10, 100 << 10);
    let below = shape.below();
    let store = Arc::new(MemoryStore::new(shape.create()));
    let image = open(store.clone()).unwrap();
    let mut model = shape.empty_disk();
    for size in [40_000, 64 << 10, 5 << 20] {
        image.write(&*below, GuestOffset::new(100), &[7; 2000]).unwrap();
        image.grow(&*below, size).unwrap();
        model[100..2100].fill(7);
        model.resize(image.size() as usize, 0);
        assert_same(&read_all(&image, &*below), &model, "after growing");
    }
    image.flush_all().unwrap();
    assert_eq!(judge(&store.bytes()), Findings::default());
}

#[test]
fn parallel_writers_of_neighbouring_bytes_lose_nothing() {
    let shape = SHAPES[3];
    let below = shape.below();
    let store = Arc::new(MemoryStore::new(shape.create()));
    let image = open(store.clone()).unwrap();
    let mut model = shape.empty_disk();
    let piece = 1111;
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let (image, below) = (&image, &*below);
            scope.spawn(move || {
                for index in (u64::from(thread)..600).step_by(4) {
                    let at = GuestOffset::new(index * piece);
                    image.write(below, at, &vec![thread + 1; piece as usize]).unwrap();
                    if index % 50 == 0 {
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    for index in 0..600_u64 {
        let at = (index * piece) as usize;
        model[at..at + piece as usize].fill((index % 4) as u8 + 1);
    }
    assert_same(&read_all(&image, &*below), &model, "after parallel writes");
    image.flush_all().unwrap();
    assert_eq!(judge(&store.bytes()), Findings::default());
}

#[test]
fn endless_rewriting_does_not_make_the_file_longer() {
    let shape = shape(Version::V3, 12, 4, 1 << 20, 0);
    let store = Arc::new(MemoryStore::new(shape.create()));
    let image = open(store.clone()).unwrap();
    let whole = GuestRange::new(GuestOffset::ZERO, shape.size);
    let mut lengths = Vec::new();
    for round in 0..20 {
        image.write(&Nothing, GuestOffset::ZERO, &vec![round; shape.size as usize]).unwrap();
        image.flush().unwrap();
        image.zero(&Nothing, whole, ZeroMode::Unmap).unwrap();
        image.flush_all().unwrap();
        lengths.push(store.bytes().len());
    }
    assert_eq!(lengths[1], lengths[19]);
}

#[test]
fn a_snapshot_that_claims_to_be_huge_is_mapped_in_few_steps() {
    let shape = shape(Version::V3, 9, 4, 64 << 10, 0);
    let store = Arc::new(MemoryStore::new(shape.create()));
    let image = open(store.clone()).unwrap();
    image.create_snapshot("huge").unwrap();
    let table = image.header().snapshots_offset.get() as usize;
    drop(image);
    let mut bytes = store.bytes();
    let size = 100_u64 << 30;
    bytes[table + 48..table + 56].copy_from_slice(&size.to_be_bytes());
    let image = Image::open(Arc::new(MemoryStore::new(bytes.clone())), Writability::ReadOnly);
    let image = image.unwrap();
    let snapshot = &image.snapshots()[0];
    assert_eq!(snapshot.size(), size);
    let (mut at, mut steps) = (0, 0);
    while at < size {
        let range = GuestRange::new(GuestOffset::new(at), size - at);
        at += image.map(Tree::Snapshot(snapshot), range).unwrap().len;
        steps += 1;
    }
    assert!(steps <= 2, "{steps} steps");
    // What no L1 table could map is refused by its field.
    bytes[table + 48..table + 56].fill(0x7f);
    assert!(Image::open(Arc::new(MemoryStore::new(bytes)), Writability::ReadOnly).is_err());
}
