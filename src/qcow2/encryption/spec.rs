//! The cipher that a LUKS header names: algorithm, mode and initialization vectors.

use std::fmt;

use super::Hash;
use crate::error::{Error, Result};

/// How the sectors of an image are encrypted. Only combinations that exist can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CipherSpec {
    algorithm: Algorithm,
    mode: Mode,
    iv: Iv,
    key_len: usize,
}

/// A block cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// AES, in blocks of 16 bytes.
    Aes,
    /// Serpent, in blocks of 16 bytes.
    Serpent,
    /// Twofish, in blocks of 16 bytes.
    Twofish,
    /// CAST-128, in blocks of 8 bytes.
    Cast5,
}

/// How the blocks of a sector hang together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// XEX with two keys and without ciphertext stealing: a sector is always whole blocks.
    Xts,
    /// Cipher block chaining.
    Cbc,
    /// Counter mode: a big-endian counter that begins at the initialization vector.
    Ctr,
    /// Every block for itself, and no initialization vector.
    Ecb,
}

/// What a sector's number makes of its initialization vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Iv {
    /// Its low 32 bits, little-endian.
    Plain,
    /// It, little-endian.
    Plain64,
    /// As [`Iv::Plain64`], encrypted with the hash of the key as its key.
    Essiv(Hash),
}

impl CipherSpec {
    /// What QEMU uses for `crypt_method` 1. (The qcow2 specification says 256 bits; no image is like that.)
    pub(super) const LEGACY_AES: Self =
        Self { algorithm: Algorithm::Aes, mode: Mode::Cbc, iv: Iv::Plain64, key_len: 16 };

    /// The cipher that a LUKS header calls `cipher` ("aes") and `mode` ("xts-plain64", "cbc-essiv:sha256"), with a
    /// volume key of `key_len` bytes: both keys of XTS together.
    ///
    /// # Errors
    /// What is unknown is unsupported, by its name. What is known can be impossible together: XTS wants blocks of 16
    /// bytes, and ESSIV a hash as long as a key.
    pub(super) fn parse(cipher: &str, mode: &str, key_len: usize) -> Result<Self> {
        let Some((mode_name, iv_name)) = mode.split_once('-') else {
            return Err(Error::invalid("LUKS cipher mode", format!("\"{mode}\" names no IV")));
        };
        let (iv_name, hash) = match iv_name.split_once(':') {
            Some((name, hash)) => (name, Some(hash)),
            None => (iv_name, None),
        };
        let mode = Mode::parse(mode_name)?;
        let cipher_key_len = key_len / mode.keys();
        let unsupported =
            || Error::unsupported(format!("LUKS cipher {cipher}-{}", cipher_key_len * 8));
        let algorithm = Algorithm::parse(cipher).ok_or_else(unsupported)?;
        if !algorithm.takes(cipher_key_len) || cipher_key_len * mode.keys() != key_len {
            return Err(unsupported());
        }
        if mode == Mode::Xts && algorithm == Algorithm::Cast5 {
            return Err(Error::invalid(
                "LUKS cipher mode",
                format!("{cipher} can't be in xts mode"),
            ));
        }
        let iv = Iv::parse(iv_name, hash)?;
        if let Iv::Essiv(hash) = iv
            && !algorithm.takes(hash.digest_len())
        {
            return Err(Error::invalid(
                "LUKS cipher mode",
                format!("a digest of {} bytes is no key for {cipher}", hash.digest_len()),
            ));
        }
        Ok(Self { algorithm, mode, iv, key_len })
    }

    /// The block cipher.
    pub fn algorithm(self) -> Algorithm {
        self.algorithm
    }

    /// Its mode.
    pub fn mode(self) -> Mode {
        self.mode
    }

    /// Its initialization vectors.
    pub fn iv(self) -> Iv {
        self.iv
    }

    /// Length of the volume key in bytes: both keys of XTS together.
    pub fn key_len(self) -> usize {
        self.key_len
    }
}

impl fmt::Display for CipherSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { algorithm, mode, iv, key_len } = self;
        let bits = key_len / mode.keys() * 8;
        write!(f, "{}-{bits} {}-{iv}", lower(algorithm), lower(mode))
    }
}

impl fmt::Display for Iv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Essiv(hash) => write!(f, "essiv:{}", lower(hash)),
            plain => f.write_str(&lower(plain)),
        }
    }
}

impl Algorithm {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "aes" => Self::Aes,
            "serpent" => Self::Serpent,
            "twofish" => Self::Twofish,
            "cast5" => Self::Cast5,
            _ => return None,
        })
    }

    /// Whether a key can have `len` bytes.
    pub(super) fn takes(self, len: usize) -> bool {
        match self {
            Self::Aes | Self::Serpent | Self::Twofish => matches!(len, 16 | 24 | 32),
            Self::Cast5 => len == 16,
        }
    }
}

impl Mode {
    fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "xts" => Self::Xts,
            "cbc" => Self::Cbc,
            "ctr" => Self::Ctr,
            "ecb" => Self::Ecb,
            _ => return Err(Error::unsupported(format!("LUKS cipher mode {name}"))),
        })
    }

    /// Keys of the block cipher that a volume key is made of.
    fn keys(self) -> usize {
        match self {
            Self::Xts => 2,
            Self::Cbc | Self::Ctr | Self::Ecb => 1,
        }
    }
}

impl Iv {
    fn parse(name: &str, hash: Option<&str>) -> Result<Self> {
        Ok(match (name, hash) {
            // A hash says nothing here, and QEMU writes one if it is told to.
            ("plain", _) => Self::Plain,
            ("plain64", _) => Self::Plain64,
            ("essiv", Some(hash)) => Self::Essiv(Hash::parse(hash)?),
            ("essiv", None) => {
                return Err(Error::invalid("LUKS cipher mode", "essiv without a hash"));
            }
            _ => return Err(Error::unsupported(format!("LUKS IV generator {name}"))),
        })
    }
}

fn lower(name: &impl fmt::Debug) -> String {
    format!("{name:?}").to_lowercase()
}
