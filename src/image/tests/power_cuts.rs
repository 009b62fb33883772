//! The power goes at every operation of a run: nothing flushed is lost, nothing is corrupt.

use super::*;
use crate::store::fault::{FaultStore, Survivors};
use checker::check;

const SHAPES: [Shape; 3] = [
    Shape {
        version: Version::V3,
        cluster_bits: 9,
        refcount_order: 4,
        size: 150 << 10,
        backing_len: 100_000,
    },
    Shape {
        version: Version::V3,
        cluster_bits: 10,
        refcount_order: 2,
        size: 90_112,
        backing_len: 0,
    },
    Shape {
        version: Version::V2,
        cluster_bits: 9,
        refcount_order: 4,
        size: 64 << 10,
        backing_len: 30_000,
    },
];

const SURVIVORS: [Survivors; 5] = [
    Survivors::Nothing,
    Survivors::All,
    Survivors::Some(0x1234_5678_9abc_def1),
    Survivors::Some(0x0f1e_2d3c_4b5a_6979),
    Survivors::Some(0x7777_1111_5555_3333),
];

/// What a sector may hold after a cut: what it held at the last flush, or at any time since.
struct History {
    states: Vec<Vec<u8>>,
    /// A change was told to have failed: later flushes promise nothing about it.
    failed: bool,
}

impl History {
    fn flushed(&mut self) {
        if !self.failed {
            self.states.drain(..self.states.len() - 1);
        }
    }

    fn changed(&mut self, change: Change) {
        let mut next = self.states[self.states.len() - 1].clone();
        change.apply_to_model(&mut next);
        self.states.push(next);
    }

    fn assert_allows(&self, found: &[u8], context: &str) {
        for at in 0..found.len() {
            assert!(
                self.states.iter().any(|disk| disk[at] == found[at]),
                "{context}: byte {at} is {:#x}, which is neither old nor new",
                found[at]
            );
        }
    }
}

#[test]
fn a_power_cut_at_any_operation_loses_nothing_flushed_and_corrupts_nothing() {
    let mut cuts = 0;
    for seed in 0..4 {
        for shape in SHAPES {
            cuts += cut_everywhere(shape, seed, Moments::Writes);
        }
    }
    assert!(cuts > 300, "only {cuts} cuts were tried");
}

#[test]
fn a_power_cut_while_a_snapshot_is_made_keeps_the_old_state_or_the_new() {
    for seed in 0..3 {
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
        let mut random = Random(seed);
        let below = shape.below();
        let store = Arc::new(FaultStore::new(shape.create()));
        store.fail(cut..u64::MAX);
        let image = open(store.clone()).unwrap();
        let mut history = History { states: vec![shape.empty_disk()], failed: false };
        for step in 0..14 {
            if step == 7 && moments == Moments::WithSnapshot && image.create_snapshot("s").is_ok() {
                history.flushed();
            }
            let change = Change::random(&mut random, shape.size);
            history.changed(change);
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
        let finished = store.changes() <= cut;
        for survivors in SURVIVORS {
            let context = format!("{shape:?}, seed {seed}, cut at {cut}, {survivors:?}");
            let bytes = store.after_power_cut(survivors);
            assert_eq!(check(&bytes).corruptions, Vec::<String>::new(), "{context}");
            let image = Image::open(Arc::new(MemoryStore::new(bytes)), Writability::ReadOnly);
            history.assert_allows(&read_all(&image.unwrap(), &*below), &context);
        }
        if finished {
            return cut;
        }
        cut += 1;
    }
}
