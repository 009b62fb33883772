//! The disk gets another size while others wait for their turn: what they were told before does not hold any more.

use std::sync::mpsc::channel;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::kinds::{Data, Kind};
use super::*;
use crate::error::Problem;
use crate::image::SectorNumbering;
use crate::store::fault::FaultStore;

impl Image {
    /// How many hold ranges of the disk or wait for one, or for the shape of the image, which comes first.
    pub(crate) fn range_requests(&self) -> usize {
        self.ranges.requests() + self.shape.requests().saturating_sub(1)
    }
}

/// Waits until so many hold ranges or wait for one.
pub(crate) fn wait_for_requests(image: &Image, count: usize) {
    let end = Instant::now() + Duration::from_secs(20);
    while image.range_requests() < count {
        assert!(Instant::now() < end, "only {} of {count} have come", image.range_requests());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Does both things, of which each asks for a range of the disk; the second begins before the first is let go on.
fn both<A: Send, B: Send>(
    image: &Image,
    first: impl FnOnce() -> A + Send,
    second: impl FnOnce() -> B + Send,
) -> (A, B) {
    let kept = image.keep_mapping(GuestRange::new(GuestOffset::ZERO, image.size()));
    std::thread::scope(|scope| {
        let first = scope.spawn(first);
        wait_for_requests(image, 2);
        let second = scope.spawn(second);
        wait_for_requests(image, 3);
        drop(kept);
        (first.join().unwrap(), second.join().unwrap())
    })
}

const CLUSTER: u64 = 4096;
const OLD: u64 = 20 * CLUSTER;
/// Ends within a cluster.
const NEW: u64 = 10 * CLUSTER + 1024;

const SHAPE: Shape = Shape {
    version: Version::V3,
    cluster_bits: 12,
    refcount_order: 4,
    l2_form: L2Form::Standard,
    size: OLD,
    backing_len: 30 * CLUSTER,
};

const ENCRYPTED: Kind = Kind {
    cluster_bits: 12,
    l2_form: L2Form::Standard,
    data: Data::Inside,
    encrypted: Some(SectorNumbering::Host),
    backing_len: 0,
};

#[track_caller]
fn is_outside(result: &Result<()>, what: &str) {
    let problem = result.as_ref().err().map(crate::error::Error::problem);
    assert!(matches!(problem, Some(Problem::OutOfRange { .. })), "{what}: {result:?}");
}

/// Lets a change wait for a disk that becomes smaller, which must refuse it and leave nothing of it behind.
fn is_refused_by_a_smaller_disk(
    what: &str,
    image: &Image,
    below: &dyn Below,
    change: impl FnOnce() -> Result<()> + Send,
) {
    image.write(below, GuestOffset::ZERO, &vec![1; OLD as usize]).unwrap();
    let (shrunk, changed) = both(image, || image.shrink(&Nothing, NEW), change);
    shrunk.unwrap();
    is_outside(&changed, what);
    image.grow(below, OLD).unwrap();
    let mut expected = vec![1; NEW as usize];
    expected.resize(OLD as usize, 0);
    assert_same(&read_all(image, below), &expected, what);
    image.flush_all().unwrap();
}

#[test]
fn changes_behind_the_end_of_a_disk_that_became_smaller_meanwhile_are_refused() {
    // In the rest of the last cluster, in clusters that are gone, and across the end.
    for (offset, len) in [(NEW, 512), (15 * CLUSTER, CLUSTER), (NEW - 512, 3 * CLUSTER)] {
        let range = GuestRange::new(GuestOffset::new(offset), len);
        for zero in [None, Some(ZeroMode::Unmap), Some(ZeroMode::Keep)] {
            let store = Arc::new(MemoryStore::new(SHAPE.create()));
            let (image, below) = (open(store.clone()).unwrap(), SHAPE.below());
            let what = format!("{zero:?} of {len} bytes at {offset}");
            is_refused_by_a_smaller_disk(&what, &image, &*below, || match zero {
                Some(mode) => image.zero(&Nothing, range, mode),
                None => image.write(&Nothing, range.start, &vec![7; len as usize]),
            });
            assert_eq!(judge(&store.bytes()), Findings::default(), "{what}");
        }
    }
}

#[test]
fn parts_of_encrypted_sectors_behind_the_end_of_a_disk_that_became_smaller_are_not_written() {
    // These do not try to write in place before they wait for the range.
    for offset in [NEW + 3, 15 * CLUSTER + 3, NEW - 3] {
        let store = Arc::new(MemoryStore::new(ENCRYPTED.create(OLD)));
        let image =
            ENCRYPTED.open(store.clone(), Arc::<MemoryStore>::default(), Writability::Writable);
        is_refused_by_a_smaller_disk(&format!("at {offset}"), &image, &Nothing, || {
            image.write(&Nothing, GuestOffset::new(offset), &[7; 6])
        });
        assert_eq!(judge(&store.bytes()), Findings::default(), "at {offset}");
    }
}

#[test]
fn a_writer_that_came_while_the_disk_grew_is_refused_if_it_did_not_grow_in_the_end() {
    for fails in [false, true] {
        let old = NEW;
        let growing = Arc::new(OnceLock::<Arc<Image>>::new());
        let (told, result) = channel();
        let (seen, once) = (growing.clone(), Mutex::new(Some(told)));
        // At the first change of the file the new size is there, but not yet for good.
        let observer = move |_: &FaultStore, _| {
            let Some(image) = seen.get().cloned() else { return };
            let Some(told) = once.lock().unwrap().take() else { return };
            let writer = image.clone();
            std::thread::spawn(move || {
                told.send(writer.write(&Nothing, GuestOffset::new(15 * CLUSTER), &[7; 100]))
                    .unwrap();
            });
            wait_for_requests(&image, 2);
        };
        let shape = Shape { size: old, backing_len: 0, ..SHAPE };
        let store = Arc::new(FaultStore::observed(shape.create(), Box::new(observer)));
        let image = Arc::new(open(store.clone()).unwrap());
        image.write(&Nothing, GuestOffset::ZERO, &vec![1; old as usize]).unwrap();
        image.flush_all().unwrap();
        let next = store.operations();
        if fails {
            // The rest of the last cluster can't be made zero.
            store.fail(next..next + 1);
        }
        assert!(growing.set(image.clone()).is_ok());
        // Behind the end of the last cluster there may be anything: grow has to write.
        let grown = image.grow(&Nothing, OLD);
        let written = result.recv().unwrap();
        assert_eq!(grown.is_err(), fails, "{grown:?}");
        let mut expected = vec![1; old as usize];
        if fails {
            is_outside(&written, "a write");
        } else {
            written.unwrap();
            expected.resize(OLD as usize, 0);
            expected[15 * CLUSTER as usize..][..100].fill(7);
        }
        assert_same(&read_all(&image, &Nothing), &expected, "the disk");
        image.flush_all().unwrap();
        let bytes = store.after_power_cut(crate::store::fault::Survivors::Nothing);
        assert_eq!(judge(&bytes), Findings::default());
    }
}

#[test]
fn a_disk_that_became_larger_meanwhile_is_not_grown_to_less() {
    let store = Arc::new(MemoryStore::new(SHAPE.create()));
    let (image, below) = (open(store.clone()).unwrap(), SHAPE.below());
    let (large, less) = (2 * OLD, OLD + CLUSTER);
    let (first, second) = both(&image, || image.grow(&*below, large), || image.grow(&*below, less));
    first.unwrap();
    assert!(second.is_err());
    assert_eq!((image.size(), image.header().size), (large, large));
    let mut expected = SHAPE.empty_disk();
    expected.resize(large as usize, 0);
    assert_same(
        &read_all(&image, &*below)[OLD as usize..],
        &expected[OLD as usize..],
        "the new part",
    );
}

#[test]
fn a_disk_that_became_smaller_meanwhile_is_not_shrunk_to_more() {
    let store = Arc::new(MemoryStore::new(SHAPE.create()));
    let image = open(store.clone()).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &vec![1; OLD as usize]).unwrap();
    let shrink = |size| image.shrink(&Nothing, size);
    let (first, second) = both(&image, || shrink(NEW), || shrink(NEW + CLUSTER));
    first.unwrap();
    assert!(second.is_err());
    assert_eq!((image.size(), image.header().size), (NEW, NEW));
    assert_same(&read_all(&image, &Nothing), &vec![1; NEW as usize], "the disk");
    assert_eq!(judge(&store.bytes()), Findings::default());
}

#[test]
fn a_version_2_image_that_got_a_snapshot_meanwhile_keeps_its_size() {
    let shape = Shape { version: Version::V2, ..SHAPE };
    for size in [NEW, 2 * OLD] {
        let image = open(Arc::new(MemoryStore::new(shape.create()))).unwrap();
        let snapshot = || image.create_snapshot("s").map(drop);
        let (made, resized) = both(&image, snapshot, || match size {
            NEW => image.shrink(&Nothing, size),
            _ => image.grow(&Nothing, size),
        });
        made.unwrap();
        assert!(resized.is_err());
        assert_eq!(image.size(), OLD);
    }
}
