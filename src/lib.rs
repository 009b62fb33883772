//! qcow2 overlay chains as flat raw disks: the library behind the program `qchainfs`.
//!
//! Open a [`chain::Chain`], take a [`chain::View`] of it, and read:
//!
//! ```no_run
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! use qchainfs::chain::{Chain, OpenOptions};
//! use qchainfs::units::GuestOffset;
//!
//! # fn main() -> qchainfs::error::Result<()> {
//! let chain = Arc::new(Chain::open(Path::new("wrap.qcow2"), &OpenOptions::default())?);
//! for index in 0..chain.members().len() {
//!     let view = chain.view(index)?;
//!     let mut sector = [0; 512];
//!     view.read(GuestOffset::ZERO, &mut sector)?;
//!     println!("member {index}: {} bytes, begins with {:02x?}", view.size(), &sector[..16]);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! From the ground up: [`units`] and [`error`]; [`store`], host files; [`qcow2`], the format without I/O; [`image`], one
//! file as a disk with snapshots; [`chain`], members in order; [`mount`], the FUSE face; [`cli`], the command line. Each
//! imports only from those before it.

pub mod chain;
pub mod cli;
pub mod control;
pub mod error;
pub mod image;
pub mod mount;
mod processors;
pub mod qcow2;
#[cfg(test)]
mod random;
pub mod store;
pub mod units;
