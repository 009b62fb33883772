//! Files with more clusters than 32 bits can number.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Mutex;

use super::*;
use crate::qcow2::offsets;
use crate::units::HostOffset;

const PAGE: u64 = 4096;

/// A file of holes with some pages of data.
#[derive(Default)]
struct SparseStore(Mutex<Sparse>);

#[derive(Default)]
struct Sparse {
    len: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl SparseStore {
    fn each_page(&self, at: u64, len: u64, mut f: impl FnMut(&mut Sparse, u64, Range<usize>)) {
        let mut sparse = self.0.lock().unwrap();
        for part in GuestRange::new(GuestOffset::new(at), len).split(PAGE) {
            let in_page = (part.start.get() % PAGE) as usize;
            f(&mut sparse, part.start.get() / PAGE, in_page..in_page + part.len as usize);
        }
    }
}

impl Store for SparseStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len)
    }

    fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> io::Result<()> {
        let mut done = 0;
        self.each_page(offset.get(), buf.len() as u64, |sparse, page, range| {
            let now = &mut buf[done..done + range.len()];
            match sparse.pages.get(&page) {
                Some(bytes) => now.copy_from_slice(&bytes[range.clone()]),
                None => now.fill(0),
            }
            done += range.len();
        });
        Ok(())
    }

    fn write_at(&self, pieces: &[&[u8]], offset: HostOffset) -> io::Result<()> {
        let data = pieces.concat();
        let mut done = 0;
        self.each_page(offset.get(), data.len() as u64, |sparse, page, range| {
            let len = range.len();
            let bytes = sparse.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize]);
            bytes[range].copy_from_slice(&data[done..done + len]);
            done += len;
        });
        let mut sparse = self.0.lock().unwrap();
        sparse.len = sparse.len.max(offset.get() + data.len() as u64);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().unwrap().len = len;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, offset: HostOffset, len: u64) -> io::Result<()> {
        self.each_page(offset.get(), len, |sparse, page, range| {
            if let Some(bytes) = sparse.pages.get_mut(&page) {
                bytes[range].fill(0);
            }
        });
        Ok(())
    }

    fn reserve(&self, _offset: HostOffset, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, from: HostOffset) -> io::Result<Option<Range<u64>>> {
        let sparse = self.0.lock().unwrap();
        let next = sparse.pages.range(from.get() / PAGE..).next();
        Ok(next.map(|(page, _)| (page * PAGE).max(from.get())..(page + 1) * PAGE))
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().pages.len() as u64 * PAGE)
    }
}

#[test]
fn a_refcount_table_moves_behind_the_cluster_that_32_bits_can_still_number() {
    // One-bit counts: the only ones that can describe so large a file with clusters so small.
    let shape = Shape {
        version: Version::V3,
        cluster_bits: 10,
        refcount_order: 0,
        l2_form: L2Form::Standard,
        size: 1 << 20,
        backing_len: 0,
    };
    let store = Arc::new(SparseStore::default());
    let image = shape.create();
    store.write_at(&[&image], HostOffset::ZERO).unwrap();
    // Everything that the refcount table can describe is in use.
    let table = offsets::REFTABLE.get() as usize;
    let table = u64::from_be_bytes(image[table..table + 8].try_into().unwrap());
    let first_block = u64::from_be_bytes(image[table as usize..][..8].try_into().unwrap());
    let blocks: Vec<u64> = std::iter::once(first_block)
        .chain((1..128).map(|index| image.len() as u64 + index * 1024))
        .collect();
    for (index, &block) in blocks.iter().enumerate() {
        store.write_at(&[&[0xff; 1024]], HostOffset::new(block)).unwrap();
        let entry = HostOffset::new(table + index as u64 * 8);
        store.write_at(&[&block.to_be_bytes()], entry).unwrap();
    }
    let far = (1_u64 << 32) * 1024;
    store.set_len(far + 5000).unwrap();

    let image = open(store.clone()).unwrap();
    let data: Vec<u8> = (0..300_000_u32).map(|index| (index % 249) as u8).collect();
    image.write(&Nothing, GuestOffset::new(1000), &data).unwrap();
    image.flush_all().unwrap();
    assert!(image.header().reftable_offset.get() > far);
    drop(image);
    let image = open(store.clone()).unwrap();
    image.write(&Nothing, GuestOffset::new(500_000), &data).unwrap();
    image.flush_all().unwrap();
    let mut found = vec![0; data.len()];
    for at in [1000, 500_000] {
        image.read_active(&Nothing, GuestOffset::new(at), &mut found).unwrap();
        assert_same(&found, &data, "after the table has moved");
    }
    drop(image);
    let mut findings = Found::default();
    let report = check::check(&*store, &mut findings).unwrap();
    assert_eq!(report.corruptions, 0, "{report:?}");
}
