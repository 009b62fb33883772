//! Snapshots made, read and deleted while others write: each is one moment between what was acknowledged before and what
//! had begun after.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use super::*;
use crate::error::Problem;
use crate::random::seeds;
use crate::store::fault::{FaultStore, Operation, Survivors};
use checker::{Findings, check};

/// Bytes of a block, which is written whole or not at all; odd, so that neighbours share clusters.
const BLOCK: u64 = 1500;
const WRITERS: u64 = 4;
const SNAPSHOTS: u32 = 6;

/// What was written of a block. A version is the number of the write among those of its writer, who does one after the
/// other.
#[derive(Default)]
struct Block {
    begun: AtomicU32,
    acknowledged: AtomicU32,
}

/// The bytes of a block's version, of which none occurs in another.
fn bytes_of(version: u32, len: usize) -> Vec<u8> {
    version.to_be_bytes().into_iter().cycle().take(len).collect()
}

fn versions(blocks: &[Block], of: impl Fn(&Block) -> &AtomicU32) -> Vec<u32> {
    blocks.iter().map(|block| of(block).load(Ordering::SeqCst)).collect()
}

fn read_versions(disk: &[u8], context: &str) -> Vec<u32> {
    let version = |(number, bytes): (usize, &[u8])| {
        let version = u32::from_be_bytes(*bytes.first_chunk().unwrap());
        let whole = bytes == bytes_of(version, bytes.len());
        assert!(whole, "{context}: block {number} is torn at version {version}");
        version
    };
    disk.chunks(BLOCK as usize).enumerate().map(version).collect()
}

#[test]
fn a_snapshot_beside_writers_is_one_moment_of_the_disk() {
    for seed in seeds(6) {
        for (cluster_bits, l2_form) in [(9, L2Form::Standard), (14, L2Form::Extended)] {
            let shape = Shape {
                version: Version::V3,
                cluster_bits,
                refcount_order: 4,
                l2_form,
                size: BLOCK * 256,
                backing_len: 0,
            };
            beside_writers(shape, seed);
        }
    }
}

fn beside_writers(shape: Shape, seed: u64) {
    let context = format!("seed {seed}, {shape:?}");
    let observer = |_: &FaultStore, _| std::thread::yield_now();
    let store = Arc::new(FaultStore::observed(shape.create(), Box::new(observer)));
    let image = open(store.clone()).unwrap();
    let blocks: Vec<Block> = (0..shape.size / BLOCK).map(|_| Block::default()).collect();
    let finished = AtomicBool::new(false);
    let moments = Mutex::new(Vec::new());
    let histories: Vec<Vec<usize>> = std::thread::scope(|scope| {
        let start = |writer| {
            let (image, blocks, finished) = (&image, &blocks, &finished);
            scope.spawn(move || write_on(image, blocks, finished, writer, seed))
        };
        let writers: Vec<_> = (0..WRITERS).map(start).collect();
        for number in 0..SNAPSHOTS {
            let least = versions(&blocks, |block| &block.acknowledged);
            let tree = image.create_snapshot(&format!("s{number}")).unwrap();
            let most = versions(&blocks, |block| &block.begun);
            let now = read_snapshot(&image, &tree, &Nothing);
            moments.lock().unwrap().push((tree.clone(), least, most, now));
            if number % 3 == 2 {
                image.delete_snapshot(&tree.entry().id).unwrap();
                let gone = tree.keep().map(drop).unwrap_err();
                assert!(matches!(gone.problem(), Problem::SnapshotGone { .. }), "{gone}");
                moments.lock().unwrap().pop();
            }
        }
        finished.store(true, Ordering::SeqCst);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    image.flush_all().unwrap();
    drop(image);
    let bytes = store.after_power_cut(Survivors::Nothing);
    assert_eq!(check(&bytes), Findings::default(), "{context}");
    let image = Image::open(Arc::new(MemoryStore::new(bytes)), Writability::ReadOnly).unwrap();
    let last = read_versions(&read_all(&image, &Nothing), &context);
    assert_eq!(last, versions(&blocks, |block| &block.acknowledged), "{context}");
    let moments = moments.into_inner().unwrap();
    assert_eq!(image.snapshots().len(), moments.len(), "{context}");
    for (tree, (made, least, most, at_once)) in image.snapshots().iter().zip(moments) {
        let context = format!("{context}, {}", made.entry().name);
        let disk = read_snapshot(&image, tree, &Nothing);
        assert_same(&disk, &at_once, &format!("{context} has changed since it was made"));
        let found = read_versions(&disk, &context);
        for (writer, history) in histories.iter().enumerate() {
            assert_is_a_beginning(&found, history, writer, &context);
        }
        for (number, version) in found.into_iter().enumerate() {
            let allowed = least[number]..=most[number];
            assert!(
                allowed.contains(&version),
                "{context}: block {number} is {version}, not {allowed:?}"
            );
        }
    }
}

/// Panics unless what a snapshot has of the blocks of one writer is what he had written up to some moment.
fn assert_is_a_beginning(found: &[u32], history: &[usize], writer: usize, context: &str) {
    let own = |number: &usize| number % WRITERS as usize == writer;
    let last = (0..found.len()).filter(own).map(|number| found[number]).max().unwrap_or(0);
    let mut expected = vec![0; found.len()];
    for (version, &number) in (1..=last).zip(history) {
        expected[number] = version;
    }
    for number in (0..found.len()).filter(own) {
        assert_eq!(
            found[number], expected[number],
            "{context}: block {number} is not as it was when writer {writer} had written {last} times"
        );
    }
}

/// Writes the blocks of one writer until all snapshots are made. Answers which, one after the other.
fn write_on(
    image: &Image,
    blocks: &[Block],
    finished: &AtomicBool,
    writer: u64,
    seed: u64,
) -> Vec<usize> {
    let mut random = Random::new(seed * 100 + writer);
    let count = blocks.len() as u64 / WRITERS;
    let mut history = Vec::new();
    while !finished.load(Ordering::SeqCst) {
        let number = random.below(count) * WRITERS + writer;
        history.push(number as usize);
        let (block, version) = (&blocks[number as usize], history.len() as u32);
        block.begun.store(version, Ordering::SeqCst);
        let at = GuestOffset::new(number * BLOCK);
        image.write(&Nothing, at, &bytes_of(version, BLOCK as usize)).unwrap();
        block.acknowledged.store(version, Ordering::SeqCst);
        if random.below(30) == 0 {
            image.flush().unwrap();
        }
    }
    history
}

#[test]
fn what_is_written_while_the_tables_are_counted_is_not_in_the_snapshot() {
    for act in 0..4 {
        let shape = Shape {
            version: Version::V3,
            cluster_bits: 9,
            refcount_order: 4,
            l2_form: L2Form::Standard,
            size: 256 << 10,
            backing_len: 0,
        };
        let bytes = {
            let store = Arc::new(MemoryStore::new(shape.create()));
            let image = open(store.clone()).unwrap();
            image.write(&Nothing, GuestOffset::ZERO, &vec![1; shape.size as usize]).unwrap();
            image.flush_all().unwrap();
            drop(image);
            store.bytes()
        };
        let frozen = Arc::new(OnceLock::<Arc<Image>>::new());
        let (seen, done) = (frozen.clone(), Arc::new(AtomicBool::new(false)));
        let was_done = done.clone();
        // The image was just opened: its tables are read when they are counted.
        let observer = move |_: &FaultStore, operation| {
            let Some(image) = seen.get().filter(|_| operation == Operation::Read) else { return };
            let is_frozen =
                image.metadata.try_lock().is_ok_and(|metadata| metadata.freeze.is_some());
            if !is_frozen || done.swap(true, Ordering::SeqCst) {
                return;
            }
            // The first table and others, in whose middle something changes.
            for table in [0, 3, 7] {
                let range = GuestRange::new(GuestOffset::new((table << 15) + 5120), 3000);
                match act {
                    0 => image.write(&Nothing, range.start, &[2; 3000]),
                    1 => image.zero(&Nothing, range, ZeroMode::Unmap),
                    2 => image.zero(&Nothing, range, ZeroMode::Keep),
                    _ => {
                        image.write(&Nothing, range.start, &[2; 3000]).and_then(|()| image.flush())
                    }
                }
                .unwrap();
            }
        };
        let store = Arc::new(FaultStore::observed(bytes, Box::new(observer)));
        let image = Arc::new(open(store.clone()).unwrap());
        assert!(frozen.set(image.clone()).is_ok());
        let tree = image.create_snapshot("s").unwrap();
        assert!(was_done.load(Ordering::SeqCst), "nobody wrote meanwhile");
        let before = vec![1; shape.size as usize];
        assert_same(&read_snapshot(&image, &tree, &Nothing), &before, "the snapshot");
        let byte = if act % 3 == 0 { 2 } else { 0 };
        let mut now = before.clone();
        for table in [0, 3, 7] {
            now[(table << 15) + 5120..][..3000].fill(byte);
        }
        assert_same(&read_all(&image, &Nothing), &now, "the disk");
        image.flush_all().unwrap();
        let bytes = store.after_power_cut(Survivors::Nothing);
        assert_eq!(check(&bytes), Findings::default());
        let image = Image::open(Arc::new(MemoryStore::new(bytes)), Writability::ReadOnly).unwrap();
        let tree = &image.snapshots()[0];
        assert_same(&read_snapshot(&image, tree, &Nothing), &before, "the snapshot, read anew");
    }
}

/// A snapshot that can't be counted fails, and whoever writes meanwhile does not.
#[test]
fn a_snapshot_that_can_not_be_counted_fails_and_no_writer_beside_it_does() {
    let shape = Shape {
        version: Version::V3,
        cluster_bits: 9,
        refcount_order: 1,
        l2_form: L2Form::Standard,
        size: BLOCK * 256,
        backing_len: 0,
    };
    let observer = |_: &FaultStore, _| std::thread::yield_now();
    let store = Arc::new(FaultStore::observed(shape.create(), Box::new(observer)));
    let image = open(store.clone()).unwrap();
    let blocks: Vec<Block> = (0..shape.size / BLOCK).map(|_| Block::default()).collect();
    for number in 0..blocks.len() as u64 {
        let at = GuestOffset::new(number * BLOCK);
        image.write(&Nothing, at, &bytes_of(0, BLOCK as usize)).unwrap();
    }
    // Two bits count up to three: the disk and two snapshots.
    image.create_snapshot("a").unwrap();
    image.create_snapshot("b").unwrap();
    // What the first tables name is the disk's alone: they are counted before the others can't be.
    let rewritten = blocks.len() as u64 / 4;
    for number in 0..rewritten {
        let at = GuestOffset::new(number * BLOCK);
        image.write(&Nothing, at, &bytes_of(0, BLOCK as usize)).unwrap();
    }
    assert!(image.create_snapshot("c").is_err(), "a third snapshot was counted");
    image.flush_all().unwrap();
    assert_eq!(check(&store.after_power_cut(Survivors::Nothing)), Findings::default());
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (image, blocks, finished) = (&image, &blocks, &finished);
            scope.spawn(move || write_on(image, blocks, finished, writer, 3));
        }
        let mut refused = 0;
        for _ in 0..8 {
            let Err(error) = image.create_snapshot("c") else { break };
            assert!(error.to_string().contains("2-bit refcounts can count"), "{error}");
            refused += 1;
        }
        assert!(refused > 0, "a third snapshot was counted");
        finished.store(true, Ordering::SeqCst);
    });
    image.flush_all().unwrap();
    assert_eq!(check(&store.after_power_cut(Survivors::Nothing)), Findings::default());
    let found = read_versions(&read_all(&image, &Nothing), "the disk");
    assert_eq!(found, versions(&blocks, |block| &block.acknowledged));
}
