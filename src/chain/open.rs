//! Opening a chain: from the top image down, each member under the policy.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Chain;
use super::backing_name::{self, BackingName};
use super::member::{DataFile, Disk, Format, Member, RawDisk};
use super::policy::{BackingPolicy, OpenPolicy};
use super::secrets::Secrets;
use super::unlock::unlock;
use crate::error::{At, Error, Problem, Result};
use crate::image::{Companions, Image, Writability, read_header};
use crate::qcow2::{DataPlace, Header};
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
    /// The keys of encrypted members.
    pub secrets: Secrets,
}

impl Default for OpenOptions {
    /// Reading the whole chain, under the strictest useful policy.
    fn default() -> Self {
        Self {
            writability: Writability::ReadOnly,
            policy: BackingPolicy::default(),
            sharing: Sharing::Locked,
            depth: Depth::WholeChain,
            secrets: Secrets::default(),
        }
    }
}

/// How many members to open, and what of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// All of them, with what it takes to read them.
    WholeChain,
    /// All of them, to look at what they are. Neither keys nor data files are needed, and no view can be read.
    Headers,
    /// The top image only, to look at it, without key and data file.
    TopOnly,
}

impl Depth {
    /// Whether the bytes of the disk are going to be read.
    pub(super) fn reads_data(self) -> bool {
        self == Self::WholeChain
    }
}

/// What other processes may do with the members of an open chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Not write to them: image locks are taken and heeded.
    Locked,
    /// Anything (`-U`): no locks. What is read of an image that is being written may be nonsense.
    Forced,
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
            let writability = Place { index: members.len(), path: &path }.writability(options);
            let wrong_file = |error: Error| match members.last() {
                Some(above) if error.path().is_none_or(|file| file == path) => {
                    error.at(&path).named_by(above.path())
                }
                _ => error.at(&path),
            };
            let store = Arc::new(FileStore::open(&file, access(writability)).map_err(wrong_file)?);
            if members.iter().any(|member| member.store().id() == store.id()) {
                let files = members.iter().map(|member| member.path().to_path_buf());
                let files = files.chain([path.clone()]).collect();
                return Err(Error::new(Problem::BackingLoop { files }).at(top));
            }
            refuse_file_of(&members, &store, options).map_err(wrong_file)?;
            if members.len() == MAX_MEMBERS {
                return Err(Error::new(Problem::ChainTooDeep { limit: MAX_MEMBERS }).at(top));
            }
            // Not before it is known to be a new file: our own lock would be in the way.
            lock(&store, writability, options.sharing).at(&path)?;
            let place = Place { index: members.len(), path: &path };
            let member = open_member(place, store, format, &policy, options, &members);
            let member = member.map_err(wrong_file)?;
            next = match member.image() {
                Some(image) if options.depth != Depth::TopOnly => {
                    find_backing(&path, image, &policy).at(&path)?
                }
                _ => None,
            };
            members.push(member);
        }
        Ok(Self::new(members))
    }
}

/// A member's place in its chain, and its name.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub index: usize,
    pub path: &'a Path,
}

impl Place<'_> {
    /// Only the active layer is ever written, here or by another process.
    pub(super) fn writability(self, options: &OpenOptions) -> Writability {
        match self.index {
            0 => options.writability,
            _ => Writability::ReadOnly,
        }
    }
}

/// Refuses `store` as one more file of a chain that is going to be written and has it already: what is written to the
/// one would destroy the other. Image locks would say so, too, but not why, and not everybody has them.
fn refuse_file_of(members: &[Member], store: &FileStore, options: &OpenOptions) -> Result<()> {
    let twin = members.iter().find(|member| member.has_file(store.id()));
    match twin.filter(|_| options.writability == Writability::Writable) {
        None => Ok(()),
        Some(twin) => Err(Error::invalid(
            "data file name",
            format!("{} is, or has, the same file", twin.path().display()),
        )),
    }
}

/// The member in `store`, which is open and locked, with all that it consists of but its backing file; `others` are
/// the members opened before.
pub(super) fn open_member(
    place: Place<'_>,
    store: Arc<FileStore>,
    format: Format,
    policy: &OpenPolicy,
    options: &OpenOptions,
    others: &[Member],
) -> Result<Member> {
    let Place { index, path } = place;
    let writability = place.writability(options);
    let mut data_file = None;
    let disk = match format {
        Format::Raw => Disk::Raw(RawDisk::open(&*store).at(path)?),
        Format::Qcow2 => {
            let header = read_header(&*store).at(path)?;
            header.refuse_unsupported().at(path)?;
            let data = open_data_file(place, &header, policy, options, &|data| {
                if data.id() == store.id() && writability == Writability::Writable {
                    return Err(Error::invalid("data file name", "it names the image itself"));
                }
                refuse_file_of(others, data, options)
            })?;
            let mut companions = Companions::default();
            if let Some((path, data)) = data {
                data_file = Some(DataFile { path, id: data.id() });
                companions.data_file = Some(data);
            }
            companions.cipher = unlock(&*store, &header, index, path, options).at(path)?;
            let image = Image::open_with(store.clone(), writability, companions);
            Disk::Qcow2(Box::new(image.at(path)?))
        }
    };
    Ok(Member::new(path.to_path_buf(), data_file, store, disk))
}

fn access(writability: Writability) -> Access {
    match writability {
        Writability::ReadOnly | Writability::BesideWriter => Access::ReadOnly,
        Writability::Writable => Access::ReadWrite,
    }
}

/// Takes the image locks that go with what a file is opened for.
pub(super) fn lock(store: &FileStore, writability: Writability, sharing: Sharing) -> Result<()> {
    match (sharing, writability) {
        // It may be written by another process: any lock of ours would be in the way of it, or it in ours.
        (Sharing::Forced, _) | (_, Writability::BesideWriter) => Ok(()),
        (Sharing::Locked, Writability::ReadOnly) => store.lock(LockMode::Read),
        (Sharing::Locked, Writability::Writable) => store.lock(LockMode::Write),
    }
}

/// Opens the external data file of `image`, if it has one, and says where it is.
///
/// Its name is a plain path, never a protocol or a description: an image must not make us open anything else.
fn open_data_file(
    place: Place<'_>,
    header: &Header,
    policy: &OpenPolicy,
    options: &OpenOptions,
    admit: &dyn Fn(&FileStore) -> Result<()>,
) -> Result<Option<(PathBuf, Arc<FileStore>)>> {
    let image = place.path;
    if header.data_place() == DataPlace::Internal || !options.depth.reads_data() {
        return Ok(None);
    }
    let name = header.data_file_name().filter(|name| !name.is_empty()).ok_or_else(|| {
        Error::invalid("data file name", "the image does not name its data file").at(image)
    })?;
    backing_name::refuse_nul("data file name", name).at(image)?;
    let path = backing_name::beside(image, name);
    let file = policy.admit(&path).at(image)?;
    let writability = place.writability(options);
    let store = FileStore::open(&file, access(writability)).at(&path)?;
    admit(&store).at(image)?;
    lock(&store, writability, options.sharing).at(&path)?;
    Ok(Some((path, Arc::new(store))))
}

/// The backing file that the header of `overlay` names, if it does: its place, the file to open, its format.
fn find_backing(
    overlay: &Path,
    image: &Image,
    policy: &OpenPolicy,
) -> Result<Option<(PathBuf, PathBuf, Format)>> {
    let header = image.header();
    let Some(name) = &header.backing_name else { return Ok(None) };
    let shown = || String::from_utf8_lossy(name).into_owned();
    let BackingName { path, format, .. } = backing_name::resolve(overlay, name)?;
    let format = match (format, header.backing_format()) {
        (Some(format), _) => format,
        (None, Some(format)) => Format::from_name(format)
            .ok_or_else(|| Error::unsupported(format!("a backing file of format \"{format}\"")))?,
        (None, None) => {
            return Err(Error::new(Problem::BackingFormatMissing { name: shown() }));
        }
    };
    match policy.admit(&path) {
        Err(error) if matches!(error.problem(), Problem::NotFound) => {
            Err(Error::new(Problem::BackingMissing { name: shown(), looked: path }))
        }
        file => Ok(Some((path, file?, format))),
    }
}
