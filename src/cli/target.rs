//! What a verb works on: an image at rest, or the live mount that has it.

use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use crate::chain::{Chain, Existing, check_place};
use crate::control::{Client, Command};
use crate::error::{At, Doing, Error, Problem, Result};
use crate::mount::{MountEntry, control_socket, our_mount, our_mounts};
use crate::store::FileId;

/// An image file or a mount.
pub enum Target {
    /// A mount that takes commands.
    Live(Client),
    /// A file that no mount of ours writes.
    Image(PathBuf),
}

impl Target {
    /// What `path` means: a mountpoint, or an image; if a live mount writes that, the mount.
    ///
    /// # Errors
    /// A mount whose process is gone or takes no commands; a directory that is none.
    pub fn find(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).doing("find out the current directory")?;
        if let Some(mount) = our_mount(&path) {
            let own = geteuid().as_raw();
            if let Some(owner) = mount.owner().filter(|&owner| own != 0 && owner != own) {
                return Err(Error::new(Problem::OfAnotherUser { owner }).at(&path));
            }
            let unreachable =
                |reason: String| Error::new(Problem::Unreachable { reason }).at(&path);
            let socket = control_socket(&mount).ok_or_else(|| {
                unreachable("the process behind it is gone, or has no control socket".to_owned())
            })?;
            let client = Client::connect(&socket);
            return client.map(Self::Live).map_err(|error| match error.problem() {
                Problem::Remote { .. } => error,
                _ => unreachable(error.to_string()),
            });
        }
        if path.is_dir() {
            return Err(Error::new(Problem::NotMounted).at(&path));
        }
        Ok(writer_of(&path).map_or(Self::Image(path), Self::Live))
    }
}

/// The live mount that has `image` as its active layer and writes it.
fn writer_of(image: &Path) -> Option<Client> {
    let wanted = FileId::of(image)?;
    // What another user's mount says of an image could be a lie, and what we asked for would not be done.
    let own = |mount: &&MountEntry| mount.owner() == Some(geteuid().as_raw());
    our_mounts().iter().filter(own).filter_map(control_socket).find_map(|socket| {
        // A mount that does not answer has nothing to say about other people's images.
        let mut client = Client::connect(&socket).ok()?;
        let nodes = client.execute(&Command::QueryNodes).ok()?;
        let top = &nodes[0];
        let file = FileId::of(Path::new(top["file"].as_str()?))?;
        (file == wanted && top["ro"] == false).then_some(client)
    })
}

/// The files of the chain that a mount shows, the active layer first.
///
/// # Errors
/// A mount that does not answer.
pub fn members_of(client: &mut Client) -> Result<Vec<PathBuf>> {
    let nodes = client.execute(&Command::QueryNodes)?;
    let files = nodes.as_array().into_iter().flatten();
    Ok(files.filter_map(|node| node["file"].as_str().map(PathBuf::from)).collect())
}

/// The same of a chain that is open here.
pub fn files_of(chain: &Chain) -> Vec<PathBuf> {
    chain.members().iter().map(|member| member.path().to_path_buf()).collect()
}

/// Refuses what could not become a new image on top of a chain of `members`, without making it.
///
/// # Errors
/// As [`check_place`].
pub fn check_new_image(file: &Path, existing: Existing, members: &[PathBuf]) -> Result<()> {
    let members: Vec<FileId> = members.iter().filter_map(|member| FileId::of(member)).collect();
    check_place(file, existing, |id| members.contains(&id)).at(file)
}

/// The error for --quiesce on an image at rest.
pub fn nothing_to_quiesce() -> Error {
    Error::usage("--quiesce is for a live mount: nothing writes to this image")
}

/// `path` for a process that has another directory.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).doing("find out the current directory").at(path)
}
