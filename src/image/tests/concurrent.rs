//! Many threads at once, with the power cut at many moments.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::random::seeds;
use crate::store::fault::{FaultStore, Operation, Survivors};
use checker::{Findings, check};

/// Judges what a power cut would leave, at some moments of a run.
struct Judge {
    moments: AtomicU64,
    verdicts: Mutex<Vec<String>>,
}

/// When a judge looks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moments {
    /// Before one of so many operations.
    OneOf(u64),
    Syncs,
}

impl Judge {
    /// A judge, and a store for him to look at.
    fn over(bytes: Vec<u8>, when: Moments) -> (Arc<Self>, Arc<FaultStore>) {
        let judge = Arc::new(Self { moments: AtomicU64::new(0), verdicts: Mutex::default() });
        let watching = judge.clone();
        let observer = move |store: &FaultStore, operation| {
            std::thread::yield_now();
            if operation == Operation::Read {
                return;
            }
            let number = watching.moments.fetch_add(1, Ordering::SeqCst);
            let now = match when {
                Moments::OneOf(every) => number.is_multiple_of(every),
                Moments::Syncs => operation == Operation::Sync,
            };
            if now {
                watching.look_at(store, number);
            }
        };
        (judge, Arc::new(FaultStore::observed(bytes, Box::new(observer))))
    }

    fn look_at(&self, store: &FaultStore, number: u64) {
        for survivors in [
            Survivors::Nothing,
            Survivors::All,
            Survivors::Some(number * 2),
            Survivors::Some(number * 2 + 1),
            Survivors::Torn(number * 2),
            Survivors::Torn(number * 2 + 1),
        ] {
            let corruptions = check(&store.after_power_cut(survivors)).corruptions;
            if let Some(first) = corruptions.first() {
                let verdict = format!("moment {number}, {survivors:?}: {first}");
                self.verdicts.lock().unwrap().push(verdict);
            }
        }
    }
}

/// Bytes of a stripe; odd, so that neighbours of different threads share clusters.
const STRIPE: u64 = 1700;
const THREADS: u64 = 6;

/// Changes the stripes of one thread and keeps a model of them.
fn work(
    image: &Image,
    below: &dyn Below,
    shape: Shape,
    thread: u64,
    mut random: Random,
) -> Vec<(u64, Vec<u8>)> {
    let starts = (thread * STRIPE..shape.size).step_by((STRIPE * THREADS) as usize);
    let mut mine: Vec<(u64, Vec<u8>)> = starts
        .map(|at| {
            let mut bytes = vec![0; STRIPE.min(shape.size - at) as usize];
            below.read(GuestOffset::new(at), &mut bytes).unwrap();
            (at, bytes)
        })
        .collect();
    for step in 0..120 {
        let count = mine.len() as u64;
        let (at, bytes) = &mut mine[random.below(count) as usize];
        let start = random.below(bytes.len() as u64);
        let len = 1 + random.below(bytes.len() as u64 - start);
        let inside = start as usize..(start + len) as usize;
        let range = GuestRange::new(GuestOffset::new(*at + start), len);
        match random.below(12) {
            0..=5 => {
                let byte = 1 + random.below(255) as u8;
                image.write(below, range.start, &vec![byte; len as usize]).unwrap();
                bytes[inside].fill(byte);
            }
            6..=8 => {
                image.zero(below, range, ZeroMode::Unmap).unwrap();
                bytes[inside].fill(0);
            }
            9 => {
                image.zero(below, range, ZeroMode::Keep).unwrap();
                bytes[inside].fill(0);
            }
            10 => {
                let whole = GuestRange::new(GuestOffset::new(*at), bytes.len() as u64);
                let _mapping = image.keep_mapping(whole);
                let mut found = vec![0; bytes.len()];
                image.read_active(below, whole.start, &mut found).unwrap();
                assert_same(&found, bytes, "while others write");
            }
            _ if thread == 0 && step % 7 == 0 => {
                // One-bit refcounts can't share; that is told, and nothing else happens.
                let _ = image.create_snapshot(&format!("s{step}"));
            }
            _ => image.flush().unwrap(),
        }
    }
    mine
}

#[test]
fn threads_that_share_clusters_lose_nothing_and_a_power_cut_at_any_time_corrupts_nothing() {
    let shape = |version, cluster_bits, refcount_order, size, backing_len| Shape {
        version,
        cluster_bits,
        refcount_order,
        l2_form: L2Form::Standard,
        size,
        backing_len,
    };
    for seed in seeds(4) {
        for shape in [
            shape(Version::V3, 9, 4, 200 << 10, 150_000),
            shape(Version::V3, 10, 0, 250 << 10, 0),
            shape(Version::V2, 9, 4, 100 << 10, 0),
        ] {
            let context = format!("seed {seed}, {shape:?}");
            let below = shape.below();
            let (judge, store) = Judge::over(shape.create(), Moments::OneOf(25));
            let image = open(store.clone()).unwrap();
            let models: Vec<_> = std::thread::scope(|scope| {
                let spawn = |thread| {
                    let (image, below) = (&image, &*below);
                    let random = Random::new(seed * 1000 + thread);
                    scope.spawn(move || work(image, below, shape, thread, random))
                };
                let threads: Vec<_> = (0..THREADS).map(spawn).collect();
                threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
            });
            image.flush_all().unwrap();
            drop(image);
            assert_eq!(*judge.verdicts.lock().unwrap(), Vec::<String>::new(), "{context}");
            let bytes = store.after_power_cut(Survivors::All);
            assert_eq!(check(&bytes), Findings::default(), "{context}");
            let image = Image::open(Arc::new(MemoryStore::new(bytes)), Writability::ReadOnly);
            let disk = read_all(&image.unwrap(), &*below);
            for (at, expected) in &models {
                assert_same(&disk[*at as usize..][..expected.len()], expected, &context);
            }
        }
    }
}

#[test]
fn many_writers_that_need_a_longer_refcount_table_get_one_and_no_more() {
    let shape = Shape {
        version: Version::V3,
        cluster_bits: 9,
        refcount_order: 6,
        l2_form: L2Form::Standard,
        size: 3 << 20,
        backing_len: 0,
    };
    for _ in 0..3 {
        let (judge, store) = Judge::over(shape.create(), Moments::Syncs);
        let image = open(store.clone()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8_u64 {
                let image = &image;
                let part = shape.size / 8;
                scope.spawn(move || {
                    for at in (0..part).step_by(8192) {
                        let offset = GuestOffset::new(thread * part + at);
                        image.write(&Nothing, offset, &[thread as u8 + 1; 8192]).unwrap();
                    }
                });
            }
        });
        image.flush_all().unwrap();
        // 3 MiB in clusters of 512 bytes: 6144 of data, 64 to a block, 64 blocks to a cluster of the table.
        let clusters = image.header().reftable_clusters;
        assert!(clusters <= 4, "the table has {clusters} clusters");
        drop(image);
        assert_eq!(*judge.verdicts.lock().unwrap(), Vec::<String>::new());
        assert_eq!(check(&store.after_power_cut(Survivors::All)), Findings::default());
    }
}
