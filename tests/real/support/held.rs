//! An image that `qemu-io` keeps open.

use std::ffi::OsString;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use super::tools::{args, start};

/// A running `qemu-io`, with the locks that a virtual machine would hold.
pub struct Held {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Held {
    /// Opens `image` for writing.
    #[track_caller]
    pub fn writing(image: &Path) -> Self {
        Self::start(&args!["-f", "qcow2", image])
    }

    /// Opens `image` for reading only.
    #[track_caller]
    pub fn reading(image: &Path) -> Self {
        Self::start(&args!["-r", "-f", "qcow2", image])
    }

    /// The id of the process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its prompt says that it has opened the image.
    #[track_caller]
    fn start(words: &[OsString]) -> Self {
        let mut command = Command::new("qemu-io");
        let mut child = start(command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()));
        let mut prompt = [0; 8];
        let stdin = child.stdin.take();
        let mut stdout = child.stdout.take().expect("a pipe");
        let held = Self { child, stdin };
        stdout.read_exact(&mut prompt).expect("qemu-io opens the image");
        held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.stdin.take();
        let _ = self.child.wait();
    }
}
