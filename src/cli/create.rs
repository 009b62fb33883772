//! `qchainfs create`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{exit, logging, size};
use crate::chain::{Chain, Depth, Format, Layer, OpenOptions, Sharing, resolve_backing_name};
use crate::error::{At, Error, Problem, Result};
use crate::image::{CreateOptions, NewBacking, NewImage};
use crate::qcow2::{BaseRecord, Geometry, L2Form, Version};
use crate::store::FileStore;

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
    /// Options: cluster_size=SIZE, compat=0.10|1.1|v2|v3, refcount_bits=N, extended_l2=on|off, and size=,
    /// backing_file=, backing_fmt= for what has an argument of its own
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
    let wanted = Wanted::of(arguments)?;
    let geometry = wanted.geometry()?;
    let backing = match (&wanted.backing, &wanted.backing_format) {
        (Some(name), _) if name.is_empty() => {
            return Err(Error::usage("the name of the backing file is empty"));
        }
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
    let found = match &backing {
        Some((name, format)) => Some(look_at_backing(&arguments.image, name, *format)?),
        None => None,
    };
    let size = match (&wanted.size, &found) {
        (Some(text), _) => size::parse(text)?,
        (None, Some(found)) => found.size,
        (None, None) => {
            return Err(Error::usage("a new image without a backing file needs a size"));
        }
    };
    let backing = backing.map(|(name, format)| NewBacking {
        name,
        format: format.to_string(),
        record: found.and_then(|found| found.record),
    });
    let options = CreateOptions { size, version: wanted.version, geometry, backing };

    let new = NewImage::plan(&options).at(&arguments.image)?;
    let store = FileStore::create_new(&arguments.image).at(&arguments.image)?;
    new.write(&store).at(&arguments.image)?;
    Ok(ExitCode::from(exit::DONE))
}

/// What was asked for, by whichever of an argument and an option.
struct Wanted {
    version: Version,
    cluster_size: u64,
    refcount_bits: u32,
    l2_form: L2Form,
    size: Option<String>,
    backing: Option<OsString>,
    backing_format: Option<String>,
}

impl Wanted {
    fn of(arguments: &Arguments) -> Result<Self> {
        let mut wanted = Self {
            version: Version::V3,
            cluster_size: 65536,
            refcount_bits: 16,
            l2_form: L2Form::Standard,
            size: None,
            backing: None,
            backing_format: None,
        };
        let words = arguments.options.iter().flat_map(|list| list.split(','));
        for word in words.filter(|word| !word.is_empty()) {
            wanted.take(word)?;
        }
        wanted.size = arguments.size.clone().or(wanted.size);
        wanted.backing = arguments.backing.clone().or(wanted.backing);
        wanted.backing_format = arguments.backing_format.clone().or(wanted.backing_format);
        Ok(wanted)
    }

    fn take(&mut self, word: &str) -> Result<()> {
        match word.split_once('=') {
            Some(("cluster_size", value)) => self.cluster_size = size::parse(value)?,
            Some(("compat", "0.10" | "v2")) => self.version = Version::V2,
            Some(("compat", "1.1" | "v3")) => self.version = Version::V3,
            Some(("refcount_bits", value)) => self.refcount_bits = value.parse().unwrap_or(0),
            Some(("extended_l2", "on")) => self.l2_form = L2Form::Extended,
            Some(("extended_l2", "off")) => self.l2_form = L2Form::Standard,
            Some(("size", value)) => self.size = Some(value.to_owned()),
            Some(("backing_file", value)) => self.backing = Some(value.into()),
            Some(("backing_fmt", value)) => self.backing_format = Some(value.to_owned()),
            Some(("preallocation" | "lazy_refcounts", "off")) => {}
            Some((key @ ("preallocation" | "lazy_refcounts"), _)) => {
                return Err(Error::usage(format!("new images are made with {key}=off only")));
            }
            _ => {
                return Err(Error::usage(format!(
                    "option \"{word}\" is none of cluster_size=SIZE, compat=0.10|1.1, refcount_bits=N, \
                     extended_l2=on|off, size=SIZE, backing_file=FILE, backing_fmt=FORMAT"
                )));
            }
        }
        Ok(())
    }

    fn geometry(&self) -> Result<Geometry> {
        let Self { cluster_size, refcount_bits, l2_form, .. } = *self;
        if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
            return Err(Error::usage("cluster_size is a power of two between 512 and 2M"));
        }
        if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
            return Err(Error::usage("refcount_bits is 1, 2, 4, 8, 16, 32 or 64"));
        }
        if l2_form == L2Form::Extended && cluster_size < 16384 {
            return Err(Error::usage("extended L2 entries need clusters of 16K or more"));
        }
        let geometry = Geometry::new(cluster_size.trailing_zeros(), refcount_bits.trailing_zeros());
        Ok(geometry.with_l2_form(l2_form))
    }
}

/// What is to be known of a backing file.
struct Found {
    /// Virtual size in bytes.
    size: u64,
    record: Option<BaseRecord>,
}

/// Looks at the backing file, which must be there and be what the user says it is.
fn look_at_backing(image: &Path, name: &[u8], format: Format) -> Result<Found> {
    let path = resolve_backing_name(image, name).at(image)?.path;
    // What it names in turn is looked at when the new image is opened, under the policy of that moment.
    let options =
        OpenOptions { depth: Depth::TopOnly, sharing: Sharing::Forced, ..OpenOptions::default() };
    let chain = match format {
        Format::Raw => {
            Chain::compose(&[Layer { path: path.clone(), format: Some(format) }], &options)?
        }
        Format::Qcow2 => Chain::open(&path, &options)?,
    };
    let base = chain.members().first().ok_or_else(|| Error::new(Problem::NotFound).at(&path))?;
    Ok(Found { size: base.size(), record: chain.stamp_of_top()? })
}
