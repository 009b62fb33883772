//! The control socket: QMP as any client speaks it, and what is left of a mount that died.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use crate::support::M;
use crate::support::images::{Images, check};
use crate::support::mounted::{Mounted, is_running};
use crate::support::tools::{QCHAINFS, args, attempt, qchainfs, run};
use crate::support::watchdog::wait_until;

struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(socket: &Path) -> Self {
        let mut client = Self(BufReader::new(UnixStream::connect(socket).expect("connect")));
        let greeting = client.receive();
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{greeting}");
        client
    }

    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).expect("send");
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("receive");
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line:?}"))
    }

    fn ask(&mut self, request: &Value) -> Value {
        self.send(&request.to_string());
        self.receive()
    }

    fn negotiate(mut self) -> Self {
        assert_eq!(self.ask(&json!({ "execute": "qmp_capabilities" })), json!({ "return": {} }));
        self
    }
}

fn socket_of(mounted: &Mounted) -> PathBuf {
    fs::read_link(mounted.path(".qchainfs/control.sock")).expect("the link to the socket")
}

#[test]
fn the_socket_is_for_its_owner_and_goes_with_the_mount() {
    let images = Images::new();
    let mounted = Mounted::new(images.create("disk.qcow2", M, ""));
    let socket = socket_of(&mounted);
    let mode = fs::metadata(&socket).expect("stat").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    mounted.umount();
    assert!(!socket.exists());
}

#[test]
fn requests_are_answered_in_order_with_their_ids_and_what_is_wrong_is_said() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let mut early = Client::connect(&socket_of(&mounted));
    let refused = early.ask(&json!({ "execute": "query-block", "id": 7 }));
    assert_eq!(
        (&refused["error"]["class"], &refused["id"]),
        (&json!("CommandNotFound"), &json!(7))
    );

    let mut client = Client::connect(&socket_of(&mounted)).negotiate();
    // Nothing between them, and one in pieces.
    client.send(
        r#"{"execute":"query-version","id":1}{"execute":"query-block","id":"two"}{"execute":"#,
    );
    client.send(r#""nonsense", "id": {"a": 3}} "#);
    assert_eq!(client.receive()["id"], 1);
    let block = client.receive();
    assert_eq!(block["id"], "two");
    assert_eq!(block["return"][0]["inserted"]["file"], json!(image));
    let nonsense = client.receive();
    assert_eq!(nonsense["error"]["class"], "CommandNotFound");
    assert_eq!(nonsense["id"], json!({ "a": 3 }));
    let wrong = client.ask(&json!({
        "execute": "blockdev-snapshot-internal-sync",
        "arguments": { "device": "disk", "name": "" },
    }));
    assert_eq!(wrong["error"]["class"], "GenericError");
    let wrong = client.ask(&json!({ "execute": "query-version", "arguments": { "a": 1 } }));
    assert_eq!(wrong["error"]["class"], "GenericError");
    // What is no JSON ends this connection, and no other.
    client.send("}{");
    assert_eq!(client.receive()["error"]["class"], "GenericError");
    let mut rest = String::new();
    assert_eq!(client.0.read_line(&mut rest).unwrap_or(0), 0, "{rest}");
    assert_eq!(early.ask(&json!({ "execute": "qmp_capabilities" })), json!({ "return": {} }));
    mounted.umount();
}

#[test]
fn a_request_without_an_end_is_cut_off() {
    let images = Images::new();
    let mounted = Mounted::new(images.create("disk.qcow2", M, ""));
    let mut client = Client::connect(&socket_of(&mounted)).negotiate();
    let long = format!("{{\"execute\": \"{}", "x".repeat(3 << 20));
    // The other side may hang up before it has read all that.
    let _ = client.0.get_mut().write_all(long.as_bytes());
    let mut line = String::new();
    if client.0.read_line(&mut line).is_ok_and(|read| read > 0) {
        assert!(line.contains("too long"), "{line}");
    }
    Client::connect(&socket_of(&mounted)).negotiate();
    mounted.umount();
}

#[test]
fn one_client_too_many_is_told_so_and_the_mount_goes_on() {
    let images = Images::new();
    let mounted = Mounted::new(images.create("disk.qcow2", M, ""));
    let socket = socket_of(&mounted);
    let silent: Vec<Client> = (0..64).map(|_| Client::connect(&socket)).collect();
    let said = qchainfs(&args!["snapshot", "create", mounted.root(), "one"]).fails(1);
    assert!(said.contains("64 clients") && !said.contains("umount"), "{said}");
    drop(silent);
    let create = || qchainfs(&args!["snapshot", "create", mounted.root(), "one"]);
    wait_until("there is room again", || create().code == Some(0));
    mounted.umount();
    let directory = images.path("");
    let said = qchainfs(&args!["snapshot", "list", &directory]).fails(1);
    assert!(said.contains("not a mountpoint"), "{said}");
}

#[test]
fn a_mount_is_managed_by_its_owner_and_others_are_told_whose_it_is() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::with(&args!["-o", "allow_other"], &image);
    // The program may be in a directory that only its owner can look into.
    let program = images.path("qchainfs");
    fs::copy(QCHAINFS, &program).expect("copy the program");
    fs::set_permissions(images.path(""), fs::Permissions::from_mode(0o755)).expect("chmod");
    let another = args!["--reuid=65534", "--regid=65534", "--clear-groups", program];
    let words = [&another[..], &args!["snapshot", "create", mounted.root(), "one"]].concat();
    let said = attempt("setpriv", &words).fails(1);
    assert!(said.contains("another user (uid 0)"), "{said}");
    assert_eq!(fs::read_dir(mounted.path("snapshots")).expect("list").count(), 0);
    mounted.umount();
}

#[test]
fn a_snapshot_made_through_the_socket_appears_at_once() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    assert!(!mounted.path("snapshots/now").exists());
    let mut client = Client::connect(&socket_of(&mounted)).negotiate();
    let made = client.ask(&json!({
        "execute": "blockdev-snapshot-internal-sync",
        "arguments": { "device": "disk", "name": "now" },
    }));
    assert_eq!(made, json!({ "return": {} }));
    assert!(mounted.path("snapshots/now/disk.raw").exists());
    let nodes = client.ask(&json!({ "execute": "query-named-block-nodes" }));
    assert_eq!(nodes["return"][0]["image"]["snapshots"][0]["name"], "now");
    mounted.umount();
    check(&image);
    assert!(run("qemu-img", &args!["snapshot", "-l", &image]).contains("now"));
}

#[test]
fn a_mount_that_died_leaves_nothing_that_hinders_the_next() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    for _ in 0..2 {
        let mounted = Mounted::new(&image);
        let daemon = mounted.daemon();
        kill(daemon, Signal::SIGKILL).expect("kill the daemon");
        wait_until("the daemon dies", || !is_running(daemon));
        let said = qchainfs(&args!["overlay", mounted.root(), images.path("new.qcow2")]).fails(1);
        assert!(said.contains("does not answer"), "{said}");
        let listed = qchainfs(&args!["ls"]).ok();
        let root = mounted.root().display().to_string();
        let line = listed.lines().find(|line| line.contains(&root)).expect("it is listed");
        assert!(line.contains("no answer"), "{line}");
    }
    let mounted = Mounted::new(&image);
    Client::connect(&socket_of(&mounted)).negotiate();
    mounted.umount();
}

#[test]
fn a_name_that_is_no_utf8_hinders_nobody() {
    let images = Images::new();
    let named = |bytes: &[u8]| images.path("").join(OsStr::from_bytes(bytes));
    let image = named(b"dis\xff.qcow2");
    fs::rename(images.create("disk.qcow2", M, ""), &image).expect("rename");
    let mounted = Mounted::new(&image);
    let root = mounted.root().display().to_string();
    let listed = qchainfs(&args!["ls"]).ok();
    let line = listed.lines().find(|line| line.contains(&root)).expect("it is listed");
    assert!(line.contains("writable"), "{line}");
    let unspeakable = named(b"ne\xff.qcow2");
    let said = qchainfs(&args!["overlay", mounted.root(), &unspeakable]).fails(2);
    assert!(said.contains("not UTF-8"), "{said}");
    assert!(!unspeakable.exists());
    let new = images.path("new.qcow2");
    qchainfs(&args!["overlay", mounted.root(), &new]).ok();
    mounted.umount();
    check(&new);
}

#[test]
fn a_mount_that_hangs_does_not_hold_up_commands_for_others() {
    let images = Images::new();
    let mounted = Mounted::new(images.create("disk.qcow2", M, ""));
    let other = images.create("other.qcow2", M, "");
    let daemon = mounted.daemon();
    kill(daemon, Signal::SIGSTOP).expect("stop the daemon");
    let listed = attempt("timeout", &args!["60", QCHAINFS, "ls"]);
    let resized = attempt("timeout", &args!["60", QCHAINFS, "resize", &other, "2M"]);
    kill(daemon, Signal::SIGCONT).expect("let the daemon go on");
    let root = mounted.root().display().to_string();
    let listed = listed.ok();
    let line = listed.lines().find(|line| line.contains(&root)).expect("it is listed");
    assert!(line.contains("no answer"), "{line}");
    resized.ok();
    mounted.umount();
}

#[test]
fn the_qmp_client_of_qemu_drives_a_mount() {
    let images = Images::new();
    let image = images.create("disk.qcow2", M, "");
    let mounted = Mounted::new(&image);
    let found = attempt("python3", &args!["-c", "import qemu.qmp"]);
    assert_eq!(found.code, Some(0), "this test needs the Python package qemu.qmp: run tests/run");
    let script = r#"
import asyncio, sys
from qemu.qmp import ExecuteError, QMPClient

async def main(socket, new):
    client, other = QMPClient("one"), QMPClient("two")
    await client.connect(socket)
    await other.connect(socket)
    await client.execute("blockdev-snapshot-internal-sync", {"device": "disk", "name": "by-qmp"})
    nodes = await other.execute("query-named-block-nodes")
    assert nodes[0]["image"]["snapshots"][0]["name"] == "by-qmp", nodes
    await client.execute("blockdev-snapshot-sync", {"device": "disk", "snapshot-file": new, "format": "qcow2"})
    nodes = await other.execute("query-named-block-nodes")
    assert [node["ro"] for node in nodes] == [False, True], nodes
    try:
        await other.execute("blockdev-snapshot-sync", {"device": "disk", "snapshot-file": new})
        raise AssertionError("a file was overwritten")
    except ExecuteError as error:
        assert "part of the chain" in str(error), error
    await client.disconnect()
    await other.disconnect()

asyncio.run(main(*sys.argv[1:]))
"#;
    let new = images.path("new.qcow2");
    run("python3", &args!["-c", script, socket_of(&mounted), &new]);
    mounted.umount();
    check(&image);
    check(&new);
}
