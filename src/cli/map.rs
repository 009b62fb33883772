//! `qchainfs map`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::process::ExitCode;

use super::report::printable;
use super::size::hexadecimal;
use super::views::Source;
use super::{Output, exit, logging, print};
use crate::chain::{Depth, Extent, Member, View};
use crate::error::{At, Doing, Result};
use crate::image::{Content, Image};
use crate::units::HostOffset;

/// Say where the bytes of a view are
#[derive(clap::Args)]
pub struct Arguments {
    /// How to print it
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    #[command(flatten)]
    source: Source,
    /// IMAGE, IMAGE@SNAPSHOT, IMAGE@#ID, IMAGE[N], IMAGE[N]@SNAPSHOT or IMAGE[FILE]
    #[arg(value_name = "ADDRESS", required_unless_present = "chain")]
    address: Option<OsString>,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    let view = arguments.source.open(Depth::WholeChain)?.only(arguments.address.as_deref())?;
    match arguments.output {
        Output::Human => print_human(&view)?,
        Output::Json => print_json(&view)?,
    }
    Ok(ExitCode::from(exit::DONE))
}

/// A line of the map, as qemu-img sees it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Line {
    start: u64,
    len: u64,
    /// Members above the one that decides.
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
}

impl Line {
    fn new(extent: &Extent, view: &View) -> Self {
        let place = match extent.content {
            // What is there is not what the disk holds.
            _ if member_of(extent, view).image().is_some_and(Image::is_encrypted) => None,
            Content::Data(place) => Some(place),
            Content::Zero { kept } | Content::Unallocated { kept } => kept,
            Content::Compressed { .. } => None,
        };
        let compressed = matches!(extent.content, Content::Compressed { .. });
        Self {
            start: extent.range.start.get(),
            len: extent.range.len,
            depth: extent.member - view.member(),
            present: !extent.content.is_unallocated(),
            zero: extent.is_zero(),
            data: !extent.is_zero(),
            compressed,
            offset: place.map(|place| place.host.get()),
        }
    }

    /// Whether `next` only goes on with what this line says.
    fn continues_with(&self, next: &Self) -> bool {
        let offset = self.offset.map(|offset| offset + self.len);
        let expected = Self { start: self.start + self.len, len: next.len, offset, ..*self };
        expected == *next
    }

    fn json(&self) -> String {
        let offset = self.offset.map(|offset| format!(", \"offset\": {offset}"));
        format!(
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
             \"data\": {}, \"compressed\": {}{}}}",
            self.start,
            self.len,
            self.depth,
            self.present,
            self.zero,
            self.data,
            self.compressed,
            offset.unwrap_or_default()
        )
    }
}

fn member_of<'a>(extent: &Extent, view: &'a View) -> &'a Member {
    &view.chain().members()[extent.member]
}

/// Calls `f` with each line, neighbours that say the same made one.
fn for_each_line(view: &View, mut f: impl FnMut(&Line) -> Result<()>) -> Result<()> {
    let mut last: Option<Line> = None;
    let mut preallocated = HashMap::new();
    for extent in view.extents(view.range()) {
        let extent = extent?;
        let mut rest = Line::new(&extent, view);
        while rest.len > 0 {
            let line = first_part(view, &mut preallocated, &rest)?;
            rest.start += line.len;
            rest.len -= line.len;
            rest.offset = rest.offset.map(|offset| offset + line.len);
            match &mut last {
                Some(last) if last.continues_with(&line) => last.len += line.len,
                _ => {
                    if let Some(finished) = last.replace(line) {
                        f(&finished)?;
                    }
                }
            }
        }
    }
    last.map_or(Ok(()), |finished| f(&finished))
}

/// The part of `line` up to where the host's file goes over between data and hole, where that matters: in clusters
/// that were allocated ahead of their data. `preallocated` remembers which members have such clusters.
fn first_part(view: &View, preallocated: &mut HashMap<usize, bool>, line: &Line) -> Result<Line> {
    let index = view.member() + line.depth;
    let member = &view.chain().members()[index];
    let (Some(offset), true, Some(image)) = (line.offset, line.data, member.image()) else {
        return Ok(*line);
    };
    let sparse = match preallocated.get(&index) {
        Some(&known) => known,
        None => {
            let found = image.looks_preallocated().at(member.path())?;
            preallocated.insert(index, found);
            found
        }
    };
    if !sparse {
        return Ok(*line);
    }
    let data = member.data_store().next_data(HostOffset::new(offset)).doing("look for holes")?;
    let (zero, end) = match data {
        Some(data) if data.start <= offset => (false, data.end),
        Some(data) => (true, data.start),
        None => (true, u64::MAX),
    };
    Ok(Line { zero, len: line.len.min(end - offset), ..*line })
}

fn print_json(view: &View) -> Result<()> {
    let mut before = "[";
    for_each_line(view, |line| {
        print(&format!("{before}{}", line.json()))?;
        before = ",\n";
        Ok(())
    })?;
    print(if before == "[" { "[]\n" } else { "]\n" })
}

/// Only what is data, with its place; compressed and encrypted clusters have none that a reader could use.
fn print_human(view: &View) -> Result<()> {
    print(&format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to"))?;
    for_each_line(view, |line| {
        if !line.data || line.zero {
            return Ok(());
        }
        let member = &view.chain().members()[view.member() + line.depth];
        let hidden = if line.compressed { "compressed" } else { "encrypted" };
        let offset = line.offset.map_or(hidden.to_owned(), hexadecimal);
        let (start, len) = (hexadecimal(line.start), hexadecimal(line.len));
        let file = printable(&member.data_path().display().to_string());
        print(&format!("{start:<16}{len:<16}{offset:<16}{file}\n"))
    })
}
