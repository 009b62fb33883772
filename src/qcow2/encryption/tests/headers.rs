//! LUKS headers: good ones, wrong keys, and hostile bytes.

use crate::error::{Kind, Problem};
use crate::qcow2::encryption::antiforensic::tests::split;
use crate::qcow2::encryption::{
    CipherSpec, Hash, LuksHeader, MAX_LUKS_ROUNDS, SECTOR, SectorCipher,
};

const HEADER_LEN: usize = 592;
const ACTIVE: u32 = 0x00ac_71f3;
const STRIPES: u32 = 5;

/// Where the fields are.
const VERSION: usize = 6;
const CIPHER_NAME: usize = 8;
const PAYLOAD: usize = 104;
const KEY_BYTES: usize = 108;
const DIGEST_ROUNDS: usize = 164;
const SLOTS: usize = 208;
/// In a slot of 48 bytes.
const ROUNDS: usize = 4;
const MATERIAL: usize = 40;
const STRIPE_COUNT: usize = 44;

/// The area of a header for `key`, with a key slot for each of `passphrases` from slot 1 on.
fn area(cipher: &str, mode: &str, hash: Hash, key: &[u8], passphrases: &[&str]) -> Vec<u8> {
    let spec = CipherSpec::parse(cipher, mode, key.len()).unwrap();
    let name = format!("{hash:?}").to_lowercase();
    let slot_sectors = (key.len() * STRIPES as usize).div_ceil(SECTOR);
    let mut area = vec![0; (2 + 8 * slot_sectors) * SECTOR];
    put(&mut area, 0, b"LUKS\xba\xbe\0\x01");
    put(&mut area, CIPHER_NAME, cipher.as_bytes());
    put(&mut area, CIPHER_NAME + 32, mode.as_bytes());
    put(&mut area, CIPHER_NAME + 64, name.as_bytes());
    let payload = (area.len() / SECTOR) as u32;
    number(&mut area, PAYLOAD, payload);
    number(&mut area, KEY_BYTES, key.len() as u32);
    put(&mut area, 112, &hash.derive(key, &[7; 32], 3, 20));
    put(&mut area, 132, &[7; 32]);
    number(&mut area, DIGEST_ROUNDS, 3);
    for slot in 0..8 {
        let at = SLOTS + slot * 48;
        let material = 2 + slot * slot_sectors;
        number(&mut area, at, 0xdead);
        number(&mut area, at + MATERIAL, material as u32);
        number(&mut area, at + STRIPE_COUNT, STRIPES);
        let Some(passphrase) = slot.checked_sub(1).and_then(|index| passphrases.get(index)) else {
            continue;
        };
        number(&mut area, at, ACTIVE);
        number(&mut area, at + ROUNDS, 4);
        put(&mut area, at + 8, &[slot as u8; 32]);
        let mut stripes = split(hash, key, STRIPES as usize);
        stripes.resize(slot_sectors * SECTOR, 0);
        let slot_key = hash.derive(passphrase.as_bytes(), &[slot as u8; 32], 4, key.len());
        SectorCipher::new(spec, &slot_key).unwrap().encrypt(0, &mut stripes);
        put(&mut area, material * SECTOR, &stripes);
    }
    area
}

fn usual() -> Vec<u8> {
    area("aes", "xts-plain64", Hash::Sha256, &[0x5a; 64], &["one", "two"])
}

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    area[at..at + bytes.len()].copy_from_slice(bytes);
}

fn number(area: &mut [u8], at: usize, number: u32) {
    put(area, at, &number.to_be_bytes());
}

#[test]
fn every_passphrase_gives_the_same_key() {
    let key: Vec<u8> = (0..64).map(|index| index * 3).collect();
    for (cipher, mode, hash, key_len) in [
        ("aes", "xts-plain64", Hash::Sha256, 64),
        ("aes", "cbc-essiv:sha256", Hash::Sha1, 32),
        ("serpent", "ctr-plain", Hash::Sha512, 24),
        ("cast5", "cbc-essiv:md5", Hash::Ripemd160, 16),
    ] {
        let key = &key[..key_len];
        let area = area(cipher, mode, hash, key, &["one", "two", ""]);
        let header = LuksHeader::parse(&area).unwrap();
        assert_eq!((header.slots(), header.hash()), (3, hash));
        for passphrase in ["one", "two", ""] {
            let unlocked = header.unlock(&area, passphrase.as_bytes()).unwrap();
            assert_eq!(unlocked.bytes(), key, "{cipher} {mode}");
            assert_eq!(unlocked.spec(), header.cipher());
            SectorCipher::luks(&unlocked).unwrap();
        }
    }
}

#[test]
fn a_wrong_passphrase_is_told_from_a_bad_header() {
    let area = usual();
    let header = LuksHeader::parse(&area).unwrap();
    let error = header.unlock(&area, b"three").unwrap_err();
    assert!(matches!(error.problem(), Problem::WrongKey), "{error}");
    assert_eq!(error.kind(), Kind::Key);
    let error = header.unlock(&area[..HEADER_LEN], b"one").unwrap_err();
    assert!(matches!(error.problem(), Problem::Invalid { .. }), "{error}");
}

#[test]
fn a_header_without_keys_opens_for_nobody() {
    let area = area("aes", "xts-plain64", Hash::Sha256, &[1; 32], &[]);
    let error = LuksHeader::parse(&area).unwrap().unlock(&area, b"").unwrap_err();
    assert!(matches!(error.problem(), Problem::WrongKey), "{error}");
}

#[test]
fn a_volume_key_is_not_printed() {
    let area = usual();
    let key = LuksHeader::parse(&area).unwrap().unlock(&area, b"two").unwrap();
    assert_eq!(format!("{key:?}"), "VolumeKey(aes-256 xts-plain64)");
}

#[test]
fn impossible_fields_are_refused() {
    let slot = SLOTS + 48;
    for (at, value) in [
        (0, 0),
        (VERSION, 2 << 16),
        (CIPHER_NAME, u32::from_be_bytes(*b"a\x1b[m")),
        (PAYLOAD, 2),
        (KEY_BYTES, 0),
        (KEY_BYTES, 65),
        (KEY_BYTES, u32::MAX),
        (DIGEST_ROUNDS, 0),
        (slot, 1),
        (slot + ROUNDS, 0),
        (slot + MATERIAL, 0),
        (slot + MATERIAL, 1),
        (slot + MATERIAL, 10),
        (slot + MATERIAL, u32::MAX),
        (slot + STRIPE_COUNT, 0),
        (slot + STRIPE_COUNT, 4000),
        (slot + STRIPE_COUNT, u32::MAX),
    ] {
        let mut area = usual();
        number(&mut area, at, value);
        assert!(LuksHeader::parse(&area).is_err(), "{value} at {at}");
    }
    let mut endless = usual();
    put(&mut endless, CIPHER_NAME, &[b'a'; 32]);
    assert!(LuksHeader::parse(&endless).is_err());
}

#[test]
fn a_header_that_takes_too_long_is_refused_at_once() {
    let slot = SLOTS + 48;
    let most = MAX_LUKS_ROUNDS as u32;
    for (at, value) in [
        (slot + ROUNDS, u32::MAX),
        (DIGEST_ROUNDS, u32::MAX),
        (slot + ROUNDS, most - 9),
        (DIGEST_ROUNDS, most / 2),
    ] {
        let mut area = usual();
        number(&mut area, at, value);
        let error = LuksHeader::parse(&area).unwrap_err();
        let Problem::Invalid { field, .. } = error.problem() else { panic!("{error}") };
        assert_eq!(*field, "LUKS iterations");
    }
    let mut area = usual();
    number(&mut area, slot + ROUNDS, most - 10);
    LuksHeader::parse(&area).unwrap();
}

#[test]
fn no_byte_of_a_header_makes_it_panic() {
    let good = usual();
    for len in 0..good.len() {
        assert!(LuksHeader::parse(&good[..len]).is_err() || len > HEADER_LEN, "{len}");
    }
    for at in 0..HEADER_LEN {
        let rounds = |slot: usize| SLOTS + slot * 48 + ROUNDS..SLOTS + slot * 48 + ROUNDS + 3;
        // The upper bytes of iterations: allowed, and slow.
        let slow = (DIGEST_ROUNDS..DIGEST_ROUNDS + 3).contains(&at)
            || (0..8).any(|slot| rounds(slot).contains(&at));
        for value in [0, 1, 0x2d, 0x7f, 0x80, 0xff] {
            let mut area = good.clone();
            area[at] = value;
            if let Ok(header) = LuksHeader::parse(&area)
                && !slow
            {
                let _ = header.unlock(&area, b"two");
            }
        }
    }
}
