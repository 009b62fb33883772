//! `qchainfs ls`.

use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::report::printable;
use super::{Output, exit, print};
use crate::control::{Client, Command};
use crate::error::Result;
use crate::mount::{MountEntry, control_socket, our_mounts};

/// List the live mounts
#[derive(clap::Args)]
pub struct Arguments {
    /// How to print them
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mounts: Vec<Mount> = our_mounts().iter().map(Mount::of).collect();
    let text = match arguments.output {
        Output::Json => format!("{:#}\n", mounts.iter().map(Mount::describe).collect::<Value>()),
        Output::Human => mounts.iter().map(Mount::line).collect(),
    };
    print(&text)?;
    Ok(ExitCode::from(exit::DONE))
}

/// A mount and what it says of itself.
struct Mount {
    mountpoint: String,
    image: String,
    /// Its members as its control socket tells them.
    nodes: Option<Value>,
}

impl Mount {
    fn of(mount: &MountEntry) -> Self {
        let nodes = control_socket(mount)
            .and_then(|socket| Client::connect(&socket).ok())
            .and_then(|mut client| client.execute(&Command::QueryNodes).ok());
        // Since it was mounted another image may have been put on top.
        let top = nodes.as_ref().and_then(|nodes| nodes[0]["file"].as_str());
        let image = top.map_or_else(|| show(&mount.source), str::to_owned);
        Self { mountpoint: show(&mount.mountpoint), image, nodes }
    }

    fn state(&self) -> &'static str {
        match &self.nodes {
            None => "no answer",
            Some(nodes) if nodes[0]["ro"] == false => "writable",
            Some(_) => "read-only",
        }
    }

    fn describe(&self) -> Value {
        json!({
            "mountpoint": self.mountpoint,
            "image": self.image,
            "state": self.state(),
            "members": self.nodes.as_ref().and_then(Value::as_array).map(Vec::len),
        })
    }

    fn line(&self) -> String {
        let (image, mountpoint) = (printable(&self.image), printable(&self.mountpoint));
        format!("{image} on {mountpoint} ({})\n", self.state())
    }
}

fn show(path: &Path) -> String {
    path.display().to_string()
}
