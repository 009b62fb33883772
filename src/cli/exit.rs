//! Exit codes: scripts branch on them, so they never change their meaning.

use crate::error::{Error, Kind};

/// All went well.
pub const DONE: u8 = 0;
/// It failed, for a reason without a code of its own.
pub const FAILED: u8 = 1;
/// The arguments make no sense.
pub const USAGE: u8 = 2;
/// `diff` has found differences.
pub const DIFFERENT: u8 = 4;
/// An image, member or snapshot is not there.
pub const NOT_FOUND: u8 = 10;
/// Another process holds the image.
pub const LOCKED: u8 = 11;
/// The key of an encrypted image is missing or wrong.
pub const KEY: u8 = 12;
/// The policy on implied opens refused a file.
pub const POLICY: u8 = 13;
/// The image needs a feature that is not supported.
pub const UNSUPPORTED: u8 = 14;

/// `check` has found corruptions.
pub const CORRUPT: u8 = 2;
/// `check` has found leaked clusters and nothing worse.
pub const LEAKS: u8 = 3;
/// `check` does not know the image's format.
pub const CHECK_UNSUPPORTED: u8 = 63;

/// The exit code for `error`.
pub fn code(error: &Error) -> u8 {
    match error.kind() {
        Kind::Failed => FAILED,
        Kind::Usage => USAGE,
        Kind::NotFound => NOT_FOUND,
        Kind::Locked => LOCKED,
        Kind::Key => KEY,
        Kind::Policy => POLICY,
        Kind::Unsupported => UNSUPPORTED,
    }
}
