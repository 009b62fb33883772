//! Snapshot table entries.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qchainfs::qcow2::{SNAPSHOT_FIXED_LEN, Snapshot, SnapshotLengths};

fuzz_target!(|bytes: &[u8]| {
    let Some(fixed) = bytes.first_chunk::<SNAPSHOT_FIXED_LEN>() else { return };
    let lengths = SnapshotLengths::parse(fixed);
    assert!(lengths.entry() >= SNAPSHOT_FIXED_LEN + lengths.variable());
    let _ = Snapshot::parse(fixed, &bytes[SNAPSHOT_FIXED_LEN..]);
});
