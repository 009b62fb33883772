//! The keys of a chain in which members may be encrypted: as QEMU takes them, and as we do.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use qchainfs::chain::{SecretFor, SecretSource, Secrets};

use super::images::format_of;
use super::tools::{args, run};

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

/// An image as it is opened: with the keys of all encrypted members from it down.
#[derive(Clone)]
pub struct Opening {
    /// From the image itself down.
    members: Vec<(PathBuf, Option<Key>)>,
}

impl Opening {
    /// The image or raw file `path` with its key, over another.
    pub fn new(path: &Path, key: Option<Key>, below: Option<&Self>) -> Self {
        let further = below.map_or(&[][..], |below| &below.members).iter().cloned();
        Self { members: [(path.to_path_buf(), key)].into_iter().chain(further).collect() }
    }

    /// A copy of the image, at `path`.
    pub fn copied_to(&self, path: &Path) -> Self {
        let mut copy = self.clone();
        copy.members[0].0 = path.to_path_buf();
        copy
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.members[0].0
    }

    /// The words that tell QEMU the keys.
    pub fn objects(&self) -> Vec<OsString> {
        self.members.iter().filter_map(|(_, key)| key.as_ref()).flat_map(Key::object).collect()
    }

    /// What QEMU calls image options: which file it is, and which key is whose.
    pub fn options(&self) -> String {
        let path = self.path();
        let mut options = format!("driver={},file.filename={}", format_of(path), path.display());
        for (depth, (_, key)) in self.members.iter().enumerate() {
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
    #[track_caller]
    pub fn img(&self, verb: &[OsString], rest: &[OsString]) {
        run("qemu-img", &[verb, &self.words(), rest].concat());
    }

    /// Runs commands of `qemu-io`; all must succeed.
    #[track_caller]
    pub fn io(&self, commands: &[String]) {
        let mut words = args!["-d", "unmap"].to_vec();
        words.extend(self.objects());
        words.extend(commands.iter().flat_map(|command| args!["-c", command]));
        words.extend(self.image());
        run("qemu-io", &words);
    }

    /// Makes an internal snapshot.
    #[track_caller]
    pub fn snapshot(&self, name: &str) {
        self.img(&args!["snapshot", "-c", name], &[]);
    }

    /// Gives the disk another size.
    #[track_caller]
    pub fn resize(&self, size: u64) {
        self.img(&args!["resize", "-q", "--shrink"], &args![size.to_string()]);
    }

    /// The keys for the library.
    pub fn secrets(&self) -> Secrets {
        let mut secrets = Secrets::default();
        for (name, file) in self.encrypted() {
            secrets.add(SecretFor::Member(name), SecretSource::File(file));
        }
        secrets
    }

    /// The same as options of the program.
    pub fn our_options(&self) -> Vec<OsString> {
        let option = |(name, file): (OsString, PathBuf)| {
            args!["-o", format!("secret[{}]={}", name.display(), file.display())]
        };
        self.encrypted().flat_map(option).collect()
    }

    /// The file names of encrypted members, each with its key.
    fn encrypted(&self) -> impl Iterator<Item = (OsString, PathBuf)> {
        self.members.iter().filter_map(|(path, key)| {
            let name = path.file_name().expect("a file");
            Some((name.into(), key.clone()?.0))
        })
    }
}
