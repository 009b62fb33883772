//! Runs programs to their end, and says which one is missing.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

use super::watchdog::{LIMIT, Watchdog};

/// The program under test.
pub const QCHAINFS: &str = env!("CARGO_BIN_EXE_qchainfs");

/// Arguments of all types that a path or a string can have.
macro_rules! args {
    ($($arg:expr),* $(,)?) => {
        [$(std::ffi::OsString::from(AsRef::<std::ffi::OsStr>::as_ref(&$arg))),*]
    };
}
pub(crate) use args;

/// How a program ended.
pub struct Outcome {
    command: String,
    /// Its exit code, if no signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { command, code, stdout, stderr } = self;
        write!(f, "{command}\nexit code: {code:?}\nstdout: {stdout}\nstderr: {stderr}")
    }
}

impl Outcome {
    /// Its standard output; panics unless it succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self}");
        self.stdout
    }

    /// Its standard error; panics unless it exited with `code` and spoke in the form of every error
    /// of qchainfs.
    #[track_caller]
    pub fn fails(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self}");
        let mut lines = self.stderr.lines();
        let headline = lines.next().unwrap_or_default();
        assert!(headline.starts_with("qchainfs: "), "the first line does not say who: {self}");
        assert!(lines.all(|line| line.starts_with(' ')), "a further line is not indented: {self}");
        self.stderr
    }
}

/// Runs `program` to its end, however that looks.
#[track_caller]
pub fn attempt(program: &str, args: &[OsString]) -> Outcome {
    attempt_with(program, args, &[])
}

/// As [`attempt`], with additional environment variables.
#[track_caller]
pub fn attempt_with(program: &str, args: &[OsString], env: &[(&str, OsString)]) -> Outcome {
    let command = format!("{program} {}", args.join(" ".as_ref()).display());
    let mut prepared = Command::new(program);
    prepared.args(args).env("LC_ALL", "C").envs(env.iter().cloned());
    prepared.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = start(&mut prepared);
    let pid = Pid::from_raw(child.id().cast_signed());
    let watchdog = Watchdog::start(command.clone(), LIMIT, move || {
        let _ = kill(pid, Signal::SIGKILL);
    });
    let output = child.wait_with_output().expect("wait for a child");
    drop(watchdog);
    Outcome {
        command,
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs `program`, which must succeed, and gives its standard output.
#[track_caller]
pub fn run(program: &str, args: &[OsString]) -> String {
    attempt(program, args).ok()
}

/// Runs the program under test.
#[track_caller]
pub fn qchainfs(args: &[OsString]) -> Outcome {
    attempt(QCHAINFS, args)
}

/// Starts a program; panics if it is not there: a test that lacks a tool never passes.
///
/// One at a time: until it executes its program, a child holds every file that is open in any test,
/// and so would make another test's unmount fail.
#[track_caller]
pub fn start(command: &mut Command) -> Child {
    static ONE: Mutex<()> = Mutex::new(());
    let started = {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        command.spawn()
    };
    let program = command.get_program().display();
    match started {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            panic!("this test needs {program}: run tests/run")
        }
        Err(error) => panic!("could not start {program}: {error}"),
    }
}

/// Panics unless file systems can be mounted here.
#[track_caller]
pub fn need_mounting() {
    assert!(geteuid().is_root(), "this test needs root: run tests/run as root");
    assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse: load the module fuse");
}
