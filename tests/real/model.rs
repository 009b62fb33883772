//! Random operations through the mount, against a plain vector and against a twin that `qemu-io`
//! writes, on images of every kind that the matrix knows.

mod twins;

use twins::{Twins, chain};

use crate::matrix::shape::Dimension::{Below, Data, Depth, Encryption, L2, Snapshots};
use crate::matrix::shape::{Shape, Value, chain_with};
use crate::support::K;
use crate::support::random::{Random, seeds};
use crate::support::writer::Writer;

/// What can happen to a disk.
#[derive(Debug, Clone, Copy)]
enum Operation {
    Write { offset: u64, len: u64, byte: u8 },
    Punch { offset: u64, len: u64 },
    Zero { offset: u64, len: u64 },
    Sync,
}

impl Operation {
    fn random(random: &mut Random, size: u64) -> Self {
        let (offset, len) = random.range(size, (size / 6).clamp(1, 300 * K));
        match random.below(20) {
            0..11 => Self::Write { offset, len, byte: 1 + (random.below(255) as u8) },
            11..15 => Self::Punch { offset, len },
            15..18 => Self::Zero { offset, len },
            _ => Self::Sync,
        }
    }

    fn apply(self, writer: &mut Writer) {
        match self {
            Self::Write { offset, len, byte } => writer.fill(offset, len, byte),
            Self::Punch { offset, len } => writer.punch(offset, len),
            Self::Zero { offset, len } => writer.zero(offset, len),
            Self::Sync => writer.sync(),
        }
    }

    /// The same in the language of `qemu-io`, where a discard would leave parts of clusters as they
    /// are.
    fn for_qemu(self) -> String {
        match self {
            Self::Write { offset, len, byte } => format!("write -P {byte} {offset} {len}"),
            Self::Punch { offset, len } => format!("write -z -u {offset} {len}"),
            Self::Zero { offset, len } => format!("write -z {offset} {len}"),
            Self::Sync => "flush".into(),
        }
    }
}

/// Chains of which the last image, or that below it, is encrypted.
const ENCRYPTED: [&[&[Value]]; 9] = [
    &[&[(Encryption, "luks"), (L2, "off"), ONE_SNAPSHOT]],
    &[&[(Encryption, "aes")], &[(Encryption, "luks"), (L2, "on"), ONE_SNAPSHOT]],
    &[&[(Depth, "2"), (Below, "raw"), (Encryption, "aes"), (L2, "off"), ONE_SNAPSHOT]],
    &[&[(Encryption, "luks")], &[(Encryption, "aes"), (L2, "on")]],
    &[&[(Encryption, "none")], &[(Encryption, "luks"), (Data, "external")]],
    &[&[(Encryption, "luks")], &[(Encryption, "none")]],
    &[&[(Encryption, "luks")], &[(Encryption, "luks"), ONE_SNAPSHOT]],
    &[&[(Encryption, "luks"), (Data, "external raw")]],
    &[&[(Encryption, "aes"), (Data, "external raw")]],
];
const ONE_SNAPSHOT: Value = (Snapshots, "one");

fn random_operations(shapes: &[Shape], random: &mut Random, rounds: usize, operations: usize) {
    let mut twins = Twins::of(shapes, random);
    for round in 0..rounds {
        twins.round(random, operations);
        twins.between(random, round);
    }
    twins.are_equal();
}

#[test]
fn random_operations_leave_what_a_vector_and_qemu_hold() {
    for seed in seeds(10) {
        random_operations(&chain(seed - 1), &mut Random::new(seed), 3, 40);
    }
}

#[test]
fn random_operations_on_encrypted_images_leave_what_a_vector_and_qemu_hold() {
    // QEMU takes seconds to make a LUKS image.
    for seed in seeds(4) {
        let random = &mut Random::new(seed);
        let kind = ENCRYPTED[(seed as usize - 1) % ENCRYPTED.len()];
        random_operations(&chain_with(kind, random), random, 3, 40);
    }
}

#[test]
fn a_long_run_of_random_operations_leaves_what_a_vector_and_qemu_hold() {
    for seed in seeds(2) {
        // Of other chains than the short runs of the same seeds.
        random_operations(&chain(seed + 60), &mut Random::new(seed), 2, 250);
    }
}
