//! Mistakes that were made once.

use super::*;
use crate::store::fault::{FaultStore, Survivors};
use checker::{Findings, check};

const SHAPE: Shape = Shape {
    version: Version::V3,
    cluster_bits: 9,
    refcount_order: 4,
    l2_form: L2Form::Standard,
    size: 120 << 10,
    backing_len: 0,
};

/// An image whose first 4 KiB hold 1, all of it durable.
fn written() -> (Arc<FaultStore>, Image) {
    let store = Arc::new(FaultStore::new(SHAPE.create()));
    let image = open(store.clone()).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &[1; 4096]).unwrap();
    image.flush_all().unwrap();
    (store, image)
}

fn fail_next(store: &FaultStore, skip: u64) {
    let next = store.operations() + skip;
    store.fail(next..next + 1);
}

fn reopened(store: &FaultStore) -> Image {
    let bytes = store.after_power_cut(Survivors::All);
    assert_eq!(check(&bytes).corruptions, Vec::<String>::new());
    Image::open(Arc::new(MemoryStore::new(bytes)), Writability::ReadOnly).unwrap()
}

#[test]
fn a_sync_that_failed_after_overwrites_only_fails_for_everybody_who_asks_later() {
    let (store, image) = written();
    image.write(&Nothing, GuestOffset::ZERO, &[2; 4096]).unwrap();
    fail_next(&store, 0);
    assert!(image.flush().is_err());
    assert!(image.flush().is_err());
    assert!(image.flush_all().is_err());
}

#[test]
fn growth_that_fails_at_any_step_loses_nothing_written_later() {
    for skip in 0.. {
        let (store, image) = written();
        fail_next(&store, skip);
        if image.grow(&Nothing, 5 << 20).is_ok() {
            assert!(skip > 5, "only {skip} steps could fail");
            return;
        }
        let later = GuestOffset::new(64 << 10);
        let promised =
            image.write(&Nothing, later, &[7; 8192]).is_ok() && image.flush_all().is_ok();
        drop(image);
        let mut found = vec![0; 8192];
        reopened(&store).read_active(&Nothing, later, &mut found).unwrap();
        assert!(!promised || found == [7; 8192], "step {skip}: a promised write is lost");
    }
}

#[test]
fn a_snapshot_that_fails_at_any_step_leaves_a_sound_image() {
    for skip in 0.. {
        let (store, image) = written();
        fail_next(&store, skip);
        let made = image.create_snapshot("s").is_ok();
        let later = GuestOffset::ZERO;
        let promised =
            image.write(&Nothing, later, &[7; 8192]).is_ok() && image.flush_all().is_ok();
        drop(image);
        let image = reopened(&store);
        let corrupt = crate::qcow2::IncompatibleFeatures::CORRUPT;
        assert!(!image.header().incompatible.contains(corrupt), "step {skip}: marked corrupt");
        let mut found = vec![0; 8192];
        image.read_active(&Nothing, later, &mut found).unwrap();
        assert!(!promised || found == [7; 8192], "step {skip}: a promised write is lost");
        if made {
            assert!(skip > 5, "only {skip} steps could fail");
            return;
        }
    }
}

#[test]
fn growing_a_disk_does_not_uncover_clusters_behind_its_old_end() {
    let (store, image) = written();
    image.write(&Nothing, GuestOffset::ZERO, &vec![9; SHAPE.size as usize]).unwrap();
    image.flush_all().unwrap();
    drop(image);
    let mut bytes = store.after_power_cut(Survivors::All);
    bytes[24..32].copy_from_slice(&(60_u64 << 10).to_be_bytes());
    let store = Arc::new(MemoryStore::new(bytes));
    let image = open(store.clone()).unwrap();
    image.grow(&Nothing, SHAPE.size).unwrap();
    let mut found = vec![1; 60 << 10];
    image.read_active(&Nothing, GuestOffset::new(60 << 10), &mut found).unwrap();
    assert!(found.iter().all(|&byte| byte == 0));
    image.flush_all().unwrap();
    assert_eq!(check(&store.bytes()), Findings::default());
}

#[test]
fn nothing_is_written_while_an_unknown_autoclear_bit_is_still_set() {
    let mut bytes = SHAPE.create();
    bytes[95] = 0x80;
    let store = Arc::new(FaultStore::new(bytes));
    let image = open(store.clone()).unwrap();
    store.fail(0..1);
    assert!(image.write(&Nothing, GuestOffset::ZERO, &[1; 512]).is_err());
    let second = image.write(&Nothing, GuestOffset::ZERO, &[1; 512]);
    let bit = store.after_power_cut(Survivors::All)[95];
    assert!(second.is_err() || bit == 0);
}

#[test]
fn an_entry_that_calls_a_table_data_lets_nobody_write_or_punch_the_table() {
    let (store, image) = written();
    let header = image.header();
    drop(image);
    let bytes = store.after_power_cut(Survivors::All);
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l1 = header.l1_offset.get();
    let l2 = number(l1 as usize) & 0x00ff_ffff_ffff_fe00;
    let block = number(header.reftable_offset.get() as usize);
    for table in [l1, block, l2] {
        let mut bytes = bytes.clone();
        bytes[l2 as usize..][..8].copy_from_slice(&(table | 1 << 63).to_be_bytes());
        let untouched = bytes[table as usize..][..512].to_vec();
        for change in [
            Change::Write { at: 0, len: 512, byte: 0xaa },
            Change::Zero { at: 0, len: 512, mode: ZeroMode::Unmap },
            Change::Zero { at: 100, len: 50, mode: ZeroMode::Unmap },
        ] {
            let store = Arc::new(MemoryStore::new(bytes.clone()));
            let image = open(store.clone()).unwrap();
            let done = change.apply_to_image(&image, &Nothing).and_then(|()| image.flush_all());
            assert!(done.is_err(), "{change:?} of the table at {table:#x}");
            drop(image);
            let found = store.bytes()[table as usize..][..512].to_vec();
            // The entry itself may have been cleared in the L2 table; no other byte may differ.
            assert!(found[8..] == untouched[8..], "{change:?} hit the table at {table:#x}");
        }
    }
}

#[test]
fn a_hostile_snapshot_table_takes_no_time_to_refuse() {
    let (store, image) = written();
    image.create_snapshot("s").unwrap();
    let table = image.header().snapshots_offset.get() as usize;
    drop(image);
    for (at, value) in [(0, &[0, 0, 1, 0, 0, 0, 0, 0][..]), (8, &[0xff; 4])] {
        let mut bytes = store.after_power_cut(Survivors::All);
        bytes[table + at..][..value.len()].copy_from_slice(value);
        assert!(open(Arc::new(MemoryStore::new(bytes))).is_err());
    }
}

#[test]
fn a_snapshot_whose_l1_table_is_nowhere_is_an_error_when_it_is_read() {
    let (store, image) = written();
    image.create_snapshot("s").unwrap();
    let table = image.header().snapshots_offset.get() as usize;
    drop(image);
    let mut bytes = store.after_power_cut(Survivors::All);
    for offset in [u64::MAX - 511, u64::MAX, 513] {
        bytes[table..table + 8].copy_from_slice(&offset.to_be_bytes());
        let store = Arc::new(MemoryStore::new(bytes.clone()));
        let image = Image::open(store, Writability::ReadOnly).unwrap();
        let tree = &image.snapshots()[0];
        let range = GuestRange::new(GuestOffset::new(40 << 10), 512);
        let found = image.map(crate::image::Tree::Snapshot(tree), range);
        assert!(found.is_err_and(|error| error.to_string().contains("l1_table_offset")));
    }
}

#[test]
fn a_snapshot_is_not_named_like_another_nor_like_anothers_number() {
    let (store, image) = written();
    image.create_snapshot("first").unwrap();
    for taken in ["first", "1", ""] {
        let next = store.operations();
        assert!(image.create_snapshot(taken).is_err(), "{taken:?}");
        assert_eq!(store.operations(), next, "a refused snapshot changed the image");
    }
    image.create_snapshot("2").unwrap();
    assert_eq!(image.snapshots().len(), 2);
}
