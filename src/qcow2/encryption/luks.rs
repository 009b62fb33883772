//! The LUKS1 header and its key slots (LUKS On-Disk Format Specification 1.2.3), as QEMU puts them into an image.

use std::fmt;
use std::ops::Range;

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};
use zeroize::Zeroizing;

use super::antiforensic::merge;
use super::{CipherSpec, Hash, SECTOR, SectorCipher};
use crate::error::{Error, Problem, Result};

/// Greatest number of hash iterations that all active key slots of a header may ask for together.
///
/// QEMU and cryptsetup choose the iterations so that they take two seconds on the machine that makes the slot: some
/// 20 million of the fastest hash today. The bound lets eight such slots pass, or one made for half a minute, and keeps
/// a hostile header from taking more than minutes.
pub const MAX_LUKS_ROUNDS: u64 = 1 << 28;

const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
const SLOT_ACTIVE: u32 = 0x00ac_71f3;
const SLOT_FREE: u32 = 0x0000_dead;
/// What all programs use, and the only number that QEMU opens.
const MAX_STRIPES: u32 = 4000;
/// Two keys of 256 bits, for XTS.
const MAX_KEY_LEN: u32 = 64;
const DIGEST_LEN: usize = 20;

/// The header's fields, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LuksHeader {
    cipher: CipherSpec,
    hash: Hash,
    digest: [u8; DIGEST_LEN],
    digest_salt: [u8; 32],
    digest_rounds: u32,
    slots: Vec<KeySlot>,
}

/// The key that the sectors of an image are encrypted with. It is wiped when dropped, and never printed.
#[derive(Clone)]
pub struct VolumeKey {
    spec: CipherSpec,
    key: Zeroizing<Vec<u8>>,
}

/// A key slot that is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KeySlot {
    rounds: u32,
    salt: [u8; 32],
    /// The key's stripes, encrypted: where they are in the header's area.
    material: Range<usize>,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    magic: [u8; 6],
    version: U16,
    pub cipher_name: [u8; 32],
    pub cipher_mode: [u8; 32],
    pub hash_spec: [u8; 32],
    pub payload_sector: U32,
    pub key_bytes: U32,
    digest: [u8; DIGEST_LEN],
    digest_salt: [u8; 32],
    pub digest_rounds: U32,
    pub uuid: [u8; 40],
    pub slots: [RawSlot; 8],
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawSlot {
    active: U32,
    pub rounds: U32,
    salt: [u8; 32],
    pub material_sector: U32,
    pub stripes: U32,
}

impl LuksHeader {
    /// Reads the header from its area, which holds the key material, too: see [`LuksArea`](super::LuksArea).
    ///
    /// # Errors
    /// A name of a cipher, mode, hash or IV generator that is not supported, or a field that holds what the format or
    /// QEMU does not allow, or that would take too long ([`MAX_LUKS_ROUNDS`]).
    pub fn parse(area: &[u8]) -> Result<Self> {
        let (raw, _) = RawHeader::ref_from_prefix(area)
            .map_err(|_| Error::invalid("LUKS header", "its area ends inside it"))?;
        if raw.magic != MAGIC {
            return Err(Error::invalid("LUKS header", "it has no LUKS magic"));
        }
        match raw.version.get() {
            1 => {}
            other => return Err(Error::unsupported(format!("LUKS version {other}"))),
        }
        let key_bytes = raw.key_bytes.get();
        if key_bytes == 0 || key_bytes > MAX_KEY_LEN {
            return Err(Error::invalid("LUKS key bytes", format!("a key of {key_bytes} bytes")));
        }
        let cipher = CipherSpec::parse(
            text("LUKS cipher name", &raw.cipher_name)?,
            text("LUKS cipher mode", &raw.cipher_mode)?,
            key_bytes as usize,
        )?;
        let hash = Hash::parse(text("LUKS hash", &raw.hash_spec)?)?;
        let digest_rounds = raw.digest_rounds.get();
        if digest_rounds == 0 {
            return Err(Error::invalid("LUKS digest iterations", "there are none"));
        }
        let mut slots = Vec::new();
        for raw_slot in &raw.slots {
            slots.extend(KeySlot::parse(raw_slot, raw, area)?);
        }
        let each = slots.iter().map(|slot| u64::from(slot.rounds) + u64::from(digest_rounds));
        let rounds: u64 = each.sum();
        if rounds > MAX_LUKS_ROUNDS {
            return Err(Error::invalid(
                "LUKS iterations",
                format!("{rounds} in all take too long: more than {MAX_LUKS_ROUNDS}"),
            ));
        }
        Ok(Self {
            cipher,
            hash,
            digest: raw.digest,
            digest_salt: raw.digest_salt,
            digest_rounds,
            slots,
        })
    }

    /// How the image's sectors are encrypted.
    pub fn cipher(&self) -> CipherSpec {
        self.cipher
    }

    /// The hash that makes keys of passphrases.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// Number of key slots in use.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The image's key, from the first slot that `passphrase` opens. `area` is what the header was parsed from.
    ///
    /// This takes long on purpose: seconds for each slot that it does not open.
    ///
    /// # Errors
    /// [`Problem::WrongKey`] if it opens none.
    pub fn unlock(&self, area: &[u8], passphrase: &[u8]) -> Result<VolumeKey> {
        for slot in &self.slots {
            let key = self.open_slot(slot, area, passphrase)?;
            let digest = self.hash.derive(&key, &self.digest_salt, self.digest_rounds, DIGEST_LEN);
            if digest[..] == self.digest {
                return Ok(VolumeKey { spec: self.cipher, key });
            }
        }
        Err(Error::new(Problem::WrongKey))
    }

    /// What `passphrase` makes of the slot: the key if it is the right one.
    fn open_slot(
        &self,
        slot: &KeySlot,
        area: &[u8],
        passphrase: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>> {
        let key_len = self.cipher.key_len();
        let sectors = slot.sectors();
        let Some(material) = area.get(sectors) else {
            return Err(Error::invalid("LUKS key material", "the area ends inside it"));
        };
        let mut material = Zeroizing::new(material.to_vec());
        let slot_key = self.hash.derive(passphrase, &slot.salt, slot.rounds, key_len);
        SectorCipher::new(self.cipher, &slot_key)?.decrypt(0, &mut material);
        Ok(merge(self.hash, &material[..slot.material.len()], key_len))
    }
}

impl VolumeKey {
    /// What it is a key for.
    pub fn spec(&self) -> CipherSpec {
        self.spec
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.key
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeKey({})", self.spec)
    }
}

impl RawSlot {
    pub fn is_active(&self) -> bool {
        self.active.get() == SLOT_ACTIVE
    }
}

impl KeySlot {
    /// The slot, unless it is free.
    fn parse(raw: &RawSlot, header: &RawHeader, area: &[u8]) -> Result<Option<Self>> {
        match raw.active.get() {
            SLOT_ACTIVE => {}
            SLOT_FREE => return Ok(None),
            other => {
                return Err(Error::invalid("LUKS key slot", format!("its state is {other:#x}")));
            }
        }
        if raw.rounds.get() == 0 {
            return Err(Error::invalid("LUKS key slot", "it has no iterations"));
        }
        let stripes = raw.stripes.get();
        if stripes == 0 || stripes > MAX_STRIPES {
            return Err(Error::invalid("LUKS key slot", format!("{stripes} stripes")));
        }
        // QEMU wants the material between the header and what the header says is the payload, although in a qcow2
        // image there is none.
        let sectors = raw.material_sector.get()..header.payload_sector.get();
        let len = (stripes * header.key_bytes.get()) as usize;
        let first = size_of::<RawHeader>().div_ceil(SECTOR) as u32;
        let end = u64::from(sectors.start) + len.div_ceil(SECTOR) as u64;
        if sectors.start < first
            || end > u64::from(sectors.end)
            || end * SECTOR as u64 > area.len() as u64
        {
            return Err(Error::invalid(
                "LUKS key slot",
                format!(
                    "its key material from sector {} on is not inside the header's area",
                    sectors.start
                ),
            ));
        }
        let start = sectors.start as usize * SECTOR;
        let rounds = raw.rounds.get();
        Ok(Some(Self { rounds, salt: raw.salt, material: start..start + len }))
    }

    /// The sectors that the material is in: it ends inside the last one if a key has 24 bytes.
    fn sectors(&self) -> Range<usize> {
        self.material.start..self.material.start + self.material.len().next_multiple_of(SECTOR)
    }
}

/// A name that ends with a zero byte. It comes from a file: nothing but visible ASCII may reach a terminal.
pub(super) fn text<'a>(field: &'static str, bytes: &'a [u8]) -> Result<&'a str> {
    let name = bytes.iter().position(|&byte| byte == 0).map(|end| &bytes[..end]);
    name.filter(|name| name.iter().all(u8::is_ascii_graphic))
        .and_then(|name| std::str::from_utf8(name).ok())
        .ok_or_else(|| Error::invalid(field, "it is no name"))
}
