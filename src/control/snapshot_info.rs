//! Snapshots as QEMU tells them.

use serde_json::{Value, json};

use crate::qcow2::Snapshot;

/// A snapshot as QEMU's `SnapshotInfo`, which `qemu-img` prints, too.
pub fn snapshot_info(entry: &Snapshot) -> Value {
    let mut info = json!({
        "id": entry.id,
        "name": entry.name,
        "vm-state-size": entry.vm_state_size,
        "date-sec": entry.date_seconds,
        "date-nsec": entry.date_nanoseconds,
        "vm-clock-sec": entry.vm_clock_nanoseconds / 1_000_000_000,
        "vm-clock-nsec": entry.vm_clock_nanoseconds % 1_000_000_000,
    });
    if let Some(icount) = entry.icount {
        info["icount"] = json!(icount);
    }
    info
}
