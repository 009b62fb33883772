//! What mount(8) and umount(8) call: `mount.qchainfs SPEC DIR [-sfnv] [-N NS] [-o OPTIONS] [-t TYPE]`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use super::mount::Plan;
use super::mount_options::{Options, Unknown};
use super::report::report;
use super::umount::umount;
use crate::error::{Error, Kind};
use crate::mount::Detach;

/// Exit codes of mount(8), of which its helpers use these.
const DONE: u8 = 0;
const USAGE: u8 = 1;
const MOUNT_FAILED: u8 = 32;

/// Arguments of `mount.qchainfs`
#[derive(clap::Args)]
pub struct Arguments {
    /// Ignore unknown options
    #[arg(short = 's')]
    sloppy: bool,
    /// Do everything but mount
    #[arg(short = 'f')]
    fake: bool,
    /// Don't write to /etc/mtab: nobody does any more
    #[arg(short = 'n')]
    no_mtab: bool,
    /// Say more
    #[arg(short = 'v')]
    verbose: bool,
    /// A namespace: mount(8) has entered it before
    #[arg(short = 'N')]
    namespace: Option<OsString>,
    /// The type
    #[arg(short = 't')]
    kind: Option<OsString>,
    /// Mount options
    #[arg(short = 'o')]
    options: Vec<String>,
    /// The image
    image: OsString,
    /// Where
    mountpoint: PathBuf,
}

/// Arguments of `umount.qchainfs`
#[derive(clap::Args)]
pub struct UmountArguments {
    /// Unmount even if the mount is in use
    #[arg(short = 'f')]
    force: bool,
    /// Take it away now, whoever uses it
    #[arg(short = 'l')]
    lazy: bool,
    /// Don't write to /etc/mtab
    #[arg(short = 'n')]
    no_mtab: bool,
    /// Remount read-only if it can't be unmounted: not for FUSE
    #[arg(short = 'r')]
    read_only: bool,
    /// Say more
    #[arg(short = 'v')]
    verbose: bool,
    /// A namespace
    #[arg(short = 'N')]
    namespace: Option<OsString>,
    /// The type
    #[arg(short = 't')]
    kind: Option<OsString>,
    /// Where it is mounted
    mountpoint: PathBuf,
}

/// Mounts for mount(8).
pub fn run(arguments: Arguments) -> ExitCode {
    let unknown = if arguments.sloppy { Unknown::Ignore } else { Unknown::Refuse };
    let words = arguments.options.iter().map(String::as_str);
    let plan = Options::parse(words, unknown)
        .and_then(|options| Plan::new(&arguments.image, &arguments.mountpoint, options));
    match plan {
        Ok(_) if arguments.fake => ExitCode::from(DONE),
        Ok(plan) => match plan.serve_in_background() {
            // The process in the background reports by its own codes; mount(8) knows one for all of them.
            Ok(code) if code == ExitCode::from(DONE) => code,
            Ok(_) => ExitCode::from(MOUNT_FAILED),
            Err(error) => fail(&error),
        },
        Err(error) => fail(&error),
    }
}

/// Unmounts for umount(8).
pub fn run_umount(arguments: &UmountArguments) -> ExitCode {
    let now = arguments.lazy || arguments.force;
    let how = if now { Detach::Now } else { Detach::WhenIdle };
    match umount(&arguments.mountpoint, how) {
        Ok(()) => ExitCode::from(DONE),
        Err(error) => fail(&error),
    }
}

fn fail(error: &Error) -> ExitCode {
    report(error);
    ExitCode::from(if error.kind() == Kind::Usage { USAGE } else { MOUNT_FAILED })
}
