//! Snapshots made, applied and deleted among random changes: every point in time is what it was.

use super::*;
use crate::error::Problem;
use crate::random::seeds;

/// An image with all its points in time, remembered byte by byte.
struct World {
    shape: Shape,
    below: Box<dyn Below>,
    store: Arc<MemoryStore>,
    image: Option<Image>,
    disk: Vec<u8>,
    /// Id, and the disk as it was.
    snapshots: Vec<(String, Vec<u8>)>,
    made: u32,
}

impl World {
    fn new(shape: Shape) -> Self {
        Self::of(shape, shape.create(), shape.empty_disk())
    }

    fn of(shape: Shape, bytes: Vec<u8>, disk: Vec<u8>) -> Self {
        let store = Arc::new(MemoryStore::new(bytes));
        let image = Some(open(store.clone()).unwrap());
        let below = shape.below();
        Self { shape, below, store, image, disk, snapshots: Vec::new(), made: 0 }
    }

    fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    fn change(&mut self, random: &mut Random) {
        let change = Change::random(random, self.image().size());
        change.apply_to_image(self.image(), &*self.below).unwrap();
        change.apply_to_model(&mut self.disk);
    }

    fn create(&mut self) {
        self.made += 1;
        match self.image().create_snapshot(&format!("s{}", self.made)) {
            Ok(tree) => self.snapshots.push((tree.entry().id.clone(), self.disk.clone())),
            Err(error) => assert_too_narrow(self.shape, &error),
        }
    }

    fn apply(&mut self, random: &mut Random) {
        let Some((id, disk)) = self.pick(random) else { return };
        match self.image().apply_snapshot(&id) {
            Ok(()) => self.disk = disk,
            Err(error) => assert_too_narrow(self.shape, &error),
        }
    }

    fn delete(&mut self, random: &mut Random) {
        let Some((id, _)) = self.pick(random) else { return };
        self.image().delete_snapshot(&id).unwrap();
        self.snapshots.retain(|(other, _)| *other != id);
    }

    fn resize(&mut self, random: &mut Random) {
        if self.shape.version == Version::V2 && !self.snapshots.is_empty() {
            return;
        }
        let size = 512 * (1 + random.below(2 * self.shape.size / 512));
        if size >= self.image().size() {
            self.image().grow(&*self.below, size).unwrap();
        } else {
            self.image().shrink(&*self.below, size).unwrap();
        }
        self.disk.resize(size as usize, 0);
    }

    fn reopen(&mut self) {
        self.image().flush_all().unwrap();
        self.image = None;
        self.image = Some(open(self.store.clone()).unwrap());
    }

    fn pick(&self, random: &mut Random) -> Option<(String, Vec<u8>)> {
        let count = self.snapshots.len() as u64;
        (count > 0).then(|| self.snapshots[random.below(count) as usize].clone())
    }

    /// Panics unless every point in time holds what it held.
    fn verify(&self, context: &str) {
        assert_sound(&self.store, context);
        assert_same(&read_all(self.image(), &*self.below), &self.disk, context);
        let trees = self.image().snapshots();
        assert_eq!(trees.len(), self.snapshots.len(), "{context}");
        for (tree, (id, disk)) in trees.iter().zip(&self.snapshots) {
            assert_eq!(&tree.entry().id, id, "{context}");
            let found = read_snapshot(self.image(), tree, &*self.below);
            assert_same(&found, disk, &format!("{context}, snapshot {id}"));
        }
    }

    /// Panics if anything is counted wrong once all is written.
    fn verify_counts(&self, context: &str) {
        self.image().flush_all().unwrap();
        assert_eq!(judge(&self.store.bytes()), Findings::default(), "{context}");
    }
}

/// A few bits count few owners.
fn assert_too_narrow(shape: Shape, error: &crate::error::Error) {
    let said = error.to_string();
    assert!(shape.refcount_order < 3 && said.contains("bit refcounts can count"), "{said}");
}

fn run(mut world: World, random: &mut Random, context: &str) {
    for step in 0..120 {
        let context = format!("{context}, step {step}");
        match random.below(20) {
            0 | 1 if world.snapshots.len() < 5 => world.create(),
            2 | 3 => world.apply(random),
            4 | 5 => world.delete(random),
            6 => world.resize(random),
            7 => world.reopen(),
            _ => {
                world.change(random);
                assert_sound(&world.store, &context);
                continue;
            }
        }
        world.verify(&context);
        world.verify_counts(&context);
    }
    world.verify(context);
    while let Some((id, _)) = world.snapshots.pop() {
        world.image().delete_snapshot(&id).unwrap();
        world.verify(context);
        world.verify_counts(context);
    }
}

#[test]
fn random_snapshots_made_applied_and_deleted_keep_every_point_in_time() {
    for seed in seeds(30) {
        let mut random = Random::new(seed);
        let shape = Shape::random(&mut random);
        run(World::new(shape), &mut random, &format!("seed {seed}, {shape:?}"));
    }
}

#[test]
fn compressed_clusters_are_counted_through_making_applying_and_deleting() {
    for (seed, refcount_order) in seeds(4).zip([4, 3, 2, 6].into_iter().cycle()) {
        let mut random = Random::new(seed);
        let shape = Shape {
            version: Version::V3,
            cluster_bits: 12,
            refcount_order,
            l2_form: L2Form::Standard,
            size: 200 << 10,
            backing_len: 0,
        };
        let disk: Vec<u8> = (0..shape.size).map(|at| (at / 90) as u8).collect();
        let world = World::of(shape, qemu::packed(&disk, &shape.qemu_options()), disk);
        run(world, &mut random, &format!("seed {seed}, {shape:?}"));
    }
}

const SHAPE: Shape = Shape {
    version: Version::V3,
    cluster_bits: 9,
    refcount_order: 4,
    l2_form: L2Form::Standard,
    size: 100 << 10,
    backing_len: 60_000,
};

/// An image with two snapshots, both different from the disk.
fn with_two() -> World {
    let mut world = World::new(SHAPE);
    let mut random = Random::new(5);
    for _ in 0..2 {
        (0..20).for_each(|_| world.change(&mut random));
        world.create();
    }
    (0..20).for_each(|_| world.change(&mut random));
    world.image().flush_all().unwrap();
    world
}

#[test]
fn deleting_every_snapshot_gives_back_all_that_only_they_had() {
    let mut world = World::new(SHAPE);
    world.image().write(&Nothing, GuestOffset::ZERO, &[1; 40_000]).unwrap();
    world.create();
    world.image().write(&Nothing, GuestOffset::ZERO, &[2; 40_000]).unwrap();
    world.image().flush_all().unwrap();
    let count = |world: &World| own_check(&world.store.bytes()).0.allocated_clusters;
    let held = world.store.bytes().iter().filter(|&&byte| byte == 1).count();
    assert!(held >= 40_000, "the snapshot's data is not there");
    world.image().delete_snapshot("1").unwrap();
    let held = world.store.bytes().iter().filter(|&&byte| byte == 1).count();
    assert!(held < 2_000, "{held} bytes of a deleted snapshot are left");
    // What is the disk's own again is overwritten in place.
    let (before, len) = (count(&world), world.store.len().unwrap());
    world.image().write(&Nothing, GuestOffset::ZERO, &[3; 40_000]).unwrap();
    world.image().flush_all().unwrap();
    assert_eq!((count(&world), world.store.len().unwrap()), (before, len));
}

#[test]
fn a_snapshot_that_is_not_there_is_named_and_nothing_changes() {
    let world = with_two();
    let before = world.store.bytes();
    for error in [
        world.image().delete_snapshot("7").unwrap_err(),
        world.image().apply_snapshot("s1").unwrap_err(),
    ] {
        assert!(matches!(error.problem(), Problem::NoSuchSnapshot { .. }), "{error}");
    }
    assert!(world.store.bytes() == before, "the file has changed");
}

#[test]
fn whoever_looks_at_a_deleted_snapshot_is_told_so_and_sees_no_other_bytes() {
    let world = with_two();
    let tree = world.image().snapshots()[0].clone();
    let range = GuestRange::new(GuestOffset::ZERO, 512);
    std::thread::scope(|scope| {
        let in_use = tree.keep().unwrap();
        let deletion = scope.spawn(|| world.image().delete_snapshot("1"));
        // It waits: what the reader has looked up is still there.
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!deletion.is_finished(), "a snapshot was deleted under its reader");
        drop(in_use);
        deletion.join().unwrap().unwrap();
    });
    let gone = world.image().map(Tree::Snapshot(&tree), range).unwrap_err();
    assert!(matches!(gone.problem(), Problem::SnapshotGone { .. }), "{gone}");
    assert_eq!(gone.errno(), libc::ESTALE);
    world.image().write(&Nothing, GuestOffset::ZERO, &[1; 512]).unwrap();
}

#[test]
fn a_snapshot_whose_tables_lead_nowhere_is_neither_deleted_nor_applied_and_the_disk_stays() {
    let world = with_two();
    let header = world.image().header();
    let bytes = world.store.bytes();
    let number = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
    let l1 = number(header.snapshots_offset.get());
    let l2 = number(l1) & 0x00ff_ffff_ffff_fe00;
    let active_l2 = number(header.l1_offset.get()) & 0x00ff_ffff_ffff_fe00;
    assert_ne!(l2, active_l2, "the table is shared");
    let far = 1_u64 << 40;
    for (at, value) in [
        (l1, 0x201),
        (l1, far),
        (l1, header.l1_offset.get()),
        (l1, header.reftable_offset.get()),
        (l1 + 8, l2),
        (l2, far),
        (l2, header.l1_offset.get()),
        (l2, active_l2),
    ] {
        let mut bytes = bytes.clone();
        bytes[at as usize..][..8].copy_from_slice(&u64::to_be_bytes(value));
        let store = Arc::new(MemoryStore::new(bytes.clone()));
        let image = open(store.clone()).unwrap();
        let context = format!("{value:#x} at {at:#x}");
        for result in [image.delete_snapshot("1"), image.apply_snapshot("1")] {
            let said = result.expect_err(&context).to_string();
            assert!(said.contains("\"s1\""), "{context}: {said}");
        }
        assert!(store.bytes() == bytes, "{context}: the file has changed");
        image.write(&*world.below, GuestOffset::new(50_000), &[1; 5000]).unwrap();
        image.flush_all().unwrap();
    }
}

#[test]
fn a_machines_state_stays_with_its_snapshot_and_is_freed_with_it() {
    // As QEMU has it: in the L1 table behind the disk, at the next L2 table.
    let shape = Shape { cluster_bits: 9, size: 32 << 10, backing_len: 0, ..SHAPE };
    let mut world = World::new(shape);
    let mut random = Random::new(9);
    (0..20).for_each(|_| world.change(&mut random));
    let disk = world.disk.clone();
    world.image().grow(&Nothing, 100 << 10).unwrap();
    let state = vec![0xcd; 20_000];
    world.image().write(&Nothing, GuestOffset::new(32 << 10), &state).unwrap();
    world.create();
    world.image().shrink(&Nothing, 32 << 10).unwrap();
    world.image().flush_all().unwrap();
    let table = world.image().header().snapshots_offset.get() as usize;
    world.image = None;
    let mut bytes = world.store.bytes();
    bytes[table + 40..table + 48].copy_from_slice(&u64::to_be_bytes(20_000));
    bytes[table + 48..table + 56].copy_from_slice(&u64::to_be_bytes(32 << 10));
    let store = Arc::new(MemoryStore::new(bytes));
    let image = open(store.clone()).unwrap();
    let holds_state = || store.bytes().iter().filter(|&&byte| byte == 0xcd).count() >= 20_000;
    for _ in 0..3 {
        image.write(&Nothing, GuestOffset::ZERO, &[7; 9000]).unwrap();
        image.apply_snapshot("1").unwrap();
        assert_same(&read_all(&image, &Nothing), &disk, "the disk");
        assert_eq!(judge(&store.bytes()), Findings::default());
        assert_eq!(image.header().l1_entries, 1, "the state has come to the disk");
        assert!(holds_state(), "the state is gone");
    }
    image.delete_snapshot("1").unwrap();
    assert!(!holds_state(), "the state is left");
    assert_eq!(judge(&store.bytes()), Findings::default());
}

#[test]
fn the_entries_of_other_snapshots_are_kept_as_the_bytes_they_are() {
    let mut world = with_two();
    world.create();
    world.image = None;
    // An entry of another program, with extra data that nobody here knows.
    let mut bytes = world.store.bytes();
    let header = crate::image::open::read_header(&MemoryStore::new(bytes.clone())).unwrap();
    let table = header.snapshots_offset.get() as usize;
    let entry_len = 40 + 24 + 8;
    let second = table + entry_len;
    let third = bytes[second + entry_len..second + 2 * entry_len].to_vec();
    bytes[second + 36..second + 40].copy_from_slice(&32_u32.to_be_bytes());
    let name = bytes[second + 64..second + 67].to_vec();
    bytes[second + 64..second + 72].copy_from_slice(b"strange!");
    bytes[second + 72..second + 75].copy_from_slice(&name);
    bytes[second + 75..second + 80].fill(0);
    bytes[second + 80..second + 80 + entry_len].copy_from_slice(&third);
    let kept = bytes[second..second + 80].to_vec();
    let store = Arc::new(MemoryStore::new(bytes));
    let image = open(store.clone()).unwrap();
    image.delete_snapshot("1").unwrap();
    image.create_snapshot("another").unwrap();
    image.delete_snapshot("3").unwrap();
    let table = image.header().snapshots_offset.get() as usize;
    assert!(store.bytes()[table..table + 80] == kept[..], "the entry has changed");
    assert_eq!(judge(&store.bytes()), Findings::default());
}

#[test]
fn a_version_2_image_does_not_get_another_size_from_a_snapshot() {
    let shape = Shape { version: Version::V2, ..SHAPE };
    let mut world = World::new(shape);
    world.create();
    let table = world.image().header().snapshots_offset.get() as usize;
    world.image = None;
    let mut bytes = world.store.bytes();
    bytes[table + 48..table + 56].copy_from_slice(&u64::to_be_bytes(50 << 10));
    let image = open(Arc::new(MemoryStore::new(bytes))).unwrap();
    assert!(matches!(
        image.apply_snapshot("1").unwrap_err().problem(),
        Problem::Unsupported { .. }
    ));
    image.delete_snapshot("1").unwrap();
}

/// Sets COPIED in all entries of the L2 table at `table` that have a cluster.
fn flag_all(bytes: &mut [u8], table: u64) {
    for entry in bytes[table as usize..][..512].chunks_exact_mut(8) {
        if entry[..7].iter().any(|&byte| byte != 0) {
            entry[0] |= 0x80;
        }
    }
}

/// Where the first L2 table is that the L1 table at `l1` names.
fn first_table(bytes: &[u8], l1: u64) -> u64 {
    let entry = u64::from_be_bytes(bytes[l1 as usize..][..8].try_into().unwrap());
    entry & 0x00ff_ffff_ffff_fe00
}

#[test]
fn flags_of_a_table_that_is_shared_let_nobody_write_in_place_what_a_snapshot_has() {
    let mut world = World::new(Shape { backing_len: 0, ..SHAPE });
    world.image().write(&Nothing, GuestOffset::ZERO, &[1; 30_000]).unwrap();
    world.disk[..30_000].fill(1);
    world.create();
    let l1 = world.image().header().l1_offset.get();
    world.image = None;
    let mut bytes = world.store.bytes();
    let table = first_table(&bytes, l1);
    flag_all(&mut bytes, table);
    let store = Arc::new(MemoryStore::new(bytes));
    let image = open(store.clone()).unwrap();
    for at in [0, 5120, 512, 5120, 1024] {
        image.write(&Nothing, GuestOffset::new(at), &[2; 512]).unwrap();
    }
    image.flush_all().unwrap();
    let tree = &image.snapshots()[0];
    assert_same(&read_snapshot(&image, tree, &Nothing), &world.disk, "the snapshot");
    assert_eq!(judge(&store.bytes()), Findings::default());
}

#[test]
fn flags_that_a_snapshot_has_mean_nothing_when_it_is_applied() {
    let mut world = World::new(Shape { backing_len: 0, ..SHAPE });
    world.image().write(&Nothing, GuestOffset::ZERO, &[1; 30_000]).unwrap();
    world.disk[..30_000].fill(1);
    world.create();
    world.image().write(&Nothing, GuestOffset::ZERO, &[2; 512]).unwrap();
    let l1 = world.image().snapshots()[0].entry().l1_offset.get();
    world.image().flush_all().unwrap();
    world.image = None;
    let mut bytes = world.store.bytes();
    let table = first_table(&bytes, l1);
    flag_all(&mut bytes, table);
    assert_eq!(judge(&bytes), Findings::default(), "flags of a snapshot count for nothing");
    let store = Arc::new(MemoryStore::new(bytes));
    let image = open(store.clone()).unwrap();
    image.apply_snapshot("1").unwrap();
    assert_eq!(judge(&store.bytes()), Findings::default());
    image.write(&Nothing, GuestOffset::new(1024), &[3; 512]).unwrap();
    image.flush_all().unwrap();
    let tree = &image.snapshots()[0];
    assert_same(&read_snapshot(&image, tree, &Nothing), &world.disk, "the snapshot");
    assert_eq!(judge(&store.bytes()), Findings::default());
}

#[test]
fn one_bit_that_can_not_count_two_owners_is_said_before_anything_changes() {
    let world = World::new(Shape { refcount_order: 0, backing_len: 0, ..SHAPE });
    world.image().write(&Nothing, GuestOffset::ZERO, &[1; 3000]).unwrap();
    world.image().flush_all().unwrap();
    let before = world.store.bytes();
    let said = world.image().create_snapshot("s").map(drop).unwrap_err().to_string();
    assert!(said.contains("1-bit refcounts"), "{said}");
    assert!(world.store.bytes() == before, "the file has changed");
}

/// The image of a disk of no bytes, as QEMU makes it: without an L1 table.
fn without_l1() -> Arc<MemoryStore> {
    let mut bytes = Shape { size: 0, backing_len: 0, ..SHAPE }.create();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap());
    // The L1 table is the last of its tables: the cluster goes with it.
    bytes[36..48].fill(0);
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(bytes[table..][..8].try_into().unwrap()) as usize;
    bytes[block + l1 as usize / 512 * 2..][..2].fill(0);
    Arc::new(MemoryStore::new(bytes))
}

#[test]
fn snapshots_of_a_disk_without_an_l1_table_are_made_applied_and_deleted_and_leak_nothing() {
    let store = without_l1();
    assert_eq!(judge(&store.bytes()), Findings::default(), "the image was not sound before");
    let image = open(store.clone()).unwrap();
    image.create_snapshot("a").unwrap();
    assert_eq!(judge(&store.bytes()), Findings::default(), "made");
    image.grow(&Nothing, 50_000).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &[1; 50_000]).unwrap();
    image.create_snapshot("b").unwrap();
    image.apply_snapshot("1").unwrap();
    assert_eq!(image.size(), 0);
    assert_eq!(judge(&store.bytes()), Findings::default(), "applied");
    image.delete_snapshot("1").unwrap();
    image.apply_snapshot("2").unwrap();
    image.delete_snapshot("2").unwrap();
    let expected = [vec![1; 50_000], vec![0; 176]].concat();
    assert_same(&read_all(&image, &Nothing), &expected, "the disk");
    assert_eq!(judge(&store.bytes()), Findings::default(), "deleted");
}

#[test]
fn a_snapshot_that_does_not_know_its_size_keeps_the_disk_from_getting_another() {
    let mut world = World::new(SHAPE);
    world.create();
    let table = world.image().header().snapshots_offset.get() as usize;
    world.image = None;
    let mut bytes = world.store.bytes();
    // No extra data: id and name follow at once.
    let names = bytes[table + 64..table + 67].to_vec();
    bytes[table + 36..table + 40].fill(0);
    bytes[table + 40..table + 43].copy_from_slice(&names);
    let image = open(Arc::new(MemoryStore::new(bytes))).unwrap();
    let tree = &image.snapshots()[0];
    assert_eq!((tree.entry().disk_size, tree.entry().name.as_str()), (None, "s1"));
    for resized in [image.grow(&Nothing, 200 << 10), image.shrink(&Nothing, 50 << 10)] {
        let error = resized.unwrap_err();
        assert!(matches!(error.problem(), Problem::Unsupported { .. }), "{error}");
    }
    image.apply_snapshot("1").unwrap();
    image.delete_snapshot("1").unwrap();
    image.grow(&Nothing, 200 << 10).unwrap();
}

#[test]
fn a_snapshot_table_never_gets_longer_than_one_that_can_be_read() {
    let mut world = World::new(SHAPE);
    world.create();
    let table = world.image().header().snapshots_offset.get() as usize;
    world.image = None;
    let mut bytes = world.store.bytes();
    // The entry at the end of the file, with as much extra data as a table has room for.
    let (entry, names) =
        (bytes[table..table + 64].to_vec(), bytes[table + 64..table + 67].to_vec());
    let (end, len) = (bytes.len(), 64 << 20);
    bytes.extend(&entry);
    bytes.resize(end + len, 0);
    let extra = len - 40 - 8;
    bytes[end + 36..end + 40].copy_from_slice(&(extra as u32).to_be_bytes());
    bytes[end + 40 + extra..][..3].copy_from_slice(&names);
    bytes[64..72].copy_from_slice(&(end as u64).to_be_bytes());
    let store = Arc::new(MemoryStore::new(bytes));
    let image = open(store.clone()).unwrap();
    assert_eq!(image.snapshots()[0].entry().name, "s1");
    let said = image.create_snapshot("one more").map(drop).unwrap_err().to_string();
    assert!(said.contains("64 MiB"), "{said}");
    drop(image);
    assert_eq!(open(store).unwrap().snapshots().len(), 1);
}

#[test]
fn a_snapshot_that_is_counted_too_low_is_neither_deleted_nor_applied_and_nothing_changes() {
    let mut world = World::new(Shape { backing_len: 0, ..SHAPE });
    world.image().write(&Nothing, GuestOffset::ZERO, &[1; 30_000]).unwrap();
    world.create();
    let header = world.image().header();
    world.image = None;
    let bytes = world.store.bytes();
    let number = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
    let table = first_table(&bytes, header.l1_offset.get());
    let data = number(table) & 0x00ff_ffff_ffff_fe00;
    let block = number(header.reftable_offset.get()) as usize;
    // What the snapshot and the disk share is counted once: it would go with the first of them.
    for shared in [table, data] {
        let mut bytes = bytes.clone();
        let count = &mut bytes[block + shared as usize / 512 * 2..][..2];
        assert_eq!(count, [0, 2]);
        count[1] = 1;
        let store = Arc::new(MemoryStore::new(bytes.clone()));
        let image = open(store.clone()).unwrap();
        for result in [image.delete_snapshot("1"), image.apply_snapshot("1")] {
            let said = result.unwrap_err().to_string();
            assert!(said.contains("\"s1\""), "{said}");
        }
        assert!(store.bytes() == bytes, "the file has changed");
    }
}
