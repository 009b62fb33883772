//! `qchainfs overlay`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use super::mount_options::{Options, Unknown};
use super::target::{Target, absolute, check_new_image, files_of, members_of, nothing_to_quiesce};
use super::{exit, logging, print};
use crate::chain::{Chain, Existing, OpenOptions};
use crate::control::{Command, NewOverlay, Quiesce};
use crate::error::Result;
use crate::image::Writability;

/// Put a new image on top of a chain: an external snapshot
///
/// What was written so far becomes a backing file, which nobody may change any more; the new image takes what is written from
/// now on. On a live mount that happens at one instant, under writers: disk.raw goes on, and what it held is chain/1. Mount
/// the new image from then on.
#[derive(clap::Args)]
pub struct Arguments {
    /// Freeze file systems that are mounted from loop devices over the mount, and thaw them when
    /// it is done (by fsfreeze; takes root)
    #[arg(long)]
    quiesce: bool,
    /// Overwrite a file that is there: what it holds is lost
    #[arg(long)]
    force: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show what would be done, and do nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Options as for mount, of which backing_policy and secret count; for an image that is not
    /// mounted
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// The top image of the chain, or the mountpoint that shows it
    target: PathBuf,
    /// The new image
    new: PathBuf,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    let words = Options::parse(arguments.options.iter().map(String::as_str), Unknown::Refuse)?;
    let new = NewOverlay {
        file: absolute(&arguments.new)?,
        existing: if arguments.force { Existing::Replace } else { Existing::Refuse },
        quiesce: if arguments.quiesce { Quiesce::Yes } else { Quiesce::No },
    };
    match Target::find(&arguments.target)? {
        Target::Live(mut client) => {
            if arguments.dry_run {
                check_new_image(&new.file, new.existing, &members_of(&mut client)?)?;
                return tell(arguments, "would be put on top of the chain mounted at");
            }
            client.execute(&Command::Overlay(new))?;
        }
        Target::Image(image) => {
            if new.quiesce == Quiesce::Yes {
                return Err(nothing_to_quiesce());
            }
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
            let chain = Arc::new(Chain::open(&image, &options)?);
            if arguments.dry_run {
                check_new_image(&new.file, new.existing, &files_of(&chain))?;
                return tell(arguments, "would be made on top of");
            }
            chain.prepare_overlay(0, &new.file, new.existing)?;
            chain.close()?;
        }
    }
    if !arguments.quiet {
        print(&format!("{} is the active layer now.\n", arguments.new.display()))?;
    }
    Ok(ExitCode::from(exit::DONE))
}

/// Says what would be done.
fn tell(arguments: &Arguments, would: &str) -> Result<ExitCode> {
    print(&format!("{} {would} {}\n", arguments.new.display(), arguments.target.display()))?;
    Ok(ExitCode::from(exit::DONE))
}
