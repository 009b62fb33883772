//! `qchainfs check`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use super::progress::{Form, Progress};
use super::report::{printable, report};
use super::{Output, exit, logging, print};
use crate::error::{At, Problem, Result};
use crate::image::check::{Class, Extent, Finding, Fixed, Report, Stage, Watch, check, repair};
use crate::store::{Access, FileStore, LockMode};

/// Findings that are told one by one.
const SHOWN: usize = 1000;

/// Check an image, and repair it
///
/// Exits as qemu-img check: 0 all is well, 1 the check failed, 2 corruptions, 3 leaked clusters, 63 not a qcow2 image.
/// Findings go to stderr, the result to stdout.
#[derive(clap::Args)]
pub struct Arguments {
    /// Repair refcounts that are too high (leaks), or all refcounts and the refcount structures
    /// (all). Data and what points to it is left as it is
    #[arg(short, long, value_enum, conflicts_with = "force_share")]
    repair: Option<What>,
    /// How to print the result
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    /// How to show progress
    #[arg(long, value_enum, value_name = "FORM", default_value = "auto")]
    progress: Form,
    /// Print nothing: the exit code tells
    #[arg(short, long)]
    quiet: bool,
    /// Look even if another process is writing
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    image: PathBuf,
}

/// What to repair.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Refcounts that are too high
    Leaks,
    /// All that can be repaired
    All,
}

/// Runs the verb. Its errors have exit codes of their own.
pub fn run(arguments: &Arguments) -> ExitCode {
    logging::to_stderr();
    let code = examine(arguments).unwrap_or_else(|error| {
        report(&error);
        match error.problem() {
            Problem::NotQcow2 => exit::CHECK_UNSUPPORTED,
            _ => exit::FAILED,
        }
    });
    ExitCode::from(code)
}

fn examine(arguments: &Arguments) -> Result<u8> {
    let image = &arguments.image;
    let (access, lock) = match arguments.repair {
        None => (Access::ReadOnly, LockMode::Read),
        Some(_) => (Access::ReadWrite, LockMode::Write),
    };
    let store = FileStore::open(image, access).at(image)?;
    if !arguments.force_share {
        store.lock(lock).at(image)?;
    }
    let mut watcher = Watcher::new(arguments);
    let done = match arguments.repair {
        None => check(&store, &mut watcher).map(|report| (report, Fixed::default())),
        Some(What::Leaks) => repair(&store, Extent::Leaks, &mut watcher),
        Some(What::All) => repair(&store, Extent::All, &mut watcher),
    };
    let (report, fixed) = done.at(image)?;
    watcher.finish();
    if !arguments.quiet {
        match arguments.output {
            Output::Human => print(&in_words(&report, fixed))?,
            Output::Json => {
                let object = json_object(arguments, &report, fixed, &watcher);
                print(&format!("{object:#}\n"))?;
            }
        }
    }
    Ok(match report {
        Report { errors: 1.., .. } => exit::FAILED,
        Report { corruptions: 1.., .. } => exit::CORRUPT,
        Report { leaks: 1.., .. } => exit::LEAKS,
        _ => exit::DONE,
    })
}

/// Shows what is found and how far the work is.
struct Watcher {
    progress: Progress,
    output: Output,
    quiet: bool,
    stage: Option<Stage>,
    /// The first findings of the stage.
    findings: Vec<(Class, String)>,
    omitted: u64,
}

impl Watcher {
    fn new(arguments: &Arguments) -> Self {
        let progress = match arguments.quiet {
            true => Progress::hidden(),
            false => Progress::new(arguments.progress),
        };
        let (output, quiet) = (arguments.output, arguments.quiet);
        Self { progress, output, quiet, stage: None, findings: Vec::new(), omitted: 0 }
    }

    /// A check after a repair tells anew what is left.
    fn enter(&mut self, stage: Stage) {
        if stage == Stage::Verify && self.stage != Some(stage) {
            self.finish();
            self.findings.clear();
            self.omitted = 0;
        }
        self.stage = Some(stage);
    }

    fn finish(&mut self) {
        if self.omitted > 0 && self.output == Output::Human && !self.quiet {
            self.progress.line(&format!("and {} more", self.omitted));
        }
        self.progress.clear();
    }
}

impl Watch for Watcher {
    fn found(&mut self, stage: Stage, finding: &Finding) {
        self.enter(stage);
        if self.findings.len() == SHOWN {
            self.omitted += 1;
            return;
        }
        let text = printable(&finding.to_string());
        if self.output == Output::Human && !self.quiet {
            self.progress.line(&text);
        }
        self.findings.push((finding.class(), text));
    }

    fn progress(&mut self, stage: Stage, done: u64, total: u64) {
        self.enter(stage);
        let name = match stage {
            Stage::Check => "check",
            Stage::Counts => "repair",
            Stage::Rebuild => "rebuild",
            Stage::Flags => "flags",
            Stage::Verify => "verify",
        };
        self.progress.update(name, done, total);
    }
}

/// The object that `qemu-img check` prints.
fn json_object(arguments: &Arguments, report: &Report, fixed: Fixed, watcher: &Watcher) -> Value {
    let mut object = Map::new();
    let filename = arguments.image.display().to_string();
    object.insert("filename".to_owned(), filename.into());
    object.insert("format".to_owned(), "qcow2".into());
    object.insert("check-errors".to_owned(), report.errors.into());
    let others = [
        ("image-end-offset", report.image_end),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", fixed.corruptions),
        ("leaks-fixed", fixed.leaks),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    for (key, number) in others.into_iter().filter(|(_, number)| *number != 0) {
        object.insert(key.to_owned(), number.into());
    }
    if !watcher.findings.is_empty() && !report.is_clean() {
        let class_name = |class: &Class| match class {
            Class::Leak => "leak",
            Class::Corruption => "corruption",
            Class::Error => "error",
        };
        let one =
            |(class, text): &(Class, String)| json!({ "class": class_name(class), "text": text });
        let findings: Vec<Value> = watcher.findings.iter().map(one).collect();
        let ours = json!({ "findings": findings, "omitted-findings": watcher.omitted });
        object.insert("qchainfs".to_owned(), ours);
    }
    Value::Object(object)
}

/// What `qemu-img check` prints.
fn in_words(report: &Report, fixed: Fixed) -> String {
    let mut text = String::new();
    if !fixed.is_nothing() {
        text += &format!(
            "The following inconsistencies were found and repaired:\n\n    \
             {} leaked clusters\n    {} corruptions\n\n\
             Double checking the fixed image now...\n",
            fixed.leaks, fixed.corruptions
        );
    }
    if report.is_clean() {
        text += "No errors were found on the image.\n";
    }
    if report.corruptions > 0 {
        text += &format!(
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        text += &format!(
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n",
            report.leaks
        );
    }
    if report.errors > 0 {
        text += &format!("\n{} internal errors have occurred during the check.\n", report.errors);
    }
    let (allocated, total) = (report.allocated_clusters, report.total_clusters);
    if allocated > 0 && total > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        text += &format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated)
        );
    }
    if report.image_end > 0 {
        text += &format!("Image end offset: {}\n", report.image_end);
    }
    text
}
