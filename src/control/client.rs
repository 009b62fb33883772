//! The side of the socket that our own verbs are on.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::message::{Command, kind_of};
use crate::error::{At, Doing, Error, Problem, Result};

/// What a mount that is well answers at once is waited for no longer than this.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to a live mount.
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// Nobody listens there, or somebody who does not speak QMP, or not at all; a mount that lets nobody in.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).doing("reach its control socket").at(path)?;
        stream.set_read_timeout(Some(PATIENCE)).doing("limit the wait for it").at(path)?;
        let mut client = Self { path: path.to_path_buf(), stream: BufReader::new(stream) };
        let greeting = client.receive()?;
        if let Some(error) = greeting.get("error") {
            return Err(remote_error(error));
        }
        if greeting.get("QMP").is_none() {
            return Err(client.nonsense(&greeting));
        }
        client.call("qmp_capabilities", &json!({}))?;
        Ok(client)
    }

    /// Has the mount do something, and returns what it says.
    ///
    /// # Errors
    /// What the mount could not do, in its words; a connection that breaks.
    pub fn execute(&mut self, command: &Command) -> Result<Value> {
        let (name, arguments) = command.write()?;
        let patience = command.is_quick().then_some(PATIENCE);
        let limited = self.stream.get_ref().set_read_timeout(patience);
        limited.doing("limit the wait for it").at(&self.path)?;
        self.call(name, &arguments)
    }

    fn call(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": name, "arguments": arguments });
        let sent = self.stream.get_mut().write_all(format!("{request}\n").as_bytes());
        sent.map_err(ended).at(&self.path)?;
        loop {
            let mut answer = self.receive()?;
            if answer.get("event").is_some() {
                continue;
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            return Err(match answer.get("error") {
                Some(error) => remote_error(error),
                None => self.nonsense(&answer),
            });
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).map_err(ended).at(&self.path)? == 0 {
            return Err(Error::new(Problem::Ended).at(&self.path));
        }
        serde_json::from_str(&line).map_err(|_| self.nonsense(&Value::String(line.clone())))
    }

    fn nonsense(&self, said: &Value) -> Error {
        let message = format!("its process answers what is no QMP: {said}");
        Error::new(Problem::Helper { program: "the control socket", message }).at(&self.path)
    }
}

/// What it means that talking to the mount's process has failed.
fn ended(error: io::Error) -> Error {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Error::new(Problem::Ended),
        _ => Error::io("talk to the mount's process", error),
    }
}

fn remote_error(error: &Value) -> Error {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let ours = &error["qchainfs"];
    let headline = text(&ours["headline"]).or_else(|| text(&error["desc"])).unwrap_or_default();
    Error::new(Problem::Remote {
        headline,
        reason: text(&ours["reason"]),
        advice: text(&ours["advice"]),
        kind: kind_of(ours["kind"].as_str().unwrap_or_default()),
    })
}
