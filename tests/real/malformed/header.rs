//! What can be wrong with a header and its extensions.

use super::At::{Extension, Header};
use super::Bytes::{Plus, Text, U8, U32, U64};
use super::Change::{Length, Set};
use super::Kind::{DataFile, Luks, Overlay, Plain, RawDataFile, Version2, Zlib, Zstd};
use super::Verdict::{OnlyWeRefuse, Read, Refused};

const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const DATA_FILE: u32 = 0x4441_5441;
const ENCRYPTION: u32 = 0x0537_be77;

cases! {
    "nothing": Plain, [] => Read;
    "nothing, version 2": Version2, [] => Read;
    "another magic": Plain, [Set(Header(0), U32(0x5146_49fa))] => Refused("not a qcow2 image");
    "version 0": Plain, [Set(Header(4), U32(0))] => Refused("version 0");
    "version 1": Plain, [Set(Header(4), U32(1))] => Refused("version 1");
    "version 4": Plain, [Set(Header(4), U32(4))] => Refused("version 4");
    // The first four bytes, and so on.
    "only a magic": Plain, [Length(4)] => Refused("header");
    "half a header": Plain, [Length(71)] => Refused("header");
    "a version 2 header of version 3": Plain, [Length(80)] => Refused("header");
    "a header without tables": Plain, [Length(512)] => Read;
    // Its length.
    "a header of 4 GiB": Plain, [Set(Header(100), U32(u32::MAX))] => Refused("header_length");
    "a header of 2 GiB": Plain, [Set(Header(100), U32(i32::MAX as u32))] => Refused("header_length");
    "a header longer than a cluster": Plain, [Set(Header(100), U32(65544))] => Refused("header_length");
    "a header of a whole cluster": Plain, [Set(Header(100), U32(65536))] => Read;
    "a header of version 2's length": Plain, [Set(Header(100), U32(72))] => Refused("header_length");
    "a header of 103 bytes": Plain, [Set(Header(100), U32(103))] => Refused("header_length");
    "a header of 104 bytes": Plain, [Set(Header(100), U32(104))] => Read;
    // The backing file's name.
    "a name at the end of all offsets": Overlay, [Set(Header(8), U64(u64::MAX))] => Refused("backing_file_offset");
    "a name in the second cluster": Overlay, [Set(Header(8), U64(65536))] => Refused("backing_file_offset");
    "a name that leaves the cluster": Overlay, [Set(Header(8), U64(65535))] => Refused("backing_file_size");
    "a name inside the header": Overlay, [Set(Header(8), U64(16)), Set(Header(16), U32(4))]
        => OnlyWeRefuse("backing_file_offset", "a name that is not text of its own is no name");
    "a name without length": Overlay, [Set(Header(16), U32(0))] => Read;
    "a name of 1024 bytes": Overlay, [Set(Header(16), U32(1024))] => Refused("backing_file_size");
    "a name of 4 GiB": Overlay, [Set(Header(16), U32(u32::MAX))] => Refused("backing_file_size");
    "a name of 2 GiB": Overlay, [Set(Header(16), U32(i32::MAX as u32))] => Refused("backing_file_size");
    "a length without a name": Plain, [Set(Header(16), U32(9))] => Read;
    // Sizes.
    "clusters of 256 bytes": Plain, [Set(Header(20), U32(8))] => Refused("cluster_bits");
    "clusters of 4 MiB": Plain, [Set(Header(20), U32(22))] => Refused("cluster_bits");
    "clusters of 2^64 bytes": Plain, [Set(Header(20), U32(64))] => Refused("cluster_bits");
    "clusters of 2^(2^32-1) bytes": Plain, [Set(Header(20), U32(u32::MAX))] => Refused("cluster_bits");
    "clusters of one byte": Plain, [Set(Header(20), U32(0))] => Refused("cluster_bits");
    "extended L2 entries in clusters of 8 KiB": Plain, [Set(Header(20), U32(13)), Set(Header(72), U64(16))] => Refused("cluster_bits");
    "an empty disk": Plain, [Set(Header(24), U64(0))] => Read;
    "half a sector": Plain, [Set(Header(24), Plus(256))] => Read;
    "a disk of 2^63 bytes": Plain, [Set(Header(24), U64(1 << 63))] => Refused("l1_size");
    "a disk of 2^64-1 bytes": Plain, [Set(Header(24), U64(u64::MAX))] => Refused("l1_size");
    "a disk of 2^63-512 bytes": Plain, [Set(Header(24), U64((1 << 63) - 512))] => Refused("l1_size");
    "a disk that its L1 table can't map": Plain, [Set(Header(24), U64(1 << 40))] => Refused("l1_size");
    "a disk larger than any L1 table": Plain, [Set(Header(24), U64(1 << 52)), Set(Header(36), U32(u32::MAX))] => Refused("l1_size");
    // The L1 table.
    "no L1 table": Plain, [Set(Header(36), U32(0))] => Refused("l1_size");
    "an L1 table of 2^32-1 entries": Plain, [Set(Header(36), U32(u32::MAX))] => Refused("l1_size");
    "an L1 table of 2^31-1 entries": Plain, [Set(Header(36), U32(i32::MAX as u32))] => Refused("l1_size");
    "an L1 table above 32 MiB": Plain, [Set(Header(36), U32((4 << 20) + 1))] => Refused("l1_size");
    "an L1 table of 32 MiB": Plain, [Set(Header(36), U32(4 << 20))] => Read;
    "an unaligned L1 table": Plain, [Set(Header(40), Plus(512))] => Refused("l1_table_offset");
    "an L1 table at the end of all offsets": Plain, [Set(Header(40), U64(0x7fff_ffff_ffff_0000))] => Refused("l1_table_offset");
    "an L1 table above all offsets": Plain, [Set(Header(40), U64(0xffff_ffff_ffff_0000))] => Refused("l1_table_offset");
    "an L1 table behind the end of the file": Plain, [Set(Header(40), U64(1 << 40))] => Read;
    "an L1 table that is the header": Plain, [Set(Header(40), U64(0))] => Read;
    // The refcount table.
    "no refcount table": Plain, [Set(Header(56), U32(0))] => Refused("refcount_table_clusters");
    "a refcount table of 2^32-1 clusters": Plain, [Set(Header(56), U32(u32::MAX))] => Refused("refcount_table_clusters");
    "a refcount table above 8 MiB": Plain, [Set(Header(56), U32(129))] => Refused("refcount_table_clusters");
    "a refcount table of 8 MiB": Plain, [Set(Header(56), U32(128))] => Read;
    "an unaligned refcount table": Plain, [Set(Header(48), Plus(512))] => Refused("refcount_table_offset");
    "a refcount table at the end of all offsets": Plain, [Set(Header(48), U64(0x7fff_ffff_ffff_0000))] => Refused("refcount_table_offset");
    "a refcount table above all offsets": Plain, [Set(Header(48), U64(0xffff_ffff_ffff_0000))] => Refused("refcount_table_offset");
    "a refcount table behind the end of the file": Plain, [Set(Header(48), U64(1 << 40))] => Read;
    "refcounts of 128 bits": Plain, [Set(Header(96), U32(7))] => Refused("refcount_order");
    "refcounts of 2^(2^32-1) bits": Plain, [Set(Header(96), U32(u32::MAX))] => Refused("refcount_order");
    // Features.
    "encryption method 3": Plain, [Set(Header(32), U32(3))] => Refused("encryption method 3");
    "LUKS without a LUKS header": Plain, [Set(Header(32), U32(2))] => Refused("encryption header pointer");
    "a compression type without its bit": Plain, [Set(Header(104), U8(1))] => Refused("compression_type");
    "the bit of a compression type without one": Plain, [Set(Header(72), U64(8))] => Refused("compression_type");
    "a compression type in a header too short for one": Zstd, [Set(Header(100), U32(104))] => Refused("compression_type");
    "compression type 2": Zstd, [Set(Header(104), U8(2))] => Refused("compression type 2");
    "an incompatible bit": Plain, [Set(Header(72), U64(1 << 5))] => Refused("bit 5");
    "the last incompatible bit": Plain, [Set(Header(72), U64(1 << 63))] => Refused("bit 63");
    "the dirty bit": Plain, [Set(Header(72), U64(1))] => Read;
    "the corrupt bit": Plain, [Set(Header(72), U64(2))] => Read;
    "all compatible bits": Plain, [Set(Header(80), U64(u64::MAX))] => Read;
    "autoclear bits that nobody knows": Plain, [Set(Header(88), U64(u64::MAX - 3))] => Read;
    "a raw data file that there is not": Plain, [Set(Header(88), U64(2))] => Refused("autoclear_features");
    "version 2 with all bytes behind its header set": Version2, [Set(Header(72), U64(0)), Set(Header(80), U64(u64::MAX))] => Read;
    // The external data file.
    "a data file without a name": Plain, [Set(Header(72), U64(4))] => Refused("data file name");
    "a data file with an empty name": DataFile, [Set(Extension(DATA_FILE, 8), U64(0)), Set(Extension(DATA_FILE, 4), U32(0))] => Refused("data file name");
    "a data file that is not there": DataFile, [Set(Extension(DATA_FILE, 8), Text(b"/nowhere"))] => Refused("no such file");
    "a data file that is described": DataFile, [Set(Extension(DATA_FILE, 8), Text(b"json:{}"))] => Refused("no such file");
    "a name with a NUL": DataFile, [Set(Extension(DATA_FILE, 9), U8(0))] => Refused("data file name");
    "a raw data file without the bit for one": RawDataFile, [Set(Header(72), U64(0))] => Refused("autoclear_features");
    // Extensions.
    "an extension of 4 GiB": Plain, [Set(Extension(FEATURE_NAMES, 4), U32(u32::MAX))] => Refused("header extension");
    "an extension of 2 GiB": Plain, [Set(Extension(FEATURE_NAMES, 4), U32(i32::MAX as u32))] => Refused("header extension");
    "an extension that leaves the cluster": Plain, [Set(Extension(FEATURE_NAMES, 4), U32(65536))] => Refused("header extension");
    "an extension up to the end of the cluster": Plain, [Set(Extension(FEATURE_NAMES, 4), U32(65536 - 112 - 8))] => Read;
    "an extension that leaves half an extension": Plain, [Set(Extension(FEATURE_NAMES, 4), U32(65536 - 112 - 16 - 3))] => Read;
    "an extension over the name of the backing file": Overlay, [Set(Extension(FEATURE_NAMES, 4), U32(1000))] => Refused("header extension");
    "a backing format of 16 bytes": Overlay, [Set(Extension(BACKING_FORMAT, 4), U32(16))] => Refused("backing format");
    "a backing format that nobody knows": Overlay, [Set(Extension(BACKING_FORMAT, 8), Text(b"rav"))] => Refused("rav");
    "a backing format that is no text": Overlay, [Set(Extension(BACKING_FORMAT, 8), Text(b"\xff\xfe\xfd"))] => Refused("backing format");
    "a backing format with a NUL": Overlay, [Set(Extension(BACKING_FORMAT, 8), Text(b"r\0w"))] => Refused("backing file of format");
    "a feature table that ends inside an entry": Plain, [Set(Extension(FEATURE_NAMES, 4), U32(383))] => Read;
    // Encryption.
    "keys behind the end of the file": Luks, [Set(Extension(ENCRYPTION, 8), U64(1 << 40))] => Refused("encryption header pointer");
    "keys at no cluster": Luks, [Set(Extension(ENCRYPTION, 8), Plus(512))] => Refused("encryption header pointer");
    "2^63 bytes of keys": Luks, [Set(Extension(ENCRYPTION, 16), U64(1 << 63))]
        => OnlyWeRefuse("encryption header pointer", "no LUKS header is so long");
    "2^64-1 bytes of keys": Luks, [Set(Extension(ENCRYPTION, 16), U64(u64::MAX))]
        => OnlyWeRefuse("encryption header pointer", "no LUKS header is so long");
    "no keys": Luks, [Set(Extension(ENCRYPTION, 16), U64(0))] => Refused("encryption header pointer");
    "an encryption header pointer of 8 bytes": Luks, [Set(Extension(ENCRYPTION, 4), U32(8))] => Refused("encryption header pointer");
    "an encryption header pointer in an image without encryption": Luks, [Set(Header(32), U32(0))] => Refused("encryption header pointer");
    "old AES where there is LUKS": Luks, [Set(Header(32), U32(1))] => Refused("encryption header pointer");
    "version 2 with compressed clusters": Zlib, [Set(Header(4), U32(2))] => Read;
}
