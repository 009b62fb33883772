//! What can be wrong with the snapshot table and the tables of a snapshot.

use super::At::{Header, SnapshotL1, SnapshotL2, Snapshots};
use super::Bytes::{Plus, Text, U16, U32, U64};
use super::Change::{Length, Set};
use super::Kind::{BesideSnapshot, Plain, Snapshot};
use super::Verdict::{OnlyQemuRefuses, OnlyWeRefuse, Read, Refused};

cases! {
    "nothing": Snapshot, [] => Read;
    "nothing, beside it": BesideSnapshot, [] => Read;
    // The table.
    "2^32-1 snapshots": Plain, [Set(Header(60), U32(u32::MAX))] => Refused("nb_snapshots");
    "65537 snapshots": Plain, [Set(Header(60), U32(65537))] => Refused("nb_snapshots");
    "65536 snapshots that are not there": Plain, [Set(Header(60), U32(65536))] => Refused("snapshot");
    "an unaligned table": BesideSnapshot, [Set(Header(64), Plus(512))] => Refused("snapshots_offset");
    "a table at the end of all offsets": BesideSnapshot, [Set(Header(64), U64(0x7fff_ffff_ffff_0000))] => Refused("snapshot");
    "a table above all offsets": BesideSnapshot, [Set(Header(64), U64(0xffff_ffff_ffff_0000))] => Refused("snapshots_offset");
    "a table behind the end of the file": BesideSnapshot, [Set(Header(64), U64(1 << 40))]
        => OnlyWeRefuse("snapshot table", "what is behind the end of the file is no snapshot");
    "a table that is not used": Plain, [Set(Header(64), U64(513))] => Refused("snapshots_offset");
    "a second snapshot of zeros": BesideSnapshot, [Set(Header(60), U32(2))] => Read;
    // The lengths in an entry.
    "no extra data": Snapshot, [Set(Snapshots(36), U32(0)), Set(Snapshots(40), Text(b"1one"))] => Read;
    "8 bytes of extra data": Snapshot, [Set(Snapshots(36), U32(8)), Set(Snapshots(48), Text(b"1one"))] => Read;
    "12 bytes of extra data": Snapshot, [Set(Snapshots(36), U32(12)), Set(Snapshots(52), Text(b"1one"))] => Read;
    "15 bytes of extra data": Snapshot, [Set(Snapshots(36), U32(15)), Set(Snapshots(55), Text(b"1one"))] => Read;
    "16 bytes of extra data": Snapshot, [Set(Snapshots(36), U32(16)), Set(Snapshots(56), Text(b"1one"))] => Read;
    "1024 bytes of extra data": Snapshot, [Set(Snapshots(36), U32(1024)), Set(Snapshots(1064), Text(b"1one"))] => Read;
    "1025 bytes of extra data": Snapshot, [Set(Snapshots(36), U32(1025)), Set(Snapshots(1065), Text(b"1one"))]
        => OnlyQemuRefuses("the format allows any length");
    "40000 bytes of extra data": Snapshot, [Set(Snapshots(36), U32(40000)), Set(Snapshots(40040), Text(b"1one"))]
        => OnlyQemuRefuses("the format allows any length");
    "2 GiB of extra data": Snapshot, [Set(Snapshots(36), U32(i32::MAX as u32))] => Refused("snapshot table");
    "4 GiB of extra data": Snapshot, [Set(Snapshots(36), U32(u32::MAX))] => Refused("snapshot table");
    "the longest id and name": BesideSnapshot, [Set(Snapshots(12), U16(u16::MAX)), Set(Snapshots(14), U16(u16::MAX))] => Read;
    "no id and no name": BesideSnapshot, [Set(Snapshots(12), U16(0)), Set(Snapshots(14), U16(0))] => Read;
    // What the snapshot is.
    "a disk of 2^64-1 bytes": Snapshot, [Set(Snapshots(48), U64(u64::MAX))]
        => OnlyWeRefuse("disk_size", "QEMU looks at the size of the active disk, and there is no disk like this");
    "a disk of 2^63 bytes": Snapshot, [Set(Snapshots(48), U64(1 << 63))]
        => OnlyWeRefuse("disk_size", "QEMU looks at the size of the active disk, and there is no disk like this");
    "a disk that its L1 table can't map": Snapshot, [Set(Snapshots(48), U64(1 << 40))] => Read;
    "an empty disk": Snapshot, [Set(Snapshots(48), U64(0))] => Read;
    "2^64-1 bytes of VM state": Snapshot, [Set(Snapshots(40), U64(u64::MAX))] => Read;
    // Its L1 table.
    "an unaligned L1 table": Snapshot, [Set(Snapshots(0), Plus(512))] => Refused("l1_table_offset");
    "an unaligned L1 table, beside it": BesideSnapshot, [Set(Snapshots(0), Plus(512))] => Read;
    "an L1 table at the end of all offsets": Snapshot, [Set(Snapshots(0), U64(0x7fff_ffff_ffff_0000))] => Refused("l1_table_offset");
    "an L1 table above all offsets": Snapshot, [Set(Snapshots(0), U64(0xffff_ffff_ffff_0000))] => Refused("l1_table_offset");
    "an L1 table behind the end of the file": Snapshot, [Set(Snapshots(0), U64(1 << 40))] => Read;
    "an L1 table of 2^32-1 entries": Snapshot, [Set(Snapshots(8), U32(u32::MAX))] => Refused("l1_size");
    "an L1 table of 2^31-1 entries": Snapshot, [Set(Snapshots(8), U32(i32::MAX as u32))] => Refused("l1_size");
    "an L1 table above 32 MiB": Snapshot, [Set(Snapshots(8), U32((4 << 20) + 1))] => Refused("l1_size");
    "an L1 table of 32 MiB": Snapshot, [Set(Snapshots(8), U32(4 << 20))] => Read;
    "an L1 table of 32 MiB, beside it": BesideSnapshot, [Set(Snapshots(8), U32(4 << 20))] => Read;
    "an L1 table of 2^32-1 entries, beside it": BesideSnapshot, [Set(Snapshots(8), U32(u32::MAX))] => Read;
    "no L1 table": Snapshot, [Set(Snapshots(8), U32(0))] => Read;
    "a file that ends inside the table": BesideSnapshot, [Length(0)] => Refused("not a qcow2");
    // Its entries.
    "an unaligned L2 table": Snapshot, [Set(SnapshotL1(0), Plus(512))] => Refused("L2 table");
    "an unaligned L2 table, beside it": BesideSnapshot, [Set(SnapshotL1(0), Plus(512))] => Read;
    "an unaligned cluster": Snapshot, [Set(SnapshotL2(0), Plus(512))] => Refused("not aligned");
    "a cluster behind the end of the file": Snapshot, [Set(SnapshotL2(0), U64(1 << 40))] => Read;
}
