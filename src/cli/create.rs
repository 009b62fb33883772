//! `qchainfs create`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use super::{exit, logging, size};
use crate::chain::{Chain, Depth, Format, OpenOptions, RawDisk, Sharing, resolve_backing_name};
use crate::error::{At, Error, Problem, Result};
use crate::image::{CreateOptions, NewImage};
use crate::qcow2::{Geometry, Version};
use crate::store::{Access, FileStore, Store};

/// Make a new, empty image, or an overlay on another
#[derive(clap::Args)]
pub struct Arguments {
    /// The backing file; a relative name counts from the new image's directory
    #[arg(short, long, value_name = "FILE")]
    backing: Option<OsString>,
    /// The backing file's format: qcow2 or raw
    #[arg(short = 'F', long, value_name = "FORMAT")]
    backing_format: Option<String>,
    /// The new image's format
    #[arg(short, long, value_name = "FORMAT", default_value = "qcow2", value_parser = ["qcow2"])]
    format: String,
    /// Options: cluster_size=SIZE, compat=0.10|1.1|v2|v3, refcount_bits=N
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// The file to make
    image: PathBuf,
    /// Virtual size, like 10G (default: that of the backing file)
    size: Option<String>,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    let (version, geometry) = parse_options(&arguments.options)?;
    let backing = match (&arguments.backing, &arguments.backing_format) {
        (Some(name), Some(format)) => {
            let known = Format::from_name(format).ok_or_else(|| {
                Error::usage(format!("a backing file is qcow2 or raw, not \"{format}\""))
            })?;
            Some((name.as_bytes().to_vec(), known))
        }
        (Some(_), None) => {
            return Err(Error::usage("say which format the backing file has: -F qcow2 or -F raw"));
        }
        (None, Some(_)) => return Err(Error::usage("-F goes with -b")),
        (None, None) => None,
    };
    let size = match (&arguments.size, &backing) {
        (Some(text), _) => size::parse(text)?,
        (None, Some((name, format))) => backing_size(&arguments.image, name, *format)?,
        (None, None) => {
            return Err(Error::usage("a new image without a backing file needs a size"));
        }
    };
    if let (Some(_), Some((name, format))) = (&arguments.size, &backing) {
        backing_size(&arguments.image, name, *format)?;
    }
    let backing = backing.map(|(name, format)| (name, format.to_string()));
    let options = CreateOptions { size, version, geometry, backing };

    let new = NewImage::plan(&options).at(&arguments.image)?;
    let store = FileStore::create_new(&arguments.image).at(&arguments.image)?;
    new.write(&store).at(&arguments.image)?;
    Ok(ExitCode::from(exit::DONE))
}

fn parse_options(lists: &[String]) -> Result<(Version, Geometry)> {
    let (mut version, mut cluster_size, mut refcount_bits) = (Version::V3, 65536, 16);
    for word in lists.iter().flat_map(|list| list.split(',')).filter(|word| !word.is_empty()) {
        match word.split_once('=') {
            Some(("cluster_size", value)) => cluster_size = size::parse(value)?,
            Some(("compat", "0.10" | "v2")) => version = Version::V2,
            Some(("compat", "1.1" | "v3")) => version = Version::V3,
            Some(("refcount_bits", value)) => {
                refcount_bits = value.parse().unwrap_or(0);
            }
            _ => {
                return Err(Error::usage(format!(
                    "option \"{word}\" is none of cluster_size=SIZE, compat=0.10|1.1, refcount_bits=N"
                )));
            }
        }
    }
    if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
        return Err(Error::usage("cluster_size is a power of two between 512 and 2M"));
    }
    if !u32::is_power_of_two(refcount_bits) || refcount_bits > 64 {
        return Err(Error::usage("refcount_bits is 1, 2, 4, 8, 16, 32 or 64"));
    }
    let geometry = Geometry::new(cluster_size.trailing_zeros(), refcount_bits.trailing_zeros());
    Ok((version, geometry))
}

/// The virtual size of the backing file, which must be there and be what the user says it is.
fn backing_size(image: &Path, name: &[u8], format: Format) -> Result<u64> {
    let path = resolve_backing_name(image, name).at(image)?.path;
    match format {
        Format::Raw => {
            let store: Arc<dyn Store> =
                Arc::new(FileStore::open(&path, Access::ReadOnly).at(&path)?);
            Ok(RawDisk::open(&*store).at(&path)?.size())
        }
        Format::Qcow2 => {
            // What it names in turn is looked at when the new image is opened, under the policy of that moment.
            let options = OpenOptions {
                depth: Depth::TopOnly,
                sharing: Sharing::Forced,
                ..OpenOptions::default()
            };
            let chain = Chain::open(&path, &options)?;
            let top = chain.members().first();
            top.map(|top| top.size()).ok_or_else(|| Error::new(Problem::NotFound).at(&path))
        }
    }
}
