//! Into the background: the program starts itself anew, detached, and waits until that one is ready.
//!
//! A fork would be shorter, but must not be done once there are threads, and needs unsafe code.

use std::env;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};

use nix::unistd;

use super::exit;
use crate::error::{Doing, Error, Problem, Result};

/// Set in the environment of the process that is to go on in the background.
const MARK: &str = "QCHAINFS_IN_BACKGROUND";
/// What that process prints when it is ready.
const READY: &[u8] = b"ready\n";

/// Which of the two processes this is.
pub enum Role {
    /// The one that the user started; it ends with this code when the other is ready or has failed.
    Launcher(ExitCode),
    /// The one that stays.
    Background,
}

/// Starts this program once more with the same arguments and waits for it, or finds that this is that process.
///
/// # Errors
/// The program can't be started.
pub fn split() -> Result<Role> {
    if env::var_os(MARK).is_some() {
        // Failing means to be the leader of a session already.
        let _ = unistd::setsid();
        return Ok(Role::Background);
    }
    let program = env::current_exe().doing("find this program's file")?;
    let mut child = Command::new(program)
        .args(env::args_os().skip(1))
        .env(MARK, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .doing("start the process for the background")?;
    let mut said = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let mut stdout = stdout.take(READY.len() as u64);
        stdout.read_to_end(&mut said).doing("wait for the process in the background")?;
    }
    if said == READY {
        return Ok(Role::Launcher(ExitCode::from(exit::DONE)));
    }
    let status = child.wait().doing("wait for the process in the background")?;
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        // It has said why on the stderr that we share.
        Some(code) => Ok(Role::Launcher(ExitCode::from(code))),
        None => Err(Error::new(Problem::Helper {
            program: "the process in the background",
            message: status.to_string(),
        })),
    }
}

/// Tells the launcher that all is well, and lets go of its terminal and directory.
///
/// # Errors
/// The standard streams can't be turned away.
pub fn ready() -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    // A launcher that was killed meanwhile is no reason to stop.
    let _ = stdout.write_all(READY).and_then(|()| stdout.flush());
    drop(stdout);
    let nowhere = OpenOptions::new().read(true).write(true).open("/dev/null");
    let nowhere = nowhere.doing("open /dev/null")?;
    unistd::dup2_stdin(&nowhere).doing("let go of stdin")?;
    unistd::dup2_stdout(&nowhere).doing("let go of stdout")?;
    unistd::dup2_stderr(&nowhere).doing("let go of stderr")?;
    env::set_current_dir("/").doing("go to the root directory")
}
