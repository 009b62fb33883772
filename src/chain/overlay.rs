//! A new image on top of a member of a live chain: an external snapshot of the active layer, or the way back to an older one.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::Chain;
use super::base_record::stamp;
use super::member::{Disk, Member};
use crate::error::{At, Doing, Error, Problem, Result};
use crate::image::{Companions, CreateOptions, Image, NewBacking, NewImage, Nothing, Writability};
use crate::qcow2::{Geometry, Version};
use crate::store::{Access, FileId, FileStore, LockMode, NewFile};

/// Clusters of 64 KiB and refcounts of 16 bits, as `qemu-img create` chooses.
const GEOMETRY: (u32, u32) = (16, 4);

/// What happens to a file that is in the place of a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It stays as it is: an error.
    Refuse,
    /// It becomes the new image; what it held is lost.
    Replace,
}

/// A new, empty image that names a member of a chain as its backing file, and is not the active layer yet.
pub struct Overlay {
    chain: Arc<Chain>,
    /// Index of that member.
    below: usize,
    top: Member,
    place: Place,
}

/// Where the file of a new image comes from.
enum Place {
    /// There was none of its name.
    New,
    /// It has become the new image.
    Replaced,
}

impl Chain {
    /// Makes the image `file`, to become the active layer with member `below` and all that it has below it.
    ///
    /// # Errors
    /// [`Problem::NoSuchMember`]; a file that is there, or is part of the chain; an encrypted member, whose
    /// overlay would show what it hides; a member that has no name any more, or another. Where no file was, none is left;
    /// one that was to be replaced may be left empty.
    pub fn prepare_overlay(
        self: &Arc<Self>,
        below: usize,
        file: &Path,
        existing: Existing,
    ) -> Result<Overlay> {
        self.check_member(below)?;
        let base = &self.members[below];
        if base.image().is_some_and(Image::is_encrypted) {
            let feature =
                "an overlay of an encrypted image: what is written to it would not be encrypted";
            return Err(Error::unsupported(feature).at(base.path()));
        }
        let options = CreateOptions {
            size: base.size(),
            version: Version::V3,
            geometry: Geometry::new(GEOMETRY.0, GEOMETRY.1),
            backing: Some(NewBacking {
                name: backing_name(base, file)?,
                format: base.format().to_string(),
                record: Some(stamp(base)?),
            }),
        };
        let new = NewImage::plan(&options).at(file)?;
        let (store, place) = match self.to_replace(file, existing).at(file)? {
            Some(store) => {
                new.write(&*store).at(file)?;
                (store, Place::Replaced)
            }
            None => {
                let place = NewFile::create(file)?;
                let store = place.store().clone();
                store.lock(LockMode::Write).at(file)?;
                new.write(&*store).at(file)?;
                place.publish()?;
                (store, Place::New)
            }
        };
        let image = Image::open_with(store.clone(), Writability::Writable, Companions::default());
        let disk = Disk::Qcow2(Box::new(image.at(file)?));
        let top = Member::new(file.to_path_buf(), None, store, disk);
        Ok(Overlay { chain: self.clone(), below, top, place })
    }

    /// The file that is to become a new image, empty and locked; `None` where there is none.
    fn to_replace(&self, file: &Path, existing: Existing) -> Result<Option<Arc<FileStore>>> {
        let is_member = |id| self.members.iter().any(|member| member.has_file(id));
        check_place(file, existing, is_member)?;
        if fs::symlink_metadata(file).is_err() {
            return Ok(None);
        }
        let store = FileStore::open(file, Access::ReadWrite)?;
        // Once more: the name may lead elsewhere by now.
        if is_member(store.id()) {
            return Err(Error::new(Problem::PartOfChain));
        }
        // Not before nobody else is known to use it.
        store.lock(LockMode::Write)?;
        store.clear().doing("empty it")?;
        Ok(Some(Arc::new(store)))
    }
}

impl Overlay {
    /// Makes the new image the active layer. `switch` is called with the new chain at the point in time: all that was
    /// written before is durable, and nobody reads or writes the disk until it returns. Who waited there then is told
    /// [`Problem::Retired`] and has to go to the new chain. Members above the one that it stands on are no part of that.
    ///
    /// # Errors
    /// [`Problem::ReadOnly`] for a chain that takes no writes; those of a flush; of `switch`. The old chain then goes on.
    pub fn put_on_top<T>(self, switch: impl FnOnce(Arc<Chain>) -> Result<T>) -> Result<T> {
        let Self { chain, below, top, place } = self;
        let (path, id) = (top.path().to_path_buf(), top.store().id());
        let switched = chain.go_on_in(top, below, switch);
        // Nobody has written to it, and its name is wanted for the next try.
        if switched.is_err()
            && matches!(place, Place::New)
            && FileId::of(&path) == Some(id)
            && let Err(error) = fs::remove_file(&path)
        {
            log::warn!("{}: {error}", path.display());
        }
        switched
    }
}

impl Chain {
    /// See [`Overlay::put_on_top`].
    fn go_on_in<T>(
        &self,
        top: Member,
        below: usize,
        switch: impl FnOnce(Arc<Chain>) -> Result<T>,
    ) -> Result<T> {
        let old = &self.members[0];
        let image = self.active_image().ok_or_else(|| Error::new(Problem::ReadOnly))?;
        let still = image.hold_still().at(old.path())?;
        let members = [Arc::new(top)].into_iter().chain(self.members[below..].iter().cloned());
        let new = Arc::new(Chain::of_shared(members.collect()));
        // The disk may have grown since the image was made, and what was written there meanwhile has to show through. An
        // image that is empty and has nothing below hides nothing when it grows.
        let size = self.members[below].size();
        if let Some(top) = new.active_image().filter(|top| top.size() != size) {
            top.grow(&Nothing, size).at(new.members[0].path())?;
        }
        let switched = switch(new.clone())?;
        still.for_good();
        old.store().lock_for_reading_only();
        // What the new image remembers of the old one was true when it was made; since then that was written.
        let recorded = stamp(&new.members[1]).and_then(|record| new.record_base(&record));
        if let Err(error) = recorded {
            log::warn!("{error}");
        }
        Ok(switched)
    }
}

/// Refuses `file` as the name of a new image if something is there that must not become one; `is_member` says which files are
/// part of the chain. Looks only, and names no file in its errors.
///
/// # Errors
/// [`Problem::PartOfChain`], [`Problem::NotARegularFile`], [`Problem::ExistsUnforced`].
pub fn check_place(
    file: &Path,
    existing: Existing,
    is_member: impl Fn(FileId) -> bool,
) -> Result<()> {
    if fs::symlink_metadata(file).is_err() {
        return Ok(());
    }
    // Not even force overwrites a member.
    if FileId::of(file).is_some_and(is_member) {
        return Err(Error::new(Problem::PartOfChain));
    }
    // Nor a directory, a device, or a link that leads nowhere, so that nobody is told to try.
    let found = fs::metadata(file);
    let leads_nowhere = found.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound);
    if leads_nowhere || found.is_ok_and(|found| !found.is_file()) {
        return Err(Error::new(Problem::NotARegularFile));
    }
    match existing {
        Existing::Refuse => Err(Error::new(Problem::ExistsUnforced)),
        Existing::Replace => Ok(()),
    }
}

/// What the image `overlay` shall call its backing file `base`: a name relative to its own directory where `base` is in there or
/// below, so that both can be moved together, else an absolute one. Relative names count from the overlay, not from where
/// anybody was started; through a symbolic link they would count from the link.
fn backing_name(base: &Member, overlay: &Path) -> Result<Vec<u8>> {
    let opened_as = base.path();
    // Of its directory only: should the name itself be a link, what the member names in turn counts from beside the link, too.
    let directory = opened_as.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let directory = fs::canonicalize(directory).doing("follow its name").at(opened_as)?;
    let path = directory.join(opened_as.file_name().unwrap_or_default());
    fs::metadata(&path).doing("look for it").at(opened_as)?;
    // It was opened long ago: whoever moved it since must not find another file under the overlay.
    if FileId::of(&path) != Some(base.store().id()) {
        return Err(Error::new(Problem::Moved).at(opened_as));
    }
    let base = path;
    if overlay.is_symlink() {
        return Ok(base.as_os_str().as_bytes().to_vec());
    }
    let directory = overlay.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let directory = fs::canonicalize(directory).doing("follow its name").at(directory)?;
    let name = base.strip_prefix(&directory).unwrap_or(&base).as_os_str().as_bytes().to_vec();
    // A colon before any slash would make it the name of a protocol.
    let first = name.split(|&byte| byte == b'/').next().unwrap_or_default();
    Ok(if first.contains(&b':') { [b"./", &name[..]].concat() } else { name })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::OpenOptions;
    use crate::store::memory::MemoryStore;
    use crate::units::GuestOffset;

    #[test]
    fn what_was_written_to_a_disk_that_grew_after_its_overlay_was_made_shows_through() {
        // Ends within a cluster, and grows into others.
        let (old, new) = ((1 << 16) + 512, 5_u64 << 16);
        let directory = tempfile::tempdir().unwrap();
        let store = MemoryStore::default();
        let geometry = Geometry::new(GEOMETRY.0, GEOMETRY.1);
        let options = CreateOptions { size: old, version: Version::V3, geometry, backing: None };
        NewImage::plan(&options).unwrap().write(&store).unwrap();
        let top = directory.path().join("top.qcow2");
        fs::write(&top, store.bytes()).unwrap();
        let options = OpenOptions { writability: Writability::Writable, ..OpenOptions::default() };
        let chain = Arc::new(Chain::open(&top, &options).unwrap());
        let disk = chain.view(0).unwrap();

        let file = directory.path().join("new.qcow2");
        let overlay = chain.prepare_overlay(0, &file, Existing::Refuse).unwrap();
        disk.grow(new).unwrap();
        disk.write(GuestOffset::ZERO, &vec![7; new as usize]).unwrap();
        let chain = overlay.put_on_top(Ok).unwrap();
        let mut found = vec![0; new as usize];
        chain.view(0).unwrap().read(GuestOffset::ZERO, &mut found).unwrap();
        assert!(found.iter().all(|&byte| byte == 7), "the overlay hides what was written");
    }
}
