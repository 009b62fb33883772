//! Feature bits of the version 3 header (section "Header", bytes 72 to 95).

use bitflags::bitflags;

bitflags! {
    /// A reader that does not know one of these must not open the image.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct IncompatibleFeatures: u64 {
        /// Refcounts may be wrong.
        const DIRTY = 1;
        /// Structures may be wrong.
        const CORRUPT = 1 << 1;
        /// Guest data is in a file of its own.
        const DATA_FILE = 1 << 2;
        /// Compressed clusters are not deflate.
        const COMPRESSION_TYPE = 1 << 3;
        /// L2 entries have 32 subclusters.
        const EXTENDED_L2 = 1 << 4;
        /// Whatever a later version may define.
        const _ = !0;
    }

    /// A reader may ignore these; a writer keeps them.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct CompatibleFeatures: u64 {
        /// Refcounts may be written late, under the dirty bit.
        const LAZY_REFCOUNTS = 1;
        /// Whatever a later version may define.
        const _ = !0;
    }

    /// A writer that does not maintain one of these must clear it before its first write.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct AutoclearFeatures: u64 {
        /// The bitmaps extension agrees with the data.
        const BITMAPS = 1;
        /// The external data file can be read by itself.
        const RAW_DATA_FILE = 1 << 1;
        /// Whatever a later version may define.
        const _ = !0;
    }
}

/// The name that the specification gives to incompatible bit `bit`, if it defines it.
pub fn incompatible_name(bit: u32) -> Option<&'static str> {
    ["dirty bit", "corrupt bit", "external data file", "compression type", "extended L2 entries"]
        .get(bit as usize)
        .copied()
}

/// Entries of the feature name table that QEMU writes: (type, bit, name).
pub const FEATURE_NAMES: &[(u8, u8, &str)] = &[
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];
