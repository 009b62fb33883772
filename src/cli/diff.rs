//! `qchainfs diff`.

use std::ffi::OsString;
use std::process::ExitCode;

use super::size::hexadecimal;
use super::views::Source;
use super::{Output, exit, logging, print};
use crate::chain::Depth;
use crate::error::Result;
use crate::units::GuestRange;

/// Say where two views differ
///
/// Exits with 0 if they hold the same bytes, and with 4 if not. The shorter view reads as zero
/// behind its end. Ranges are whole sectors of 512 bytes. What both views have from one place of
/// one file is not read.
#[derive(clap::Args)]
pub struct Arguments {
    /// How to print it
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    /// Print nothing: the exit code tells
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    source: Source,
    /// IMAGE, IMAGE@SNAPSHOT, IMAGE@#ID, IMAGE[N], IMAGE[N]@SNAPSHOT or IMAGE[FILE]
    #[arg(value_name = "ADDRESS")]
    first: OsString,
    /// Of the same chain, or of another
    #[arg(value_name = "ADDRESS")]
    second: OsString,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    let mut views = arguments.source.open(Depth::WholeChain)?;
    let [first, second] = views.both(&arguments.first, &arguments.second)?;
    let mut differences = first.differences(&second);
    let differ = if arguments.quiet {
        differences.next().transpose()?.is_some()
    } else {
        if first.size() != second.size() {
            log::warn!(
                "the views are of {} and {} bytes: the shorter one reads as zero behind its end",
                first.size(),
                second.size()
            );
        }
        match arguments.output {
            Output::Human => print_human(differences)?,
            Output::Json => print_json(differences)?,
        }
    };
    Ok(ExitCode::from(if differ { exit::DIFFERENT } else { exit::DONE }))
}

/// Prints a table; nothing where there are no differences. Answers whether there are.
fn print_human(differences: impl Iterator<Item = Result<GuestRange>>) -> Result<bool> {
    let mut any = false;
    for range in differences {
        let range = range?;
        if !any {
            print(&format!("{:<16}Length\n", "Offset"))?;
            any = true;
        }
        let (start, len) = (hexadecimal(range.start.get()), hexadecimal(range.len));
        print(&format!("{start:<16}{len}\n"))?;
    }
    Ok(any)
}

/// As [`print_human`], for programs: always a list.
fn print_json(differences: impl Iterator<Item = Result<GuestRange>>) -> Result<bool> {
    let mut before = "[";
    for range in differences {
        let range = range?;
        print(&format!(
            "{before}{{ \"start\": {}, \"length\": {}}}",
            range.start.get(),
            range.len
        ))?;
        before = ",\n";
    }
    let any = before != "[";
    print(if any { "]\n" } else { "[]\n" })?;
    Ok(any)
}
