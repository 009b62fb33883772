//! The power goes at every operation on images whose data is not simply clusters of the file: both files lose what was
//! not synced, each in its own way.

use super::checker::check;
use super::history::{History, SECTOR};
use super::kinds::{KINDS, Kind};
use super::*;
use crate::random::seeds;
use crate::store::fault::{FaultStore, Survivors};

const SIZE: u64 = 96 << 10;

/// What survives of the image and of its data file.
const SURVIVORS: [(Survivors, Survivors); 6] = [
    (Survivors::Nothing, Survivors::Nothing),
    (Survivors::All, Survivors::Nothing),
    (Survivors::Nothing, Survivors::All),
    (Survivors::All, Survivors::All),
    (Survivors::Torn(0x2468_ace0_1357_9bdf), Survivors::Torn(0x1b2d_3f48_5a6c_7e90)),
    (Survivors::Some(0x0f1e_2d3c_4b5a_6979), Survivors::Torn(0x7777_1111_5555_3333)),
];

#[test]
fn a_power_cut_at_any_operation_on_two_files_loses_nothing_flushed_and_corrupts_nothing() {
    let mut cuts = 0;
    for seed in seeds(3) {
        for kind in KINDS {
            cuts += cut_everywhere(kind, seed);
        }
    }
    assert!(cuts > 300, "only {cuts} cuts were tried");
}

fn cut_everywhere(kind: Kind, seed: u64) -> u64 {
    let below = kind.below();
    for cut in 0.. {
        let mut random = Random::new(seed);
        let image_file = Arc::new(FaultStore::new(kind.create(SIZE)));
        let data_file = Arc::new(image_file.beside(Vec::new()));
        image_file.fail(cut..u64::MAX);
        let image = kind.open(image_file.clone(), data_file.clone(), Writability::Writable);
        let mut history = History::new(kind.empty_disk(SIZE), SECTOR);
        for _ in 0..12 {
            let change = Change::of_sectors(&mut random, SIZE);
            history.changes(change);
            match (change, change.apply_to_image(&image, &*below)) {
                (Change::Flush, Ok(())) => history.flushed(),
                (_, Ok(())) => {}
                (_, Err(_)) => history.failed = true,
            }
        }
        if image.flush_all().is_ok() {
            history.flushed();
        }
        for (of_image, of_data) in SURVIVORS {
            let context = format!("{kind:?}, seed {seed}, cut {cut}, {of_image:?}, {of_data:?}");
            let bytes = image_file.after_power_cut(of_image);
            assert_eq!(check(&bytes).corruptions, Vec::<String>::new(), "{context}");
            let data = Arc::new(MemoryStore::new(data_file.after_power_cut(of_data)));
            let image = Arc::new(MemoryStore::new(bytes));
            let image = kind.open(image, data, Writability::ReadOnly);
            history.assert_allows(&read_all(&image, &*below), &context);
        }
        if image_file.operations() <= cut {
            return cut;
        }
    }
    unreachable!("a run has an end")
}
