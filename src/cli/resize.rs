//! `qchainfs resize`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use super::mount_options::{Options, Unknown};
use super::target::Target;
use super::{exit, logging, print, size};
use crate::chain::{Chain, OpenOptions};
use crate::control::{Client, Command};
use crate::error::{At, Error, Result};
use crate::image::Writability;

/// Make the disk of an image larger, or smaller
///
/// New bytes read as zero, whatever the backing file has there. The disk of a live mount can be
/// made larger, not smaller.
#[derive(clap::Args)]
pub struct Arguments {
    /// Allow a smaller size: what is behind it is lost, but for what snapshots hold
    #[arg(long)]
    shrink: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show what would be done, and do nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Options as for mount, of which backing_policy and secret count
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// The image, or the mountpoint that shows it
    target: PathBuf,
    /// The new size, like 20G, or a difference to the present one, like +5G
    #[arg(allow_hyphen_values = true)]
    size: String,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    let wanted = Wanted::parse(&arguments.size)?;
    match Target::find(&arguments.target)? {
        Target::Live(mut client) => resize_live(arguments, &wanted, &mut client)?,
        Target::Image(image) => resize_image(arguments, &wanted, &image)?,
    }
    if !arguments.quiet && !arguments.dry_run {
        print("Image resized.\n")?;
    }
    Ok(ExitCode::from(exit::DONE))
}

fn resize_image(arguments: &Arguments, wanted: &Wanted, image: &Path) -> Result<()> {
    let words = Options::parse(arguments.options.iter().map(String::as_str), Unknown::Refuse)?;
    let writability = match arguments.dry_run {
        true => Writability::ReadOnly,
        false => Writability::Writable,
    };
    let options = OpenOptions {
        writability,
        policy: words.policy,
        secrets: words.secrets,
        ..OpenOptions::default()
    };
    let chain = Arc::new(Chain::open(image, &options)?);
    let disk = chain.view(0)?;
    let old = disk.size();
    let new = wanted.size(old).at(image)?;
    if new < old && !arguments.shrink {
        return Err(Error::usage(format!(
            "{new} bytes are less than the {old} of {} today: what is behind them would be lost (--shrink allows it)",
            image.display()
        )));
    }
    if arguments.dry_run {
        return print(&plan(image, old, new));
    }
    if new >= old {
        disk.grow(new)?;
    } else {
        disk.shrink(new)?;
    }
    chain.close()
}

fn resize_live(arguments: &Arguments, wanted: &Wanted, client: &mut Client) -> Result<()> {
    let nodes = client.execute(&Command::QueryNodes)?;
    let old = nodes[0]["image"]["virtual-size"].as_u64().unwrap_or_default();
    let size = wanted.size(old).at(&arguments.target)?;
    if size < old {
        return Err(Error::usage(format!(
            "the disk of a live mount can't become smaller than its {old} bytes: unmount it first"
        )));
    }
    if arguments.dry_run {
        return print(&plan(&arguments.target, old, size));
    }
    client.execute(&Command::Resize { size }).map(drop)
}

fn plan(target: &Path, old: u64, new: u64) -> String {
    format!("{}: {old} bytes would become {new}\n", target.display())
}

/// The size that was asked for, in bytes.
enum Wanted {
    Exactly(u64),
    More(u64),
    Less(u64),
}

impl Wanted {
    fn parse(text: &str) -> Result<Self> {
        Ok(match text.split_at_checked(1) {
            Some(("+", more)) => Self::More(size::parse(more)?),
            Some(("-", less)) => Self::Less(size::parse(less)?),
            _ => Self::Exactly(size::parse(text)?),
        })
    }

    /// Whole sectors, since a disk of `old` bytes has them.
    fn size(&self, old: u64) -> Result<u64> {
        let size = match *self {
            Self::Exactly(size) => Some(size),
            Self::More(more) => old.checked_add(more),
            Self::Less(less) => old.checked_sub(less),
        };
        size.and_then(|size| size.checked_next_multiple_of(512))
            .ok_or_else(|| Error::usage(format!("the disk has {old} bytes: no such size")))
    }
}
