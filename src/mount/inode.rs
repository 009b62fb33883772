//! Inode numbers that are the same at every mount, so that backup programs recognise what has not changed.

use std::fmt;

/// An inode number of the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inode(pub u64);

impl Inode {
    /// The mountpoint itself.
    pub const ROOT: Self = Self(1);

    /// The number for whatever `parts` identify.
    ///
    /// FNV-1a: the standard library's hashes may change with its version, this may not.
    pub fn of(parts: &[&[u8]]) -> Self {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        for part in parts {
            // With the lengths ["ab", "c"] differs from ["a", "bc"], whatever bytes there are.
            (part.len() as u64).to_be_bytes().into_iter().for_each(&mut add);
            part.iter().copied().for_each(&mut add);
        }
        Self(hash.max(2))
    }

    /// The number to try when this one is taken.
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1).max(2))
    }
}

impl fmt::Display for Inode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_border_between_parts_counts() {
        assert_ne!(Inode::of(&[b"ab", b"c"]), Inode::of(&[b"a", b"bc"]));
        assert_ne!(Inode::of(&[b"a\xff\0b"]), Inode::of(&[b"a", b"b"]));
    }

    #[test]
    fn numbers_do_not_change_from_release_to_release() {
        assert_eq!(Inode::of(&[b"disk.raw"]), Inode(0x92b3_869c_df98_2a60));
    }
}
