//! Sectors: in the clear and encrypted.

use std::fmt;

use zeroize::Zeroizing;

use super::block::KeyedBlocks;
use super::modes::{IvBytes, KeyedMode, MAX_BLOCK};
use super::{CipherSpec, Iv, SECTOR, VolumeKey};
use crate::error::{Error, Result};

/// Encrypts and decrypts sectors of 512 bytes. Its keys are wiped when it is dropped.
pub struct SectorCipher {
    spec: CipherSpec,
    mode: KeyedMode,
    iv: IvGenerator,
}

enum IvGenerator {
    Plain,
    Plain64,
    Essiv(KeyedBlocks),
}

impl SectorCipher {
    /// The cipher of a LUKS image. Its sectors are numbered by their place in the image *file*, whose first has
    /// number 0.
    ///
    /// # Errors
    /// None for a key that [`LuksHeader::unlock`](super::LuksHeader::unlock) gave.
    pub fn luks(key: &VolumeKey) -> Result<Self> {
        Self::new(key.spec(), key.bytes())
    }

    /// The cipher of an image of method [`CRYPT_AES`](super::CRYPT_AES). Its sectors are numbered by their place on the
    /// *guest's* disk.
    ///
    /// The key is the first 16 bytes of the password, or all with zeros behind. Whether it is the right one can't be
    /// known: a wrong one makes noise of the disk.
    ///
    /// # Errors
    /// None.
    pub fn legacy_aes(password: &[u8]) -> Result<Self> {
        let mut key = Zeroizing::new([0; 16]);
        for (byte, from) in key.iter_mut().zip(password) {
            *byte = *from;
        }
        Self::new(CipherSpec::LEGACY_AES, &key[..])
    }

    pub(super) fn new(spec: CipherSpec, key: &[u8]) -> Result<Self> {
        let impossible = || Error::invalid("encryption key", format!("{} bytes", key.len()));
        let mode = KeyedMode::new(spec, key).ok_or_else(impossible)?;
        let iv = match spec.iv() {
            Iv::Plain => IvGenerator::Plain,
            Iv::Plain64 => IvGenerator::Plain64,
            Iv::Essiv(hash) => {
                let salt = hash.digest(&[key]);
                IvGenerator::Essiv(spec.algorithm().with_key(&salt).ok_or_else(impossible)?)
            }
        };
        Ok(Self { spec, mode, iv })
    }

    /// Decrypts the sectors from number `first_sector` on.
    ///
    /// # Panics
    /// If `data` is not whole sectors: nothing that a file holds leads there.
    pub fn decrypt(&self, first_sector: u64, data: &mut [u8]) {
        for (number, sector) in numbered(first_sector, data) {
            self.mode.decrypt(self.iv.of(number), sector);
        }
    }

    /// Encrypts the sectors from number `first_sector` on.
    ///
    /// # Panics
    /// If `data` is not whole sectors: nothing that a file holds leads there.
    pub fn encrypt(&self, first_sector: u64, data: &mut [u8]) {
        for (number, sector) in numbered(first_sector, data) {
            self.mode.encrypt(self.iv.of(number), sector);
        }
    }
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SectorCipher({})", self.spec)
    }
}

impl IvGenerator {
    /// The initialization vector of sector `number`.
    fn of(&self, number: u64) -> IvBytes {
        let number = match self {
            Self::Plain => number & u64::from(u32::MAX),
            Self::Plain64 | Self::Essiv(_) => number,
        };
        let mut iv = [0; MAX_BLOCK];
        iv[..8].copy_from_slice(&number.to_le_bytes());
        if let Self::Essiv(cipher) = self {
            cipher.encrypt(&mut iv[..cipher.block_len()]);
        }
        iv
    }
}

fn numbered(first: u64, data: &mut [u8]) -> impl Iterator<Item = (u64, &mut [u8; SECTOR])> {
    let (sectors, rest) = data.as_chunks_mut();
    assert!(rest.is_empty(), "only whole sectors can be encrypted");
    (0..).zip(sectors).map(move |(index, sector)| (first.wrapping_add(index), sector))
}
