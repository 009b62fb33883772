//! The JSON files of a mount.

use std::path::Path;

use serde_json::{Value, json};

use super::view_files::ViewFiles;
use crate::chain::Chain;
use crate::error::Result;

/// The content of a view's `info.json`.
pub fn view_info(files: &ViewFiles, image: &Path) -> Result<Vec<u8>> {
    let view = files.original();
    let member = &view.chain().members()[view.member()];
    let created = jiff::Timestamp::try_from(view.time()?).ok();
    let mut info = json!({
        "address": format!("{}{}", image.display(), files.address),
        "size": view.size(),
        "allocated": files.allocated(view.range()),
        "file": member.path().display().to_string(),
        "format": member.format().to_string(),
        "created": created.map(|time| time.to_string()),
        "read-only": !files.is_writable(),
    });
    if let (true, Some(object)) = (view.is_torn(), info.as_object_mut()) {
        object.insert("torn".to_owned(), json!(true));
    }
    if let (Some(twin), Some(object)) = (files.twin(), info.as_object_mut()) {
        object.insert("scratch".to_owned(), json!({ "changed": twin.is_changed() }));
    }
    if let (Some(snapshot), Some(object)) = (view.snapshot(), info.as_object_mut()) {
        let entry = snapshot.entry();
        let value = json!({
            "id": entry.id,
            "name": entry.name,
            "vm-state-size": entry.vm_state_size,
            "vm-clock-nsec": entry.vm_clock_nanoseconds,
        });
        object.insert("snapshot".to_owned(), value);
    }
    Ok(lines(&info))
}

/// The content of `.qchainfs/chain.json`: every member with its snapshots.
///
/// The top one is number `first` in the chain that it was opened from.
pub fn chain_info(chain: &Chain, first: usize) -> Vec<u8> {
    let members = chain.members().iter().enumerate().map(|(index, member)| {
        let snapshots = member.image().map(|image| image.snapshots()).unwrap_or_default();
        let snapshots = snapshots.iter().map(|tree| {
            let entry = tree.entry();
            json!({ "id": entry.id, "name": entry.name, "size": tree.size() })
        });
        json!({
            "index": first + index,
            "file": member.path().display().to_string(),
            "format": member.format().to_string(),
            "size": member.size(),
            "read-only": index > 0 || !chain.is_writable(),
            "snapshots": snapshots.collect::<Vec<_>>(),
        })
    });
    lines(&members.collect::<Vec<_>>().into())
}

/// The content of `.qchainfs/daemon.json`: who serves the mount, and by which way the kernel's requests reach him.
pub fn daemon_info(image: &Path, way: Option<&str>) -> Vec<u8> {
    lines(&json!({
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "image": image.display().to_string(),
        "requests": way,
    }))
}

/// The content of `.qchainfs/version`.
pub fn version() -> Vec<u8> {
    concat!("qchainfs ", env!("CARGO_PKG_VERSION"), "\n").as_bytes().to_vec()
}

fn lines(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}
