//! Names of backing files: plain ones, `file:` and `json:`.
#![no_main]

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use qchainfs::chain::resolve_backing_name;

const OVERLAYS: [&str; 3] = ["top.qcow2", "directory/top.qcow2", "/top.qcow2"];

fuzz_target!(|name: &[u8]| {
    for overlay in OVERLAYS {
        let overlay = Path::new(overlay);
        let Ok(found) = resolve_backing_name(overlay, name) else { continue };
        let path = found.path.as_os_str().as_bytes();
        assert!(!path.contains(&0), "no file has such a name");
        match name.iter().position(|&byte| byte == b':' || byte == b'/') {
            Some(end) if name[end] == b':' => {
                assert!(matches!(&name[..end], b"file" | b"json"), "another protocol");
                assert_eq!(found.full, name);
            }
            _ if name.starts_with(b"/") => assert_eq!(path, name),
            _ => assert!(path.ends_with(name), "a relative name is kept as it is"),
        }
    }
});
