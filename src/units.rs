//! Offsets that can't be mixed up: a place in the guest's disk is not a place in an image file.

use std::fmt;

/// Declares a `u64` newtype with the few operations that make sense for it.
macro_rules! offset {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// Offset 0.
            pub const ZERO: Self = Self(0);

            /// The offset `bytes` bytes from the beginning.
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// Bytes from the beginning.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + bytes`, or `None` past 2^64.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }

            /// The largest multiple of `alignment` (a power of two) that is not above `self`.
            pub const fn align_down(self, alignment: u64) -> Self {
                Self(self.0 & !(alignment - 1))
            }

            /// Whether the offset is a multiple of `alignment`, a power of two.
            pub const fn is_aligned(self, alignment: u64) -> bool {
                self.0 & (alignment - 1) == 0
            }
        }

        impl std::ops::Add<u64> for $name {
            type Output = Self;
            fn add(self, bytes: u64) -> Self {
                Self(self.0 + bytes)
            }
        }

        impl std::ops::Sub for $name {
            type Output = u64;
            fn sub(self, other: Self) -> u64 {
                self.0 - other.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:#x})", stringify!($name), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset! {
    /// A byte offset in the disk that the guest sees.
    GuestOffset
}

offset! {
    /// A byte offset in an image file on the host.
    HostOffset
}

/// Bytes `start .. start + len` of the guest's disk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GuestRange {
    /// First byte.
    pub start: GuestOffset,
    /// Length in bytes; may be 0.
    pub len: u64,
}

impl GuestRange {
    /// The range of `len` bytes from `start`.
    pub const fn new(start: GuestOffset, len: u64) -> Self {
        Self { start, len }
    }

    /// The first byte behind the range.
    pub fn end(self) -> GuestOffset {
        self.start + self.len
    }

    /// Whether the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The smallest range with borders on multiples of `alignment` that holds this one.
    pub fn widen(self, alignment: u64) -> Self {
        let start = self.start.align_down(alignment);
        let end = self.end().get().next_multiple_of(alignment);
        Self::new(start, end - start.get())
    }

    /// The largest range with borders on multiples of `alignment` inside this one, if any byte is left.
    pub fn narrow(self, alignment: u64) -> Option<Self> {
        let start = self.start.get().next_multiple_of(alignment);
        let end = self.end().align_down(alignment).get();
        (start < end).then(|| Self::new(GuestOffset::new(start), end - start))
    }

    /// The parts of the range between multiples of `alignment`, a power of two, in order.
    pub fn split(self, alignment: u64) -> impl Iterator<Item = Self> {
        let mut at = self.start;
        std::iter::from_fn(move || {
            let len = (self.end() - at).min(alignment - (at.get() & (alignment - 1)));
            let part = Self::new(at, len);
            at = at + len;
            (len > 0).then_some(part)
        })
    }

    /// Whether the two ranges share a byte.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset::new(start), len)
    }

    #[test]
    fn widening_covers_every_touched_cluster() {
        assert_eq!(range(5, 1).widen(4), range(4, 4));
        assert_eq!(range(3, 2).widen(4), range(0, 8));
        assert_eq!(range(4, 4).widen(4), range(4, 4));
    }

    #[test]
    fn narrowing_keeps_only_whole_clusters() {
        assert_eq!(range(1, 7).narrow(4), Some(range(4, 4)));
        assert_eq!(range(1, 6).narrow(4), None);
        assert_eq!(range(0, 8).narrow(4), Some(range(0, 8)));
    }

    #[test]
    fn splitting_gives_every_byte_once_and_no_empty_part() {
        let parts: Vec<_> = range(3, 9).split(4).collect();
        assert_eq!(parts, [range(3, 1), range(4, 4), range(8, 4)]);
        assert_eq!(range(5, 0).split(4).count(), 0);
    }

    #[test]
    fn touching_ranges_do_not_overlap() {
        assert!(!range(0, 4).overlaps(range(4, 4)));
        assert!(range(0, 5).overlaps(range(4, 4)));
    }
}
