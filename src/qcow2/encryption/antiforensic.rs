//! The anti-forensic splitter: a key spread over many stripes, of which every one is needed to get it back.

use zeroize::Zeroizing;

use super::Hash;

/// The key of `len` bytes that is spread over `stripes`, which hold it a whole number of times.
pub(super) fn merge(hash: Hash, stripes: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; len]);
    for (index, stripe) in stripes.chunks_exact(len).enumerate() {
        if index > 0 {
            diffuse(hash, &mut key);
        }
        for (byte, with) in key.iter_mut().zip(stripe) {
            *byte ^= with;
        }
    }
    key
}

/// Lets every bit of a digest's length of `block` depend on all others in it.
fn diffuse(hash: Hash, block: &mut [u8]) {
    for (index, part) in (0_u32..).zip(block.chunks_mut(hash.digest_len())) {
        let digest = hash.digest(&[&index.to_be_bytes(), part]);
        part.copy_from_slice(&digest[..part.len()]);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::qcow2::encryption::tests::hex;

    /// `key` spread over `count` stripes: all but the last one are arbitrary.
    pub fn split(hash: Hash, key: &[u8], count: usize) -> Vec<u8> {
        let filler = (0_u32..).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8);
        let mut stripes: Vec<u8> = filler.take((count - 1) * key.len()).collect();
        let mut last = merge(hash, &stripes, key.len());
        if count > 1 {
            diffuse(hash, &mut last);
        }
        stripes.extend(last.iter().zip(key).map(|(a, b)| a ^ b));
        stripes
    }

    #[test]
    fn merging_gives_what_another_implementation_does() {
        for &(hash, len, key) in VECTORS {
            let stripes: Vec<u8> = (0..len * 7).map(|n| (n * 31 + n / 256) as u8).collect();
            assert_eq!(*merge(hash, &stripes, len), hex(key), "{hash:?} {len}");
        }
    }

    #[test]
    fn what_was_split_merges_to_the_same() {
        for (len, count) in [(16, 1), (16, 2), (64, 50), (48, 9)] {
            let key: Vec<u8> = (0..len).collect();
            for hash in [Hash::Md5, Hash::Sha1, Hash::Sha256, Hash::Sha512] {
                let stripes = split(hash, &key, count);
                assert_eq!(*merge(hash, &stripes, key.len()), key, "{hash:?} {len} {count}");
            }
        }
    }

    /// Made with a program of its own over Python's `hashlib`: hash, length of the key, the key.
    const VECTORS: &[(Hash, usize, &str)] = &[
        (Hash::Sha1, 16, "15a208f4bf180455739045db035d4b7f"),
        (Hash::Sha1, 32, "dd45f947f4890ea110909b17097d71ca86334f4c0aa5b07d5e8b2fd3ecdd9393"),
        (Hash::Sha256, 32, "90a2f8bd99f2795ec4d86253de9222130d883f901fba289f60bca453e5298fd3"),
        (
            Hash::Sha256,
            48,
            "dd4451ebd4de9ee9623697055510bec52b1a8d1ade6140fd830b3b198b809772\
             904832e9260742f055a8e3e5067247c5",
        ),
        (
            Hash::Sha256,
            64,
            "1d03c88fa52ca253865a1ca47097d5123ca1893fec6880aec3f385349d521fab\
             889ca9c8395f29292a25df77026ca5cbdebfb83c6c3320f2566abdf5caeefaff",
        ),
        (
            Hash::Sha512,
            64,
            "4fbb16989dba081f025a3dc116ff22664347f12fe147359105ae84c880f77a75\
             caf051cd5de9f564782deb5217b786dad8f436cd65e6ecbd8b48c1e78be0122b",
        ),
    ];
}
