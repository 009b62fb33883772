//! Many threads at once, with the power cut at many moments.

use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::store::fault::{FaultStore, Survivors};
use crate::units::HostOffset;
use checker::{Findings, check};

/// A store that judges what a power cut would leave, at some of the syncs and punches of a run and at every move of
/// the refcount table.
struct Judge {
    inner: FaultStore,
    /// One of so many moments is judged.
    every: u64,
    moments: AtomicU64,
    verdicts: Mutex<Vec<String>>,
}

impl Judge {
    fn new(bytes: Vec<u8>, every: u64) -> Self {
        let (moments, verdicts) = (AtomicU64::new(0), Mutex::default());
        Self { inner: FaultStore::new(bytes), every, moments, verdicts }
    }

    fn moment(&self, what: &str) {
        let number = self.moments.fetch_add(1, Ordering::SeqCst);
        if number.is_multiple_of(self.every) {
            self.judge(what, number);
        }
    }

    fn judge(&self, what: &str, number: u64) {
        for survivors in [
            Survivors::Nothing,
            Survivors::All,
            Survivors::Some(number * 7919 + 1),
            Survivors::Some(number * 104_729 + 3),
        ] {
            let corruptions = check(&self.inner.after_power_cut(survivors)).corruptions;
            if let Some(first) = corruptions.first() {
                let verdict = format!("{what}, {survivors:?}: {first}");
                self.verdicts.lock().unwrap().push(verdict);
            }
        }
    }
}

impl Store for Judge {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> io::Result<()> {
        let written = self.inner.write_at(pieces, offset);
        if offset == crate::qcow2::offsets::REFTABLE {
            self.judge("move of the refcount table", offset.get());
        }
        written
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.moment("before a sync");
        let synced = self.inner.sync();
        std::thread::yield_now();
        synced
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        let punched = self.inner.punch_hole(offset, len);
        self.moment("after a punch");
        punched
    }

    fn next_data(&self, from: HostOffset) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(from)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
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
        size,
        backing_len,
    };
    for seed in 0..4 {
        for shape in [
            shape(Version::V3, 9, 4, 200 << 10, 150_000),
            shape(Version::V3, 10, 0, 250 << 10, 0),
            shape(Version::V2, 9, 4, 100 << 10, 0),
        ] {
            let context = format!("seed {seed}, {shape:?}");
            let below = shape.below();
            let store = Arc::new(Judge::new(shape.create(), 5));
            let image = open(store.clone()).unwrap();
            let models: Vec<_> = std::thread::scope(|scope| {
                let spawn = |thread| {
                    let (image, below) = (&image, &*below);
                    let random = Random(seed * 1000 + thread);
                    scope.spawn(move || work(image, below, shape, thread, random))
                };
                let threads: Vec<_> = (0..THREADS).map(spawn).collect();
                threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
            });
            image.flush_all().unwrap();
            drop(image);
            assert_eq!(*store.verdicts.lock().unwrap(), Vec::<String>::new(), "{context}");
            let bytes = store.inner.after_power_cut(Survivors::All);
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
        size: 3 << 20,
        backing_len: 0,
    };
    for _ in 0..3 {
        let store = Arc::new(Judge::new(shape.create(), u64::MAX));
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
        assert_eq!(*store.verdicts.lock().unwrap(), Vec::<String>::new());
        assert_eq!(check(&store.inner.after_power_cut(Survivors::All)), Findings::default());
    }
}
