//! A file as memory.

use std::fs::File;

use memmap2::MmapOptions;

use super::index;

/// Hands `use_it` a part of `file`, mapped shared and writable; it is unmapped afterwards.
#[allow(unsafe_code, reason = "a map is memory that others can change")]
pub fn mapped<T>(file: &File, offset: u64, len: u64, use_it: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut options = MmapOptions::new();
    options.offset(offset).len(index(len));
    // SAFETY: nobody shortens the file, and nobody else writes to it while the map lives.
    let mut map = unsafe { options.map_mut(file) }.expect("map a part of the disk");
    use_it(&mut map)
}
