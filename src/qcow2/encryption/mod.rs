//! Encryption of guest data (section "Data encryption"): from the header's bytes and a key to sectors in the clear.
//!
//! The way: [`LuksArea::find`] says where the LUKS header is; [`LuksHeader::parse`] reads that area;
//! [`LuksHeader::unlock`] makes of it and a passphrase a [`VolumeKey`], and of that comes a [`SectorCipher`]. Images
//! of method [`CRYPT_AES`] have no header of their own: [`SectorCipher::legacy_aes`].
//!
//! All that QEMU can write is read: the ciphers AES, Serpent, Twofish and CAST5, the modes XTS, CBC, CTR and ECB, the
//! initialization vectors plain, plain64 and ESSIV, and all eight hashes. Other names are refused by their name.
//!
//! Keys and all that is derived from a passphrase are wiped from memory when dropped, and are never printed.

mod antiforensic;
mod area;
mod block;
mod cipher;
mod describe;
mod hash;
mod luks;
mod modes;
mod spec;
#[cfg(test)]
mod tests;

pub use area::{LuksArea, MAX_LUKS_AREA_BYTES};
pub use cipher::SectorCipher;
pub use describe::{LuksDescription, SlotDescription};
pub use hash::Hash;
pub use luks::{LuksHeader, MAX_LUKS_ROUNDS, VolumeKey};
pub use spec::{Algorithm, CipherSpec, Iv, Mode};

/// `crypt_method` of an image whose data is not encrypted.
pub const CRYPT_NONE: u32 = 0;
/// `crypt_method` of an image that is encrypted with AES and without a header: see [`SectorCipher::legacy_aes`].
pub const CRYPT_AES: u32 = 1;
/// `crypt_method` of an image with a LUKS header.
pub const CRYPT_LUKS: u32 = 2;

/// Bytes that are encrypted as one, whatever the size of a cluster or of a host's sectors.
pub const SECTOR: usize = 512;
