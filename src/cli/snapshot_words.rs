//! Snapshots as qemu-img prints them.

use serde_json::Value;

use super::report::printable;
use super::size::human;
use crate::control::snapshot_info;
use crate::image::SnapshotTree;
use crate::qcow2::Snapshot;

/// The object that qemu-img prints for a snapshot, with what we know besides.
pub fn snapshot_object(snapshot: &SnapshotTree) -> Value {
    let mut object = snapshot_info(snapshot.entry());
    object["virtual-size"] = snapshot.size().into();
    object
}

/// When the snapshot was made, in local time.
pub fn when(entry: &Snapshot) -> String {
    jiff::Timestamp::from_second(entry.date_seconds.into())
        .map(|time| time.to_zoned(jiff::tz::TimeZone::system()))
        .map(|time| time.strftime("%Y-%m-%d %H:%M:%S").to_string())
        .unwrap_or_default()
}

/// The names of the columns of [`snapshot_line`].
pub fn columns_head() -> String {
    columns("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")
}

/// The line that qemu-img prints for a snapshot.
pub fn snapshot_line(entry: &Snapshot) -> String {
    let milliseconds = entry.vm_clock_nanoseconds / 1_000_000;
    let seconds = milliseconds / 1000;
    let clock = format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        milliseconds % 1000
    );
    let icount = entry.icount.map_or("--".to_owned(), |icount| icount.to_string());
    columns(
        &printable(&entry.id),
        &printable(&entry.name),
        &human(entry.vm_state_size),
        &when(entry),
        &clock,
        &icount,
    )
}

fn columns(id: &str, tag: &str, size: &str, date: &str, clock: &str, icount: &str) -> String {
    format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
}
