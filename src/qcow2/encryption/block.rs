//! The block ciphers behind one face.

use aes::cipher::array::Array;
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use serpent::Serpent;
use twofish::Twofish;

use super::Algorithm;

/// A block cipher with its key, which is wiped when dropped.
pub(super) type KeyedBlocks = Box<dyn BlockCipher>;

/// A block cipher for any number of blocks that don't depend on each other.
///
/// Many at once are much faster than one by one: the processor works on several.
pub(super) trait BlockCipher: Send + Sync {
    /// Length of a block in bytes: 8 or 16.
    fn block_len(&self) -> usize;

    /// Encrypts whole blocks.
    fn encrypt(&self, blocks: &mut [u8]);

    /// Decrypts whole blocks.
    fn decrypt(&self, blocks: &mut [u8]);
}

impl<C> BlockCipher for C
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn block_len(&self) -> usize {
        C::block_size()
    }

    fn encrypt(&self, blocks: &mut [u8]) {
        let (blocks, rest) = Array::slice_as_chunks_mut(blocks);
        debug_assert!(rest.is_empty());
        self.encrypt_blocks(blocks);
    }

    fn decrypt(&self, blocks: &mut [u8]) {
        let (blocks, rest) = Array::slice_as_chunks_mut(blocks);
        debug_assert!(rest.is_empty());
        self.decrypt_blocks(blocks);
    }
}

impl Algorithm {
    /// The cipher with `key`, if it can have one of that length: see [`Algorithm::takes`].
    pub(super) fn with_key(self, key: &[u8]) -> Option<KeyedBlocks> {
        match (self, key.len()) {
            _ if !self.takes(key.len()) => None,
            (Self::Aes, 16) => keyed::<Aes128>(key),
            (Self::Aes, 24) => keyed::<Aes192>(key),
            (Self::Aes, _) => keyed::<Aes256>(key),
            (Self::Serpent, _) => keyed::<Serpent>(key),
            (Self::Twofish, _) => keyed::<Twofish>(key),
            (Self::Cast5, _) => keyed::<Cast5>(key),
        }
    }
}

fn keyed<C: KeyInit + BlockCipher + 'static>(key: &[u8]) -> Option<KeyedBlocks> {
    Some(Box::new(C::new_from_slice(key).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::encryption::tests::hex;

    #[test]
    fn blocks_are_encrypted_as_published() {
        for (algorithm, key, clear, encrypted) in [
            // FIPS 197, appendix C.
            (
                Algorithm::Aes,
                "000102030405060708090a0b0c0d0e0f",
                "00112233445566778899aabbccddeeff",
                "69c4e0d86a7b0430d8cdb78070b4c55a",
            ),
            (
                Algorithm::Aes,
                "000102030405060708090a0b0c0d0e0f1011121314151617",
                "00112233445566778899aabbccddeeff",
                "dda97ca4864cdfe06eaf70a0ec0d7191",
            ),
            (
                Algorithm::Aes,
                "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
                "00112233445566778899aabbccddeeff",
                "8ea2b7ca516745bfeafc49904b496089",
            ),
            // RFC 2144, appendix B.1.
            (
                Algorithm::Cast5,
                "0123456712345678234567893456789a",
                "0123456789abcdef",
                "238b4fe5847e44b2",
            ),
            // The Twofish paper, table of test vectors for keys of 128 bits.
            (
                Algorithm::Twofish,
                "00000000000000000000000000000000",
                "00000000000000000000000000000000",
                "9f589f5cf6122c32b6bfec2f2ae8c35a",
            ),
        ] {
            let cipher = algorithm.with_key(&hex(key)).unwrap();
            let mut block = hex(clear);
            assert_eq!(cipher.block_len(), block.len());
            cipher.encrypt(&mut block);
            assert_eq!(block, hex(encrypted), "{algorithm:?} {key}");
            cipher.decrypt(&mut block);
            assert_eq!(block, hex(clear), "{algorithm:?} {key}");
        }
    }

    #[test]
    fn keys_of_other_lengths_are_refused() {
        for len in [0, 15, 17, 20, 31, 33, 64] {
            for algorithm in
                [Algorithm::Aes, Algorithm::Serpent, Algorithm::Twofish, Algorithm::Cast5]
            {
                assert!(algorithm.with_key(&vec![1; len]).is_none(), "{algorithm:?} {len}");
            }
        }
        assert!(Algorithm::Cast5.with_key(&[1; 24]).is_none());
    }
}
