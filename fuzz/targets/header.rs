//! The header with its extensions, from arbitrary bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qchainfs::qcow2::Header;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(len) = Header::first_cluster_len(bytes) {
        assert!((512..=2 << 20).contains(&len));
    }
    if let Ok(header) = Header::parse(bytes) {
        let _ = header.refuse_unsupported().map_err(|error| error.to_string());
        let _ = header.check_tables().map_err(|error| error.to_string());
        let _ = header.bitmap_directory();
        // What can be read can be written, as far as it fits, and reads the same again.
        if let Ok(cluster) = header.to_cluster() {
            assert_eq!(Header::parse(&cluster).expect("our own header"), header);
        }
    }
});
