//! The floor as a whole, on headers made here. What QEMU makes is in the tests on real images.

mod ciphers;
mod headers;

/// The bytes that `text` says in hexadecimal digits.
pub(super) fn hex(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
    pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}
