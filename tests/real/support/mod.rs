//! What the scenarios stand on: tools, images, mounts, and the oracle that judges them.

pub mod daemon;
pub mod foreground;
pub mod held;
pub mod images;
pub mod keys;
pub mod load;
pub mod loopdev;
pub mod mapped;
pub mod mounted;
pub mod mounted_file;
pub mod mute;
pub mod oracle;
pub mod random;
pub mod stamped;
pub mod tools;
pub mod watchdog;
pub mod writer;

/// One kibibyte.
pub const K: u64 = 1 << 10;
/// One mebibyte.
pub const M: u64 = 1 << 20;

/// `offset` as an index into a vector of bytes.
pub fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("a test disk fits into memory")
}
