//! `qchainfs snapshot`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Subcommand;
use serde_json::Value;

use super::report::printable;
use super::size::human;
use super::snapshot_words::{columns_head, snapshot_line, snapshot_object, when};
use super::{Output, exit, logging, print};
use crate::chain::{Chain, Depth, OpenOptions, Sharing, SnapshotChoice};
use crate::error::{At, Error, Result};
use crate::image::{Image, SnapshotTree, Writability};

/// List, make, delete and go back to the internal snapshots of an image
///
/// NAME is a snapshot's name, or #ID with its id from the list. The image must not be in use by others; an internal
/// snapshot of a backing file is made by naming that file.
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
    /// The image
    image: PathBuf,
}

#[derive(clap::Args)]
struct Create {
    #[command(flatten)]
    how: How,
    /// The image
    image: PathBuf,
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
    /// The image
    image: PathBuf,
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
    let sharing = if arguments.force_share { Sharing::Forced } else { Sharing::Locked };
    let options = OpenOptions { sharing, depth: Depth::TopOnly, ..OpenOptions::default() };
    let chain = Chain::open(&arguments.image, &options)?;
    let snapshots = image_of(&chain, &arguments.image)?.snapshots();
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
    let chain = open(&arguments.image, Writability::Writable)?;
    let image = image_of(&chain, &arguments.image)?;
    let made = image.create_snapshot(&arguments.name).at(&arguments.image)?;
    chain.close()?;
    arguments.how.tell(&format!("Snapshot {} created.", name_of(&made)))
}

fn apply(arguments: &Change) -> Result<()> {
    let (chain, wanted) = arguments.find()?;
    let image = image_of(&chain, &arguments.image)?;
    if arguments.dry_run {
        return print(&format!(
            "{}: the disk would become what it was at snapshot {}, {}\n\
             its size: {} bytes, {} today; what was written since would be lost\n",
            printable(&arguments.image.display().to_string()),
            name_of(&wanted),
            when(wanted.entry()),
            wanted.size(),
            image.size(),
        ));
    }
    image.apply_snapshot(&wanted.entry().id).at(&arguments.image)?;
    chain.close()?;
    arguments.how.tell(&format!("Snapshot {} applied.", name_of(&wanted)))
}

fn delete(arguments: &Change) -> Result<()> {
    let (chain, wanted) = arguments.find()?;
    if arguments.dry_run {
        let state = match wanted.entry().vm_state_size {
            0 => String::new(),
            size => format!(", with {} of a machine's state", human(size)),
        };
        return print(&format!(
            "{}: snapshot {}, {}{state}, would be deleted\n",
            printable(&arguments.image.display().to_string()),
            name_of(&wanted),
            when(wanted.entry()),
        ));
    }
    let image = image_of(&chain, &arguments.image)?;
    image.delete_snapshot(&wanted.entry().id).at(&arguments.image)?;
    chain.close()?;
    arguments.how.tell(&format!("Snapshot {} deleted.", name_of(&wanted)))
}

impl Change {
    /// The image, open for what is to be done, and the snapshot in it that is meant.
    fn find(&self) -> Result<(Chain, Arc<SnapshotTree>)> {
        let writability = match self.dry_run {
            true => Writability::ReadOnly,
            false => Writability::Writable,
        };
        let chain = open(&self.image, writability)?;
        let snapshots = image_of(&chain, &self.image)?.snapshots();
        let wanted = SnapshotChoice::parse(&self.name).only(&snapshots).at(&self.image)?;
        Ok((chain, wanted))
    }
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
