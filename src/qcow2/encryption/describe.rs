//! What a LUKS header says of itself, for people and programs: no key is needed for that.

use zerocopy::FromBytes;

use super::luks::{RawHeader, text};
use super::{CipherSpec, SECTOR};
use crate::error::{Error, Result};

/// The fields of a LUKS header that are no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LuksDescription {
    /// Like "aes-256".
    pub cipher_algorithm: String,
    /// Like "xts".
    pub cipher_mode: String,
    /// Like "plain64".
    pub iv_generator: String,
    /// The hash of the IV generator, where it has one.
    pub iv_hash: Option<String>,
    /// The hash of the key slots.
    pub hash: String,
    /// The image's own id.
    pub uuid: String,
    /// Where the data would begin behind the header, in bytes from its beginning.
    pub payload_offset: u64,
    /// Iterations of the master key's digest.
    pub master_key_iterations: u32,
    /// All eight key slots.
    pub slots: Vec<SlotDescription>,
}

/// A key slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotDescription {
    /// Iterations and stripes, if the slot is in use.
    pub active: Option<(u32, u32)>,
    /// Where its key material is, in bytes from the header's beginning.
    pub key_offset: u64,
}

impl LuksDescription {
    /// Reads the header from its area.
    ///
    /// # Errors
    /// An area that is too short, or a cipher that is not known.
    pub fn parse(area: &[u8]) -> Result<Self> {
        let (raw, _) = RawHeader::ref_from_prefix(area)
            .map_err(|_| Error::invalid("LUKS header", "its area ends inside it"))?;
        let cipher = CipherSpec::parse(
            text("LUKS cipher name", &raw.cipher_name)?,
            text("LUKS cipher mode", &raw.cipher_mode)?,
            raw.key_bytes.get() as usize,
        )?;
        // "aes-256 xts-plain64", "aes-256 cbc-essiv:sha256"
        let shown = cipher.to_string();
        let (algorithm, rest) = shown.split_once(' ').unwrap_or((&shown, ""));
        let (mode, generator) = rest.split_once('-').unwrap_or((rest, ""));
        let (generator, iv_hash) = match generator.split_once(':') {
            Some((generator, hash)) => (generator, Some(hash.to_owned())),
            None => (generator, None),
        };
        let slots = raw.slots.iter().map(|slot| SlotDescription {
            active: slot.is_active().then(|| (slot.rounds.get(), slot.stripes.get())),
            key_offset: u64::from(slot.material_sector.get()) * SECTOR as u64,
        });
        Ok(Self {
            cipher_algorithm: algorithm.to_owned(),
            cipher_mode: mode.to_owned(),
            iv_generator: generator.to_owned(),
            iv_hash,
            hash: text("LUKS hash", &raw.hash_spec)?.to_owned(),
            uuid: text("LUKS uuid", &raw.uuid)?.to_owned(),
            payload_offset: u64::from(raw.payload_sector.get()) * SECTOR as u64,
            master_key_iterations: raw.digest_rounds.get(),
            slots: slots.collect(),
        })
    }
}
