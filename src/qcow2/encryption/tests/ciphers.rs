//! Sectors through every mode.

use super::hex;
use crate::error::{Kind, Problem};
use crate::qcow2::encryption::{CipherSpec, Hash, SECTOR, SectorCipher};

/// 0, 1, … 255, 0, 1, … 255.
fn counting() -> [u8; SECTOR] {
    std::array::from_fn(|index| index as u8)
}

fn cipher(name: &str, mode: &str, key: &[u8]) -> SectorCipher {
    SectorCipher::new(CipherSpec::parse(name, mode, key.len()).unwrap(), key).unwrap()
}

#[test]
fn xts_is_that_of_ieee_1619() {
    for (key, number, beginning) in [
        (
            "2718281828459045235360287471352631415926535897932384626433832795",
            0,
            "27a7479befa1d476489f308cd4cfa6e2",
        ),
        (
            "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462\
             643383279502884197169399375105820974944592",
            0xff,
            "1c3b3a102f770386e4836c99e370cf9b",
        ),
    ] {
        let mut sector = counting();
        cipher("aes", "xts-plain64", &hex(key)).encrypt(number, &mut sector);
        assert_eq!(sector[..16], hex(beginning));
    }
}

/// Digests of [`counting`] as sector 2^32 + 5, encrypted by another implementation (OpenSSL).
#[test]
fn sectors_are_encrypted_as_another_implementation_does() {
    let key: [u8; 64] = std::array::from_fn(|index| index as u8 + 1);
    for (name, mode, key_len, digest) in [
        (
            "aes",
            "xts-plain64",
            64,
            "fb6081d7ad45f98b2c4534691c20422cd501452eddb072d994a6b2c15b884477",
        ),
        (
            "aes",
            "xts-plain",
            32,
            "cb92213695ec4752906136638f9e2fda9deb4a0d4ac03cb134694eb09af5779d",
        ),
        (
            "aes",
            "xts-essiv:sha256",
            64,
            "18501b7595246c1341fb5ec3a435f5640b608846dccd7aa04f85cb77fd8fa4d2",
        ),
        (
            "aes",
            "cbc-plain64",
            24,
            "44b5bfb0c59b4b8e3fb2a17c8ce16f87521fad6bdccbc89263bd8a125b5c8014",
        ),
        (
            "aes",
            "cbc-essiv:sha256",
            16,
            "d8e181b47d7b45e420d810d27526101d5aa25a14530c47622d6ea31e94894e45",
        ),
        (
            "aes",
            "ctr-plain64",
            32,
            "a8aa499752e18e8309ef9ba378b4b811cb912c33b408aaef36ae3dfc6b83a8c9",
        ),
        (
            "aes",
            "ecb-plain64",
            16,
            "dce94e77a1ae47f1b33881cdb031028c3bdc446953de3f75d42e6a869563214f",
        ),
        (
            "cast5",
            "cbc-plain64",
            16,
            "27e0f5e981f1ec4ecc0c57f85f4c7490f20c0fa0a8f6a0940230eea59a01a919",
        ),
        (
            "cast5",
            "cbc-essiv:md5",
            16,
            "486a3424113ba4c09ad63475e17c52255ab145ed3bcbe5b7f0f1c9260e4c1b39",
        ),
    ] {
        let cipher = cipher(name, mode, &key[..key_len]);
        let mut sector = counting();
        cipher.encrypt(0x1_0000_0005, &mut sector);
        assert_eq!(*Hash::Sha256.digest(&[&sector]), hex(digest), "{name} {mode}");
        cipher.decrypt(0x1_0000_0005, &mut sector);
        assert_eq!(sector, counting(), "{name} {mode}");
    }
}

#[test]
fn sectors_survive_every_combination_and_have_numbers_of_their_own() {
    for (name, key_lens) in [
        ("aes", &[16, 24, 32][..]),
        ("serpent", &[16, 24, 32]),
        ("twofish", &[16, 24, 32]),
        ("cast5", &[16]),
    ] {
        for (mode, keys) in [("xts", 2), ("cbc", 1), ("ctr", 1), ("ecb", 1)] {
            for iv in ["plain", "plain64", "essiv:md5", "essiv:sha256", "essiv:sm3"] {
                for key_len in key_lens.iter().map(|len| len * keys) {
                    let key: Vec<u8> = (0..key_len).map(|index| index as u8).collect();
                    let mode = format!("{mode}-{iv}");
                    let Ok(spec) = CipherSpec::parse(name, &mode, key_len) else {
                        assert_eq!(name, "cast5");
                        continue;
                    };
                    let cipher = SectorCipher::new(spec, &key).unwrap();
                    let clear = [counting(), counting(), counting()].concat();
                    let mut data = clear.clone();
                    cipher.encrypt(u64::MAX - 1, &mut data);
                    let differs = data[..SECTOR] != data[SECTOR..2 * SECTOR];
                    assert_eq!(differs, !mode.starts_with("ecb"), "{name} {mode}");
                    let mut second = data[SECTOR..2 * SECTOR].to_vec();
                    cipher.decrypt(u64::MAX - 1, &mut data);
                    assert_eq!(data, clear, "{name} {mode}");
                    cipher.decrypt(u64::MAX, &mut second);
                    assert_eq!(second, counting(), "{name} {mode}");
                }
            }
        }
    }
}

#[test]
fn a_legacy_password_is_cut_or_filled_to_128_bits() {
    let encrypt = |password: &[u8]| {
        let mut sector = counting();
        SectorCipher::legacy_aes(password).unwrap().encrypt(7, &mut sector);
        sector
    };
    assert_eq!(encrypt(b"0123456789abcdef"), encrypt(b"0123456789abcdefghi"));
    assert_eq!(encrypt(b"secret"), encrypt(b"secret\0\0\0\0\0\0\0\0\0\0"));
    assert_ne!(encrypt(b"secret"), encrypt(b"Secret"));
}

#[test]
fn what_is_not_known_is_refused_by_its_name() {
    for (name, mode, key_len, feature) in [
        ("sm4", "xts-plain64", 32, "LUKS cipher sm4-128"),
        ("aes", "xts-plain64", 40, "LUKS cipher aes-160"),
        ("aes", "xts-plain64", 33, "LUKS cipher aes-128"),
        ("cast5", "cbc-plain64", 32, "LUKS cipher cast5-256"),
        ("aes", "gcm-plain64", 32, "LUKS cipher mode gcm"),
        ("aes", "cbc-benbi", 32, "LUKS IV generator benbi"),
        ("aes", "cbc-essiv:whirlpool", 32, "LUKS hash whirlpool"),
    ] {
        let error = CipherSpec::parse(name, mode, key_len).unwrap_err();
        assert!(
            matches!(error.problem(), Problem::Unsupported { feature: named } if named == feature),
            "{error}"
        );
    }
}

#[test]
fn impossible_combinations_are_refused() {
    for (name, mode, key_len) in [
        ("aes", "ecb", 16),
        ("aes", "", 16),
        ("cast5", "xts-plain64", 32),
        ("aes", "cbc-essiv", 32),
        ("aes", "cbc-essiv:sha1", 32),
        ("cast5", "cbc-essiv:sha256", 16),
    ] {
        let error = CipherSpec::parse(name, mode, key_len).unwrap_err();
        assert_eq!(error.kind(), Kind::Failed, "{name} {mode}: {error}");
    }
}

#[test]
fn nothing_that_is_printed_holds_a_key() {
    let cipher = cipher("aes", "cbc-essiv:sha256", &[0xab; 32]);
    assert_eq!(format!("{cipher:?}"), "SectorCipher(aes-256 cbc-essiv:sha256)");
}
