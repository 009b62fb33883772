//! What no reader sees and still must be: space given back, memory bounded, changes announced.

use super::*;
use crate::error::{Doing, Error, Problem};
use crate::store::fault::{FaultStore, Survivors};
use checker::{Findings, check};
use kinds::{Data, KINDS, Kind};

const SHAPE: Shape = Shape {
    version: Version::V3,
    cluster_bits: 9,
    refcount_order: 4,
    l2_form: L2Form::Standard,
    size: (60 << 10) + 512,
    backing_len: 0,
};

fn whole(image: &Image) -> GuestRange {
    GuestRange::new(GuestOffset::ZERO, image.size())
}

#[test]
fn a_write_whose_data_can_not_be_stored_gives_its_clusters_back() {
    let store = Arc::new(FaultStore::new(SHAPE.create()));
    let image = open(store.clone()).unwrap();
    image.write(&Nothing, GuestOffset::ZERO, &[1; 512]).unwrap();
    // A first operation makes the file longer, a second writes the data.
    let next = store.operations();
    store.fail(next + 1..next + 2);
    assert!(image.write(&Nothing, GuestOffset::new(8192), &[2; 2048]).is_err());
    image.flush_all().unwrap();
    assert_eq!(check(&store.after_power_cut(Survivors::Nothing)), Findings::default());
    assert_eq!(read_all(&image, &Nothing)[8192..8192 + 2048], [0; 2048]);
    let len = store.len().unwrap();
    image.write(&Nothing, GuestOffset::new(8192), &[2; 2048]).unwrap();
    assert_eq!(store.len().unwrap(), len, "the clusters that were given back were not used again");
}

#[test]
fn clusters_that_somebody_else_fills_take_the_place_of_others_or_are_given_back() {
    let store = Arc::new(FaultStore::new(SHAPE.create()));
    let image = open(store.clone()).unwrap();
    let size = image.geometry().cluster_size();
    let clusters = |start, count| GuestRange::new(GuestOffset::new(start * size), count * size);
    image.write(&Nothing, GuestOffset::ZERO, &vec![1; 4 * size as usize]).unwrap();
    let fill = |part: GuestRange, host| {
        store.write_at(&[&vec![2; part.len as usize]], host).doing("write to it")
    };
    image.fill_clusters(clusters(2, 5), &fill).unwrap();
    let refused = |_, _| Err(Error::new(Problem::ReadOnly));
    assert!(image.fill_clusters(clusters(0, 3), &refused).is_err());
    image.flush_all().unwrap();
    let size = size as usize;
    let expected = [vec![1; 2 * size], vec![2; 5 * size], vec![0; size]].concat();
    assert_same(&read_all(&image, &Nothing)[..8 * size], &expected, "the disk");
    assert_eq!(check(&store.after_power_cut(Survivors::Nothing)), Findings::default());
}

#[test]
fn discarding_a_disk_to_its_end_inside_a_cluster_frees_every_cluster_and_its_space() {
    for version in [Version::V2, Version::V3] {
        let shape = Shape { version, cluster_bits: 12, ..SHAPE };
        let store = Arc::new(MemoryStore::new(shape.create()));
        let image = open(store.clone()).unwrap();
        image.write(&Nothing, GuestOffset::ZERO, &vec![0xa5; shape.size as usize]).unwrap();
        image.flush().unwrap();
        image.zero(&Nothing, whole(&image), ZeroMode::Unmap).unwrap();
        image.flush_all().unwrap();
        let run = image.map(Tree::Active, GuestRange::new(GuestOffset::new(60 << 10), 512));
        assert!(!matches!(run.unwrap().content, Content::Data(_)), "{version:?}: the end is left");
        assert!(!store.bytes().contains(&0xa5), "{version:?}: freed clusters still hold data");
        assert_eq!(check(&store.bytes()), Findings::default());
    }
}

#[test]
fn every_change_of_the_mapping_is_announced() {
    let image = open(Arc::new(MemoryStore::new(SHAPE.create()))).unwrap();
    let range = GuestRange::new(GuestOffset::ZERO, 2048);
    let mut before = image.generation();
    let mut announced = |what: &str| {
        let now = image.generation();
        assert!(now > before, "{what}");
        before = now;
    };
    image.write(&Nothing, range.start, &[1; 2048]).unwrap();
    announced("an allocating write");
    image.zero(&Nothing, range, ZeroMode::Keep).unwrap();
    announced("zeroing in place");
    image.zero(&Nothing, range, ZeroMode::Unmap).unwrap();
    image.write(&Nothing, range.start, &[1; 2048]).unwrap();
    announced("a write after a discard");
    image.zero(&Nothing, range, ZeroMode::Unmap).unwrap();
    announced("a discard");
    image.grow(&Nothing, 100 << 10).unwrap();
    announced("growth");
}

#[test]
fn a_change_of_the_mapping_that_fails_half_way_is_announced() {
    // Two pages of an L2 table, which a write of neighbouring clusters changes both.
    let kind = Kind { data: Data::File, backing_len: 0, cluster_bits: 13, ..KINDS[6] };
    let store = Arc::new(FaultStore::new(kind.create(8 << 20)));
    let image = kind.open(store.clone(), Arc::new(MemoryStore::default()), Writability::Writable);
    image.write(&Nothing, GuestOffset::ZERO, &[1; 8192]).unwrap();
    image.flush_all().unwrap();
    let before = image.generation();
    // There is no space for the second page.
    let next = store.operations();
    store.fail(next..next + 1);
    let written = image.write(&Nothing, GuestOffset::new(8192), &vec![2; 6 << 20]);
    assert!(written.is_err());
    let second = GuestRange::new(GuestOffset::new(8192), 8192);
    let run = image.map(Tree::Active, second).unwrap();
    assert!(matches!(run.content, Content::Data(_)), "nothing has changed");
    assert!(image.generation() > before);
}

/// A backing file of which nothing is known.
struct Opaque;

impl Below for Opaque {
    fn read(&self, _offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        buf.fill(7);
        Ok(())
    }

    fn is_zero(&self, _range: GuestRange) -> Result<bool> {
        Ok(false)
    }
}

#[test]
fn neither_a_long_discard_nor_many_writes_keep_much_dirty_metadata() {
    let size = 96 << 20;
    let dirty = |image: &Image| image.metadata().pages.dirty_count();
    for act in [
        |image: &Image| image.zero(&Opaque, whole(image), ZeroMode::Unmap).unwrap(),
        |image: &Image| {
            // A sector for each L2 table.
            for at in (0..image.size()).step_by(32 << 10) {
                image.write(&Nothing, GuestOffset::new(at), &[1; 512]).unwrap();
            }
        },
    ] {
        let image = open(Arc::new(MemoryStore::new(Shape { size, ..SHAPE }.create()))).unwrap();
        act(&image);
        assert!(dirty(&image) < 2200, "{} pages wait to be written", dirty(&image));
    }
}
