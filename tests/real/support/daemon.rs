//! A `qemu-storage-daemon` that holds an image as a virtual machine does: it writes, makes snapshots and deletes them.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::tools::{args, start};

/// How QEMU gets at the file.
#[derive(Debug, Clone, Copy)]
pub enum Cache {
    /// Through the page cache (`cache=writeback`).
    Host,
    /// Past it (`cache=none`).
    Direct,
}

/// The daemon, with a connection to its disk.
pub struct Daemon {
    process: Process,
    monitor: Monitor,
    disk: UnixStream,
    _directory: TempDir,
}

const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;

impl Daemon {
    /// Opens `image` for writing.
    #[track_caller]
    pub fn open(image: &Path, cache: Cache) -> Self {
        let directory = TempDir::with_prefix("qchainfs-daemon-").expect("make a directory");
        let socket = directory.path().join("nbd");
        let direct = matches!(cache, Cache::Direct);
        let file = json!({
            "driver": "file", "filename": image, "node-name": "file",
            "discard": "unmap", "cache": { "direct": direct },
        });
        let disk = json!({
            "driver": "qcow2", "file": "file", "node-name": "disk", "discard": "unmap",
        });
        let server = format!("addr.type=unix,addr.path={}", socket.display());
        let mut command = Command::new("qemu-storage-daemon");
        command.args(args![
            "--chardev",
            "stdio,id=qmp",
            "--monitor",
            "chardev=qmp",
            "--blockdev",
            file.to_string(),
            "--blockdev",
            disk.to_string(),
            "--nbd-server",
            server,
            "--export",
            "nbd,id=nbd,node-name=disk,name=disk,writable=on",
        ]);
        let child = start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let mut process = Process(child);
        // It obeys when all that its arguments ask for is there: its socket is there before somebody listens.
        let monitor = Monitor::of(&mut process.0);
        let disk = connect(&socket);
        Self { process, monitor, disk, _directory: directory }
    }

    /// The id of the process.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Makes an internal snapshot.
    #[track_caller]
    pub fn create_snapshot(&mut self, name: &str) {
        let arguments = json!({ "device": "disk", "name": name });
        self.monitor.execute("blockdev-snapshot-internal-sync", arguments);
    }

    /// Deletes an internal snapshot.
    #[track_caller]
    pub fn delete_snapshot(&mut self, name: &str) {
        let arguments = json!({ "device": "disk", "name": name });
        self.monitor.execute("blockdev-snapshot-delete-internal-sync", arguments);
    }

    /// Writes to the disk.
    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.request(WRITE, offset, data.len() as u64, data);
    }

    /// Makes a range of the disk zero, and gives its space back.
    #[track_caller]
    pub fn zero(&mut self, offset: u64, len: u64) {
        self.request(WRITE_ZEROES, offset, len, &[]);
    }

    /// Makes all that was written durable.
    #[track_caller]
    pub fn flush(&mut self) {
        self.request(FLUSH, 0, 0, &[]);
    }

    #[track_caller]
    fn request(&mut self, kind: u16, offset: u64, len: u64, data: &[u8]) {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0; 2]);
        request.extend(kind.to_be_bytes());
        request.extend([0; 8]);
        request.extend(offset.to_be_bytes());
        request.extend(u32::try_from(len).expect("a short request").to_be_bytes());
        request.extend(data);
        self.disk.write_all(&request).expect("send a request");
        let mut reply = [0; 16];
        self.disk.read_exact(&mut reply).expect("get the reply");
        assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "the daemon refuses");
    }

    /// Lets it close the image in order.
    #[track_caller]
    pub fn quit(mut self) {
        self.monitor.execute("quit", json!({}));
        let ended = self.process.0.wait().expect("wait for the daemon");
        assert!(ended.success(), "{ended}");
    }
}

/// A process that ends with this value, also where nobody could be connected to it.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a daemon is told, and what it answers.
struct Monitor {
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Monitor {
    #[track_caller]
    fn of(daemon: &mut Child) -> Self {
        let answers = BufReader::new(daemon.stdout.take().expect("a pipe"));
        let mut monitor = Self { commands: daemon.stdin.take(), answers };
        assert!(monitor.receive()["QMP"].is_object());
        monitor.execute("qmp_capabilities", json!({}));
        monitor
    }

    #[track_caller]
    fn execute(&mut self, command: &str, arguments: Value) {
        let request = json!({ "execute": command, "arguments": arguments });
        let commands = self.commands.as_mut().expect("it runs");
        // At one go: it obeys as soon as the braces are closed, and if it is told to quit nobody reads what follows.
        commands.write_all(format!("{request}\n").as_bytes()).expect("send a command");
        loop {
            let answer = self.receive();
            if answer.get("event").is_none() {
                assert!(answer.get("return").is_some(), "{request}: {answer}");
                return;
            }
        }
    }

    #[track_caller]
    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("receive");
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line:?}"))
    }
}

/// Shakes hands as the NBD protocol wants it.
fn connect(socket: &Path) -> UnixStream {
    let mut disk = UnixStream::connect(socket).expect("connect to the disk");
    let mut greeting = [0; 18];
    disk.read_exact(&mut greeting).expect("be greeted");
    assert!(greeting.starts_with(b"NBDMAGICIHAVEOPT"));
    // Fixed newstyle, no padding; then the option that names the export and ends the negotiation.
    let mut answer = vec![0, 0, 0, 3];
    answer.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk");
    disk.write_all(&answer).expect("name the export");
    let mut export = [0; 10];
    disk.read_exact(&mut export).expect("learn about the export");
    disk
}
