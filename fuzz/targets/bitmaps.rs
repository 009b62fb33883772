//! The bitmaps extension and directory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qchainfs::qcow2::BitmapDirectory;

fuzz_target!(|input: (&[u8], u32)| {
    let (bytes, count) = input;
    let (extension, directory) = bytes.split_at(bytes.len().min(24));
    if let Ok(mut found) = BitmapDirectory::parse(extension, 65536) {
        found.count = count % 65536;
        if let Ok(bitmaps) = found.parse_entries(directory, 65536) {
            assert_eq!(bitmaps.len(), found.count as usize);
        }
    }
});
