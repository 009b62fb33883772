//! A few threads on a tiny image, in thousands of schedules: `tests/run` builds these with the feature
//! `interleavings`. A failing schedule is printed and can be replayed with `shuttle::replay`.

mod log;

use std::sync::{Mutex, PoisonError};

use shuttle::rand::{RngCore as _, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, Runner};

use super::*;
use crate::random::seeds;
use crate::store::fault::{FaultStore, Operation, Survivors};
use checker::{Findings, check};
use log::{Log, SECTOR, Span};

const THREADS: u64 = 3;
const STEPS: usize = 4;

/// A backing file whose sectors each hold one byte, every third of them zeroes.
struct Stripes;

impl Below for Stripes {
    fn read(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        for (at, byte) in (offset.get()..).zip(buf) {
            *byte = if at < BELOW && at / SECTOR % 3 != 2 { 0xfe } else { 0 };
        }
        Ok(())
    }

    fn is_zero(&self, range: GuestRange) -> Result<bool> {
        let mut bytes = vec![0; range.len as usize];
        self.read(range.start, &mut bytes)?;
        Ok(bytes.iter().all(|&byte| byte == 0))
    }
}

const BELOW: u64 = 40 * SECTOR;

/// What the threads do to which disk.
#[derive(Clone)]
struct Scene {
    /// The image before.
    bytes: Vec<u8>,
    /// The sectors that the threads meet in.
    sectors: std::ops::Range<u64>,
    structure: Structure,
}

/// Whether the threads also change more than content.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Structure {
    Fixed,
    SnapshotsAndGrowth,
    Snapshots,
}

/// What the threads of one schedule share.
struct Stage {
    scene: Scene,
    image: Image,
    log: Arc<Log>,
    /// Snapshots with the time in which they were made.
    snapshots: Mutex<Vec<(Arc<SnapshotTree>, Span)>>,
}

impl Stage {
    fn step(&self, thread: u64, number: usize, random: &mut Random) {
        let Scene { sectors, structure, .. } = &self.scene;
        let first = sectors.start + random.below(sectors.end - sectors.start);
        let count = (1 + random.below(5)).min(sectors.end - first);
        let range = GuestRange::new(GuestOffset::new(first * SECTOR), count * SECTOR);
        let byte = (thread * 16) as u8 + number as u8 + 1;
        let zero = |mode| {
            self.log.write(range, 0, || self.image.zero(&Stripes, range, mode).unwrap());
        };
        match random.below(12) {
            0..=3 => self.log.write(range, byte, || {
                let data = vec![byte; range.len as usize];
                self.image.write(&Stripes, range.start, &data).unwrap();
            }),
            4 | 5 => zero(ZeroMode::Unmap),
            6 => zero(ZeroMode::Keep),
            7 | 8 => self.log.flush(|| self.image.flush().unwrap()),
            9 | 10 if *structure == Structure::SnapshotsAndGrowth => match random.below(4) {
                0 | 1 => self.snapshot(&format!("{thread} {number}")),
                2 => self.delete(),
                _ => self.grow(),
            },
            9..=11 if *structure == Structure::Snapshots => match random.below(4) {
                0 => self.delete(),
                _ => self.snapshot(&format!("{thread} {number}")),
            },
            _ => self.read(range),
        }
    }

    fn read(&self, range: GuestRange) {
        let mut found = vec![0; range.len as usize];
        let begin = self.log.now();
        {
            let _mapping = self.image.keep_mapping(range);
            self.image.read_active(&Stripes, range.start, &mut found).unwrap();
        }
        let span = Span { begin, end: self.log.now() };
        self.log.assert_allows(range.start.get() / SECTOR, &found, span, "a reader");
    }

    fn snapshot(&self, name: &str) {
        let begin = self.log.now();
        self.log.flush(|| {
            let tree = self.image.create_snapshot(name).unwrap();
            let span = Span { begin, end: self.log.now() };
            self.snapshots.lock().unwrap_or_else(PoisonError::into_inner).push((tree, span));
        });
    }

    /// Deletes a snapshot that somebody has made, while somebody may read it.
    fn delete(&self) {
        let newest = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some((tree, _)) = newest else { return };
        self.image.delete_snapshot(&tree.entry().id).unwrap();
        assert!(tree.keep().is_err(), "a deleted snapshot can be read");
    }

    fn grow(&self) {
        let size = self.image.size() + 20 * SECTOR;
        // Somebody else may have made it longer meanwhile; then nothing happens.
        let _ = self.image.grow(&Stripes, size);
    }

    /// All that must hold when everybody is done.
    fn end(&self, store: &FaultStore) {
        self.log.flush(|| self.image.flush_all().unwrap());
        let bytes = store.after_power_cut(Survivors::Nothing);
        assert_eq!(check(&bytes), Findings::default());
        let table = self.image.header().reftable_clusters;
        assert!(table <= 2, "the refcount table has grown to {table} clusters");
        assert_allowed(&self.log, bytes.clone(), self.log.cut(), "in the end");
        let image = Image::open(Arc::new(MemoryStore::new(bytes)), Writability::ReadOnly).unwrap();
        let snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(image.snapshots().len(), snapshots.len());
        for (made, span) in &*snapshots {
            let trees = image.snapshots();
            let tree = trees.iter().find(|tree| tree.entry().name == made.entry().name).unwrap();
            let disk = read_snapshot(&image, tree, &Stripes);
            self.log.assert_allows(0, &disk, *span, "a snapshot");
        }
    }
}

fn assert_allowed(log: &Log, bytes: Vec<u8>, span: Span, context: &str) {
    let image = Image::open(Arc::new(MemoryStore::new(bytes)), Writability::ReadOnly).unwrap();
    log.assert_allows(0, &read_all(&image, &Stripes), span, context);
}

/// Gives the others a turn at each operation of the store, and judges some power cuts.
fn watch(store: &FaultStore, operation: Operation, log: &Log, number: u64) {
    shuttle::thread::yield_now();
    if operation == Operation::Sync && number.is_multiple_of(4) && !std::thread::panicking() {
        let span = log.cut();
        let bytes = store.after_power_cut(Survivors::Torn(number));
        assert_eq!(check(&bytes).corruptions, Vec::<String>::new(), "cut at {span:?}");
        assert_allowed(log, bytes, span, "after a power cut");
    }
}

fn play(scene: &Scene) {
    let disk = {
        let store = Arc::new(MemoryStore::new(scene.bytes.clone()));
        read_all(&Image::open(store, Writability::ReadOnly).unwrap(), &Stripes)
    };
    let log = Arc::new(Log::new(&disk));
    let watched = log.clone();
    let first = thread_rng().next_u64() / 2;
    let number = std::sync::atomic::AtomicU64::new(first);
    let observer = move |store: &FaultStore, operation| {
        let number = number.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        watch(store, operation, &watched, number);
    };
    let store = Arc::new(FaultStore::observed(scene.bytes.clone(), Box::new(observer)));
    let image = open(store.clone()).unwrap();
    let stage = Arc::new(Stage { scene: scene.clone(), image, log, snapshots: Mutex::default() });
    let start = |thread| {
        let stage = stage.clone();
        let mut random = Random::new(thread_rng().next_u64());
        shuttle::thread::spawn(move || {
            (0..STEPS).for_each(|number| stage.step(thread, number, &mut random));
        })
    };
    let threads: Vec<_> = (0..THREADS).map(start).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    stage.end(&store);
}

fn run(scene: &Scene, scheduler: impl Scheduler + 'static) {
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.silence_warnings = true;
    let scene = scene.clone();
    Runner::new(scheduler, config).run(move || play(&scene));
}

/// Plays the scene in so many random schedules for each seed, and in as many that change few priorities.
fn run_all(scene: &Scene, schedules: usize) {
    for seed in seeds(10) {
        run(scene, RandomScheduler::new_from_seed(seed, schedules));
        run(scene, PctScheduler::new_from_seed(seed, 3, schedules));
    }
}

/// An image of which a part is written.
fn image(shape: Shape, written: u64) -> Vec<u8> {
    let store = Arc::new(MemoryStore::new(shape.create()));
    let image = open(store.clone()).unwrap();
    image.write(&Stripes, GuestOffset::ZERO, &vec![0xfd; written as usize]).unwrap();
    image.flush_all().unwrap();
    drop(image);
    store.bytes()
}

const SHAPE: Shape = Shape {
    version: Version::V3,
    cluster_bits: 10,
    refcount_order: 4,
    l2_form: L2Form::Standard,
    size: 24 * SECTOR,
    backing_len: 0,
};

#[test]
fn writes_discards_and_flushes_of_the_same_clusters_come_one_after_the_other_in_every_schedule() {
    for shape in [
        SHAPE,
        Shape { cluster_bits: 9, refcount_order: 0, ..SHAPE },
        Shape { version: Version::V2, ..SHAPE },
    ] {
        let bytes = shuttled(move || image(shape, 7 * SECTOR));
        let scene = Scene { bytes, sectors: 0..24, structure: Structure::Fixed };
        run_all(&scene, 300);
    }
}

#[test]
fn snapshots_and_growth_among_writes_see_one_moment_in_every_schedule() {
    let shape = Shape { cluster_bits: 9, size: 60 * SECTOR, ..SHAPE };
    let bytes = shuttled(move || image(shape, 7 * SECTOR));
    let scene = Scene { bytes, sectors: 0..12, structure: Structure::SnapshotsAndGrowth };
    run_all(&scene, 300);
}

#[test]
fn a_snapshot_beside_writers_and_a_flush_is_one_moment_in_every_schedule() {
    // Several L2 tables, so that writers come to some of them before they are counted.
    let shape = Shape { cluster_bits: 9, size: 200 * SECTOR, ..SHAPE };
    let bytes = shuttled(move || image(shape, 200 * SECTOR));
    let scene = Scene { bytes, sectors: 60..68, structure: Structure::Snapshots };
    run_all(&scene, 200);
}

#[test]
fn writers_at_the_end_of_the_refcount_table_grow_it_once_in_every_schedule() {
    // One cluster of table with 64 blocks of 64 refcounts describes 4096 clusters.
    const DESCRIBED: u64 = 4096;
    let shape = Shape { cluster_bits: 9, refcount_order: 6, size: DESCRIBED * SECTOR, ..SHAPE };
    let mut written = 3900;
    let bytes = loop {
        let bytes = shuttled(move || image(shape, written * SECTOR));
        if bytes.len() as u64 >= (DESCRIBED - 3) * SECTOR {
            break bytes;
        }
        written += 1;
    };
    let scene = Scene { bytes, sectors: written - 5..written + 40, structure: Structure::Fixed };
    run_all(&scene, 10);
}

/// Runs `make` where shuttle's locks work.
fn shuttled<T: Send + 'static>(make: impl Fn() -> T + Send + Sync + 'static) -> T {
    let made = Arc::new(Mutex::new(None));
    let place = made.clone();
    let once = RandomScheduler::new_from_seed(0, 1);
    Runner::new(once, Config::new()).run(move || {
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(make());
    });
    made.lock().unwrap_or_else(PoisonError::into_inner).take().expect("it was made")
}
