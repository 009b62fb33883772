//! A page of metadata in memory is what the file holds, whoever changed that meanwhile.

use std::sync::Mutex;

use super::*;
use crate::store::fault::{FaultStore, Operation, Survivors};
use crate::units::HostOffset;

const SHAPE: Shape = Shape {
    version: Version::V3,
    cluster_bits: 9,
    refcount_order: 4,
    l2_form: L2Form::Standard,
    size: 64 << 10,
    backing_len: 0,
};

fn cluster(number: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(number * 512), 512)
}

/// An image whose first cluster holds 1, durable.
fn written() -> Vec<u8> {
    let store = Arc::new(FaultStore::new(SHAPE.create()));
    let image = open(store.clone()).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &[1; 512]).unwrap();
    image.flush_all().unwrap();
    store.after_power_cut(Survivors::Nothing)
}

#[test]
fn a_page_that_was_read_before_a_flush_does_not_replace_what_the_flush_wrote() {
    type Meanwhile = Box<dyn FnOnce() + Send>;
    let meanwhile: Arc<Mutex<Option<Meanwhile>>> = Arc::default();
    let waiting = meanwhile.clone();
    let observer = move |_: &FaultStore, operation| {
        let act = (operation == Operation::Read).then(|| waiting.lock().unwrap().take()).flatten();
        act.into_iter().for_each(|act| act());
    };
    let store = Arc::new(FaultStore::observed(written(), Box::new(observer)));
    let image = Arc::new(open(store).unwrap());
    let writer = image.clone();
    *meanwhile.lock().unwrap() = Some(Box::new(move || {
        writer.write(&Nothing, cluster(1).start, &[2; 512]).unwrap();
        writer.flush_all().unwrap();
    }));
    image.map(Tree::Active, cluster(0)).unwrap();
    assert!(meanwhile.lock().unwrap().is_none(), "the L2 table was not read");
    assert_same(&read_all(&image, &Nothing)[..1024], &[[1; 512], [2; 512]].concat(), "the disk");
}

#[test]
fn a_table_that_was_given_back_is_not_remembered_when_a_snapshot_gets_its_cluster() {
    let mut bytes = written();
    // The L2 table seems to be shared, as after a snapshot that is gone: it is copied before it is written.
    let header = crate::image::open::read_header(&MemoryStore::new(bytes.clone())).unwrap();
    let l1 = header.l1_offset.get() as usize;
    bytes[l1] &= 0x7f;
    let table = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap());
    let image = open(Arc::new(MemoryStore::new(bytes))).unwrap();
    assert_same(&read_all(&image, &Nothing)[..512], &[1; 512], "the disk");
    image.write(&Nothing, cluster(1).start, &[2; 512]).unwrap();
    image.flush_all().unwrap();
    image.create_snapshot("s").unwrap();
    let snapshot = &image.snapshots()[0];
    assert_eq!(snapshot.entry().l1_offset, HostOffset::new(table), "another place was free");
    assert_same(&read_snapshot(&image, snapshot, &Nothing), &read_all(&image, &Nothing), "s");
}
