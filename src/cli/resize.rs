//! `qchainfs resize`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use super::mount_options::{Options, Unknown};
use super::{exit, logging, print, size};
use crate::chain::{Chain, OpenOptions};
use crate::error::{At, Error, Result};
use crate::image::Writability;

/// Make the disk of an image larger, or smaller
///
/// New bytes read as zero, whatever the backing file has there. An image that is mounted can't be
/// resized by this: mount it with -o growable and use truncate.
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
    /// The image
    image: PathBuf,
    /// The new size, like 20G, or a difference to the present one, like +5G
    #[arg(allow_hyphen_values = true)]
    size: String,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    let wanted = Wanted::parse(&arguments.size)?;
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
    let chain = Arc::new(Chain::open(&arguments.image, &options)?);
    let disk = chain.view(0)?;
    let old = disk.size();
    let new = wanted.size(old).at(&arguments.image)?;
    if new < old && !arguments.shrink {
        return Err(Error::usage(format!(
            "{new} bytes are less than the {old} of {} today: what is behind them would be lost (--shrink allows it)",
            arguments.image.display()
        )));
    }
    if arguments.dry_run {
        print(&format!("{}: {old} bytes would become {new}\n", arguments.image.display()))?;
        return Ok(ExitCode::from(exit::DONE));
    }
    if new >= old {
        disk.grow(new)?;
    } else {
        disk.shrink(new)?;
    }
    chain.close()?;
    if !arguments.quiet {
        print("Image resized.\n")?;
    }
    Ok(ExitCode::from(exit::DONE))
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
