//! `qchainfs snapshot`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Subcommand;
use serde_json::Value;

use super::report::printable;
use super::size::human;
use super::snapshot_words::{columns_head, snapshot_line, snapshot_object, when};
use super::target::{Target, members_of, nothing_to_quiesce};
use super::{Output, exit, logging, print};
use crate::chain::{Chain, Depth, OpenOptions, Sharing, SnapshotChoice};
use crate::control::{Client, Command, Quiesce, SnapshotName};
use crate::error::{At, Error, Result};
use crate::image::{Image, SnapshotTree, Writability};

/// List, make, delete and go back to the internal snapshots of an image
///
/// NAME is a snapshot's name, or #ID with its id from the list. TARGET is an image, or the mountpoint that shows it; an image
/// that a mount writes is reached through the mount. An internal snapshot of a backing file is made by naming that file,
/// while nobody uses it.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the snapshots, as qemu-img snapshot -l does
    List(List),
    /// Make a snapshot of the disk as it is
    Create(Create),
    /// Make the disk what it was at a snapshot: what was written since is lost
    Apply(Change),
    /// Delete a snapshot, and give its space back
    Delete(Change),
}

#[derive(clap::Args)]
struct List {
    /// How to print it
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    /// Look even if another process is writing
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image, or the mountpoint that shows it
    target: PathBuf,
}

#[derive(clap::Args)]
struct Create {
    /// Freeze file systems that are mounted from loop devices over the mount, and thaw them when
    /// it is done (by fsfreeze; takes root)
    #[arg(long)]
    quiesce: bool,
    #[command(flatten)]
    how: How,
    /// The image, or the mountpoint that shows it
    target: PathBuf,
    /// The name of the new snapshot
    name: String,
}

#[derive(clap::Args)]
struct Change {
    /// Show what would be done, and do nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    #[command(flatten)]
    how: How,
    /// The image, or the mountpoint that shows it
    target: PathBuf,
    /// The snapshot: its name, or #ID
    name: String,
}

#[derive(clap::Args)]
struct How {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    match &arguments.verb {
        Verb::List(arguments) => list(arguments)?,
        Verb::Create(arguments) => create(arguments)?,
        Verb::Apply(arguments) => apply(arguments)?,
        Verb::Delete(arguments) => delete(arguments)?,
    }
    Ok(ExitCode::from(exit::DONE))
}

fn list(arguments: &List) -> Result<()> {
    let (image, sharing) = match Target::find(&arguments.target)? {
        // What the mount has made is in the table by the time it says so.
        Target::Live(mut client) => (top_of(&mut client)?, Sharing::Forced),
        Target::Image(image) if arguments.force_share => (image, Sharing::Forced),
        Target::Image(image) => (image, Sharing::Locked),
    };
    let options = OpenOptions { sharing, depth: Depth::TopOnly, ..OpenOptions::default() };
    let chain = Chain::open(&image, &options)?;
    let snapshots = image_of(&chain, &image)?.snapshots();
    match arguments.output {
        Output::Json => {
            let objects = snapshots.iter().map(|tree| snapshot_object(tree));
            print(&format!("{:#}\n", Value::Array(objects.collect())))
        }
        Output::Human if snapshots.is_empty() => Ok(()),
        Output::Human => {
            let lines = snapshots.iter().map(|tree| snapshot_line(tree.entry()));
            print(&format!("Snapshot list:\n{}{}", columns_head(), lines.collect::<String>()))
        }
    }
}

fn create(arguments: &Create) -> Result<()> {
    let name = match Target::find(&arguments.target)? {
        Target::Live(mut client) => {
            let name = arguments.name.clone();
            let quiesce = if arguments.quiesce { Quiesce::Yes } else { Quiesce::No };
            client.execute(&Command::CreateSnapshot { name, quiesce })?;
            format!("\"{}\"", printable(&arguments.name))
        }
        Target::Image(_) if arguments.quiesce => return Err(nothing_to_quiesce()),
        Target::Image(image) => {
            let chain = open(&image, Writability::Writable)?;
            let made = image_of(&chain, &image)?.create_snapshot(&arguments.name).at(&image)?;
            chain.close()?;
            name_of(&made)
        }
    };
    arguments.how.tell(&format!("Snapshot {name} created."))
}

fn apply(arguments: &Change) -> Result<()> {
    let mut found = arguments.find()?;
    if arguments.dry_run {
        let (wanted, image) = (&found.wanted, image_of(&found.chain, &found.path)?);
        return print(&format!(
            "{}: the disk would become what it was at snapshot {}, {}\n\
             its size: {} bytes, {} today; what was written since would be lost\n",
            printable(&found.path.display().to_string()),
            name_of(wanted),
            when(wanted.entry()),
            wanted.size(),
            image.size(),
        ));
    }
    let id = &found.wanted.entry().id;
    match &mut found.client {
        Some(client) => drop(client.execute(&Command::ApplySnapshot(precisely(&found.wanted)))?),
        None => {
            image_of(&found.chain, &found.path)?.apply_snapshot(id).at(&found.path)?;
            found.chain.close()?;
        }
    }
    arguments.how.tell(&format!("Snapshot {} applied.", name_of(&found.wanted)))
}

fn delete(arguments: &Change) -> Result<()> {
    let mut found = arguments.find()?;
    if arguments.dry_run {
        let entry = found.wanted.entry();
        let state = match entry.vm_state_size {
            0 => String::new(),
            size => format!(", with {} of a machine's state", human(size)),
        };
        return print(&format!(
            "{}: snapshot {}, {}{state}, would be deleted\n",
            printable(&found.path.display().to_string()),
            name_of(&found.wanted),
            when(entry),
        ));
    }
    let id = &found.wanted.entry().id;
    match &mut found.client {
        Some(client) => drop(client.execute(&Command::DeleteSnapshot(precisely(&found.wanted)))?),
        None => {
            image_of(&found.chain, &found.path)?.delete_snapshot(id).at(&found.path)?;
            found.chain.close()?;
        }
    }
    arguments.how.tell(&format!("Snapshot {} deleted.", name_of(&found.wanted)))
}

/// A snapshot that is meant, and who is to change it.
struct Found {
    /// The image that has it.
    path: PathBuf,
    chain: Chain,
    wanted: Arc<SnapshotTree>,
    /// The mount that writes the image, if one does.
    client: Option<Client>,
}

impl Change {
    /// The image, open for what is to be done, and the snapshot in it that is meant.
    fn find(&self) -> Result<Found> {
        let (path, chain, client) = match Target::find(&self.target)? {
            Target::Live(mut client) => {
                let path = top_of(&mut client)?;
                let options = OpenOptions {
                    sharing: Sharing::Forced,
                    depth: Depth::TopOnly,
                    ..OpenOptions::default()
                };
                let chain = Chain::open(&path, &options)?;
                (path, chain, Some(client))
            }
            Target::Image(path) if self.dry_run => {
                let chain = open(&path, Writability::ReadOnly)?;
                (path, chain, None)
            }
            Target::Image(path) => {
                let chain = open(&path, Writability::Writable)?;
                (path, chain, None)
            }
        };
        let snapshots = image_of(&chain, &path)?.snapshots();
        let wanted = SnapshotChoice::parse(&self.name).only(&snapshots).at(&path)?;
        Ok(Found { path, chain, wanted, client })
    }
}

/// The image that the mount writes.
fn top_of(client: &mut Client) -> Result<PathBuf> {
    let top = members_of(client)?.into_iter().next();
    top.ok_or_else(|| Error::usage("the mount does not say which image it shows"))
}

fn precisely(snapshot: &SnapshotTree) -> SnapshotName {
    let entry = snapshot.entry();
    SnapshotName { id: Some(entry.id.clone()), name: Some(entry.name.clone()) }
}

impl How {
    fn tell(&self, text: &str) -> Result<()> {
        if self.quiet { Ok(()) } else { print(&format!("{text}\n")) }
    }
}

/// Opens the image alone: a snapshot is made of tables, for which neither backing file nor key can be missing.
fn open(image: &Path, writability: Writability) -> Result<Chain> {
    let options = OpenOptions { writability, depth: Depth::TopOnly, ..OpenOptions::default() };
    Chain::open(image, &options)
}

fn image_of<'a>(chain: &'a Chain, path: &Path) -> Result<&'a Image> {
    chain.active_image().ok_or_else(|| Error::usage("only qcow2 images have snapshots").at(path))
}

/// The snapshot as the user may name it, and its id.
fn name_of(tree: &SnapshotTree) -> String {
    let entry = tree.entry();
    format!("\"{}\" (#{})", printable(&entry.name), printable(&entry.id))
}
