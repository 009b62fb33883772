//! The words behind `-o`.

use std::path::PathBuf;

use crate::chain::{BackingPolicy, SecretFor, SecretSource, Secrets, Sharing};
use crate::error::{Error, Result};
use crate::image::Writability;
use crate::mount::{Audience, BesideWriter, DiscardMode, Growth, MountFlag, Way};

/// Greatest number of threads that makes any sense.
const MAX_THREADS: usize = 256;

/// What `--help` says of `-o`.
pub const HELP: &str = "Mount options, separated by commas:\n\
     ro, rw                    read-only; writable (the default if it can be)\n\
     force_share               the same as -U\n\
     active                    with -U: show the active layer, too, though\n\
     \u{20}                         its bytes may be half of a change; its\n\
     \u{20}                         partitions are those at the mount\n\
     growable                  truncate may make disk.raw larger\n\
     allow_other               other users may look inside\n\
     uid=N, gid=N              owner of the files (default: you)\n\
     umask=OCTAL               mode bits to clear (default: 027)\n\
     backing_policy=same-dir   images may name files in or below the top\n\
     \u{20}                         image's directory (default)\n\
     backing_policy=allow:DIR  and files in or below DIR (repeatable)\n\
     backing_policy=any|deny   any file; none\n\
     scratch, scratch=DIR      scratch/ holds writable throwaway twins of the\n\
     \u{20}                         views, which write to nameless files in DIR\n\
     \u{20}                         (default: $TMPDIR, or /var/tmp)\n\
     discard=unmap|ignore      discards give host space back (default); not\n\
     strict                    refuse a chain with a backing file that was\n\
     \u{20}                         changed since its overlay was made\n\
     lock=on|off               take and heed image locks (default: on)\n\
     secret=FILE               key of encrypted images; or env:VARIABLE, or\n\
     \u{20}                         cred:NAME for a systemd credential\n\
     secret[M]=FILE            key of the member of index or file name M\n\
     threads=N                 threads that answer requests; over io_uring at\n\
     \u{20}                         least one for each processor\n\
     io_uring=auto|off         let requests come over io_uring where the kernel\n\
     \u{20}                         offers it (default); never\n\
     noexec, noatime           as in mount(8), whose other options are\n\
     \u{20}                         accepted and ignored";

/// Mount options as ready values; `None` where nothing was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// `ro`, `rw`.
    pub writability: Option<Writability>,
    /// `force_share`, or -U.
    pub force_share: bool,
    /// `active`.
    pub beside_writer: BesideWriter,
    /// `growable`.
    pub growth: Growth,
    /// `allow_other`.
    pub audience: Audience,
    /// `uid=`.
    pub uid: Option<u32>,
    /// `gid=`.
    pub gid: Option<u32>,
    /// `umask=`.
    pub umask: u16,
    /// `backing_policy=`.
    pub policy: BackingPolicy,
    /// `discard=`.
    pub discard: DiscardMode,
    /// `scratch`, `scratch=`: the directory for what is written to twins.
    pub scratch: Option<PathBuf>,
    /// `lock=`.
    pub sharing: Sharing,
    /// `strict`.
    pub changed_bases: ChangedBases,
    /// `secret=`.
    pub secrets: Secrets,
    /// `threads=`.
    pub threads: Option<usize>,
    /// `io_uring=`.
    pub way: Way,
    /// Flags for the kernel.
    pub flags: Vec<MountFlag>,
}

/// What to do with a backing file that is not as its overlay remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangedBases {
    /// Warn.
    Warn,
    /// Refuse the chain.
    Refuse,
}

/// What to do with a word that is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// Refuse it.
    Refuse,
    /// Ignore it (mount's "sloppy").
    Ignore,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            writability: None,
            force_share: false,
            beside_writer: BesideWriter::Immutable,
            growth: Growth::Fixed,
            audience: Audience::Owner,
            uid: None,
            gid: None,
            umask: 0o027,
            policy: BackingPolicy::default(),
            discard: DiscardMode::Unmap,
            scratch: None,
            sharing: Sharing::Locked,
            changed_bases: ChangedBases::Warn,
            secrets: Secrets::default(),
            threads: None,
            way: Way::Best,
            flags: Vec::new(),
        }
    }
}

impl Options {
    /// Reads lists of options, later ones over earlier ones.
    ///
    /// # Errors
    /// A word that is not known, or a value that makes no sense.
    pub fn parse<'a>(lists: impl Iterator<Item = &'a str>, unknown: Unknown) -> Result<Self> {
        let mut options = Self::default();
        for word in lists.flat_map(|list| list.split(',')).filter(|word| !word.is_empty()) {
            let (key, value) = match word.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (word, None),
            };
            if !options.take(key, value)? && !is_standard(key) && unknown == Unknown::Refuse {
                return Err(Error::usage(format!(
                    "unknown mount option \"{word}\"; see qchainfs mount --help"
                )));
            }
        }
        options.settle()?;
        Ok(options)
    }

    /// What a forced share means for the other options.
    fn settle(&mut self) -> Result<()> {
        let contradiction = |option: &str| {
            Err(Error::usage(format!(
                "-U and -o {option} contradict each other: another process may be writing the image"
            )))
        };
        match (self.force_share, self.writability, self.growth) {
            (true, Some(Writability::Writable), _) => contradiction("rw"),
            (true, _, Growth::Growable) => contradiction("growable"),
            (true, ..) if self.scratch.is_some() => contradiction("scratch"),
            (true, ..) => {
                self.writability = Some(Writability::BesideWriter);
                Ok(())
            }
            (false, ..) if self.beside_writer == BesideWriter::Everything => Err(Error::usage(
                "-o active goes with -U: without it the active layer is always shown",
            )),
            (false, ..) => Ok(()),
        }
    }

    /// Takes one option; answers whether it is one of ours.
    fn take(&mut self, key: &str, value: Option<&str>) -> Result<bool> {
        match (key, value) {
            ("ro", None) => self.writability = Some(Writability::ReadOnly),
            ("rw", None) => self.writability = Some(Writability::Writable),
            ("force_share", None) => self.force_share = true,
            ("active", None) => self.beside_writer = BesideWriter::Everything,
            ("growable", None) => self.growth = Growth::Growable,
            ("strict", None) => self.changed_bases = ChangedBases::Refuse,
            ("allow_other", None) => self.audience = Audience::Everyone,
            ("noexec", None) => self.flags.push(MountFlag::NoExec),
            ("noatime", None) => self.flags.push(MountFlag::NoAtime),
            ("uid", Some(value)) => self.uid = Some(number(key, value, 10)?),
            ("gid", Some(value)) => self.gid = Some(number(key, value, 10)?),
            ("umask", Some(value)) => self.umask = (number(key, value, 8)? & 0o777) as u16,
            ("threads", Some(value)) => {
                let threads = number(key, value, 10)? as usize;
                if !(1..=MAX_THREADS).contains(&threads) {
                    return Err(Error::usage(format!("threads is between 1 and {MAX_THREADS}")));
                }
                self.threads = Some(threads);
            }
            ("discard", Some("unmap")) => self.discard = DiscardMode::Unmap,
            ("discard", Some("ignore")) => self.discard = DiscardMode::Ignore,
            ("io_uring", Some("auto")) => self.way = Way::Best,
            ("io_uring", Some("off")) => self.way = Way::Device,
            ("scratch", None) => self.scratch = Some(temporary_directory()),
            ("scratch", Some(directory)) if !directory.is_empty() => {
                self.scratch = Some(PathBuf::from(directory));
            }
            ("lock", Some("on")) => self.sharing = Sharing::Locked,
            ("lock", Some("off")) => self.sharing = Sharing::Forced,
            ("backing_policy", Some(value)) => self.take_policy(value)?,
            (key, Some(value)) if secret_for(key).is_some() && !value.is_empty() => {
                if let Some(members) = secret_for(key) {
                    self.secrets.add(members, SecretSource::parse(value));
                }
            }
            (
                "discard" | "io_uring" | "lock" | "scratch" | "secret" | "uid" | "gid" | "umask"
                | "threads" | "backing_policy",
                _,
            ) => {
                return Err(Error::usage(format!(
                    "mount option {key} does not take the value \"{}\"",
                    value.unwrap_or_default()
                )));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn take_policy(&mut self, value: &str) -> Result<()> {
        self.policy = match (value, value.strip_prefix("allow:")) {
            ("same-dir", _) => BackingPolicy::SameDirectory,
            ("any", _) => BackingPolicy::Any,
            ("deny", _) => BackingPolicy::Deny,
            (_, Some(directory)) if !directory.is_empty() => {
                let mut directories = match std::mem::take(&mut self.policy) {
                    BackingPolicy::Allow(directories) => directories,
                    _ => Vec::new(),
                };
                directories.push(PathBuf::from(directory));
                BackingPolicy::Allow(directories)
            }
            _ => {
                return Err(Error::usage(format!(
                    "backing_policy is same-dir, any, deny or allow:DIR, not \"{value}\""
                )));
            }
        };
        Ok(())
    }
}

/// Where temporary files go that may become large: /tmp is often in memory.
fn temporary_directory() -> PathBuf {
    let named = std::env::var_os("TMPDIR").filter(|directory| !directory.is_empty());
    named.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

/// Which members the key `secret` or `secret[M]` of an option is about.
fn secret_for(key: &str) -> Option<SecretFor> {
    let rest = key.strip_prefix("secret")?;
    if rest.is_empty() {
        return Some(SecretFor::AnyMember);
    }
    let member = rest.strip_prefix('[')?.strip_suffix(']')?;
    Some(SecretFor::Member(member.into()))
}

fn number(key: &str, value: &str, radix: u32) -> Result<u32> {
    u32::from_str_radix(value, radix)
        .map_err(|_| Error::usage(format!("mount option {key} takes a number, not \"{value}\"")))
}

/// Whether `key` is an option that mount(8), systemd or mount.fuse3 hand to any helper.
fn is_standard(key: &str) -> bool {
    const STANDARD: &[&str] = &[
        "_netdev",
        "_rnetdev",
        "async",
        "atime",
        "auto",
        "comment",
        "context",
        "default_permissions",
        "defaults",
        "defcontext",
        "dev",
        "diratime",
        "dirsync",
        "exec",
        "fscontext",
        "fsname",
        "group",
        "iversion",
        "lazytime",
        "loud",
        "mand",
        "noauto",
        "nodev",
        "nodiratime",
        "nofail",
        "nogroup",
        "noiversion",
        "nolazytime",
        "nomand",
        "noowner",
        "norelatime",
        "nostrictatime",
        "nosuid",
        "nouser",
        "nousers",
        "owner",
        "relatime",
        "rootcontext",
        "silent",
        "strictatime",
        "subtype",
        "suid",
        "sync",
        "user",
        "users",
    ];
    STANDARD.contains(&key) || key.starts_with("x-") || key.starts_with("X-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Result<Options> {
        Options::parse([list].into_iter(), Unknown::Refuse)
    }

    #[test]
    fn what_mount_hands_to_any_helper_is_ignored() {
        let list =
            "defaults,nofail,_netdev,x-systemd.automount,user,nosuid,nodev,dev,suid,comment=hi";
        assert_eq!(parse(list).unwrap(), Options::default());
    }

    #[test]
    fn several_directories_can_be_allowed() {
        let options = parse("backing_policy=allow:/a,ro,backing_policy=allow:/b").unwrap();
        assert_eq!(options.policy, BackingPolicy::Allow(vec!["/a".into(), "/b".into()]));
        assert_eq!(options.writability, Some(Writability::ReadOnly));
    }

    #[test]
    fn a_misspelt_option_is_an_error_unless_mount_is_sloppy() {
        assert!(parse("growabel").is_err());
        assert!(parse("discard=maybe").is_err());
        assert!(parse("threads=0").is_err());
        assert!(Options::parse(["growabel"].into_iter(), Unknown::Ignore).is_ok());
    }
}
