//! `qchainfs clone`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::Value;

use super::progress::{Form, Progress};
use super::size::human;
use super::views::Source;
use super::{exit, logging, print};
use crate::chain::{Chain, Depth, Format, Layer, OpenOptions, Reflink, View};
use crate::error::{At, Doing, Error, Problem, Result};
use crate::mount::STILL_DISK;

/// How long a twin may seem to be open for writing: the kernel tells a moment late that a file was closed.
const PATIENCE: Duration = Duration::from_secs(2);

/// Copy a view to a new image that needs no other file
///
/// What reads as zero takes no space there. The file gets its name when it is complete and on stable storage, where the file
/// system allows that, and never takes the place of another one. The copy is not encrypted.
#[derive(clap::Args)]
pub struct Arguments {
    /// The new file's format
    #[arg(short = 'O', long, value_enum, value_name = "FORMAT", default_value = "qcow2")]
    output_format: NewFormat,
    /// How to show progress
    #[arg(long, value_enum, value_name = "FORM", default_value = "auto")]
    progress: Form,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show what would be done, and do nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Whether the copy shares data with the files that it comes from instead of copying that, on a file system that can
    /// (btrfs, XFS): auto where it is possible, always or not at all, never. What is compressed, encrypted, or in clusters
    /// smaller than those of the copy is copied in any case
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    reflink: When,
    #[command(flatten)]
    source: Source,
    /// IMAGE, IMAGE@SNAPSHOT, IMAGE@#ID, IMAGE[N], IMAGE[N]@SNAPSHOT or IMAGE[FILE]; or a
    /// directory in a live mount that shows a view nobody writes, or a scratch twin, which nobody can write meanwhile
    #[arg(value_name = "ADDRESS")]
    address: OsString,
    /// The file to make
    #[arg(value_name = "DEST")]
    to: PathBuf,
}

/// When data is shared.
#[derive(Clone, Copy, ValueEnum)]
enum When {
    Auto,
    Always,
    Never,
}

/// Formats of copies.
#[derive(Clone, Copy, ValueEnum)]
enum NewFormat {
    /// A qcow2 image
    Qcow2,
    /// The bytes of the disk, with holes
    Raw,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    let view = match directory_of(&arguments.address) {
        Some(directory) => live_view(&directory)?,
        None => arguments.source.open(Depth::WholeChain)?.only(Some(&arguments.address))?,
    };
    let to = &arguments.to;
    let format = match arguments.output_format {
        NewFormat::Qcow2 => Format::Qcow2,
        NewFormat::Raw => Format::Raw,
    };
    if arguments.dry_run {
        let (size, data) = (view.size(), human(view.allocated(view.range())?));
        let to = to.display();
        print(&format!(
            "{to} would be made in format {format}: {size} bytes, at most {data} of data\n"
        ))?;
        return Ok(ExitCode::from(exit::DONE));
    }
    let mut progress = match arguments.quiet {
        true => Progress::hidden(),
        false => Progress::new(arguments.progress),
    };
    let size = view.size();
    let reflink = match arguments.reflink {
        When::Auto => Reflink::Auto,
        When::Always => Reflink::Always,
        When::Never => Reflink::Never,
    };
    view.copy_to(to, format, reflink, &mut |at| progress.update("clone", at.get(), size))?;
    progress.clear();
    if !arguments.quiet {
        print(&format!("{} is a copy of {}.\n", to.display(), arguments.address.display()))?;
    }
    Ok(ExitCode::from(exit::DONE))
}

/// The directory in a mount that `address` means: itself, or that of a disk in it.
fn directory_of(address: &OsStr) -> Option<PathBuf> {
    let path = Path::new(address);
    match path.file_name() {
        _ if path.is_dir() => Some(path.to_path_buf()),
        Some(name) if name == "disk.raw" => {
            path.parent().filter(|parent| parent.join("info.json").is_file()).map(Path::to_path_buf)
        }
        _ => None,
    }
}

/// The view that `directory`, one of a live mount, shows.
fn live_view(directory: &Path) -> Result<View> {
    let disk = directory.join("disk.raw");
    let still = directory.join(STILL_DISK);
    if fs::symlink_metadata(&still).is_ok() {
        return open_still(still, &disk);
    }
    let info = directory.join("info.json");
    let info = fs::read(&info).doing("read what it says of the view").at(&info)?;
    let info: Value = serde_json::from_slice(&info).unwrap_or_default();
    if info["read-only"] != true || info["torn"] == true {
        return Err(Error::usage(format!(
            "{} may be written at any time: make a snapshot and clone that",
            disk.display()
        )));
    }
    open(disk)
}

/// A scratch twin that nobody writes while the view is there.
fn open_still(still: PathBuf, disk: &Path) -> Result<View> {
    let begun = Instant::now();
    loop {
        match open(still.clone()) {
            Err(error) if error.errno() == libc::EBUSY => {
                if begun.elapsed() > PATIENCE {
                    return Err(Error::new(Problem::Busy { holders: Vec::new() }).at(disk));
                }
                thread::sleep(Duration::from_millis(20));
            }
            opened => return opened,
        }
    }
}

fn open(disk: PathBuf) -> Result<View> {
    let layer = Layer { path: disk, format: Some(Format::Raw) };
    Arc::new(Chain::compose(&[layer], &OpenOptions::default())?).view(0)
}
