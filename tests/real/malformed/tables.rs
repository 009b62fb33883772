//! What can be wrong with L1 and L2 tables and refcounts.

use super::At::{Header, L1, L2, Refblock, Reftable};
use super::Bytes::{Or, Plus, U8, U64};
use super::Change::{Length, Set};
use super::Kind::{DataFile, Extended, Luks, Plain, RawDataFile, Version2, Zlib, Zstd};
use super::Verdict::{OnlyQemuRefuses, OnlyWeRefuse, Read, Refused};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

cases! {
    // L1 entries.
    "an unaligned L2 table": Plain, [Set(L1(0), Plus(512))] => Refused("L2 table");
    "an L2 table behind the end of the file": Plain, [Set(L1(0), U64(COPIED | 1 << 40))] => Read;
    "an L2 table at the end of all offsets": Plain, [Set(L1(0), U64(COPIED | 0x00ff_ffff_ffff_0000))] => Read;
    "reserved bits in an L1 entry": Plain, [Set(L1(0), Or(0x7f00_0000_0000_01ff))] => Read;
    "an L1 entry of reserved bits alone": Plain, [Set(L1(0), U64(0x7f00_0000_0000_01ff))] => Read;
    "an L2 table at the header": Plain, [Set(L1(0), U64(COPIED))] => Read;
    "an L2 table that is the refcount table": Plain, [Set(L1(0), U64(COPIED | 0x10000))] => Read;
    "an L2 table that is the L1 table": Plain, [Set(L1(0), U64(COPIED | 0x30000))] => Read;
    "a file that ends inside the L2 table": Plain, [Length(0x40020)] => Read;
    "a file that ends before the L2 table": Plain, [Length(0x40000)] => Read;
    "a file that ends inside the L1 table": Plain, [Length(0x30004)] => Read;
    // Standard L2 entries.
    "an unaligned cluster": Plain, [Set(L2(0), Plus(512))] => Refused("not aligned");
    "an unaligned cluster behind others": Plain, [Set(L2(5), Plus(512))] => Refused("not aligned");
    "an unaligned zero cluster": Plain, [Set(L2(8), Plus(512))] => Refused("not aligned");
    "a cluster behind the end of the file": Plain, [Set(L2(0), U64(COPIED | 1 << 40))] => Read;
    "a cluster at the end of all offsets": Plain, [Set(L2(0), U64(COPIED | 0x00ff_ffff_ffff_0000))] => Read;
    "reserved bits in an L2 entry": Plain, [Set(L2(0), Or(0x3f00_0000_0000_01fe))] => Read;
    "an L2 entry of reserved bits alone": Plain, [Set(L2(0), U64(0x3f00_0000_0000_01fe))] => Read;
    "an L2 entry without a place that is marked as ours": Plain, [Set(L2(0), U64(COPIED))] => Read;
    "a cluster that is the header": Plain, [Set(L2(1), U64(0x0000))] => Read;
    "a cluster that is the L2 table": Plain, [Set(L2(1), U64(COPIED | 0x40000))] => Read;
    "a cluster that is another": Plain, [Set(L2(1), U64(COPIED | 0x50000))] => Read;
    "a zero cluster in version 2": Version2, [Set(L2(0), Or(1))] => Refused("zero flag");
    "a zero cluster without a place in version 2": Version2, [Set(L2(0), U64(1))] => Refused("zero flag");
    "an unaligned L2 table of an encrypted image": Luks, [Set(L1(0), Plus(512))] => Refused("L2 table");
    "a compressed cluster in an encrypted image": Luks, [Set(L2(0), U64(COMPRESSED | 0x50000))] => Refused("");
    // Compressed clusters.
    "a compressed cluster of garbage": Plain, [Set(L2(0), U64(COMPRESSED | 0x50000))] => Refused("compressed");
    "a compressed cluster behind the end of the file": Zlib, [Set(L2(0), U64(COMPRESSED | 1 << 40))] => Refused("compressed");
    "a compressed cluster at the end of all offsets": Zlib, [Set(L2(0), U64(COMPRESSED | 0x003f_ffff_ffff_ffff))] => Refused("compressed");
    "a compressed cluster of most sectors": Zlib, [Set(L2(0), Or(0x3fc0_0000_0000_0000))] => Read;
    "a compressed cluster of most sectors, by zstd": Zstd, [Set(L2(0), Or(0x3fc0_0000_0000_0000))] => Read;
    "a compressed cluster that begins elsewhere": Zlib, [Set(L2(0), Plus(1))] => Refused("compressed");
    "a compressed cluster that begins elsewhere, by zstd": Zstd, [Set(L2(0), Plus(1))] => Refused("compressed");
    "a compressed cluster that is marked as ours": Zlib, [Set(L2(0), Or(COPIED))] => Read;
    "a file that ends inside a compressed cluster": Zlib, [Length(0x50010)] => Refused("compressed");
    "a file that ends inside a compressed cluster, by zstd": Zstd, [Length(0x50010)] => Refused("compressed");
    "zlib taken for zstd": Zlib, [Set(Header(72), U64(8)), Set(Header(104), U8(1))] => Refused("compressed");
    "a compressed cluster beside a data file": DataFile, [Set(L2(0), U64(COMPRESSED | 0x50000))] => Refused("external data file");
    // Extended L2 entries; two words each.
    "an unaligned cluster of subclusters": Extended, [Set(L2(0), Plus(512))] => Refused("not aligned");
    "subclusters both allocated and zero": Extended, [Set(L2(1), U64(0x0000_0001_ffff_ffff))] => Refused("both allocated and zero");
    "a subcluster both, the others read before": Extended, [Set(L2(1), U64(0x8000_0000_ffff_ffff))] => Refused("both allocated and zero");
    "allocated subclusters without a cluster": Extended, [Set(L2(0), U64(0))] => Refused("without a cluster");
    "a zero flag in an extended entry": Extended, [Set(L2(0), Or(1))]
        => OnlyWeRefuse("zero flag", "the format says that it is always 0, and nobody knows what was meant");
    "a compressed cluster with a bitmap": Extended, [Set(L2(0), U64(COMPRESSED | 0x50000))] => Refused("bitmap");
    "reserved bits in an extended entry": Extended, [Set(L2(0), Or(0x3f00_0000_0000_01fe))] => Read;
    "zero subclusters without a cluster": Extended, [Set(L2(0), U64(0)), Set(L2(1), U64(0xffff_ffff_0000_0000))] => Read;
    "a cluster of no subclusters": Extended, [Set(L2(1), U64(0))] => Read;
    // Data files.
    "a cluster elsewhere in a data file": DataFile, [Set(L2(0), U64(COPIED | 0x10000))]
        => OnlyQemuRefuses("the format wants the same place in raw data files only");
    "a cluster behind the end of the data file": DataFile, [Set(L2(0), U64(COPIED | 1 << 40))]
        => OnlyQemuRefuses("the format wants the same place in raw data files only");
    "a cluster at 0 that is not marked as ours": DataFile, [Set(L2(0), U64(0))] => Read;
    "an unaligned cluster of a data file": DataFile, [Set(L2(0), Plus(512))] => Refused("not aligned");
    "a cluster elsewhere in a raw data file": RawDataFile, [Set(L2(1), U64(COPIED | 0x50000))] => Refused("raw data file");
    // Refcounts say nothing to a reader.
    "an unaligned refcount block": Plain, [Set(Reftable(0), Plus(512))] => Read;
    "no refcount block": Plain, [Set(Reftable(0), U64(0))] => Read;
    "reserved bits in the refcount table": Plain, [Set(Reftable(0), Or(511))] => Read;
    "a refcount block at the end of all offsets": Plain, [Set(Reftable(0), U64(0xffff_ffff_ffff_0000))] => Read;
    "refcounts of zero": Plain, [Set(Refblock(0), U64(0))] => Read;
}
