//! What goes over the wire: requests, answers and errors of QMP (QEMU's "QMP Protocol Specification").

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::chain::Existing;
use crate::error::{self, Error, Kind};

/// The name under which the disk of a mount is known as a device.
pub const DEVICE: &str = "disk";
/// The node name of the member with this index.
pub const NODE_PREFIX: &str = "member";

/// What a client may ask a live mount for. Names and arguments are QEMU's where it has the command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `query-named-block-nodes`: the members of the chain, the active layer first.
    QueryNodes,
    /// `query-block`: the disk with its snapshots.
    QueryBlock,
    /// `blockdev-snapshot-internal-sync`: makes an internal snapshot.
    CreateSnapshot {
        /// Its name.
        name: String,
        /// Whether file systems on the disk are frozen meanwhile.
        quiesce: Quiesce,
    },
    /// `blockdev-snapshot-delete-internal-sync`: deletes one.
    DeleteSnapshot(SnapshotName),
    /// `x-qchainfs-snapshot-apply`: the disk goes back to one. QEMU has no such command.
    ApplySnapshot(SnapshotName),
    /// `blockdev-snapshot-sync`: puts a new image on top of the chain.
    Overlay(NewOverlay),
    /// `x-qchainfs-revert`: puts a new image on top of an older member. QEMU has no such command.
    Revert(Revert),
    /// `block_resize`: makes the disk larger.
    Resize {
        /// The new size in bytes.
        size: u64,
    },
}

/// Which internal snapshot is meant: whatever of it is said must be right.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct SnapshotName {
    /// Its id.
    pub id: Option<String>,
    /// Its name.
    pub name: Option<String>,
}

/// The new top image that a chain is to get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewOverlay {
    /// The file, absolute.
    pub file: PathBuf,
    /// What happens to a file that is there.
    pub existing: Existing,
    /// Whether file systems on the disk are frozen meanwhile.
    pub quiesce: Quiesce,
}

/// The member that a chain is to go back to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revert {
    /// Its file, as [`Command::QueryNodes`] says it. Not its index, which may be another one by now.
    pub member: PathBuf,
    /// The file of the image on top of it, absolute.
    pub file: PathBuf,
    /// What happens to a file that is there.
    pub existing: Existing,
}

/// Whether mounted file systems hold still while the disk changes hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quiesce {
    /// No: the point in time is that of a power cut.
    No,
    /// Those that sit on loop devices over the mount do.
    Yes,
}

/// A request as it came.
pub(super) struct Request {
    pub name: String,
    pub arguments: Map<String, Value>,
    /// Comes back with the answer.
    pub id: Option<Value>,
}

/// Why a request was refused before anybody tried to do it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// `CommandNotFound`.
    UnknownCommand(String),
    /// `GenericError`.
    Wrong(String),
}

impl Request {
    pub fn parse(value: Value) -> Result<Self, (Refusal, Option<Value>)> {
        let wrong = |what: &str, id| Err((Refusal::Wrong(what.to_owned()), id));
        let Value::Object(mut object) = value else {
            return wrong("a request is a JSON object", None);
        };
        let id = object.remove("id");
        let name = match object.remove("execute") {
            Some(Value::String(name)) => name,
            Some(_) => return wrong("\"execute\" is a string, the name of a command", id),
            None => return wrong("the request has no \"execute\"", id),
        };
        let arguments = match object.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return wrong("\"arguments\" is a JSON object", id),
        };
        match object.keys().next() {
            Some(key) => wrong(&format!("no request has \"{key}\""), id),
            None => Ok(Self { name, arguments, id }),
        }
    }
}

/// The commands of a [`Command`] by their names on the wire.
pub(super) const COMMANDS: [&str; 8] = [
    "query-named-block-nodes",
    "query-block",
    "blockdev-snapshot-internal-sync",
    "blockdev-snapshot-delete-internal-sync",
    "blockdev-snapshot-sync",
    "block_resize",
    "x-qchainfs-snapshot-apply",
    "x-qchainfs-revert",
];

impl Command {
    pub(super) fn parse(name: &str, arguments: Map<String, Value>) -> Result<Self, Refusal> {
        Ok(match name {
            "query-named-block-nodes" => {
                // "flat" leaves out what is not said here anyway.
                let _: FlatArguments = read(arguments)?;
                Self::QueryNodes
            }
            "query-block" => {
                let NoArguments {} = read(arguments)?;
                Self::QueryBlock
            }
            "blockdev-snapshot-internal-sync" => {
                let CreateArguments { device, name, quiesce } = read(arguments)?;
                check_device(&device)?;
                Self::CreateSnapshot { name, quiesce: quiesced(quiesce) }
            }
            "blockdev-snapshot-delete-internal-sync" => {
                Self::DeleteSnapshot(ChoiceArguments::read(arguments)?)
            }
            "x-qchainfs-snapshot-apply" => Self::ApplySnapshot(ChoiceArguments::read(arguments)?),
            "blockdev-snapshot-sync" => Self::Overlay(OverlayArguments::read(arguments)?),
            "x-qchainfs-revert" => Self::Revert(RevertArguments::read(arguments)?),
            "block_resize" => {
                let ResizeArguments { device, node_name, size } = read(arguments)?;
                check_active(device.as_deref(), node_name.as_deref())?;
                Self::Resize { size }
            }
            _ => {
                let text = format!("there is no command \"{name}\"; query-commands lists them");
                return Err(Refusal::UnknownCommand(text));
            }
        })
    }

    /// The name and arguments that [`Command::parse`] makes the same command of.
    ///
    /// # Errors
    /// A file whose name JSON can't hold.
    pub(super) fn write(&self) -> error::Result<(&'static str, Value)> {
        let choice = |choice: &SnapshotName| {
            let mut arguments = json!({ "device": DEVICE });
            if let Some(id) = &choice.id {
                arguments["id"] = json!(id);
            }
            if let Some(name) = &choice.name {
                arguments["name"] = json!(name);
            }
            arguments
        };
        Ok(match self {
            Self::QueryNodes => ("query-named-block-nodes", json!({})),
            Self::QueryBlock => ("query-block", json!({})),
            Self::CreateSnapshot { name, quiesce } => (
                "blockdev-snapshot-internal-sync",
                json!({
                    "device": DEVICE,
                    "name": name,
                    "x-qchainfs-quiesce": *quiesce == Quiesce::Yes,
                }),
            ),
            Self::DeleteSnapshot(snapshot) => {
                ("blockdev-snapshot-delete-internal-sync", choice(snapshot))
            }
            Self::ApplySnapshot(snapshot) => ("x-qchainfs-snapshot-apply", choice(snapshot)),
            Self::Overlay(NewOverlay { file, existing, quiesce }) => (
                "blockdev-snapshot-sync",
                json!({
                    "device": DEVICE,
                    "snapshot-file": utf8(file)?,
                    "x-qchainfs-force": *existing == Existing::Replace,
                    "x-qchainfs-quiesce": *quiesce == Quiesce::Yes,
                }),
            ),
            Self::Revert(Revert { member, file, existing }) => (
                "x-qchainfs-revert",
                json!({
                    "device": DEVICE,
                    "member-file": utf8(member)?,
                    "snapshot-file": utf8(file)?,
                    "force": *existing == Existing::Replace,
                }),
            ),
            Self::Resize { size } => ("block_resize", json!({ "device": DEVICE, "size": size })),
        })
    }

    /// Whether it only looks at what is in memory, and so is answered at once unless something is wrong.
    pub(super) fn is_quick(&self) -> bool {
        match self {
            Self::QueryNodes | Self::QueryBlock => true,
            Self::CreateSnapshot { .. }
            | Self::DeleteSnapshot(_)
            | Self::ApplySnapshot(_)
            | Self::Overlay(_)
            | Self::Revert(_)
            | Self::Resize { .. } => false,
        }
    }
}

fn utf8(file: &Path) -> error::Result<&str> {
    file.to_str().ok_or_else(|| {
        Error::usage(format!(
            "{}: its name is not UTF-8, which a mount can't be told",
            file.display()
        ))
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoArguments {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FlatArguments {
    #[serde(rename = "flat")]
    _flat: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateArguments {
    device: String,
    name: String,
    #[serde(default, rename = "x-qchainfs-quiesce")]
    quiesce: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChoiceArguments {
    device: String,
    id: Option<String>,
    name: Option<String>,
}

impl ChoiceArguments {
    fn read(arguments: Map<String, Value>) -> Result<SnapshotName, Refusal> {
        let Self { device, id, name } = read(arguments)?;
        check_device(&device)?;
        match (&id, &name) {
            (None, None) => Err(Refusal::Wrong("Name or id must be provided".to_owned())),
            _ => Ok(SnapshotName { id, name }),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct OverlayArguments {
    device: Option<String>,
    node_name: Option<String>,
    snapshot_file: PathBuf,
    format: Option<String>,
    mode: Option<String>,
    #[serde(default, rename = "x-qchainfs-force")]
    force: bool,
    #[serde(default, rename = "x-qchainfs-quiesce")]
    quiesce: bool,
}

impl OverlayArguments {
    fn read(arguments: Map<String, Value>) -> Result<NewOverlay, Refusal> {
        let Self { device, node_name, snapshot_file: file, format, mode, force, quiesce } =
            read(arguments)?;
        check_active(device.as_deref(), node_name.as_deref())?;
        if format.is_some_and(|format| format != "qcow2") {
            return Err(Refusal::Wrong("an overlay is a qcow2 image".to_owned()));
        }
        if mode.is_some_and(|mode| mode != "absolute-paths") {
            return Err(Refusal::Wrong("the only mode is absolute-paths".to_owned()));
        }
        check_absolute(&file)?;
        Ok(NewOverlay { file, existing: existing(force), quiesce: quiesced(quiesce) })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RevertArguments {
    device: String,
    member_file: PathBuf,
    snapshot_file: PathBuf,
    #[serde(default)]
    force: bool,
}

impl RevertArguments {
    fn read(arguments: Map<String, Value>) -> Result<Revert, Refusal> {
        let Self { device, member_file: member, snapshot_file: file, force } = read(arguments)?;
        check_device(&device)?;
        check_absolute(&file)?;
        Ok(Revert { member, file, existing: existing(force) })
    }
}

fn check_absolute(file: &Path) -> Result<(), Refusal> {
    match file.is_absolute() {
        true => Ok(()),
        false => Err(Refusal::Wrong(
            "snapshot-file must be absolute: the mount has a directory of its own".to_owned(),
        )),
    }
}

fn quiesced(quiesce: bool) -> Quiesce {
    if quiesce { Quiesce::Yes } else { Quiesce::No }
}

fn existing(force: bool) -> Existing {
    if force { Existing::Replace } else { Existing::Refuse }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ResizeArguments {
    device: Option<String>,
    node_name: Option<String>,
    size: u64,
}

fn read<T: DeserializeOwned>(arguments: Map<String, Value>) -> Result<T, Refusal> {
    serde_json::from_value(Value::Object(arguments))
        .map_err(|error| Refusal::Wrong(error.to_string()))
}

fn check_device(device: &str) -> Result<(), Refusal> {
    match device == DEVICE || device == format!("{NODE_PREFIX}0") {
        true => Ok(()),
        false => Err(Refusal::Wrong(format!(
            "there is no device \"{device}\": a mount has one, \"{DEVICE}\""
        ))),
    }
}

fn check_active(device: Option<&str>, node_name: Option<&str>) -> Result<(), Refusal> {
    match (device, node_name) {
        (Some(name), None) | (None, Some(name)) => check_device(name),
        _ => Err(Refusal::Wrong("either device or node-name must be given".to_owned())),
    }
}

/// The first thing that a server says.
pub(super) fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": [] } })
}

/// The version of QMP's command set that ours follows, and our own.
pub(super) fn version() -> Value {
    json!({
        "qemu": { "major": 10, "minor": 0, "micro": 0 },
        "package": concat!("qchainfs-", env!("CARGO_PKG_VERSION")),
    })
}

pub(super) fn success(value: Value, id: Option<Value>) -> Value {
    with_id(json!({ "return": value }), id)
}

pub(super) fn refusal(refusal: &Refusal, id: Option<Value>) -> Value {
    let (class, text) = match refusal {
        Refusal::UnknownCommand(text) => ("CommandNotFound", text),
        Refusal::Wrong(text) => ("GenericError", text),
    };
    with_id(json!({ "error": { "class": class, "desc": text } }), id)
}

/// An error of a command. Beside what QMP has, it says what our own verbs print.
pub(super) fn failure(error: &Error, id: Option<Value>) -> Value {
    let headline = error.headline();
    let description = match error.reason() {
        Some(reason) => format!("{headline}: {reason}"),
        None => headline.clone(),
    };
    let ours = json!({
        "headline": headline,
        "reason": error.reason(),
        "advice": error.advice(),
        "kind": kind_name(error.kind()),
    });
    with_id(
        json!({ "error": { "class": "GenericError", "desc": description, "qchainfs": ours } }),
        id,
    )
}

fn with_id(mut answer: Value, id: Option<Value>) -> Value {
    if let Some(id) = id {
        answer["id"] = id;
    }
    answer
}

const KINDS: [(Kind, &str); 7] = [
    (Kind::Failed, "failed"),
    (Kind::Usage, "usage"),
    (Kind::NotFound, "not-found"),
    (Kind::Locked, "locked"),
    (Kind::Key, "key"),
    (Kind::Policy, "policy"),
    (Kind::Unsupported, "unsupported"),
];

fn kind_name(kind: Kind) -> &'static str {
    KINDS.iter().find(|(known, _)| *known == kind).map_or("failed", |(_, name)| name)
}

pub(super) fn kind_of(name: &str) -> Kind {
    KINDS.iter().find(|(_, known)| *known == name).map_or(Kind::Failed, |(kind, _)| *kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Command, Refusal> {
        let request =
            Request::parse(serde_json::from_str(text).unwrap()).map_err(|(why, _)| why)?;
        Command::parse(&request.name, request.arguments)
    }

    #[test]
    fn a_command_survives_the_wire() {
        let snapshot = SnapshotName { id: Some("3".into()), name: Some("before".into()) };
        for command in [
            Command::QueryNodes,
            Command::QueryBlock,
            Command::CreateSnapshot { name: "a \"b\"".into(), quiesce: Quiesce::Yes },
            Command::DeleteSnapshot(snapshot.clone()),
            Command::ApplySnapshot(SnapshotName { id: None, ..snapshot }),
            Command::Overlay(NewOverlay {
                file: "/a/b.qcow2".into(),
                existing: Existing::Replace,
                quiesce: Quiesce::Yes,
            }),
            Command::Revert(Revert {
                member: "/a/base.raw".into(),
                file: "/a/b.qcow2".into(),
                existing: Existing::Refuse,
            }),
            Command::Resize { size: 1 << 40 },
        ] {
            let (name, arguments) = command.write().unwrap();
            assert!(COMMANDS.contains(&name));
            let Value::Object(arguments) = arguments else { panic!("no object") };
            assert_eq!(Command::parse(name, arguments), Ok(command));
        }
    }

    #[test]
    fn what_qemu_calls_wrong_is_wrong() {
        for text in [
            r#"{"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "disk"}}"#,
            r#"{"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "x", "name": "a"}}"#,
            r#"{"execute": "blockdev-snapshot-delete-internal-sync", "arguments": {"device": "disk"}}"#,
            r#"{"execute": "query-block", "arguments": {"unknown": 1}}"#,
            r#"{"execute": "query-block", "arguments": []}"#,
            r#"{"execute": "query-block", "extra": 1}"#,
            r#"{"arguments": {}}"#,
            r#"[1]"#,
            r#"{"execute": "blockdev-snapshot-sync", "arguments": {"device": "disk", "snapshot-file": "x"}}"#,
        ] {
            assert!(matches!(parsed(text), Err(Refusal::Wrong(_))), "{text}");
        }
        let unknown = parsed(r#"{"execute": "quit"}"#);
        assert!(matches!(unknown, Err(Refusal::UnknownCommand(_))));
    }
}
