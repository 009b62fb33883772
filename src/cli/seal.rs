//! `qchainfs seal`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::mount_options::{Options, Unknown};
use super::progress::{Form, Progress};
use super::report::printable;
use super::{exit, logging, print};
use crate::chain::{Chain, Closeness, OpenOptions};
use crate::error::{Error, Result};
use crate::image::Writability;
use crate::qcow2::BaseRecord;

/// Let an image remember its backing file as it is, so that a later change of that is noticed
///
/// Length and time of last change are remembered, in a header extension that other programs keep and ignore. Mounting warns
/// of a backing file that is no longer like that; with -o strict it is refused. Images made by create -b, overlay and revert
/// remember their backing files from the beginning. What is remembered counts for the backing file of that name only: an image
/// that is rebased to another one remembers nothing. The image must not be in use. Its own time of last change stays as it is,
/// since its overlays may remember that; but it becomes other bytes, so seal --hash it before them.
#[derive(clap::Args)]
pub struct Arguments {
    /// Remember the SHA-256 of the backing file, too: all of it is read
    #[arg(long)]
    hash: bool,
    /// Change nothing, and compare the backing file with what is remembered: its bytes if their
    /// SHA-256 is. Exit code 13 if it is another
    #[arg(long, conflicts_with = "hash")]
    verify: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// How to show progress
    #[arg(long, value_enum, default_value = "auto")]
    progress: Form,
    /// Options as for mount, of which backing_policy and secret count
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// The image
    image: PathBuf,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    let text = if arguments.verify { verify(arguments)? } else { seal(arguments)? };
    if !arguments.quiet {
        print(&format!("{}\n", printable(&text)))?;
    }
    Ok(ExitCode::from(exit::DONE))
}

fn seal(arguments: &Arguments) -> Result<String> {
    let chain = open(arguments, Writability::Writable)?;
    let closeness = if arguments.hash { Closeness::Content } else { Closeness::Stamp };
    let record = look(arguments, &chain, closeness)?;
    chain.seal(&record)?;
    Ok(format!("{} remembers {}", arguments.image.display(), words(&chain, &record)))
}

fn verify(arguments: &Arguments) -> Result<String> {
    let chain = open(arguments, Writability::ReadOnly)?;
    let recorded = chain.active_image().and_then(|image| image.base_record());
    let recorded = recorded.ok_or_else(|| {
        Error::usage("it does not remember its backing file: see qchainfs seal")
            .at(&arguments.image)
    })?;
    let closeness = match recorded.digest {
        Some(_) => Closeness::Content,
        None => Closeness::Stamp,
    };
    let found = look(arguments, &chain, closeness)?;
    chain.compare_base(&recorded, &found)?;
    Ok(format!("{} is as {} remembers it", words(&chain, &found), arguments.image.display()))
}

fn open(arguments: &Arguments, writability: Writability) -> Result<Chain> {
    let words = Options::parse(arguments.options.iter().map(String::as_str), Unknown::Refuse)?;
    let options = OpenOptions {
        writability,
        policy: words.policy,
        secrets: words.secrets,
        ..OpenOptions::default()
    };
    Chain::open(&arguments.image, &options)
}

fn look(arguments: &Arguments, chain: &Chain, closeness: Closeness) -> Result<BaseRecord> {
    let mut progress =
        if arguments.quiet { Progress::hidden() } else { Progress::new(arguments.progress) };
    chain.look_at_base(closeness, &mut |done, total| progress.update("hash", done, total))
}

/// The backing file and what is known of it.
fn words(chain: &Chain, record: &BaseRecord) -> String {
    let base = chain.members().get(1).map(|base| base.path().display().to_string());
    let time = jiff::Timestamp::from_second(record.modified_seconds);
    let time = time.map_or_else(|_| "an unknown time".to_owned(), |time| time.to_string());
    let mut text = format!("{}: {} bytes of {time}", base.unwrap_or_default(), record.len);
    if let Some(digest) = &record.digest {
        text += ", SHA-256 ";
        text.extend(digest.iter().map(|byte| format!("{byte:02x}")));
    }
    text
}
