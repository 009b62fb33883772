//! A chain of files that do not name each other: full and incremental backups, put together by the user.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::Chain;
use super::member::{Format, Member};
use super::open::{OpenOptions, Place, lock, open_member};
use super::policy::OpenPolicy;
use crate::error::{At, Doing, Error, Result};
use crate::image::Writability;
use crate::qcow2::MAGIC;
use crate::store::{Access, FileStore, Store};
use crate::units::HostOffset;

/// A file of a chain that the user puts together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The file.
    pub path: PathBuf,
    /// Its format, or whatever its first bytes say.
    pub format: Option<Format>,
}

impl Layer {
    /// Reads `FILE`, `raw:FILE` or `qcow2:FILE`.
    pub fn parse(word: &OsStr) -> Self {
        let forced = |format, prefix: &[u8]| {
            let path = word.as_bytes().strip_prefix(prefix)?;
            Some(Self { path: OsStr::from_bytes(path).into(), format: Some(format) })
        };
        forced(Format::Raw, b"raw:")
            .or_else(|| forced(Format::Qcow2, b"qcow2:"))
            .unwrap_or_else(|| Self { path: word.into(), format: None })
    }
}

impl Chain {
    /// Opens `layers`, the base first, as one chain in which each shows through the next one. Nothing is ever
    /// written, whatever `options` say.
    ///
    /// The backing files that headers name are ignored. Where a layer has no format, its first bytes decide: the
    /// user names every file himself, so that a raw disk that a guest has begun with qcow2's magic leads to no backing
    /// file that he did not name. What else an image consists of, such as an external data file, passes the policy in
    /// `options`, counted from that image.
    ///
    /// # Errors
    /// No layer at all, a file twice, a raw file above others; any layer that is missing, locked, unsupported or
    /// broken, by its name.
    pub fn compose(layers: &[Layer], options: &OpenOptions) -> Result<Self> {
        let writability = match options.writability {
            Writability::Writable => Writability::ReadOnly,
            unwritten => unwritten,
        };
        let options = &OpenOptions { writability, ..options.clone() };
        let mut members: Vec<Member> = Vec::new();
        for (above, layer) in (0..layers.len()).rev().zip(layers) {
            let path = &layer.path;
            let store = Arc::new(FileStore::open(path, Access::ReadOnly).at(path)?);
            if let Some(twin) = members.iter().find(|member| member.store().id() == store.id()) {
                let message = if twin.path() == path {
                    format!("{} is in the chain twice", path.display())
                } else {
                    let (twin, path) = (twin.path().display(), path.display());
                    format!("{twin} and {path} are the same file, which is in the chain twice")
                };
                return Err(Error::usage(message));
            }
            // Not before it is known to be a new file: our own lock would be in the way.
            let place = Place { index: above, path };
            lock(&store, place.writability(options), options.sharing).at(path)?;
            let format = match layer.format {
                Some(format) => format,
                None => detect(&store).at(path)?,
            };
            if format == Format::Raw && !members.is_empty() {
                return Err(Error::usage(format!(
                    "{} is a raw disk and would hide all below it: a chain is given base first",
                    path.display()
                )));
            }
            let policy = OpenPolicy::new(options.policy.clone(), path);
            let member = open_member(place, store, format, &policy, options, &members)?;
            if let Some(name) = member.image().and_then(|image| image.header().backing_name) {
                let name = String::from_utf8_lossy(&name).into_owned();
                log::info!("{}: its backing file \"{name}\" is ignored", path.display());
            }
            members.push(member);
        }
        if members.is_empty() {
            return Err(Error::usage("a chain has at least one file"));
        }
        members.reverse();
        Ok(Self::new(members))
    }
}

fn detect(store: &FileStore) -> Result<Format> {
    let mut magic = [0; MAGIC.len()];
    store.read_at(&mut magic, HostOffset::ZERO).doing("read its first bytes")?;
    Ok(if magic == MAGIC { Format::Qcow2 } else { Format::Raw })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_forces_the_format() {
        let layer = |word: &str| {
            let layer = Layer::parse(OsStr::new(word));
            (layer.path.display().to_string(), layer.format)
        };
        assert_eq!(layer("raw:disk.qcow2"), ("disk.qcow2".into(), Some(Format::Raw)));
        assert_eq!(layer("qcow2:a"), ("a".into(), Some(Format::Qcow2)));
        assert_eq!(layer("./raw:a"), ("./raw:a".into(), None));
    }

    #[test]
    fn a_chain_without_files_is_no_chain() {
        assert!(Chain::compose(&[], &OpenOptions::default()).is_err());
    }
}
