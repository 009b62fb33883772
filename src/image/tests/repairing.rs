//! Repairs make the counts right, keep every byte of every view, and can be cut off at any moment.

use super::checking::{header_of, put, used_image, word};
use super::*;
use crate::image::check::{Extent, Limits, repair};
use crate::qcow2::refcount;
use crate::store::fault::{FaultStore, Survivors};

const SHAPES: [Shape; 4] = [
    shape(Version::V3, 9, 4, 200 << 10),
    shape(Version::V3, 9, 0, 100 << 10),
    shape(Version::V2, 10, 4, 300 << 10),
    shape(Version::V3, 9, 6, 60 << 10),
];

const fn shape(version: Version, cluster_bits: u32, refcount_order: u32, size: u64) -> Shape {
    Shape { version, cluster_bits, refcount_order, size, backing_len: 0, l2_form: L2Form::Standard }
}

/// The bytes of the active disk and of all snapshots.
fn views(bytes: &[u8]) -> Vec<Vec<u8>> {
    let store = Arc::new(MemoryStore::new(bytes.to_vec()));
    let image = Image::open(store, Writability::ReadOnly).unwrap();
    let mut views = vec![read_all(&image, &Nothing)];
    views.extend(image.snapshots().iter().map(|tree| read_snapshot(&image, tree, &Nothing)));
    views
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    /// Some refcounts are anything.
    Counts,
    /// Some COPIED flags are wrong.
    Flags,
    /// A refcount table entry is anything.
    Table,
    /// The header names another refcount table.
    Header,
    /// All refcounts are zero.
    Wiped,
}

const DAMAGES: [Damage; 5] =
    [Damage::Counts, Damage::Flags, Damage::Table, Damage::Header, Damage::Wiped];

impl Damage {
    /// Damages what can be repaired whole: counts, flags, and where the counts are.
    fn apply(self, bytes: &mut [u8], random: &mut Random) {
        let header = header_of(bytes);
        let order = header.geometry.refcount_order();
        let size = header.geometry.cluster_size();
        let table = header.reftable_offset.get();
        let block = word(bytes, table) as usize;
        let len = bytes.len() as u64;
        match self {
            Self::Counts => {
                for _ in 0..10 {
                    let described = header.geometry.refcounts_per_block().min(len / size);
                    let cluster = random.below(described) as usize;
                    let count = random.below(4).min(refcount::max(order));
                    refcount::set(&mut bytes[block..block + size as usize], cluster, order, count);
                }
            }
            Self::Flags => {
                let l1 = header.l1_offset.get();
                for index in 0..u64::from(header.l1_entries) {
                    let entry = word(bytes, l1 + index * 8);
                    let l2 = entry & !(1 << 63);
                    if random.below(2) == 0 && entry != 0 {
                        put(bytes, l1 + index * 8, &(entry ^ 1 << 63).to_be_bytes());
                    }
                    for at in (0..if entry == 0 { 0 } else { size }).step_by(8) {
                        let entry = word(bytes, l2 + at);
                        if entry > 1 && random.below(2) == 0 {
                            put(bytes, l2 + at, &(entry ^ 1 << 63).to_be_bytes());
                        }
                    }
                }
            }
            Self::Table => {
                let new = [0, random.below(len), random.below(len) & !(size - 1), 1 << 50];
                put(bytes, table, &new[random.below(4) as usize].to_be_bytes());
            }
            Self::Header => {
                let new = [random.below(len) & !(size - 1), random.below(len), 1 << 50];
                put(bytes, 48, &new[random.below(3) as usize].to_be_bytes());
            }
            Self::Wiped => bytes[block..block + size as usize].fill(0),
        }
    }
}

pub(super) fn damaged(seed: u64) -> (Vec<u8>, Vec<u8>, String) {
    let mut random = Random::new(seed);
    let shape = SHAPES[seed as usize % SHAPES.len()];
    let damage = DAMAGES[seed as usize / SHAPES.len() % DAMAGES.len()];
    let sound = used_image(shape, &mut random);
    let mut bytes = sound.clone();
    damage.apply(&mut bytes, &mut random);
    (sound, bytes, format!("seed {seed}, {damage:?}, {shape:?}"))
}

#[test]
fn whatever_happens_to_counts_and_flags_is_repaired_and_no_byte_of_a_view_changes() {
    for seed in 0..200 {
        let (sound, bytes, context) = damaged(seed);
        for limits in [Limits::default(), Limits { clusters: 72, tables: 2 }] {
            let store = MemoryStore::new(bytes.clone());
            let done =
                check::repair::repair_within(&store, Extent::All, &mut Found::default(), limits);
            let (report, fixed) = done.unwrap();
            assert!(report.is_clean(), "{context}: {report:?}, {fixed:?}");
            assert_eq!(judge(&store.bytes()), Findings::default(), "{context}");
            assert!(views(&store.bytes()) == views(&sound), "{context}: a view has changed");
            // What is repaired can be written.
            let image = open(Arc::new(MemoryStore::new(store.bytes()))).unwrap();
            image.write(&Nothing, GuestOffset::new(5), &[1; 4000]).unwrap();
            image.flush_all().unwrap();
        }
    }
}

#[test]
fn a_power_cut_at_any_operation_of_a_repair_changes_no_byte_and_a_second_repair_ends_clean() {
    let mut cuts = 0;
    for seed in 0..40 {
        let (sound, bytes, context) = damaged(seed);
        let expected = views(&sound);
        for cut in 0.. {
            let store = FaultStore::new(bytes.clone());
            store.fail(cut..u64::MAX);
            let done = repair(&store, Extent::All, &mut Found::default());
            for survivors in [
                Survivors::Nothing,
                Survivors::All,
                Survivors::Some(seed * 77 + cut),
                Survivors::Torn(seed * 55 + cut),
            ] {
                let context = format!("{context}, cut at {cut}, {survivors:?}");
                let left = MemoryStore::new(store.after_power_cut(survivors));
                if !context.contains("Header") {
                    assert!(views(&left.bytes()) == expected, "{context}: a view has changed");
                }
                let (report, _) = repair(&left, Extent::All, &mut Found::default()).unwrap();
                assert!(report.is_clean(), "{context}: {report:?}");
                assert_eq!(judge(&left.bytes()), Findings::default(), "{context}");
                assert!(views(&left.bytes()) == expected, "{context}: a view has changed");
            }
            cuts += 1;
            if done.is_ok() {
                break;
            }
        }
    }
    assert!(cuts > 200, "only {cuts} cuts were tried");
}

#[test]
fn repairing_leaks_lowers_counts_and_raises_none() {
    for seed in (0..200).step_by(20) {
        let (_, bytes, context) = damaged(seed);
        let before = own_check(&bytes).0;
        let store = MemoryStore::new(bytes);
        let (report, fixed) = repair(&store, Extent::Leaks, &mut Found::default()).unwrap();
        let too_low = |bytes: &[u8]| {
            let found = own_check(bytes).1;
            found.iter().filter(|one| matches!(one, Finding::TooLow { .. })).count()
        };
        assert_eq!((report.leaks, fixed.leaks), (0, before.leaks), "{context}");
        assert_eq!(report.is_sound(), too_low(&store.bytes()) == 0, "{context}: {report:?}");
    }
}

#[test]
fn clusters_of_a_snapshot_that_can_not_be_found_are_not_freed() {
    let mut random = Random::new(3);
    let mut bytes = used_image(SHAPES[0], &mut random);
    let snapshot = header_of(&bytes).snapshots_offset.get();
    put(&mut bytes, snapshot, &0x201_u64.to_be_bytes());
    for extent in [Extent::Leaks, Extent::All] {
        let store = MemoryStore::new(bytes.clone());
        let (report, fixed) = repair(&store, extent, &mut Found::default()).unwrap();
        assert!(report.leaks > 0 && report.corruptions > 0 && fixed.leaks == 0, "{report:?}");
        assert!(store.bytes() == bytes, "something was written");
    }
}

#[test]
fn clusters_of_a_table_whose_pointer_leads_to_something_else_are_not_freed() {
    let store = Arc::new(MemoryStore::new(used_image(SHAPES[0], &mut Random::new(3))));
    let image = open(store.clone()).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &[1; 80 << 10]).unwrap();
    image.create_snapshot("t").unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &[2; 80 << 10]).unwrap();
    image.flush_all().unwrap();
    drop(image);
    let sound = store.bytes();
    let header = header_of(&sound);
    let snapshot = header.snapshots_offset.get();
    let snapshot_l1 = word(&sound, snapshot + 72);
    let own_l1 = header.l1_offset.get();
    let other_table = word(&sound, own_l1 + 16) & !(1 << 63);
    let data = word(&sound, other_table) & !(1 << 63);
    assert!(other_table != 0 && data != 0, "nothing is there");
    for (at, new) in [
        (own_l1, other_table.to_be_bytes()),
        (own_l1, data.to_be_bytes()),
        (snapshot_l1, other_table.to_be_bytes()),
        (snapshot + 72, other_table.to_be_bytes()),
        (snapshot + 72, own_l1.to_be_bytes()),
        // The first entry of the snapshot table has another length, and the second is somewhere else.
        (snapshot + 36, [0; 8]),
    ] {
        let mut bytes = sound.clone();
        put(&mut bytes, at, &new);
        for extent in [Extent::Leaks, Extent::All] {
            let context = format!("{new:x?} at {at:#x}, {extent:?}");
            let store = MemoryStore::new(bytes.clone());
            let (report, _) = repair(&store, extent, &mut Found::default()).unwrap();
            assert!(report.corruptions > 0, "{context}: {report:?}");
            // Somebody puts the pointer right.
            let mut mended = store.bytes();
            mended[at as usize..at as usize + 8].copy_from_slice(&sound[at as usize..][..8]);
            let (_, found) = own_check(&mended);
            let too_low = |one: &Finding| matches!(one, Finding::TooLow { .. });
            assert!(!found.iter().any(too_low), "{context}: {found:?}");
            let store = MemoryStore::new(mended);
            let (report, _) = repair(&store, Extent::All, &mut Found::default()).unwrap();
            assert!(report.is_clean(), "{context}: {report:?}");
            assert!(views(&store.bytes()) == views(&sound), "{context}: a view has changed");
        }
    }
}

#[test]
fn a_rebuild_keeps_the_clusters_of_a_snapshot_that_can_not_be_found() {
    let mut random = Random::new(3);
    let sound = used_image(SHAPES[0], &mut random);
    let mut bytes = sound.clone();
    let header = header_of(&bytes);
    let snapshot = header.snapshots_offset.get();
    let l1 = word(&bytes, snapshot);
    put(&mut bytes, snapshot, &0x201_u64.to_be_bytes());
    put(&mut bytes, header.reftable_offset.get(), &[0; 8]);
    let store = Arc::new(MemoryStore::new(bytes));
    let (report, _) = repair(&*store, Extent::All, &mut Found::default()).unwrap();
    assert!(report.corruptions > 0, "{report:?}");
    // Somebody finds the table again: all that the snapshot holds is still counted.
    store.write_at(&[&l1.to_be_bytes()], crate::units::HostOffset::new(snapshot)).unwrap();
    let (_, found) = own_check(&store.bytes());
    assert!(!found.iter().any(|one| matches!(one, Finding::TooLow { .. })), "{found:?}");
    for raw in found.iter().filter_map(copied_entry) {
        assert_eq!(raw >> 63, 0, "a cluster that the snapshot shares may be written: {raw:x}");
    }
    let (report, _) = repair(&*store, Extent::All, &mut Found::default()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert!(views(&store.bytes()) == views(&sound));
}

/// The entry of which the COPIED flag is wrong.
fn copied_entry(finding: &Finding) -> Option<u64> {
    match finding {
        Finding::Copied { raw, .. } => Some(*raw),
        _ => None,
    }
}

#[test]
fn counts_that_are_raised_leave_room_for_a_snapshot_that_can_not_be_found() {
    let mut random = Random::new(3);
    let sound = used_image(SHAPES[0], &mut random);
    let mut bytes = sound.clone();
    let header = header_of(&bytes);
    let snapshot = header.snapshots_offset.get();
    let l1 = word(&bytes, snapshot);
    put(&mut bytes, snapshot, &0x201_u64.to_be_bytes());
    Damage::Wiped.apply(&mut bytes, &mut random);
    let store = Arc::new(MemoryStore::new(bytes));
    repair(&*store, Extent::All, &mut Found::default()).unwrap();
    store.write_at(&[&l1.to_be_bytes()], crate::units::HostOffset::new(snapshot)).unwrap();
    let (_, found) = own_check(&store.bytes());
    // What only the snapshot has is counted nowhere; what it shares must be left to it.
    let shared_too_low = |one: &Finding| matches!(one, Finding::TooLow { refcount: 1.., .. });
    assert!(!found.iter().any(shared_too_low), "{found:?}");
    for raw in found.iter().filter_map(copied_entry) {
        assert_eq!(raw >> 63, 0, "a cluster that the snapshot shares may be written: {raw:x}");
    }
    let (report, _) = repair(&*store, Extent::All, &mut Found::default()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert!(views(&store.bytes()) == views(&sound));
}

#[test]
fn a_rebuild_believes_no_old_count_while_a_snapshot_can_not_be_found() {
    let sound = used_image(SHAPES[0], &mut Random::new(3));
    let mut bytes = sound.clone();
    let header = header_of(&bytes);
    let snapshot = header.snapshots_offset.get();
    let l1 = word(&bytes, snapshot);
    put(&mut bytes, snapshot, &0x201_u64.to_be_bytes());
    // The block is there and agrees with the references that are found: it knows no more of the snapshot than these.
    let table = header.reftable_offset.get();
    let block = word(&bytes, table) as usize;
    let size = header.geometry.cluster_size() as usize;
    let order = header.geometry.refcount_order();
    for index in 0..header.geometry.refcounts_per_block() as usize {
        let count = refcount::get(&bytes[block..block + size], index, order).min(1);
        refcount::set(&mut bytes[block..block + size], index, order, count);
    }
    // Another block is nowhere, so that the table is made anew.
    put(&mut bytes, table + 16, &0x201_u64.to_be_bytes());
    let store = Arc::new(MemoryStore::new(bytes));
    repair(&*store, Extent::All, &mut Found::default()).unwrap();
    assert_ne!(header_of(&store.bytes()).reftable_offset.get(), table, "nothing was rebuilt");
    store.write_at(&[&l1.to_be_bytes()], crate::units::HostOffset::new(snapshot)).unwrap();
    let (_, found) = own_check(&store.bytes());
    assert!(!found.iter().any(|one| matches!(one, Finding::TooLow { .. })), "{found:?}");
    for raw in found.iter().filter_map(copied_entry) {
        assert_eq!(raw >> 63, 0, "a cluster that the snapshot shares may be written: {raw:x}");
    }
    let (report, _) = repair(&*store, Extent::All, &mut Found::default()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert!(views(&store.bytes()) == views(&sound));
}

#[test]
fn clusters_cut_off_the_end_of_the_file_are_not_given_to_another_after_a_repair() {
    for lost_counts in [false, true] {
        let store = Arc::new(MemoryStore::new(SHAPES[0].create()));
        let image = open(store.clone()).unwrap();
        image.write(&Nothing, GuestOffset::ZERO, &[7; 16 << 10]).unwrap();
        image.flush_all().unwrap();
        drop(image);
        let mut bytes = store.bytes();
        bytes.truncate(bytes.len() - (4 << 10));
        if lost_counts {
            Damage::Wiped.apply(&mut bytes, &mut Random::new(0));
        }
        for extent in [Extent::Leaks, Extent::All] {
            if lost_counts && extent == Extent::Leaks {
                continue;
            }
            let store = Arc::new(MemoryStore::new(bytes.clone()));
            let (report, fixed) = repair(&*store, extent, &mut Found::default()).unwrap();
            assert_eq!((report.leaks, fixed.leaks), (0, 0), "{report:?}");
            assert!(report.corruptions > 0, "{report:?}");
            assert!(store.bytes().len() == bytes.len(), "the file is longer");
            let before = views(&store.bytes())[0].clone();
            let image = open(store.clone()).unwrap();
            image.write(&Nothing, GuestOffset::new(64 << 10), &[9; 8 << 10]).unwrap();
            image.flush_all().unwrap();
            drop(image);
            let after = views(&store.bytes())[0].clone();
            assert!(after[..64 << 10] == before[..64 << 10], "{extent:?}: written over");
        }
    }
}

#[test]
fn repairing_leaks_lets_nobody_write_in_place_what_a_snapshot_shares() {
    let sound = used_image(SHAPES[0], &mut Random::new(3));
    let mut bytes = sound.clone();
    let header = header_of(&bytes);
    let block = word(&bytes, header.reftable_offset.get()) as usize;
    let size = header.geometry.cluster_size() as usize;
    let order = header.geometry.refcount_order();
    for index in 0..header.geometry.refcounts_per_block() as usize {
        let count = refcount::get(&bytes[block..block + size], index, order).min(1);
        refcount::set(&mut bytes[block..block + size], index, order, count);
    }
    let store = MemoryStore::new(bytes);
    repair(&store, Extent::Leaks, &mut Found::default()).unwrap();
    let after = store.bytes();
    let l1 = header.l1_offset.get();
    let kept = |at: u64| {
        let (was, is) = (word(&sound, at), word(&after, at));
        assert!(was >> 63 == 1 || is >> 63 == 0, "at {at:#x}: {was:x} is now {is:x}");
    };
    for index in 0..u64::from(header.l1_entries) {
        kept(l1 + index * 8);
        let l2 = word(&sound, l1 + index * 8) & !(1 << 63);
        (0..if l2 == 0 { 0 } else { size as u64 }).step_by(8).for_each(|at| kept(l2 + at));
    }
}

/// An image with a data cluster that two guest clusters have.
fn two_owners() -> Vec<u8> {
    let store = Arc::new(MemoryStore::new(SHAPES[0].create()));
    let image = open(store.clone()).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &[7; 4096]).unwrap();
    image.flush_all().unwrap();
    let l1 = image.header().l1_offset.get();
    drop(image);
    let mut bytes = store.bytes();
    let l2 = word(&bytes, l1) & !(1 << 63);
    let second = word(&bytes, l2 + 8);
    put(&mut bytes, l2, &second.to_be_bytes());
    bytes
}

#[test]
fn two_owners_are_counted_but_left_and_the_marks_stay() {
    let mut bytes = two_owners();
    put(&mut bytes, 72, &3_u64.to_be_bytes());
    let before = views(&bytes);
    let store = MemoryStore::new(bytes);
    let (report, _) = repair(&store, Extent::All, &mut Found::default()).unwrap();
    assert_eq!((report.corruptions, report.leaks), (1, 0));
    assert!(views(&store.bytes()) == before);
    assert_eq!(header_of(&store.bytes()).incompatible.bits(), 3);
    // Both entries say by now that the cluster must not be written in place: a write gives them one each.
    let mut bytes = store.bytes();
    put(&mut bytes, 72, &0_u64.to_be_bytes());
    let store = Arc::new(MemoryStore::new(bytes));
    let image = open(store.clone()).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &[9; 512]).unwrap();
    image.flush_all().unwrap();
    assert_eq!(read_all(&image, &Nothing)[512..1024], [7; 512]);
}

#[test]
fn the_marks_are_cleared_once_the_image_is_sound() {
    for extent in [Extent::Leaks, Extent::All] {
        for marks in 1..=3_u64 {
            let mut bytes = used_image(SHAPES[0], &mut Random::new(marks));
            put(&mut bytes, 72, &marks.to_be_bytes());
            let store = MemoryStore::new(bytes);
            let (report, fixed) = repair(&store, extent, &mut Found::default()).unwrap();
            assert!(report.is_clean() && fixed.is_nothing());
            assert!(header_of(&store.bytes()).incompatible.is_empty());
        }
    }
}

#[test]
fn a_writer_clears_the_autoclear_bits_that_it_does_not_know_before_it_frees_anything() {
    let mut bytes = used_image(SHAPES[0], &mut Random::new(1));
    put(&mut bytes, 88, &(1_u64 << 40).to_be_bytes());
    let store = MemoryStore::new(bytes.clone());
    repair(&store, Extent::All, &mut Found::default()).unwrap();
    assert!(store.bytes() == bytes, "a sound image is not written");
    Damage::Counts.apply(&mut bytes, &mut Random::new(2));
    let store = MemoryStore::new(bytes);
    repair(&store, Extent::All, &mut Found::default()).unwrap();
    assert!(header_of(&store.bytes()).autoclear.is_empty());
}

#[test]
fn a_new_refcount_table_keeps_clear_of_pointers_to_nowhere() {
    let (mut bytes, l2) = {
        let bytes = two_owners();
        let l1 = header_of(&bytes).l1_offset.get();
        let l2 = word(&bytes, l1) & !(1 << 63);
        (bytes, l2)
    };
    let end = bytes.len() as u64;
    for (index, behind) in [0, 1, 2, 4].into_iter().enumerate() {
        put(&mut bytes, l2 + index as u64 * 8, &(end + behind * 512).to_be_bytes());
    }
    let reftable = header_of(&bytes).reftable_offset.get();
    put(&mut bytes, reftable, &[0; 8]);
    let before = views(&bytes);
    let store = MemoryStore::new(bytes);
    let (report, _) = repair(&store, Extent::All, &mut Found::default()).unwrap();
    assert!(views(&store.bytes()) == before, "a pointer to nowhere leads to refcounts");
    assert!(report.leaks == 0, "{report:?}");
}

#[test]
fn new_refcounts_are_not_put_where_a_table_that_the_file_has_lost_would_be() {
    let whole = shape(Version::V3, 9, 4, 60 << 10).create();
    for clusters in 1..whole.len() / 512 {
        let cut = whole[..clusters * 512].to_vec();
        let read = |bytes: Vec<u8>| {
            let image = Image::open(Arc::new(MemoryStore::new(bytes)), Writability::ReadOnly);
            read_all(&image.unwrap(), &Nothing)
        };
        let before = read(cut.clone());
        let store = MemoryStore::new(cut);
        repair(&store, Extent::All, &mut Found::default()).unwrap();
        assert_same(&read(store.bytes()), &before, &format!("{clusters} clusters were left"));
    }
}
