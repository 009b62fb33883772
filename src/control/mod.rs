//! The control socket of a live mount. It speaks QMP, so that any client of that drives it.
//!
//! `message` has what goes over the wire, `server` answers any number of clients, `client` is what our own verbs use.
//! What a command does is not decided here: the floor above hands a [`Target`] to the server.

mod client;
mod message;
mod server;
mod snapshot_info;

pub use client::Client;
pub use message::{Command, DEVICE, NODE_PREFIX, NewOverlay, Quiesce, Revert, SnapshotName};
pub use server::{Server, Target};
pub use snapshot_info::snapshot_info;
