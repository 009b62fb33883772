//! A page of metadata in memory is what the file holds, whoever changed that meanwhile.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::*;
use crate::store::fault::{FaultStore, Survivors};
use crate::units::HostOffset;

const SHAPE: Shape = Shape {
    version: Version::V3,
    cluster_bits: 9,
    refcount_order: 4,
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

type Meanwhile = Box<dyn FnOnce() + Send>;

/// A store in which something happens between a read and the reader's hearing of it.
#[derive(Default)]
struct SlowReads {
    inner: MemoryStore,
    meanwhile: Mutex<Option<Meanwhile>>,
}

impl SlowReads {
    fn set(&self, meanwhile: Meanwhile) {
        *self.meanwhile.lock().unwrap_or_else(PoisonError::into_inner) = Some(meanwhile);
    }
}

impl Store for SlowReads {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> io::Result<()> {
        self.inner.read_at(buf, offset)?;
        let meanwhile = self.meanwhile.lock().unwrap_or_else(PoisonError::into_inner).take();
        meanwhile.into_iter().for_each(|act| act());
        Ok(())
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> io::Result<()> {
        self.inner.write_at(pieces, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        self.inner.punch_hole(offset, len)
    }

    fn next_data(&self, from: HostOffset) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(from)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }
}

#[test]
fn a_page_that_was_read_before_a_flush_does_not_replace_what_the_flush_wrote() {
    let store = Arc::new(SlowReads { inner: MemoryStore::new(written()), ..SlowReads::default() });
    let image = Arc::new(open(store.clone()).unwrap());
    let found = Arc::new(OnceLock::new());
    let (writer, done) = (image.clone(), found.clone());
    store.set(Box::new(move || {
        writer.write(&Nothing, cluster(1).start, &[2; 512]).unwrap();
        writer.flush_all().unwrap();
        done.set(()).unwrap();
    }));
    image.map(Tree::Active, cluster(0)).unwrap();
    assert!(found.get().is_some(), "the L2 table was not read");
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
