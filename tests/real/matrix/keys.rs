//! The keys of a chain in which members may be encrypted: as QEMU takes them, and as we do.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use qchainfs::chain::{SecretFor, SecretSource, Secrets};

use super::build::Member;
use crate::support::images::format_of;
use crate::support::tools::{args, run};

/// A key of its own for a member, in a file that holds its own name.
#[derive(Clone)]
pub struct Key(PathBuf);

impl Key {
    /// Makes `file` a key.
    pub fn make(file: PathBuf) -> Self {
        let key = Self(file);
        fs::write(&key.0, key.id()).expect("write a key");
        key
    }

    /// What QEMU knows it by.
    pub fn id(&self) -> String {
        self.0.file_name().expect("a file").display().to_string()
    }

    /// The words that tell QEMU this key.
    pub fn object(&self) -> [OsString; 2] {
        args!["--object", format!("secret,id={0},data={0}", self.id())]
    }
}

/// A member as QEMU opens it: with the keys of all encrypted members from it down.
#[derive(Clone)]
pub struct Opening {
    path: PathBuf,
    /// From the member itself down.
    keys: Vec<Option<Key>>,
}

impl Opening {
    /// The image or raw file `path` with its key, over another.
    pub fn new(path: &Path, key: Option<Key>, below: Option<&Self>) -> Self {
        let further = below.map_or(&[][..], |below| &below.keys).iter().cloned();
        Self { path: path.to_path_buf(), keys: [key].into_iter().chain(further).collect() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The words that tell QEMU the keys.
    pub fn objects(&self) -> Vec<OsString> {
        self.keys.iter().flatten().flat_map(Key::object).collect()
    }

    /// What QEMU calls image options: which file it is, and which key is whose.
    pub fn options(&self) -> String {
        let format = format_of(&self.path);
        let mut options = format!("driver={format},file.filename={}", self.path.display());
        for (depth, key) in self.keys.iter().enumerate() {
            if let Some(key) = key {
                let below = "backing.".repeat(depth);
                options += &format!(",{below}encrypt.key-secret={}", key.id());
            }
        }
        options
    }

    /// The words that make it the image of a command, but for the keys.
    pub fn image(&self) -> [OsString; 2] {
        args!["--image-opts", self.options()]
    }

    /// All of the words.
    pub fn words(&self) -> Vec<OsString> {
        [&self.objects()[..], &self.image()].concat()
    }

    /// Runs `qemu-img` with words before and behind the image.
    pub fn img(&self, verb: &[OsString], rest: &[OsString]) {
        run("qemu-img", &[verb, &self.words(), rest].concat());
    }
}

/// The keys of these members, for the library.
pub fn secrets(members: &[Member]) -> Secrets {
    let mut secrets = Secrets::default();
    for (name, file) in encrypted(members) {
        secrets.add(SecretFor::Member(name), SecretSource::File(file));
    }
    secrets
}

/// The same as options of the program.
pub fn options(members: &[Member]) -> Vec<OsString> {
    let option = |(name, file): (OsString, PathBuf)| {
        args!["-o", format!("secret[{}]={}", name.display(), file.display())]
    };
    encrypted(members).flat_map(option).collect()
}

/// The file names of encrypted members, each with its key.
fn encrypted(members: &[Member]) -> impl Iterator<Item = (OsString, PathBuf)> {
    members.iter().filter_map(|member| {
        let name = member.path().file_name().expect("a file");
        let key = member.opening.keys.first().cloned().flatten()?;
        Some((name.into(), key.0))
    })
}
