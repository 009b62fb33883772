//! Repairs of images on a disk that fails, at any of its reads.

use std::collections::BTreeMap;

use super::repairing::damaged;
use super::*;
use crate::image::check::{Extent, repair};
use crate::store::fault::{FaultStore, Survivors};

/// The clusters that are counted too low, and how.
fn too_low(bytes: &[u8]) -> BTreeMap<u64, u64> {
    let found = own_check(bytes).1;
    let counts = found.iter().filter_map(|finding| match finding {
        Finding::TooLow { cluster, refcount, .. } => Some((*cluster, *refcount)),
        _ => None,
    });
    counts.collect()
}

#[test]
fn a_read_that_fails_once_lets_no_repair_lower_the_count_of_what_is_in_use() {
    let mut failed = 0;
    for seed in (0..60).step_by(3) {
        let (_, bytes, context) = damaged(seed);
        let before = too_low(&bytes);
        for extent in [Extent::Leaks, Extent::All] {
            for failing in 0.. {
                let store = FaultStore::new(bytes.clone());
                store.count_reads();
                store.fail(failing..failing + 1);
                let done = repair(&store, extent, &mut Found::default()).map(drop);
                if store.failed().is_none() {
                    break;
                }
                failed += 1;
                let context = format!("{context}, {extent:?}, operation {failing}, {done:?}");
                for (cluster, count) in too_low(&store.after_power_cut(Survivors::All)) {
                    let was = before.get(&cluster).copied();
                    assert!(
                        was.is_some_and(|was| was <= count),
                        "{context}: cluster {cluster} is in use, was counted as {was:?} and is now {count}"
                    );
                }
            }
        }
    }
    assert!(failed > 1000, "only {failed} operations failed");
}
