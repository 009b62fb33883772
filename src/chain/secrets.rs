//! Where the keys of encrypted members come from.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::error::{At, Doing, Error, Result};

/// The sources of keys that the user named, later ones over earlier ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Secrets {
    sources: Vec<(SecretFor, SecretSource)>,
}

/// Which members a key is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretFor {
    /// All that have no key of their own.
    AnyMember,
    /// The one with this index in its chain, or this file name.
    Member(OsString),
}

/// Where a key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// The bytes of a file, all of them.
    File(PathBuf),
    /// An environment variable.
    Environment(OsString),
    /// A credential that systemd gives the service.
    Credential(OsString),
}

impl SecretSource {
    /// The source that `text` names: `env:NAME`, `cred:NAME` or a file.
    pub fn parse(text: &str) -> Self {
        match (text.strip_prefix("env:"), text.strip_prefix("cred:")) {
            (Some(name), _) => Self::Environment(name.into()),
            (_, Some(name)) => Self::Credential(name.into()),
            _ => Self::File(text.into()),
        }
    }

    /// The key itself; wiped from memory when dropped.
    ///
    /// # Errors
    /// A file that can't be read, a variable or credential that is not there.
    pub fn read(&self) -> Result<Zeroizing<Vec<u8>>> {
        let file = match self {
            Self::File(path) => path.clone(),
            Self::Environment(name) => {
                let value = env::var_os(name).ok_or_else(|| missing("environment variable", name));
                return Ok(Zeroizing::new(value?.into_encoded_bytes()));
            }
            Self::Credential(name) => {
                let directory = env::var_os("CREDENTIALS_DIRECTORY");
                let directory = directory.ok_or_else(|| missing("systemd credential", name))?;
                Path::new(&directory).join(name)
            }
        };
        fs::read(&file).map(Zeroizing::new).doing("read the key in it").at(&file)
    }
}

impl Secrets {
    /// Adds a source.
    pub fn add(&mut self, members: SecretFor, source: SecretSource) {
        self.sources.push((members, source));
    }

    /// The source for the member with this index and path.
    pub(super) fn find(&self, index: usize, path: &Path) -> Option<&SecretSource> {
        let named = |wanted: &OsString| {
            wanted.to_str().and_then(|text| text.parse().ok()) == Some(index)
                || path.file_name() == Some(wanted)
                || path == Path::new(wanted)
        };
        let own = self.sources.iter().rev().find(|(members, _)| match members {
            SecretFor::Member(wanted) => named(wanted),
            SecretFor::AnyMember => false,
        });
        let any = self.sources.iter().rev().find(|(members, _)| *members == SecretFor::AnyMember);
        own.or(any).map(|(_, source)| source)
    }
}

fn missing(what: &str, name: &OsStr) -> Error {
    Error::usage(format!("there is no {what} \"{}\"", name.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_its_own_goes_before_one_for_all() {
        let mut secrets = Secrets::default();
        let source = |name: &str| SecretSource::File(name.into());
        secrets.add(SecretFor::Member("1".into()), source("one"));
        secrets.add(SecretFor::Member("base.qcow2".into()), source("base"));
        secrets.add(SecretFor::AnyMember, source("all"));
        let found = |index, path| secrets.find(index, Path::new(path)).cloned();
        assert_eq!(found(0, "top.qcow2"), Some(source("all")));
        assert_eq!(found(1, "middle.qcow2"), Some(source("one")));
        assert_eq!(found(2, "/d/base.qcow2"), Some(source("base")));
        assert_eq!(Secrets::default().find(0, Path::new("top.qcow2")), None);
    }

    #[test]
    fn the_three_kinds_of_sources_are_told_apart() {
        assert_eq!(SecretSource::parse("env:KEY"), SecretSource::Environment("KEY".into()));
        assert_eq!(SecretSource::parse("cred:disk"), SecretSource::Credential("disk".into()));
        assert_eq!(SecretSource::parse("/etc/key"), SecretSource::File("/etc/key".into()));
        let missing = SecretSource::parse("env:QCHAINFS_SURELY_NOT_SET").read().unwrap_err();
        assert!(missing.to_string().contains("QCHAINFS_SURELY_NOT_SET"), "{missing}");
    }
}
