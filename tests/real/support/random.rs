//! A small seeded generator: a test prints its seed, and QCHAINFS_SEED replays one.

use std::env;

/// The generator splitmix64.
pub struct Random(u64);

impl Random {
    /// The sequence that belongs to `seed`, which is printed for the case that the test fails.
    pub fn new(seed: u64) -> Self {
        eprintln!("seed {seed}: QCHAINFS_SEED={seed} replays it");
        Self(seed)
    }

    /// A sequence that is not replayed by its number, since the same test always takes the same.
    pub fn fixed(number: u64) -> Self {
        Self(number)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.any() % end
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        let position = self.below(choices.len() as u64);
        choices[usize::try_from(position).expect("an index")]
    }

    /// Bytes without a pattern.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.any().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    /// Offset and length of a run of at least one byte and at most `longest`, inside `size` bytes.
    /// Short runs, long ones and such on round borders are all likely.
    pub fn range(&mut self, size: u64, longest: u64) -> (u64, u64) {
        let grain = self.pick(&[1, 512, 4096, 65536]).min(size);
        let offset = self.below(size) / grain * grain;
        let longest = self.pick(&[longest, longest, 4096, 600]).min(size - offset);
        let len = (1 + self.below(longest)).next_multiple_of(grain).min(size - offset);
        (offset, len)
    }
}

/// The seeds that a test tries: the one in QCHAINFS_SEED, or as many as QCHAINFS_SEEDS says, or
/// `count`.
pub fn seeds(count: u64) -> Vec<u64> {
    let number = |name: &str| -> Option<u64> {
        let value = env::var(name).ok()?;
        Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
    };
    match number("QCHAINFS_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("QCHAINFS_SEEDS").unwrap_or(count)).collect(),
    }
}
