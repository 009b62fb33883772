//! The command line: a file per verb, from arguments to ready values to one call.

mod background;
mod check;
mod clone;
mod create;
mod diff;
mod exit;
mod info;
mod info_encryption;
mod logging;
mod ls;
mod map;
mod mount;
mod mount_helper;
mod mount_options;
mod overlay;
mod progress;
mod report;
mod resize;
mod revert;
mod seal;
mod size;
mod snapshot;
mod snapshot_words;
mod target;
mod umount;
mod views;

use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use self::report::report;
use crate::error::{Doing, Result};

/// Mount a qcow2 overlay chain: every chain member and every internal snapshot as a flat raw disk file.
#[derive(Parser)]
#[command(
    name = "qchainfs",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 4 diff found differences, 10 image not found,\n\
                  11 locked by another process, 12 key missing or wrong, 13 refused by policy, 14 unsupported feature.\n\
                  `check` exits as qemu-img check."
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Mount(mount::Arguments),
    Umount(umount::Arguments),
    Info(info::Arguments),
    Map(map::Arguments),
    Diff(diff::Arguments),
    Check(check::Arguments),
    Clone(clone::Arguments),
    Create(create::Arguments),
    Resize(resize::Arguments),
    Overlay(overlay::Arguments),
    Revert(revert::Arguments),
    Seal(seal::Arguments),
    Ls(ls::Arguments),
    Snapshot(snapshot::Arguments),
    #[command(name = "mount-helper", hide = true)]
    MountHelper(mount_helper::Arguments),
    #[command(name = "umount-helper", hide = true)]
    UmountHelper(mount_helper::UmountArguments),
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Human,
    /// For programs, with qemu-img's keys.
    Json,
}

/// Runs the program with `arguments` (the first is its name) and returns how it ends.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let words: Vec<OsString> = arguments.collect();
    let arguments = match Arguments::try_parse_from(&words) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are no errors; clap knows where each of them goes.
            let _ = error.print();
            let wrong = match words.get(1) {
                Some(verb) if verb == "check" => exit::FAILED,
                _ => exit::USAGE,
            };
            return ExitCode::from(if error.use_stderr() { wrong } else { exit::DONE });
        }
    };
    raise_descriptor_limit();
    match arguments.verb {
        Verb::Mount(arguments) => finish(mount::run(arguments)),
        Verb::Umount(arguments) => finish(umount::run(&arguments)),
        Verb::Info(arguments) => finish(info::run(&arguments)),
        Verb::Map(arguments) => finish(map::run(&arguments)),
        Verb::Diff(arguments) => finish(diff::run(&arguments)),
        Verb::Check(arguments) => check::run(&arguments),
        Verb::Clone(arguments) => finish(clone::run(&arguments)),
        Verb::Create(arguments) => finish(create::run(&arguments)),
        Verb::Resize(arguments) => finish(resize::run(&arguments)),
        Verb::Overlay(arguments) => finish(overlay::run(&arguments)),
        Verb::Revert(arguments) => finish(revert::run(&arguments)),
        Verb::Seal(arguments) => finish(seal::run(&arguments)),
        Verb::Ls(arguments) => finish(ls::run(&arguments)),
        Verb::Snapshot(arguments) => finish(snapshot::run(&arguments)),
        Verb::MountHelper(arguments) => mount_helper::run(arguments),
        Verb::UmountHelper(arguments) => mount_helper::run_umount(&arguments),
    }
}

fn finish(result: Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        report(&error);
        ExitCode::from(exit::code(&error))
    })
}

/// Each member of a chain costs a descriptor, and the usual limit is 1024.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        log::debug!("could not raise the limit of open files: {error}");
    }
}

/// Prints to stdout; a reader who has seen enough is no error.
fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.doing("print the result"),
    }
}
