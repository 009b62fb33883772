//! What can be wrong with the bitmaps extension and the bitmap directory.

use super::At::{Bitmaps as Directory, Extension};
use super::Bytes::{Text, U8, U16, U32, U64};
use super::Change::{Length, Set};
use super::Kind::Bitmaps;
use super::Verdict::{OnlyQemuRefuses, Read, Refused};

pub const EXTENSION: u32 = 0x2385_2875;

cases! {
    "nothing": Bitmaps, [] => Read;
    // The extension.
    "an extension of 16 bytes": Bitmaps, [Set(Extension(EXTENSION, 4), U32(16))] => Refused("bitmaps extension");
    "no bitmaps": Bitmaps, [Set(Extension(EXTENSION, 8), U32(0))] => Refused("nb_bitmaps");
    "65536 bitmaps": Bitmaps, [Set(Extension(EXTENSION, 8), U32(65536))] => Refused("nb_bitmaps");
    "two bitmaps": Bitmaps, [Length(1 << 20), Set(Extension(EXTENSION, 8), U32(2))] => Refused("bitmap directory");
    "a reserved field": Bitmaps, [Set(Extension(EXTENSION, 12), U32(1))] => Refused("bitmaps extension");
    "an empty directory": Bitmaps, [Set(Extension(EXTENSION, 16), U64(0))] => Refused("bitmap directory");
    "a directory above 64 MiB": Bitmaps, [Set(Extension(EXTENSION, 16), U64(1024 * 65535 + 1))] => Refused("bitmap_directory_size");
    "a directory of 2^64-1 bytes": Bitmaps, [Set(Extension(EXTENSION, 16), U64(u64::MAX))] => Refused("bitmap_directory_size");
    "a directory longer than its entries": Bitmaps, [Length(1 << 20), Set(Extension(EXTENSION, 16), U64(64))] => Refused("bitmap directory");
    "an unaligned directory": Bitmaps, [Set(Extension(EXTENSION, 24), U64(513))] => Refused("bitmap_directory_offset");
    "a directory at the header": Bitmaps, [Set(Extension(EXTENSION, 24), U64(0))] => Refused("bitmap_directory_offset");
    "a directory behind the end of the file": Bitmaps, [Set(Extension(EXTENSION, 24), U64(1 << 40))] => Refused("bitmap directory");
    "a directory at the end of all offsets": Bitmaps, [Set(Extension(EXTENSION, 24), U64(0x7fff_ffff_ffff_0000))] => Refused("bitmap directory");
    // An entry of the directory.
    "an unaligned bitmap table": Bitmaps, [Set(Directory(0), U64(0x50200))] => Refused("bitmap directory");
    "a bitmap table at the end of all offsets": Bitmaps, [Set(Directory(0), U64(0x7fff_ffff_ffff_0000))] => Refused("bitmap directory");
    "a bitmap table at the header": Bitmaps, [Set(Directory(0), U64(0))] => Refused("bitmap directory");
    "a bitmap table behind the end of the file": Bitmaps, [Set(Directory(0), U64(1 << 40))] => Read;
    "no bitmap table": Bitmaps, [Set(Directory(8), U32(0))] => Refused("bitmap directory");
    "a bitmap table of 2^32-1 entries": Bitmaps, [Length(1 << 20), Set(Directory(8), U32(u32::MAX))] => Refused("bitmap directory");
    "reserved flags": Bitmaps, [Set(Directory(12), U32(8))] => Refused("bitmap directory");
    "a bitmap in use": Bitmaps, [Set(Directory(12), U32(1))] => Read;
    "type 2": Bitmaps, [Set(Directory(16), U8(2))] => Refused("bitmap directory");
    "granularity of 256 bytes": Bitmaps, [Set(Directory(17), U8(8))] => Refused("bitmap directory");
    "granularity of 4 GiB": Bitmaps, [Set(Directory(17), U8(32))] => Refused("bitmap directory");
    "granularity of 2^255 bytes": Bitmaps, [Set(Directory(17), U8(255))] => Refused("bitmap directory");
    "extra data that may be ignored": Bitmaps, [Length(1 << 20), Set(Directory(12), U32(6)), Set(Directory(20), U32(8)), Set(Directory(32), Text(b"nightly\0")), Set(Extension(EXTENSION, 16), U64(40))]
        => OnlyQemuRefuses("the format lets programs ignore it that have no use for it");
    "no name": Bitmaps, [Set(Directory(18), U16(0))] => Refused("bitmap directory");
    "a name of 1024 bytes": Bitmaps, [Length(1 << 20), Set(Directory(18), U16(1024)), Set(Extension(EXTENSION, 16), U64(1048))] => Refused("bitmap directory");
    "extra data": Bitmaps, [Length(1 << 20), Set(Directory(20), U32(8)), Set(Directory(32), Text(b"nightly\0")), Set(Extension(EXTENSION, 16), U64(40))]
        => OnlyQemuRefuses("a list of bitmaps needs nothing of it");
    "4 GiB of extra data": Bitmaps, [Set(Directory(20), U32(u32::MAX))] => Refused("bitmap directory");
}
