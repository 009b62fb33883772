//! From the name in a header to a file: the rules that QEMU has for backing file names.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::Format;
use crate::error::{Error, Result};

/// What a backing name means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// The file. A relative path counts from the current directory.
    pub path: PathBuf,
    /// Its format, if the name says that, too.
    pub format: Option<Format>,
    /// The name as `qemu-img info` shows it when it says in full which file that is.
    pub full: Vec<u8>,
}

/// What the backing name `name` in the header of `overlay` means.
///
/// A plain relative name counts from the directory part of the overlay's name as it was given; symbolic links in it
/// are not resolved. A name with a `:` before its first `/` names a protocol, of which `file:` is a file and `json:`
/// a description; both count from the current directory, as in QEMU.
///
/// # Errors
/// Other protocols, and descriptions of anything but a qcow2 or raw image in a file, are not supported. A name with a
/// NUL byte is invalid.
pub fn resolve(overlay: &Path, name: &[u8]) -> Result<BackingName> {
    refuse_nul("backing file name", name)?;
    let plain = |path: &[u8]| BackingName {
        path: Path::new(OsStr::from_bytes(path)).to_path_buf(),
        format: None,
        full: name.to_vec(),
    };
    match protocol(name) {
        Some((b"file", path)) => Ok(plain(path)),
        Some((b"json", description)) => {
            let (path, format) = described(description)?;
            Ok(BackingName { format, ..plain(path.as_bytes()) })
        }
        Some((other, _)) => Err(Error::unsupported(format!(
            "a backing file over the protocol \"{}\"",
            String::from_utf8_lossy(other)
        ))),
        None => {
            let path = beside(overlay, name);
            let full = path.as_os_str().as_bytes().to_vec();
            Ok(BackingName { path, format: None, full })
        }
    }
}

/// Refuses the name of a file that no file has, since it would be cut there.
pub fn refuse_nul(field: &'static str, name: &[u8]) -> Result<()> {
    match name.contains(&0) {
        true => Err(Error::invalid(field, "it has a NUL byte in it")),
        false => Ok(()),
    }
}

/// The file that the plain path `name`, relative to the directory of `image`, means.
pub fn beside(image: &Path, name: &[u8]) -> PathBuf {
    let name = Path::new(OsStr::from_bytes(name));
    match image.parent() {
        Some(directory) if name.is_relative() && directory != Path::new("") => directory.join(name),
        _ => name.to_path_buf(),
    }
}

/// The parts before and behind a `:` that comes before any `/`.
fn protocol(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = name.iter().position(|&byte| byte == b':' || byte == b'/')?;
    (name[end] == b':').then(|| (&name[..end], &name[end + 1..]))
}

/// The file and format of a description like `{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}`,
/// nested or with dotted keys. Anything more than that is refused: it could make QEMU do anything.
fn described(description: &[u8]) -> Result<(String, Option<Format>)> {
    let unsupported = |why: &str| Error::unsupported(format!("a backing file by json: with {why}"));
    let value: Value =
        serde_json::from_slice(description).map_err(|_| unsupported("a broken description"))?;
    let Value::Object(object) = value else { return Err(unsupported("no object")) };
    let mut flat = Map::new();
    if flatten("", object, &mut flat).is_err() {
        return Err(unsupported("a key in two forms"));
    }
    let mut format = None;
    let mut filename = None;
    for (key, value) in flat {
        let Value::String(value) = value else {
            return Err(unsupported(&format!("key \"{key}\"")));
        };
        match (&key[..], &value[..]) {
            ("driver", name) => {
                let known = Format::from_name(name);
                format = Some(known.ok_or_else(|| unsupported(&format!("the driver \"{name}\"")))?);
            }
            ("file.driver", "file") => {}
            ("file.filename", _) => filename = Some(value),
            _ => return Err(unsupported(&format!("key \"{key}\""))),
        }
    }
    match filename {
        Some(filename) => Ok((filename, format)),
        None => Err(unsupported("no file name")),
    }
}

/// A key that is there both nested and dotted.
struct Twice;

/// Turns nested objects into one with dotted keys.
fn flatten(
    prefix: &str,
    object: Map<String, Value>,
    flat: &mut Map<String, Value>,
) -> Result<(), Twice> {
    for (key, value) in object {
        let key = format!("{prefix}{key}");
        match value {
            // One level is all that can be meant; what is deeper is refused by its key.
            Value::Object(inner) if prefix.is_empty() => flatten(&format!("{key}."), inner, flat)?,
            value => {
                if flat.insert(key, value).is_some() {
                    return Err(Twice);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(overlay: &str, name: &str) -> String {
        let name = resolve(Path::new(overlay), name.as_bytes()).unwrap();
        name.path.display().to_string()
    }

    #[test]
    fn a_relative_name_counts_from_the_overlays_directory() {
        assert_eq!(resolved("d/wrap.qcow2", "base.qcow2"), "d/base.qcow2");
        assert_eq!(resolved("wrap.qcow2", "base.qcow2"), "base.qcow2");
        assert_eq!(resolved("/a/wrap.qcow2", "../base.qcow2"), "/a/../base.qcow2");
        assert_eq!(resolved("d/wrap.qcow2", "/abs/base.qcow2"), "/abs/base.qcow2");
    }

    #[test]
    fn a_colon_names_a_protocol_unless_a_slash_comes_before_it() {
        assert_eq!(resolved("wrap.qcow2", "./a:b.qcow2"), "./a:b.qcow2");
        assert_eq!(resolved("d/wrap.qcow2", "file:base.qcow2"), "base.qcow2");
        for name in ["nbd://host/x", "a:b.qcow2", "fat:rw:/tmp"] {
            assert!(resolve(Path::new("wrap.qcow2"), name.as_bytes()).is_err(), "{name}");
        }
    }

    #[test]
    fn only_a_plain_file_may_be_described() {
        for (description, format) in [
            (r#"{"driver":"qcow2","file":{"driver":"file","filename":"b"}}"#, Some(Format::Qcow2)),
            (r#"{"driver":"raw","file.driver":"file","file.filename":"b"}"#, Some(Format::Raw)),
            (r#"{"file.filename":"b"}"#, None),
        ] {
            let name = resolve(Path::new("d/w"), format!("json:{description}").as_bytes()).unwrap();
            assert_eq!((name.path, name.format), (PathBuf::from("b"), format));
        }
        for description in [
            "",
            "[]",
            "{}",
            r#"{"driver":"qcow2"}"#,
            r#"{"driver":"nbd","host":"x"}"#,
            r#"{"driver":"qcow2","file":{"driver":"nbd","filename":"b"}}"#,
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"b","locking":"off"}}"#,
            r#"{"driver":"qcow2","file":{"driver":"raw","file":{"filename":"b"}}}"#,
            r#"{"driver":"qcow2","data-file":{"filename":"/etc/passwd"},"file.filename":"b"}"#,
            r#"{"file.filename":7}"#,
            r#"{"file.filename":"a","file":{"filename":"b"}}"#,
        ] {
            let name = format!("json:{description}");
            assert!(resolve(Path::new("w"), name.as_bytes()).is_err(), "{description}");
        }
    }
}
