//! Stores that fail: what fails is told, what was there stays.

use std::path::Path;

use super::*;
use crate::error::Error;
use crate::random::seeds;
use crate::store::fault::{FaultStore, Survivors};
use checker::check;

const SHAPE: Shape = Shape {
    version: Version::V3,
    cluster_bits: 9,
    refcount_order: 4,
    l2_form: L2Form::Standard,
    size: 120 << 10,
    backing_len: 90_000,
};

/// A kind of image, and what is done to it. The first seed is that of the kind that the other tests have.
fn scenario(seed: u64) -> (Shape, Vec<Change>) {
    let mut random = Random::new(seed);
    let shape = if seed == 0 { SHAPE } else { Shape::random(&mut random) };
    (shape, (0..12).map(|_| Change::random(&mut random, shape.size)).collect())
}

/// Each byte of `found` must be that of one of the `allowed` disks.
fn assert_one_of(found: &[u8], allowed: &[Vec<u8>], context: &str) {
    for at in 0..found.len() {
        assert!(
            allowed.iter().any(|disk| disk[at] == found[at]),
            "{context}: byte {at} is {:#x}, which it never was",
            found[at]
        );
    }
}

#[test]
fn every_operation_may_fail_once_and_at_most_clusters_leak() {
    for seed in seeds(4) {
        let (shape, changes) = scenario(seed);
        let below = shape.below();
        let total = {
            let store = Arc::new(FaultStore::new(shape.create()));
            let image = open(store.clone()).unwrap();
            changes.iter().for_each(|one| one.apply_to_image(&image, &*below).unwrap());
            image.flush_all().unwrap();
            store.operations()
        };
        for failing in 0..total {
            let context = format!("seed {seed}, {shape:?}, failing operation {failing}");
            let store = Arc::new(FaultStore::new(shape.create()));
            store.fail(failing..failing + 1);
            let image = open(store.clone()).unwrap();
            let mut possible = vec![shape.empty_disk()];
            for change in &changes {
                let done = change.apply_to_image(&image, &*below);
                let newest = possible[possible.len() - 1].clone();
                let mut next = newest;
                change.apply_to_model(&mut next);
                match done {
                    // What was told to be done is there; what failed may be there in part.
                    Ok(()) => possible.iter_mut().for_each(|disk| change.apply_to_model(disk)),
                    Err(_) => possible.push(next),
                }
            }
            assert_one_of(&read_all(&image, &*below), &possible, &context);
            let closed = image.flush_all();
            drop(image);
            let bytes = store.after_power_cut(Survivors::All);
            assert_eq!(check(&bytes).corruptions, Vec::<String>::new(), "{context}");
            if closed.is_ok() {
                let image = Image::open(Arc::new(MemoryStore::new(bytes)), Writability::ReadOnly);
                let image = image.unwrap();
                assert_one_of(&read_all(&image, &*below), &possible, &context);
            }
        }
    }
}

#[test]
fn after_a_failed_sync_the_image_takes_no_more_writes_and_still_reads() {
    let store = Arc::new(FaultStore::new(SHAPE.create()));
    let image = open(store.clone()).unwrap();
    let below = SHAPE.below();
    image.write(&*below, GuestOffset::new(1000), &[9; 5000]).unwrap();
    let next = store.operations();
    store.fail(next..next + 1);
    assert!(image.flush().is_err());
    assert!(image.write(&*below, GuestOffset::ZERO, &[1; 10]).is_err());
    assert!(image.flush().is_err(), "a second flush must not claim success");
    let mut buf = [0; 5000];
    image.read_active(&*below, GuestOffset::new(1000), &mut buf).unwrap();
    assert_eq!(buf, [9; 5000]);
}

/// A store with an image that has a snapshot and was written since.
fn used() -> FaultStore {
    let store = Arc::new(FaultStore::new(SHAPE.create()));
    let image = open(store.clone()).unwrap();
    image.write(&*SHAPE.below(), GuestOffset::new(1000), &[9; 50_000]).unwrap();
    image.create_snapshot("s").unwrap();
    image.write(&*SHAPE.below(), GuestOffset::new(2000), &[8; 5000]).unwrap();
    image.flush_all().unwrap();
    drop(image);
    FaultStore::new(store.after_power_cut(Survivors::Nothing))
}

#[test]
fn whatever_read_of_an_opening_fails_refuses_it_and_changes_nothing() {
    let store = Arc::new(used());
    let bytes = store.after_power_cut(Survivors::All);
    store.count_reads();
    for writability in [Writability::ReadOnly, Writability::Writable] {
        for failing in 0.. {
            let next = store.operations() + failing;
            store.fail(next..next + 1);
            let opened = Image::open(store.clone(), writability);
            if store.operations() <= next {
                assert!(opened.is_ok() && failing > 5, "only {failing} reads could fail");
                break;
            }
            assert!(opened.is_err(), "{writability:?}: nobody was told of read {failing}");
        }
    }
    assert!(store.after_power_cut(Survivors::All) == bytes, "something was written");
}

#[test]
fn a_read_that_fails_is_an_error_of_its_own_and_of_nothing_later() {
    let store = Arc::new(used());
    let below = SHAPE.below();
    let mut failed = 0;
    let expected = read_all(&open(store.clone()).unwrap(), &*below);
    store.count_reads();
    loop {
        let image = open(store.clone()).unwrap();
        let next = store.operations() + failed;
        store.fail(next..next + 1);
        let mut disk = vec![0; SHAPE.size as usize];
        let read = image.read_active(&*below, GuestOffset::ZERO, &mut disk);
        if store.operations() <= next {
            assert!(read.is_ok() && failed > 4, "only {failed} reads could fail");
            return;
        }
        assert!(read.is_err(), "nobody was told of read {failed}");
        assert_same(&read_all(&image, &*below), &expected, "read again");
        image.write(&*below, GuestOffset::new(2000), &[8; 5000]).unwrap();
        image.flush_all().unwrap();
        failed += 1;
    }
}

/// A backing file with an impossible table.
struct CorruptBelow;

impl Below for CorruptBelow {
    fn read(&self, _offset: GuestOffset, _buf: &mut [u8]) -> Result<()> {
        Err(Error::corrupt("an L2 entry").at(Path::new("base.qcow2")))
    }

    fn is_zero(&self, range: GuestRange) -> Result<bool> {
        self.read(range.start, &mut []).map(|()| false)
    }
}

#[test]
fn a_corrupt_backing_file_does_not_make_its_overlay_corrupt() {
    let store = Arc::new(MemoryStore::new(SHAPE.create()));
    let image = open(store.clone()).unwrap();
    assert!(image.write(&CorruptBelow, GuestOffset::new(100), &[1; 10]).is_err());
    image.write(&CorruptBelow, GuestOffset::ZERO, &[1; 512]).unwrap();
    image.flush_all().unwrap();
    drop(image);
    open(store).unwrap();
}

#[test]
fn damaged_compressed_data_is_an_error_of_its_cluster_and_of_nothing_else() {
    let disk: Vec<u8> = (0..SHAPE.size).map(|at| (at / 40) as u8).collect();
    let store = Arc::new(MemoryStore::new(qemu::packed(&disk, "cluster_size=4k")));
    let image = open(store.clone()).unwrap();
    let first = GuestRange::new(GuestOffset::ZERO, 4096);
    let Content::Compressed { cluster, .. } = image.map(Tree::Active, first).unwrap().content
    else {
        panic!("the first cluster is compressed");
    };
    store.write_at(&[&[0xff; 16]], cluster.host).unwrap();
    assert!(image.read_active(&Nothing, GuestOffset::ZERO, &mut [0; 512]).is_err());
    assert!(image.write(&Nothing, GuestOffset::new(100), &[1; 10]).is_err());
    image.write(&Nothing, GuestOffset::new(4100), &[1; 10]).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &[1; 4096]).unwrap();
    image.flush_all().unwrap();
    drop(image);
    assert_eq!(judge(&store.bytes()), Findings::default());
    open(store).unwrap();
}
