//! Answers clients on a unix socket, a thread for each.

use std::fs;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::unistd::geteuid;
use rustix::net::sockopt::socket_peercred;
use serde_json::{Value, json};

use super::message::{
    COMMANDS, Command, Refusal, Request, failure, greeting, refusal, success, version,
};
use crate::error::{Doing, Result};

/// The longest request in bytes.
const MAX_REQUEST: u64 = 1 << 20;
/// Rest after a client that could not be let in.
const AFTER_FAILURE: Duration = Duration::from_millis(100);
/// How long an answer may take to be read.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clients at once: each costs a thread.
const MAX_CLIENTS: usize = 64;

/// Who does what the clients ask for.
pub trait Target: Send + Sync {
    /// Does it. Any number of threads call this at once.
    ///
    /// # Errors
    /// What went wrong; the client is told.
    fn execute(&self, command: &Command) -> Result<Value>;
}

/// A socket that is served until this is dropped.
pub struct Server {
    path: PathBuf,
    shared: Arc<Shared>,
    listener: OwnedFd,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    target: Arc<dyn Target>,
    stopping: AtomicBool,
    next: AtomicU64,
    clients: Mutex<Vec<Client>>,
}

/// A connection, to end it.
struct Client {
    number: u64,
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl Server {
    /// Serves `target` at `path`, where a socket that somebody left behind is replaced.
    ///
    /// # Errors
    /// No socket can be made there.
    pub fn start(path: &Path, target: Arc<dyn Target>) -> Result<Self> {
        let listener = listen(path).doing("make its control socket")?;
        let waking = listener.try_clone().doing("make its control socket")?.into();
        let shared = Arc::new(Shared {
            target,
            stopping: AtomicBool::new(false),
            next: AtomicU64::new(0),
            clients: Mutex::default(),
        });
        let work = {
            let shared = shared.clone();
            move || shared.accept_all(&listener)
        };
        let accepting = thread::Builder::new().name("control".into()).spawn(work);
        let accepting = Some(accepting.doing("start a thread")?);
        Ok(Self { path: path.to_path_buf(), shared, listener: waking, accepting })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Err(error) = fs::remove_file(&self.path) {
            log::debug!("{}: {error}", self.path.display());
        }
        // Wakes the thread that waits in accept(). Not by a connection: the place in the file system may be another's by now.
        let woken = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        // If it could not be woken it goes with the process.
        if woken.is_ok()
            && let Some(accepting) = self.accepting.take()
            && accepting.join().is_err()
        {
            log::error!("the control thread ran into a bug");
        }
        let clients = std::mem::take(&mut *self.shared.clients());
        for client in &clients {
            // One that has gone is as good.
            let _ = client.stream.shutdown(Shutdown::Read);
        }
        // What they have begun is done, and answered, before anything else ends.
        for client in clients {
            if client.thread.join().is_err() {
                log::error!("a control client's thread ran into a bug");
            }
        }
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        removed => removed?,
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl Shared {
    fn accept_all(self: &Arc<Self>, listener: &UnixListener) {
        for client in listener.incoming() {
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            if let Err(error) = client.and_then(|client| self.welcome(client)) {
                log::warn!("control socket: {error}");
                // Where descriptors or threads have run out the next try fails at once, too.
                thread::sleep(AFTER_FAILURE);
            }
        }
    }

    fn welcome(self: &Arc<Self>, client: UnixStream) -> io::Result<()> {
        let peer = socket_peercred(&client)?.uid.as_raw();
        if peer != 0 && peer != geteuid().as_raw() {
            log::warn!("control socket: user {peer} was turned away");
            return Ok(());
        }
        // One that does not read its answers must not keep the mount from ending.
        client.set_write_timeout(Some(PATIENCE))?;
        if self.clients().len() >= MAX_CLIENTS {
            let text = format!("the mount has {MAX_CLIENTS} clients already, and no room for more");
            return send(&client, &refusal(&Refusal::Wrong(text), None));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let stream = client.try_clone()?;
        let shared = self.clone();
        let work = move || {
            // Also after a bug it has to go: who is on the list keeps the connection, and its client waits.
            match catch_unwind(AssertUnwindSafe(|| shared.talk(&client))) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => log::debug!("control client {number}: {error}"),
                Err(_) => log::error!("control client {number} ran into a bug"),
            }
            shared.clients().retain(|other| other.number != number);
        };
        // It can't take itself off the list before it is on it.
        let mut clients = self.clients();
        let thread = thread::Builder::new().name("control-client".into()).spawn(work)?;
        clients.push(Client { number, stream, thread });
        Ok(())
    }

    fn clients(&self) -> MutexGuard<'_, Vec<Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Talks with one client until it goes.
    fn talk(&self, client: &UnixStream) -> io::Result<()> {
        send(client, &greeting())?;
        let mut negotiated = false;
        for request in Requests::new(client) {
            if self.stopping.load(Ordering::Acquire) {
                break;
            }
            let value = match request {
                Ok(value) => value,
                Err(error) => {
                    // What comes behind can't be told from what is broken.
                    let text = format!("this is no JSON: {error}");
                    return send(client, &refusal(&Refusal::Wrong(text), None));
                }
            };
            send(client, &self.answer(value, &mut negotiated))?;
        }
        Ok(())
    }

    fn answer(&self, request: Value, negotiated: &mut bool) -> Value {
        let Request { name, arguments, id } = match Request::parse(request) {
            Ok(request) => request,
            Err((why, id)) => return refusal(&why, id),
        };
        match (name.as_str(), *negotiated) {
            ("qmp_capabilities", false) => {
                *negotiated = true;
                return success(json!({}), id);
            }
            ("qmp_capabilities", true) => {
                let text = "the session has begun already: qmp_capabilities is for its beginning";
                return refusal(&Refusal::UnknownCommand(text.to_owned()), id);
            }
            (_, false) => {
                let text = "a session begins with qmp_capabilities";
                return refusal(&Refusal::UnknownCommand(text.to_owned()), id);
            }
            ("query-version" | "query-commands", true) if !arguments.is_empty() => {
                let text = format!("{name} takes no arguments");
                return refusal(&Refusal::Wrong(text), id);
            }
            ("query-version", true) => return success(version(), id),
            ("query-commands", true) => {
                let own = ["qmp_capabilities", "query-version", "query-commands"];
                let names = own.iter().chain(&COMMANDS).map(|name| json!({ "name": name }));
                return success(names.collect(), id);
            }
            (_, true) => {}
        }
        match Command::parse(&name, arguments) {
            Err(why) => refusal(&why, id),
            Ok(command) => match self.target.execute(&command) {
                Ok(value) => success(value, id),
                Err(error) => failure(&error, id),
            },
        }
    }
}

/// One message in a line of its own.
fn send(mut client: &UnixStream, message: &Value) -> io::Result<()> {
    client.write_all(format!("{message}\r\n").as_bytes())
}

/// The requests of a client. They need not be in lines of their own.
struct Requests<'a> {
    stream:
        serde_json::StreamDeserializer<'a, serde_json::de::IoRead<BufReader<Bounded<'a>>>, Value>,
    left: Arc<AtomicU64>,
}

impl<'a> Requests<'a> {
    fn new(client: &'a UnixStream) -> Self {
        let left = Arc::new(AtomicU64::new(MAX_REQUEST));
        let bounded = BufReader::new(Bounded { client, left: left.clone() });
        Self { stream: serde_json::Deserializer::from_reader(bounded).into_iter(), left }
    }
}

impl Iterator for Requests<'_> {
    type Item = serde_json::Result<Value>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left.store(MAX_REQUEST, Ordering::Relaxed);
        self.stream.next()
    }
}

/// A connection from which one request can't read more than its share.
struct Bounded<'a> {
    client: &'a UnixStream,
    left: Arc<AtomicU64>,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.client.read(buf)?;
        let left = self.left.load(Ordering::Relaxed);
        let Some(left) = left.checked_sub(read as u64) else {
            return Err(io::Error::new(ErrorKind::InvalidData, "the request is too long"));
        };
        self.left.store(left, Ordering::Relaxed);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Problem;

    struct Nothing;

    impl Target for Nothing {
        fn execute(&self, _command: &Command) -> Result<Value> {
            Ok(json!({}))
        }
    }

    /// Does what it is asked for when its server is about to end.
    struct Late {
        path: PathBuf,
        begun: AtomicBool,
    }

    impl Target for Late {
        fn execute(&self, _command: &Command) -> Result<Value> {
            self.begun.store(true, Ordering::SeqCst);
            while self.path.exists() {
                thread::yield_now();
            }
            Ok(json!("done"))
        }
    }

    #[test]
    fn a_command_that_was_begun_is_answered_though_the_server_ends_and_a_later_one_is_not() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("x.sock");
        let target = Arc::new(Late { path: path.clone(), begun: AtomicBool::new(false) });
        let server = Server::start(&path, target.clone()).unwrap();
        let mut client = super::super::Client::connect(&path).unwrap();
        thread::scope(|scope| {
            let asking = scope.spawn(|| client.execute(&Command::QueryNodes));
            while !target.begun.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            drop(server);
            assert_eq!(asking.join().unwrap().unwrap(), json!("done"));
        });
        let error = client.execute(&Command::QueryNodes).unwrap_err();
        assert!(matches!(error.problem(), Problem::Ended), "{error}");
    }

    #[test]
    fn a_server_ends_though_its_socket_was_replaced_by_anothers() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("x.sock");
        let first = Server::start(&path, Arc::new(Nothing)).unwrap();
        let second = Server::start(&path, Arc::new(Nothing)).unwrap();
        drop(first);
        drop(second);
    }
}
