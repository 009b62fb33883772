//! The hashes that a LUKS header can name.

use pbkdf2::pbkdf2_hmac;
use sha2::Digest;
use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// A hash function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// MD5, 16 bytes.
    Md5,
    /// SHA-1, 20 bytes.
    Sha1,
    /// RIPEMD-160, 20 bytes.
    Ripemd160,
    /// SHA-224, 28 bytes.
    Sha224,
    /// SHA-256, 32 bytes: QEMU's default.
    Sha256,
    /// SM3, 32 bytes.
    Sm3,
    /// SHA-384, 48 bytes.
    Sha384,
    /// SHA-512, 64 bytes.
    Sha512,
}

/// `$body` with the type `$Digest` that computes `$hash`.
macro_rules! with {
    ($hash:expr, $Digest:ident => $body:expr) => {
        with!(@ $hash, $Digest => $body;
            Md5: md5::Md5, Sha1: sha1::Sha1, Ripemd160: ripemd::Ripemd160, Sha224: sha2::Sha224,
            Sha256: sha2::Sha256, Sm3: sm3::Sm3, Sha384: sha2::Sha384, Sha512: sha2::Sha512)
    };
    (@ $hash:expr, $Digest:ident => $body:expr; $($name:ident: $digest:ty),*) => {
        match $hash {
            $(Hash::$name => {
                type $Digest = $digest;
                $body
            })*
        }
    };
}

impl Hash {
    /// The hash of that name in a LUKS header.
    ///
    /// # Errors
    /// The hash is not known.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "md5" => Self::Md5,
            "sha1" => Self::Sha1,
            "ripemd160" => Self::Ripemd160,
            "sha224" => Self::Sha224,
            "sha256" => Self::Sha256,
            "sm3" => Self::Sm3,
            "sha384" => Self::Sha384,
            "sha512" => Self::Sha512,
            _ => return Err(Error::unsupported(format!("LUKS hash {name}"))),
        })
    }

    /// Length of a digest in bytes.
    pub fn digest_len(self) -> usize {
        with!(self, Algorithm => <Algorithm as Digest>::output_size())
    }

    /// The digest of `parts`, one after the other.
    pub fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        with!(self, Algorithm => {
            let mut digest = Algorithm::new();
            parts.iter().for_each(|part| digest.update(part));
            Zeroizing::new(digest.finalize().to_vec())
        })
    }

    /// `len` bytes derived from `password` with PBKDF2-HMAC (RFC 8018); takes `rounds` hashes for each
    /// [`Hash::digest_len`] of them.
    pub fn derive(
        self,
        password: &[u8],
        salt: &[u8],
        rounds: u32,
        len: usize,
    ) -> Zeroizing<Vec<u8>> {
        let mut derived = Zeroizing::new(vec![0; len]);
        with!(self, Algorithm => pbkdf2_hmac::<Algorithm>(password, salt, rounds, &mut derived));
        derived
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::encryption::tests::hex;

    #[test]
    fn digests_of_abc_are_the_published_ones() {
        for (name, digest) in [
            ("md5", "900150983cd24fb0d6963f7d28e17f72"),
            ("sha1", "a9993e364706816aba3e25717850c26c9cd0d89d"),
            ("ripemd160", "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
            ("sha224", "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7"),
            ("sha256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            ("sm3", "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"),
            (
                "sha384",
                "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed\
                 8086072ba1e7cc2358baeca134c825a7",
            ),
            (
                "sha512",
                "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                 2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
            ),
        ] {
            let hash = Hash::parse(name).unwrap();
            assert_eq!(*hash.digest(&[b"a", b"", b"bc"]), hex(digest), "{name}");
            assert_eq!(hash.digest_len() * 2, digest.len(), "{name}");
        }
        assert!(Hash::parse("whirlpool").is_err());
    }

    #[test]
    fn derived_keys_are_those_of_rfc_6070_and_7914() {
        for (hash, password, salt, rounds, derived) in [
            (Hash::Sha1, "password", "salt", 1, "0c60c80f961f0e71f3a9b524af6012062fe037a6"),
            (Hash::Sha1, "password", "salt", 4096, "4b007901b765489abead49d926f721d065a429c1"),
            (
                Hash::Sha1,
                "passwordPASSWORDpassword",
                "saltSALTsaltSALTsaltSALTsaltSALTsalt",
                4096,
                "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038",
            ),
            (
                Hash::Sha256,
                "passwd",
                "salt",
                1,
                "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc\
                 49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783",
            ),
        ] {
            let expected = hex(derived);
            let got = hash.derive(password.as_bytes(), salt.as_bytes(), rounds, expected.len());
            assert_eq!(*got, expected, "{hash:?} {rounds}");
        }
    }
}
