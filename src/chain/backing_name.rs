//! From the name in a header to a file: the rules that QEMU has for backing file names.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The file that the backing name `name` in the header of `overlay` means.
///
/// A relative name counts from the directory part of the overlay's name as it was given; symbolic links in it are
/// not resolved. A name with a `:` before its first `/` names a protocol, of which only `file:` is a file.
///
/// # Errors
/// Protocols and `json:` descriptions are not supported.
pub fn resolve(overlay: &Path, name: &[u8]) -> Result<PathBuf> {
    let name = name.strip_prefix(b"file:").unwrap_or(name);
    if let Some(protocol) = protocol(name) {
        let shown = String::from_utf8_lossy(protocol);
        return Err(Error::unsupported(match protocol {
            b"json" => "a backing file described by json:".to_owned(),
            _ => format!("a backing file over the protocol \"{shown}\""),
        }));
    }
    let name = Path::new(OsStr::from_bytes(name));
    Ok(match overlay.parent() {
        Some(directory) if name.is_relative() && directory != Path::new("") => directory.join(name),
        _ => name.to_path_buf(),
    })
}

/// The part before a `:` that comes before any `/`.
fn protocol(name: &[u8]) -> Option<&[u8]> {
    let end = name.iter().position(|&byte| byte == b':' || byte == b'/')?;
    (name[end] == b':').then(|| &name[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(overlay: &str, name: &str) -> String {
        resolve(Path::new(overlay), name.as_bytes()).unwrap().display().to_string()
    }

    #[test]
    fn a_relative_name_counts_from_the_overlays_directory() {
        assert_eq!(resolved("d/wrap.qcow2", "base.qcow2"), "d/base.qcow2");
        assert_eq!(resolved("wrap.qcow2", "base.qcow2"), "base.qcow2");
        assert_eq!(resolved("/a/wrap.qcow2", "../base.qcow2"), "/a/../base.qcow2");
        assert_eq!(resolved("d/wrap.qcow2", "/abs/base.qcow2"), "/abs/base.qcow2");
        assert_eq!(resolved("d/wrap.qcow2", "file:base.qcow2"), "d/base.qcow2");
    }

    #[test]
    fn a_colon_names_a_protocol_unless_a_slash_comes_before_it() {
        assert_eq!(resolved("wrap.qcow2", "./a:b.qcow2"), "./a:b.qcow2");
        for name in ["nbd://host/x", "a:b.qcow2", "json:{\"driver\":\"raw\"}"] {
            assert!(resolve(Path::new("wrap.qcow2"), name.as_bytes()).is_err(), "{name}");
        }
    }
}
