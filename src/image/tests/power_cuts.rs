//! The power goes at every operation of a run: nothing flushed is lost, nothing is corrupt.

use super::*;
use crate::random::seeds;
use crate::store::fault::{FaultStore, Survivors};
use checker::check;
use history::History;

const SHAPES: [Shape; 3] = [
    Shape {
        version: Version::V3,
        cluster_bits: 9,
        refcount_order: 4,
        l2_form: L2Form::Standard,
        size: 150 << 10,
        backing_len: 100_000,
    },
    Shape {
        version: Version::V3,
        cluster_bits: 10,
        refcount_order: 2,
        l2_form: L2Form::Standard,
        size: 90_112,
        backing_len: 0,
    },
    Shape {
        version: Version::V2,
        cluster_bits: 9,
        refcount_order: 4,
        l2_form: L2Form::Standard,
        size: 64 << 10,
        backing_len: 30_000,
    },
];

const SURVIVORS: [Survivors; 7] = [
    Survivors::Nothing,
    Survivors::All,
    Survivors::Some(0x1234_5678_9abc_def1),
    Survivors::Some(0x0f1e_2d3c_4b5a_6979),
    Survivors::Some(0x7777_1111_5555_3333),
    Survivors::Torn(0x2468_ace0_1357_9bdf),
    Survivors::Torn(0x1b2d_3f48_5a6c_7e90),
];

#[test]
fn a_power_cut_at_any_operation_loses_nothing_flushed_and_corrupts_nothing() {
    let mut cuts = 0;
    for seed in seeds(4) {
        for shape in SHAPES {
            cuts += cut_everywhere(shape, seed, Moments::Writes);
        }
    }
    assert!(cuts > 60, "only {cuts} cuts were tried");
}

#[test]
fn a_power_cut_while_a_snapshot_is_made_keeps_the_old_state_or_the_new() {
    for seed in seeds(3) {
        cut_everywhere(SHAPES[0], seed, Moments::WithSnapshot);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Moments {
    Writes,
    WithSnapshot,
}

fn cut_everywhere(shape: Shape, seed: u64, moments: Moments) -> u64 {
    let mut cut = 0;
    loop {
        let mut random = Random::new(seed);
        let below = shape.below();
        let store = Arc::new(FaultStore::new(shape.create()));
        store.fail(cut..u64::MAX);
        let image = open(store.clone()).unwrap();
        let mut history = History::new(shape.empty_disk(), 1);
        for step in 0..14 {
            if step == 7 && moments == Moments::WithSnapshot && image.create_snapshot("s").is_ok() {
                history.flushed();
            }
            let change = Change::random(&mut random, shape.size);
            history.changes(change);
            let done = change.apply_to_image(&image, &*below);
            match (change, done) {
                (Change::Flush, Ok(())) => history.flushed(),
                (_, Ok(())) => {}
                (_, Err(_)) => history.failed = true,
            }
        }
        if image.flush_all().is_ok() {
            history.flushed();
        }
        let finished = store.operations() <= cut;
        for survivors in SURVIVORS {
            let context = format!("{shape:?}, seed {seed}, cut at {cut}, {survivors:?}");
            let bytes = store.after_power_cut(survivors);
            assert_eq!(check(&bytes).corruptions, Vec::<String>::new(), "{context}");
            let store = Arc::new(MemoryStore::new(bytes));
            let image = Image::open(store.clone(), Writability::ReadOnly).unwrap();
            let disk = read_all(&image, &*below);
            history.assert_allows(&disk, &context);
            if cut % 4 != 0 {
                continue;
            }
            check::repair(&*store, check::Extent::All, &mut Found::default()).unwrap();
            assert_eq!(judge(&store.bytes()), Findings::default(), "{context}, repaired");
            let image = Image::open(store, Writability::ReadOnly).unwrap();
            assert_same(&read_all(&image, &*below), &disk, &format!("{context}, repaired"));
        }
        if finished {
            return cut;
        }
        cut += 1;
    }
}
