//! `qchainfs info`.

use std::ffi::OsString;
use std::process::ExitCode;

use serde_json::{Map, Value, json};

use super::report::printable;
use super::size::human;
use super::snapshot_words::{columns_head, snapshot_line, snapshot_object};
use super::views::Source;
use super::{Output, exit, info_encryption, logging, print};
use crate::chain::resolve_backing_name;
use crate::chain::{Address, Depth, Member, MemberChoice};
use crate::control::snapshot_info;
use crate::error::{At, Doing, Result};
use crate::image::Image;
use crate::qcow2::encryption::CRYPT_NONE;
use crate::qcow2::{
    Bitmap, BitmapFlags, CompatibleFeatures, Compression, DataPlace, Header, IncompatibleFeatures,
    L2Form, Version,
};
use crate::store::Store;

/// Say what an image is
#[derive(clap::Args)]
pub struct Arguments {
    /// How to print it
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    /// All members of the chain, from the top down
    #[arg(long)]
    backing_chain: bool,
    #[command(flatten)]
    source: Source,
    /// IMAGE, IMAGE@SNAPSHOT, IMAGE@#ID, IMAGE[N], IMAGE[N]@SNAPSHOT or IMAGE[FILE]
    #[arg(value_name = "ADDRESS", required_unless_present = "chain")]
    address: Option<OsString>,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    let address = arguments.address.as_deref();
    let is_top = address.is_some_and(|text| Address::parse(text).member == MemberChoice::Index(0));
    let depth = if is_top && !arguments.backing_chain { Depth::TopOnly } else { Depth::Headers };
    let view = arguments.source.open(depth)?.only(address)?;
    let chain = view.chain();
    let first = view.member();
    let last = if arguments.backing_chain { chain.members().len() } else { first + 1 };
    let members = &chain.members()[first..last];
    match arguments.output {
        Output::Json => {
            let mut objects =
                members.iter().map(|member| describe(member)).collect::<Result<Vec<_>>>()?;
            if let Some(snapshot) = view.snapshot() {
                objects[0]["virtual-size"] = snapshot.size().into();
                objects[0]["qchainfs"] = json!({ "snapshot": snapshot_object(snapshot) });
            }
            let whole = match arguments.backing_chain {
                true => Value::Array(objects),
                false => objects.remove(0),
            };
            print(&format!("{whole:#}\n"))?;
        }
        Output::Human => {
            let mut texts = members
                .iter()
                .map(|member| describe_in_words(member))
                .collect::<Result<Vec<_>>>()?;
            if let Some(snapshot) = view.snapshot() {
                let size = snapshot.size();
                let name = printable(&snapshot.entry().name);
                let shown = human(size);
                texts[0] +=
                    &format!("Snapshot {name}:\n    virtual size: {shown} ({size} bytes)\n");
            }
            print(&texts.join("\n"))?;
        }
    }
    Ok(ExitCode::from(exit::DONE))
}

/// The object that `qemu-img info` prints for a member.
fn describe(member: &Member) -> Result<Value> {
    let (file_len, allocated) = file_sizes(member)?;
    let filename = member.path().display().to_string();
    let mut object = Map::new();
    let mut put = |key: &str, value: Value| {
        object.insert(key.to_owned(), value);
    };
    let file = json!({
        "children": [],
        "virtual-size": file_len,
        "filename": filename,
        "format": "file",
        "actual-size": allocated,
        "format-specific": { "type": "file", "data": {} },
        "dirty-flag": false,
    });
    put("children", json!([{ "name": "file", "info": file }]));
    put("virtual-size", member.size().into());
    put("filename", filename.into());
    put("format", member.format().to_string().into());
    put("actual-size", allocated.into());
    put("dirty-flag", false.into());
    if let Some(image) = member.image() {
        let header = image.header();
        put("cluster-size", header.geometry.cluster_size().into());
        put("dirty-flag", header.incompatible.contains(IncompatibleFeatures::DIRTY).into());
        let mut data = format_specific(image).at(member.path())?;
        if let Some(encryption) = info_encryption::object(member, &header)? {
            data["encrypt"] = encryption;
            put("encrypted", true.into());
        }
        put("format-specific", json!({ "type": "qcow2", "data": data }));
        let snapshots = image.snapshots();
        if !snapshots.is_empty() {
            let snapshots = snapshots.iter().map(|tree| snapshot_info(tree.entry()));
            put("snapshots", snapshots.collect::<Vec<_>>().into());
        }
        if let Some(backing) = Backing::of(member, image) {
            put("backing-filename", backing.name.into());
            if let Some(full) = backing.full {
                put("full-backing-filename", full.into());
            }
            if let Some(format) = backing.format {
                put("backing-filename-format", format.into());
            }
        }
    }
    Ok(Value::Object(object))
}

/// The backing file as `info` shows it: no look at the file itself.
struct Backing {
    name: String,
    full: Option<String>,
    format: Option<String>,
}

impl Backing {
    fn of(member: &Member, image: &Image) -> Option<Self> {
        let header = image.header();
        let name = header.backing_name.as_ref()?;
        let full = resolve_backing_name(member.path(), name).ok().map(|name| name.full);
        Some(Self {
            name: String::from_utf8_lossy(name).into_owned(),
            full: full.map(|full| String::from_utf8_lossy(&full).into_owned()),
            format: header.backing_format().map(str::to_owned),
        })
    }
}

fn file_sizes(member: &Member) -> Result<(u64, u64)> {
    let store = member.store();
    // Counted in sectors, as qemu-img does.
    let len = store.len().doing("find out its length").at(member.path())?.next_multiple_of(512);
    let allocated = store.allocated().doing("find out its size").at(member.path())?;
    Ok((len, allocated))
}

fn format_specific(image: &Image) -> Result<Value> {
    let header = image.header();
    let mut data = json!({
        "compat": compat(header.version),
        "compression-type": compression(&header),
        "refcount-bits": 1_u32 << header.geometry.refcount_order(),
    });
    if header.version == Version::V3 {
        data["lazy-refcounts"] =
            header.compatible.contains(CompatibleFeatures::LAZY_REFCOUNTS).into();
        data["corrupt"] = header.incompatible.contains(IncompatibleFeatures::CORRUPT).into();
        data["extended-l2"] = (header.geometry.l2_form() == L2Form::Extended).into();
    }
    if let (DataPlace::External, Some(name)) = (header.data_place(), header.data_file_name()) {
        data["data-file"] = String::from_utf8_lossy(name).into();
        data["data-file-raw"] = header.data_file_is_raw().into();
    }
    let bitmaps = image.bitmaps()?;
    if !bitmaps.is_empty() {
        let object = |bitmap: &Bitmap| {
            json!({
                "name": bitmap.name,
                "granularity": 1_u64 << bitmap.granularity_bits,
                "flags": flag_names(bitmap),
            })
        };
        data["bitmaps"] = bitmaps.iter().map(object).collect::<Vec<_>>().into();
    }
    Ok(data)
}

fn flag_names(bitmap: &Bitmap) -> Vec<&'static str> {
    let names = [(BitmapFlags::IN_USE, "in-use"), (BitmapFlags::AUTO, "auto")];
    names
        .into_iter()
        .filter(|(flag, _)| bitmap.flags.contains(*flag))
        .map(|(_, name)| name)
        .collect()
}

fn compression(header: &Header) -> &'static str {
    match header.compression() {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    }
}

fn compat(version: Version) -> &'static str {
    match version {
        Version::V2 => "0.10",
        Version::V3 => "1.1",
    }
}

/// What `qemu-img info` prints for a member.
fn describe_in_words(member: &Member) -> Result<String> {
    let (file_len, allocated) = file_sizes(member)?;
    let filename = printable(&member.path().display().to_string());
    let size = member.size();
    let mut text = format!(
        "image: {filename}\nfile format: {}\nvirtual size: {} ({size} bytes)\ndisk size: {}\n",
        member.format(),
        human(size),
        human(allocated)
    );
    if let Some(image) = member.image() {
        text += &describe_image(member, image).at(member.path())?;
    }
    text += &format!(
        "Child node '/file':\n    filename: {filename}\n    protocol type: file\n    \
         file length: {} ({file_len} bytes)\n    disk size: {}\n",
        human(file_len),
        human(allocated)
    );
    Ok(text)
}

fn describe_image(member: &Member, image: &Image) -> Result<String> {
    let header = image.header();
    let mut text = String::new();
    if header.crypt_method != CRYPT_NONE {
        text += "encrypted: yes\n";
    }
    text += &format!("cluster_size: {}\n", header.geometry.cluster_size());
    if header.incompatible.contains(IncompatibleFeatures::DIRTY) {
        text += "cleanly shut down: no\n";
    }
    if let Some(backing) = Backing::of(member, image) {
        let name = printable(&backing.name);
        text += &format!("backing file: {name}");
        match backing.full {
            Some(full) if full != backing.name => {
                text += &format!(" (actual path: {})\n", printable(&full));
            }
            _ => text.push('\n'),
        }
        if let Some(format) = backing.format {
            text += &format!("backing file format: {}\n", printable(&format));
        }
    }
    let snapshots = image.snapshots();
    if !snapshots.is_empty() {
        text += "Snapshot list:\n";
        text += &columns_head();
        for tree in snapshots {
            text += &snapshot_line(tree.entry());
        }
    }
    text += &format!(
        "Format specific information:\n    compat: {}\n    compression type: {}\n",
        compat(header.version),
        compression(&header)
    );
    let bits = 1_u32 << header.geometry.refcount_order();
    if header.version == Version::V3 {
        let lazy = header.compatible.contains(CompatibleFeatures::LAZY_REFCOUNTS);
        let corrupt = header.incompatible.contains(IncompatibleFeatures::CORRUPT);
        let extended = header.geometry.l2_form() == L2Form::Extended;
        text += &format!("    lazy refcounts: {lazy}\n");
        text += &describe_bitmaps(&image.bitmaps()?);
        text += &format!("    refcount bits: {bits}\n");
        text += &info_encryption::lines(member, &header)?;
        if let (DataPlace::External, Some(name)) = (header.data_place(), header.data_file_name()) {
            let (name, raw) = (String::from_utf8_lossy(name), header.data_file_is_raw());
            text += &format!("    data file: {}\n    data file raw: {raw}\n", printable(&name));
        }
        text += &format!("    corrupt: {corrupt}\n    extended l2: {extended}\n");
    } else {
        text += &format!("    refcount bits: {bits}\n");
        text += &info_encryption::lines(member, &header)?;
    }
    Ok(text)
}

fn describe_bitmaps(bitmaps: &[Bitmap]) -> String {
    if bitmaps.is_empty() {
        return String::new();
    }
    let mut text = "    bitmaps:\n".to_owned();
    for (index, bitmap) in bitmaps.iter().enumerate() {
        text += &format!("        [{index}]:\n            flags:\n");
        for (index, name) in flag_names(bitmap).iter().enumerate() {
            text += &format!("                [{index}]: {name}\n");
        }
        let granularity = 1_u64 << bitmap.granularity_bits;
        let name = printable(&bitmap.name);
        text += &format!("            name: {name}\n            granularity: {granularity}\n");
    }
    text
}
