//! Disks that become smaller and larger.

use super::*;
use crate::store::fault::{FaultStore, Survivors};
use checker::{Findings, check};

fn shape(cluster_bits: u32, backing_len: u64) -> Shape {
    Shape {
        version: Version::V3,
        cluster_bits,
        refcount_order: 4,
        l2_form: L2Form::Standard,
        size: 200 << 10,
        backing_len,
    }
}

fn resize(image: &Image, below: &dyn Below, model: &mut Vec<u8>, size: u64) {
    if size >= image.size() {
        image.grow(below, size).unwrap();
    } else {
        image.shrink(below, size).unwrap();
    }
    model.resize(image.size() as usize, 0);
}

#[test]
fn random_sizes_among_writes_keep_what_is_inside_and_bring_nothing_back() {
    for seed in 0..24 {
        let mut random = Random::new(seed);
        let shape = shape([9, 12, 16][seed as usize % 3], [0, 1 << 20][seed as usize / 3 % 2]);
        let context = format!("seed {seed}, {shape:?}");
        let below = shape.below();
        let store = Arc::new(MemoryStore::new(shape.create()));
        let mut model = shape.empty_disk();
        let mut moments = Vec::new();
        let image = open(store.clone()).unwrap();
        for round in 0..12 {
            for _ in 0..8 {
                let change = Change::random(&mut random, image.size());
                change.apply_to_image(&image, &*below).unwrap();
                change.apply_to_model(&mut model);
            }
            if round % 4 == 1 {
                image.create_snapshot(&format!("s{round}")).unwrap();
                moments.push(model.clone());
            }
            let size = 512 * (1 + random.below(800));
            resize(&image, &*below, &mut model, size);
            assert_same(&read_all(&image, &*below), &model, &context);
            image.flush_all().unwrap();
            assert_eq!(check(&store.bytes()), Findings::default(), "{context}");
        }
        let image = Image::open(store, Writability::ReadOnly).unwrap();
        assert_same(&read_all(&image, &*below), &model, &context);
        for (tree, moment) in image.snapshots().iter().zip(&moments) {
            assert_same(&read_snapshot(&image, tree, &*below), moment, &context);
        }
    }
}

#[test]
fn a_smaller_disk_needs_less_of_its_file() {
    let shape = shape(12, 0);
    let store = Arc::new(MemoryStore::new(shape.create()));
    let image = open(store.clone()).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &vec![1; shape.size as usize]).unwrap();
    image.shrink(&Nothing, 8192).unwrap();
    let len = store.bytes().len();
    image.grow(&Nothing, shape.size).unwrap();
    image.write(&Nothing, GuestOffset::new(8192), &vec![2; shape.size as usize - 8192]).unwrap();
    image.flush_all().unwrap();
    assert_eq!(store.bytes().len(), len);
}

#[test]
fn a_power_cut_while_a_disk_shrinks_leaves_it_at_one_size_or_the_other() {
    let shape = shape(9, 100_000);
    let below = shape.below();
    let small = 70_144;
    for cut in 0.. {
        let store = Arc::new(FaultStore::new(shape.create()));
        let image = open(store.clone()).unwrap();
        let mut model = shape.empty_disk();
        for at in (0..shape.size - 3000).step_by(3000) {
            let change = Change::Write { at, len: 1700, byte: 7 };
            change.apply_to_image(&image, &*below).unwrap();
            change.apply_to_model(&mut model);
        }
        image.flush_all().unwrap();
        let first = store.operations();
        store.fail(first + cut..u64::MAX);
        let shrunk = image.shrink(&*below, small);
        for survivors in [Survivors::Nothing, Survivors::All, Survivors::Some(0x1234_5678)] {
            let context = format!("cut {cut}, {survivors:?}");
            let bytes = store.after_power_cut(survivors);
            assert_eq!(check(&bytes).corruptions, Vec::<String>::new(), "{context}");
            let store = Arc::new(MemoryStore::new(bytes));
            let image = open(store.clone()).unwrap();
            assert!([shape.size, small].contains(&image.size()), "{context}");
            assert_same(&read_all(&image, &*below), &model[..image.size() as usize], &context);
            // What was left behind the end must not come back.
            let mut grown = model[..image.size() as usize].to_vec();
            image.grow(&*below, 2 * shape.size).unwrap();
            grown.resize(2 * shape.size as usize, 0);
            assert_same(&read_all(&image, &*below), &grown, &context);
        }
        if shrunk.is_ok() {
            assert!(cut > 5, "only {cut} operations could fail");
            return;
        }
    }
}

#[test]
fn a_version_2_image_with_snapshots_keeps_its_size() {
    let shape = Shape { version: Version::V2, ..shape(9, 0) };
    let image = open(Arc::new(MemoryStore::new(shape.create()))).unwrap();
    image.create_snapshot("s").unwrap();
    assert!(image.shrink(&Nothing, 512).is_err());
    assert!(image.grow(&Nothing, 1 << 20).is_err());
    assert_eq!(image.size(), shape.size);
}
