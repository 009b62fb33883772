//! Modes of operation over one sector.
//!
//! By hand, since a sector is always whole blocks and has a length that is known: all of its blocks go through the
//! cipher in one call.

use super::block::KeyedBlocks;
use super::{CipherSpec, Mode, SECTOR};

/// The greatest length of a block, and so of an initialization vector.
pub(super) const MAX_BLOCK: usize = 16;

/// A sector's initialization vector; ciphers with shorter blocks use its beginning.
pub(super) type IvBytes = [u8; MAX_BLOCK];

/// A mode with its keys.
pub(super) enum KeyedMode {
    Xts { data: KeyedBlocks, tweak: KeyedBlocks },
    Cbc(KeyedBlocks),
    Ctr(KeyedBlocks),
    Ecb(KeyedBlocks),
}

impl KeyedMode {
    /// The mode of `spec` with `key`; nothing if the key has not the length that `spec` wants.
    pub(super) fn new(spec: CipherSpec, key: &[u8]) -> Option<Self> {
        if key.len() != spec.key_len() {
            return None;
        }
        let keyed = |key| spec.algorithm().with_key(key);
        Some(match spec.mode() {
            Mode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                Self::Xts { data: keyed(data)?, tweak: keyed(tweak)? }
            }
            Mode::Cbc => Self::Cbc(keyed(key)?),
            Mode::Ctr => Self::Ctr(keyed(key)?),
            Mode::Ecb => Self::Ecb(keyed(key)?),
        })
    }

    /// Decrypts a sector.
    pub(super) fn decrypt(&self, iv: IvBytes, sector: &mut [u8; SECTOR]) {
        match self {
            Self::Xts { data, tweak } => {
                let tweaks = tweaks(tweak, iv);
                xor(sector, &tweaks);
                data.decrypt(sector);
                xor(sector, &tweaks);
            }
            Self::Cbc(cipher) => {
                let len = cipher.block_len();
                let mut before = [0; SECTOR];
                before[..len].copy_from_slice(&iv[..len]);
                before[len..].copy_from_slice(&sector[..SECTOR - len]);
                cipher.decrypt(sector);
                xor(sector, &before);
            }
            Self::Ctr(cipher) => xor(sector, &key_stream(cipher, iv)),
            Self::Ecb(cipher) => cipher.decrypt(sector),
        }
    }

    /// Encrypts a sector.
    pub(super) fn encrypt(&self, iv: IvBytes, sector: &mut [u8; SECTOR]) {
        match self {
            Self::Xts { data, tweak } => {
                let tweaks = tweaks(tweak, iv);
                xor(sector, &tweaks);
                data.encrypt(sector);
                xor(sector, &tweaks);
            }
            Self::Cbc(cipher) => {
                let mut before = iv;
                for block in sector.chunks_exact_mut(cipher.block_len()) {
                    xor(block, &before);
                    cipher.encrypt(block);
                    before[..block.len()].copy_from_slice(block);
                }
            }
            Self::Ctr(cipher) => xor(sector, &key_stream(cipher, iv)),
            Self::Ecb(cipher) => cipher.encrypt(sector),
        }
    }
}

/// The tweaks of a sector's blocks (IEEE 1619): each is the one before times x in GF(2^128).
fn tweaks(cipher: &KeyedBlocks, mut iv: IvBytes) -> [u8; SECTOR] {
    cipher.encrypt(&mut iv);
    let mut tweak = u128::from_le_bytes(iv);
    let mut tweaks = [0; SECTOR];
    for place in tweaks.as_chunks_mut().0 {
        *place = tweak.to_le_bytes();
        let carry = if tweak >> 127 == 0 { 0 } else { 0x87 };
        tweak = tweak << 1 ^ carry;
    }
    tweaks
}

/// What counter mode mixes into a sector.
fn key_stream(cipher: &KeyedBlocks, iv: IvBytes) -> [u8; SECTOR] {
    let len = cipher.block_len();
    let mut stream = [0; SECTOR];
    // In the upper bytes of the number, a shorter counter wraps around by itself.
    let one = 1_u128 << ((MAX_BLOCK - len) * 8);
    let mut counter = u128::from_be_bytes(iv);
    for place in stream.chunks_exact_mut(len) {
        place.copy_from_slice(&counter.to_be_bytes()[..len]);
        counter = counter.wrapping_add(one);
    }
    cipher.encrypt(&mut stream);
    stream
}

fn xor(bytes: &mut [u8], with: &[u8]) {
    for (byte, with) in bytes.iter_mut().zip(with) {
        *byte ^= with;
    }
}
