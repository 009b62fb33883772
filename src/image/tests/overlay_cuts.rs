//! The power goes at every operation while a new image is put on top of a disk, or on top of what that stands on: the steps
//! of `chain/overlay.rs`, on two files of which each loses what was not synced in its own way.

use super::checker::check;
use super::history::{History, SECTOR};
use super::*;
use crate::random::seeds;
use crate::store::fault::{FaultStore, Survivors};

const SHAPES: [Shape; 2] = [
    Shape {
        version: Version::V3,
        cluster_bits: 9,
        refcount_order: 4,
        l2_form: L2Form::Standard,
        size: 80 << 10,
        backing_len: 60_000,
    },
    Shape {
        version: Version::V2,
        cluster_bits: 10,
        refcount_order: 4,
        l2_form: L2Form::Standard,
        size: 48 << 10,
        backing_len: 0,
    },
];

/// What survives of the old image and of the new one.
const SURVIVORS: [(Survivors, Survivors); 6] = [
    (Survivors::Nothing, Survivors::Nothing),
    (Survivors::All, Survivors::Nothing),
    (Survivors::Nothing, Survivors::All),
    (Survivors::All, Survivors::All),
    (Survivors::Torn(0x2468_ace0_1357_9bdf), Survivors::Torn(0x1b2d_3f48_5a6c_7e90)),
    (Survivors::Some(0x0f1e_2d3c_4b5a_6979), Survivors::Torn(0x7777_1111_5555_3333)),
];

/// What the new image goes on top of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Onto {
    /// The disk: an overlay.
    Disk,
    /// What is below the disk: a revert.
    Base,
}

#[test]
fn a_power_cut_while_an_image_is_put_on_top_leaves_the_old_disk_or_the_new_one() {
    let mut cuts = 0;
    for seed in seeds(3) {
        for shape in SHAPES {
            for onto in [Onto::Disk, Onto::Base] {
                cuts += cut_everywhere(shape, seed, onto);
            }
        }
    }
    assert!(cuts > 200, "only {cuts} cuts were tried");
}

/// A run of some writes, the new image, and more writes.
struct Run {
    old: Arc<FaultStore>,
    new: Arc<FaultStore>,
    /// What the old image may hold.
    before: History,
    /// What the new one may, once it is the disk.
    after: Option<History>,
}

fn run(shape: Shape, seed: u64, onto: Onto, cut: u64) -> Run {
    let mut random = Random::new(seed);
    let below = shape.below();
    let old_file = Arc::new(FaultStore::new(shape.create()));
    let new_file = Arc::new(old_file.beside(Vec::new()));
    old_file.fail(cut..u64::MAX);
    let old = open(old_file.clone()).unwrap();
    let mut before = History::new(shape.empty_disk(), SECTOR);
    let mut write = |image: &Image, below: &dyn Below, history: &mut History| {
        for _ in 0..5 {
            let change = Change::of_sectors(&mut random, image.size());
            history.changes(change);
            match (change, change.apply_to_image(image, below)) {
                (Change::Flush, Ok(())) => history.flushed(),
                (_, Ok(())) => {}
                (_, Err(_)) => history.failed = true,
            }
        }
    };
    write(&old, &*below, &mut before);
    let after = make(shape, &new_file).ok().and_then(|new| {
        write(&old, &*below, &mut before);
        before.resizes(shape.size + 5 * 512);
        before.failed |= old.grow(&*below, shape.size + 5 * 512).is_err();
        write(&old, &*below, &mut before);
        let still = old.hold_still().ok()?;
        before.flushed();
        let size = if onto == Onto::Disk { old.size() } else { shape.size };
        if new.size() != size {
            new.grow(&Nothing, size).ok()?;
        }
        still.for_good();
        let disk = match onto {
            Onto::Disk => before.newest().clone(),
            Onto::Base => shape.empty_disk(),
        };
        let mut after = History::new(disk, SECTOR);
        let old = OverImage { image: &old, below: &*below };
        let under: &dyn Below = if onto == Onto::Disk { &old } else { &*below };
        write(&new, under, &mut after);
        if new.flush_all().is_ok() {
            after.flushed();
        }
        Some(after)
    });
    Run { old: old_file, new: new_file, before, after }
}

/// The new image as `chain/overlay.rs` makes it, open.
fn make(shape: Shape, store: &Arc<FaultStore>) -> Result<Image> {
    let options = CreateOptions {
        size: shape.size,
        version: Version::V3,
        geometry: Geometry::new(9, 4),
        backing: None,
    };
    NewImage::plan(&options)?.write(&**store)?;
    open(store.clone())
}

/// A disk as what is below another.
struct OverImage<'a> {
    image: &'a Image,
    below: &'a dyn Below,
}

impl Below for OverImage<'_> {
    fn read(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let inside = self.image.size().saturating_sub(offset.get()).min(buf.len() as u64);
        let (inside, behind) = buf.split_at_mut(inside as usize);
        behind.fill(0);
        self.image.read_active(self.below, offset, inside)
    }

    fn is_zero(&self, range: GuestRange) -> Result<bool> {
        let mut bytes = vec![0; range.len as usize];
        self.read(range.start, &mut bytes)?;
        Ok(bytes.iter().all(|&byte| byte == 0))
    }
}

fn cut_everywhere(shape: Shape, seed: u64, onto: Onto) -> u64 {
    let below = shape.below();
    for cut in 0.. {
        let Run { old, new, before, after } = run(shape, seed, onto, cut);
        for (of_old, of_new) in SURVIVORS {
            let context =
                format!("{shape:?}, seed {seed}, {onto:?}, {cut}, {of_old:?}, {of_new:?}");
            let old = old.after_power_cut(of_old);
            assert_eq!(check(&old).corruptions, Vec::<String>::new(), "{context}");
            let old = Image::open(Arc::new(MemoryStore::new(old)), Writability::ReadOnly).unwrap();
            before.assert_allows(&read_all(&old, &*below), &context);
            let bytes = new.after_power_cut(of_new);
            let new = Image::open(Arc::new(MemoryStore::new(bytes.clone())), Writability::ReadOnly);
            let under_old = OverImage { image: &old, below: &*below };
            let under: &dyn Below = if onto == Onto::Disk { &under_old } else { &*below };
            match (&after, new) {
                // Nobody was told that it is the disk, and a file that is no image hurts nobody.
                (None, Err(_)) => {}
                (None, Ok(new)) => {
                    assert_eq!(check(&bytes).corruptions, Vec::<String>::new(), "{context}");
                    assert!(read_all(&new, &Nothing).iter().all(|&byte| byte == 0), "{context}");
                }
                (Some(_), Err(error)) => panic!("{context}: the new image is none: {error}"),
                (Some(history), Ok(new)) => {
                    assert_eq!(check(&bytes).corruptions, Vec::<String>::new(), "{context}");
                    history.assert_allows(&read_all(&new, under), &context);
                }
            }
        }
        if old.operations() <= cut {
            assert!(after.is_some(), "without a cut there is a new disk");
            return cut;
        }
    }
    unreachable!("a run has an end")
}
