//! Images, made by QEMU's own tools in a directory of their own.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tempfile::TempDir;

use super::oracle;
use super::random::Random;
use super::tools::{args, run};

/// A directory of images that goes with the test.
pub struct Images {
    dir: TempDir,
}

impl Images {
    /// An empty directory.
    pub fn new() -> Self {
        Self { dir: TempDir::with_prefix("qchainfs-images-").expect("make a directory") }
    }

    /// Where `name` is or would be.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A qcow2 image without a backing file. `options` are those of `qemu-img create -o`, or empty.
    pub fn create(&self, name: &str, size: u64, options: &str) -> PathBuf {
        let path = self.path(name);
        let options = if options.is_empty() { "compat=1.1" } else { options };
        let size = size.to_string();
        run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-o", options, path, size]);
        path
    }

    /// A raw image that holds `bytes`.
    pub fn raw(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).expect("write a raw image");
        path
    }

    /// A qcow2 image of `size` bytes over `base`, which it names as given.
    pub fn overlay_sized(&self, name: &str, base: &str, size: u64, options: &str) -> PathBuf {
        let path = self.path(name);
        let format = if base.ends_with(".raw") { "raw" } else { "qcow2" };
        let options = if options.is_empty() { "compat=1.1" } else { options };
        let mut words = args!["create", "-q", "-f", "qcow2", "-o", options].to_vec();
        words.extend(args!["-b", base, "-F", format, path, size.to_string()]);
        run("qemu-img", &words);
        path
    }

    /// A qcow2 image over `base`, as large as it.
    pub fn overlay(&self, name: &str, base: &str, options: &str) -> PathBuf {
        let size = oracle::virtual_size(&self.path(base));
        self.overlay_sized(name, base, size, options)
    }
}

/// The format of `image`, which in these tests its name tells.
pub fn format_of(image: &Path) -> &'static str {
    if image.extension().is_some_and(|end| end == "raw") { "raw" } else { "qcow2" }
}

/// Runs commands of `qemu-io` on `image`; all must succeed.
#[track_caller]
pub fn io<S: AsRef<str>>(image: &Path, commands: &[S]) {
    let mut words = args!["-f", format_of(image)].to_vec();
    for command in commands {
        words.extend(args!["-c", command.as_ref()]);
    }
    words.extend(args![image]);
    run("qemu-io", &words);
}

/// Writes `count` random runs of bytes and, where the format has them, zeros into the first `size`
/// bytes of `image`.
pub fn paint(image: &Path, random: &mut Random, size: u64, count: usize) {
    let commands: Vec<String> = (0..count)
        .map(|_| {
            let (offset, len) = random.range(size, size / 8);
            match random.below(6) {
                0 => format!("write -z {offset} {len}"),
                1 => format!("write -z -u {offset} {len}"),
                _ => format!("write -P {} {offset} {len}", 1 + random.below(255)),
            }
        })
        .collect();
    io(image, &commands);
}

/// Makes an internal snapshot.
#[track_caller]
pub fn snapshot(image: &Path, name: &str) {
    run("qemu-img", &args!["snapshot", "-c", name, image]);
}

/// Panics unless QEMU finds neither an error nor a leak in `image`.
#[track_caller]
pub fn check(image: &Path) {
    is_clean(&args![image]);
}

/// As [`check`], of the image that `words` tell QEMU.
#[track_caller]
pub fn is_clean(words: &[OsString]) {
    let said = run("qemu-img", &[&args!["check"], words].concat());
    assert!(said.contains("No errors were found"), "qemu-img check {words:?}: {said}");
}

/// Overwrites bytes of the file, as no tool would.
pub fn poke(image: &Path, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(image).expect("open an image to poke");
    file.write_all_at(bytes, offset).expect("poke an image");
}

/// Bytes that the host has allocated for `file`, once it has written them back.
pub fn allocated(file: &Path) -> u64 {
    File::open(file).expect("open").sync_all().expect("sync");
    fs::metadata(file).expect("stat").blocks() * 512
}

/// Files that a test must leave as they are.
pub struct Untouched(Vec<(PathBuf, Vec<u8>, SystemTime)>);

impl Untouched {
    /// Remembers how `files` are now.
    pub fn now<P: AsRef<Path>>(files: &[P]) -> Self {
        Self(files.iter().map(|file| Self::state(file.as_ref())).collect())
    }

    /// Panics if one of them is different.
    #[track_caller]
    pub fn verify(self) {
        for (path, bytes, modified) in self.0 {
            let (_, bytes_now, modified_now) = Self::state(&path);
            oracle::same(&format!("the file {}", path.display()), &bytes, &bytes_now);
            assert_eq!(modified, modified_now, "mtime of {}", path.display());
        }
    }

    fn state(path: &Path) -> (PathBuf, Vec<u8>, SystemTime) {
        let modified = fs::metadata(path).and_then(|data| data.modified()).expect("stat an image");
        (path.to_path_buf(), fs::read(path).expect("read an image"), modified)
    }
}
