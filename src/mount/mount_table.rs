//! The mount table: which of our mounts are where. It never asks the file systems themselves.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::attach::resolve;

/// The type of our mounts, as `findmnt` shows it.
pub const TYPE: &str = "fuse.qchainfs";

/// A line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The number of its device, "0:41". It is the mount's own as long as anybody has it open.
    pub device: String,
    /// What is mounted; for our own mounts the image.
    pub source: PathBuf,
    /// Where.
    pub mountpoint: PathBuf,
    /// The file system's type, with its subtype.
    pub kind: String,
    /// The options of the mount and behind them those of the file system, separated by commas. The
    /// mount is read-only if there is an `ro` among either.
    pub options: String,
}

impl MountEntry {
    /// The user who mounted it.
    pub fn owner(&self) -> Option<u32> {
        self.options.split(',').find_map(|word| word.strip_prefix("user_id=")?.parse().ok())
    }
}

/// The mounts of this program that are visible here, the oldest first.
pub fn our_mounts() -> Vec<MountEntry> {
    mounts().into_iter().filter(|mount| mount.kind == TYPE).collect()
}

/// Our mount on top at `mountpoint`, if there is one. Asks the mount table and never the file system itself, which
/// may be dead or hang.
pub fn our_mount(mountpoint: &Path) -> Option<MountEntry> {
    mount_on(&resolve(mountpoint).ok()?).filter(|mount| mount.kind == TYPE)
}

/// All mounts that are visible here, the oldest first; none if the table can't be read.
pub(super) fn mounts() -> Vec<MountEntry> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_else(|error| {
        log::warn!("can't read the mount table: {error}");
        Vec::new()
    });
    table.split(|&byte| byte == b'\n').filter_map(parse_mount).collect()
}

/// The topmost mount on `place`, a resolved path.
pub(super) fn mount_on(place: &Path) -> Option<MountEntry> {
    mounts().into_iter().rfind(|mount| mount.mountpoint == place)
}

/// Parses `36 35 0:41 / /mnt rw,nosuid shared:1 - fuse.qchainfs /a.qcow2 rw,user_id=0`, where the
/// number of fields before the dash varies.
fn parse_mount(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = fields.nth(2)?;
    let mountpoint = fields.nth(1)?;
    let mount_options = fields.next()?;
    let mut fields = fields.skip_while(|&field| field != b"-").skip(1);
    let (kind, source, options) = (fields.next()?, fields.next()?, fields.next()?);

    let text = String::from_utf8_lossy;
    Some(MountEntry {
        device: text(device).into_owned(),
        source: unescape(source),
        mountpoint: unescape(mountpoint),
        kind: text(kind).into_owned(),
        options: format!("{},{}", text(mount_options), text(options)),
    })
}

/// Undoes the kernel's `\040` for what would break its tables.
fn unescape(field: &[u8]) -> PathBuf {
    let octal = |digits: &[u8]| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok();
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail.get(..3).filter(|_| byte == b'\\').and_then(octal);
        path.push(code.unwrap_or(byte));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_mount_table_has_optional_fields_and_escapes() {
        let line = br"36 35 0:41 / /mnt/a\040b rw,nosuid shared:1 master:2 - fuse.qchainfs /a\134b.qcow2 ro,user_id=0";
        let mount = parse_mount(line).expect("a mount");
        assert_eq!(mount.device, "0:41");
        assert_eq!(mount.mountpoint, Path::new("/mnt/a b"));
        assert_eq!(mount.source, Path::new(r"/a\b.qcow2"));
        assert_eq!(mount.kind, TYPE);
        assert_eq!(mount.options, "rw,nosuid,ro,user_id=0");
        assert_eq!(mount.owner(), Some(0));
        assert_eq!(parse_mount(b"36 35 0:41 / /mnt rw - tmpfs"), None);
    }

    #[test]
    fn only_whole_octal_codes_are_unescaped() {
        assert_eq!(unescape(br"a\040\011b"), Path::new("a \tb"));
        assert_eq!(unescape(br"\04"), Path::new(r"\04"));
        assert_eq!(unescape(br"\999\777\"), Path::new(r"\999\777\"));
        assert_eq!(unescape(b"\\303\\274"), Path::new("ü"));
    }
}
