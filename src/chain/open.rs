//! Opening a chain: from the top image down, each member under the policy.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Chain;
use super::backing_name;
use super::member::{Disk, Format, Member, RawDisk};
use super::policy::{BackingPolicy, OpenPolicy};
use crate::error::{At, Error, Problem, Result};
use crate::image::{Image, Writability};
use crate::store::{Access, FileStore, LockMode};

/// More members than anyone stacks on purpose; each costs a file descriptor.
const MAX_MEMBERS: usize = 16384;

/// How to open a chain.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Whether the active layer takes writes. All other members are opened read-only.
    pub writability: Writability,
    /// Which files the images may name.
    pub policy: BackingPolicy,
    /// What other processes may do meanwhile.
    pub sharing: Sharing,
    /// How far down.
    pub depth: Depth,
}

impl Default for OpenOptions {
    /// Reading the whole chain, under the strictest useful policy.
    fn default() -> Self {
        Self {
            writability: Writability::ReadOnly,
            policy: BackingPolicy::default(),
            sharing: Sharing::Locked,
            depth: Depth::WholeChain,
        }
    }
}

/// How many members to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// All of them.
    WholeChain,
    /// The top image only, to look at it: its views lack what shows through.
    TopOnly,
}

/// What other processes may do with the members of an open chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Not write to them: image locks are taken and heeded.
    Locked,
    /// Anything (`-U`): no locks. What is read of an image that is being written may be nonsense.
    Forced,
}

/// The backing file that a header names.
struct BackingReference {
    name: Vec<u8>,
    format: Format,
}

impl Chain {
    /// Opens the qcow2 image `top` and all members below it.
    ///
    /// # Errors
    /// Any member that is missing, refused by the policy, locked, unsupported or broken, by its name; a chain that
    /// leads back to itself.
    pub fn open(top: &Path, options: &OpenOptions) -> Result<Self> {
        let policy = OpenPolicy::new(options.policy.clone(), top);
        let mut members: Vec<Member> = Vec::new();
        let mut next = Some((top.to_path_buf(), top.to_path_buf(), Format::Qcow2));
        while let Some((path, file, format)) = next {
            let writability = match members.len() {
                0 => options.writability,
                _ => Writability::ReadOnly,
            };
            let access = match writability {
                Writability::ReadOnly => Access::ReadOnly,
                Writability::Writable => Access::ReadWrite,
            };
            let store = Arc::new(FileStore::open(&file, access).at(&path)?);
            if members.iter().any(|member| member.store().id() == store.id()) {
                let files = members.iter().map(|member| member.path().to_path_buf());
                let files = files.chain([path.clone()]).collect();
                return Err(Error::new(Problem::BackingLoop { files }).at(top));
            }
            if members.len() == MAX_MEMBERS {
                return Err(Error::new(Problem::ChainTooDeep { limit: MAX_MEMBERS }).at(top));
            }
            // Not before it is known to be a new file: our own lock would be in the way.
            if options.sharing == Sharing::Locked {
                store.lock(lock_mode(writability)).at(&path)?;
            }
            let disk = match format {
                Format::Raw => Disk::Raw(RawDisk::open(&*store).at(&path)?),
                Format::Qcow2 => {
                    Disk::Qcow2(Box::new(Image::open(store.clone(), writability).at(&path)?))
                }
            };
            next = match &disk {
                Disk::Qcow2(image) if options.depth == Depth::WholeChain => {
                    match backing_reference(image).at(&path)? {
                        Some(reference) => {
                            Some(find_backing(&path, &reference, &policy).at(&path)?)
                        }
                        None => None,
                    }
                }
                _ => None,
            };
            members.push(Member::new(path, store, disk));
        }
        Ok(Self { members })
    }
}

fn lock_mode(writability: Writability) -> LockMode {
    match writability {
        Writability::ReadOnly => LockMode::Read,
        Writability::Writable => LockMode::Write,
    }
}

fn backing_reference(image: &Image) -> Result<Option<BackingReference>> {
    let header = image.header();
    let Some(name) = &header.backing_name else { return Ok(None) };
    let shown = String::from_utf8_lossy(name).into_owned();
    let Some(format) = header.backing_format() else {
        return Err(Error::new(Problem::BackingFormatMissing { name: shown }));
    };
    let format = Format::from_name(format)
        .ok_or_else(|| Error::unsupported(format!("a backing file of format \"{format}\"")))?;
    Ok(Some(BackingReference { name: name.clone(), format }))
}

/// The name by which the chain knows the backing file of `overlay`, the file to open for it, and its format.
fn find_backing(
    overlay: &Path,
    reference: &BackingReference,
    policy: &OpenPolicy,
) -> Result<(PathBuf, PathBuf, Format)> {
    let path = backing_name::resolve(overlay, &reference.name)?;
    let file = policy.admit(&path)?;
    match file.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let name = String::from_utf8_lossy(&reference.name).into_owned();
            Err(Error::new(Problem::BackingMissing { name, looked: path }))
        }
        _ => Ok((path, file, reference.format)),
    }
}
