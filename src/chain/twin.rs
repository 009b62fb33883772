//! Writable twins of views that can't change: a temporary image on top of them, which goes with its descriptor.

use std::path::PathBuf;
use std::sync::Arc;

use super::member::{Disk, Member};
use super::resolved::ResolvedMaps;
use super::{Chain, View};
use crate::error::{At, Error, Result};
use crate::image::{Companions, CreateOptions, Image, NewImage, Writability};
use crate::qcow2::{Geometry, L2Form, Version};
use crate::store::TemporaryDirectory;

/// Clusters of 64 KiB with 32 subclusters, so that a small write copies little.
const GEOMETRY: (u32, u32, L2Form) = (16, 4, L2Form::Extended);

impl View {
    /// The active layer of a chain of its own that begins as this view and can be written. What is written goes to a file
    /// without a name in `directory`, and with the last [`View`] of that chain it is gone.
    ///
    /// The file is an image that names no backing file: what a snapshot shows has no name that a header could hold.
    ///
    /// # Errors
    /// A view that is being written itself, which would change under its twin; an encrypted one, whose twin would show what
    /// it hides; no temporary file.
    pub fn twin(&self, directory: &TemporaryDirectory) -> Result<View> {
        let members = &self.chain().members()[self.member()..];
        let path = members[0].path();
        if self.is_writable() {
            return Err(Error::usage("the active layer has no twin while it is written").at(path));
        }
        if members.iter().any(|member| member.image().is_some_and(Image::is_encrypted)) {
            let feature =
                "a twin of an encrypted disk: what is written to it would not be encrypted";
            return Err(Error::unsupported(feature).at(path));
        }
        let (cluster_bits, refcount_order, form) = GEOMETRY;
        let options = CreateOptions {
            size: self.size(),
            version: Version::V3,
            geometry: Geometry::new(cluster_bits, refcount_order).with_l2_form(form),
            backing: None,
        };
        // What errors call it: a name in the file system it has not.
        let name = format!("a scratch file in {}", directory.path().display());
        let name = PathBuf::from(name);
        let store = Arc::new(directory.make_file()?);
        NewImage::plan(&options).at(&name)?.write(&*store).at(&name)?;
        let image = Image::open_with(store.clone(), Writability::Writable, Companions::default());
        let disk = Disk::Qcow2(Box::new(image.at(&name)?));
        let top = Arc::new(Member::new(name, None, store, disk));
        let members: Vec<_> = [top].into_iter().chain(members.iter().cloned()).collect();
        let resolved = ResolvedMaps::of_twin(members.len());
        Arc::new(Chain { members, below_top: self.snapshot_tree(), resolved }).view(0)
    }
}
