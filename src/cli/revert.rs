//! `qchainfs revert`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use super::mount_options::{Options, Unknown};
use super::report::printable;
use super::target::{Target, absolute, check_new_image, files_of, members_of};
use super::{exit, logging, print};
use crate::chain::{Address, Chain, Existing, MemberChoice, OpenOptions};
use crate::control::{Command, Revert};
use crate::error::{Error, Problem, Result};
use crate::store::FileId;

/// Go back to an older member of a chain: a new image goes on top of it
///
/// The images above that member are no longer part of the chain, and stay as they are: nothing is deleted, and mounting the
/// one that was on top shows the disk as it was. On a live mount disk.raw becomes what that member holds; that is refused
/// while somebody has it open for writing. Mount the new image from then on.
#[derive(clap::Args)]
pub struct Arguments {
    /// Overwrite a file that is there: what it holds is lost
    #[arg(long)]
    force: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show what would be done, and do nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Options as for mount, of which backing_policy and secret count; for an image that is not
    /// mounted
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// The top image of the chain, or the mountpoint that shows it
    target: PathBuf,
    /// The member to go back to: TARGET[N], TARGET[base.qcow2], [N], or its file
    #[arg(value_name = "ADDRESS")]
    member: OsString,
    /// The new image (default: beside the present one, with a number in its name)
    new: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    logging::to_stderr();
    let words = Options::parse(arguments.options.iter().map(String::as_str), Unknown::Refuse)?;
    match Target::find(&arguments.target)? {
        Target::Live(mut client) => {
            let plan = Plan::of(arguments, &members_of(&mut client)?)?;
            plan.carry_out(arguments, |plan| {
                let (member, file) = (plan.member().to_path_buf(), plan.new.clone());
                let revert = Command::Revert(Revert { member, file, existing: plan.existing });
                client.execute(&revert).map(drop)
            })?;
        }
        Target::Image(image) => {
            let options = OpenOptions {
                policy: words.policy,
                secrets: words.secrets,
                ..OpenOptions::default()
            };
            let chain = Arc::new(Chain::open(&image, &options)?);
            let plan = Plan::of(arguments, &files_of(&chain))?;
            plan.carry_out(arguments, |plan| {
                let below = plan.leaving.len();
                chain.prepare_overlay(below, &plan.new, plan.existing).map(drop)
            })?;
        }
    }
    Ok(ExitCode::from(exit::DONE))
}

/// What is going to happen.
struct Plan {
    /// The members that will no longer be part of the chain, the top first.
    leaving: Vec<PathBuf>,
    /// Those that will, below the new image. There is at least one.
    staying: Vec<PathBuf>,
    new: PathBuf,
    existing: Existing,
}

impl Plan {
    fn of(arguments: &Arguments, files: &[PathBuf]) -> Result<Self> {
        let target = &arguments.target;
        let below = find(files, target, &arguments.member)?;
        let new = match (&arguments.new, files.first()) {
            (Some(new), _) => absolute(new)?,
            (None, Some(top)) => free_name_beside(top),
            (None, None) => return Err(Error::usage("the mount does not say which images it has")),
        };
        let (leaving, staying) = files.split_at(below);
        Ok(Self {
            leaving: leaving.to_vec(),
            staying: staying.to_vec(),
            new,
            existing: if arguments.force { Existing::Replace } else { Existing::Refuse },
        })
    }

    fn member(&self) -> &Path {
        &self.staying[0]
    }

    fn carry_out(
        &self,
        arguments: &Arguments,
        revert: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<()> {
        if arguments.dry_run {
            let members = [&self.leaving[..], &self.staying].concat();
            check_new_image(&self.new, self.existing, &members)?;
            return print(&self.words("would go", "would no longer be"));
        }
        revert(self)?;
        match arguments.quiet {
            true => Ok(()),
            false => print(&self.words("is the active layer now,", "are no longer")),
        }
    }

    fn words(&self, goes: &str, leave: &str) -> String {
        let show = |path: &Path| printable(&path.display().to_string());
        let mut text = format!(
            "{} {goes} on top of {}\nfiles that {leave} part of the chain, and stay as they are:\n",
            show(&self.new),
            show(self.member())
        );
        for file in &self.leaving {
            text += &format!("    {}\n", show(file));
        }
        text
    }
}

/// The index in the chain `files` of what the user calls `text`.
fn find(files: &[PathBuf], target: &Path, text: &OsStr) -> Result<usize> {
    let address = Address::parse(text);
    if address.snapshot.is_some() {
        return Err(Error::usage(
            "an image can't be put on top of an internal snapshot: see qchainfs snapshot apply",
        ));
    }
    let image = &address.image;
    let same = |file: &Path| FileId::of(image).is_some_and(|id| FileId::of(file) == Some(id));
    let start = match image.as_os_str().is_empty() || same(target) {
        true => Some(0),
        false => files.iter().position(|file| same(file)),
    };
    let missing = || {
        let (wanted, count) = (text.display().to_string(), files.len());
        Error::new(Problem::NoSuchMember { wanted, count }).at(target)
    };
    let start = start.ok_or_else(missing)?;
    let index = match &address.member {
        MemberChoice::Index(index) => start.checked_add(*index),
        MemberChoice::Name(name) => {
            let named = |file: &PathBuf| file == Path::new(name) || file.file_name() == Some(name);
            files[start..].iter().position(named).map(|index| start + index)
        }
    };
    match index.filter(|&index| index < files.len()) {
        Some(0) => Err(Error::usage(
            "member 0 is the active layer: to keep what it holds below a new image, use qchainfs overlay",
        )),
        Some(index) => Ok(index),
        None => Err(missing()),
    }
}

/// `disk.1.qcow2` for `disk.qcow2`, or the first number that no file has; that for `disk.1.qcow2` is `disk.2.qcow2`.
fn free_name_beside(top: &Path) -> PathBuf {
    let stem = top.file_stem().unwrap_or_default();
    let numbered = |stem: &Path| {
        stem.extension().and_then(OsStr::to_str).is_some_and(|word| word.parse::<u64>().is_ok())
    };
    let stem = match numbered(Path::new(stem)) {
        true => Path::new(stem).file_stem().unwrap_or_default(),
        false => stem,
    };
    let name = |number: u64| {
        let mut name = stem.to_os_string();
        name.push(format!(".{number}.qcow2"));
        top.with_file_name(name)
    };
    (1..).map(name).find(|path| path.symlink_metadata().is_err()).unwrap_or_else(|| name(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_the_new_image_has_the_next_free_number() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        assert_eq!(free_name_beside(&path("disk.qcow2")), path("disk.1.qcow2"));
        std::fs::write(path("disk.1.qcow2"), "").unwrap();
        std::os::unix::fs::symlink("nowhere", path("disk.2.qcow2")).unwrap();
        assert_eq!(free_name_beside(&path("disk.1.qcow2")), path("disk.3.qcow2"));
        assert_eq!(free_name_beside(&path("disk.img")), path("disk.3.qcow2"));
        assert_eq!(free_name_beside(&path("v1.2-web.qcow2")), path("v1.2-web.1.qcow2"));
    }
}
