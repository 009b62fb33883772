//! Seeded random numbers, for tests: each prints its seed and can be replayed.

use std::env;

/// A linear congruential generator.
pub struct Random(u64);

impl Random {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Puts `items` in any order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

/// The seeds that a test tries: the one in QCHAINFS_SEED, or as many as QCHAINFS_SEEDS says, or `count`.
pub fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let number = |name: &str| -> Option<u64> {
        let value = env::var(name).ok()?;
        Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
    };
    let range = match number("QCHAINFS_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("QCHAINFS_SEEDS").unwrap_or(count),
    };
    range.inspect(|seed| eprintln!("seed {seed}: QCHAINFS_SEED={seed} replays it"))
}
