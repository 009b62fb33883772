//! Errors in words: what is wrong with which file, why, and the command to run next.

use std::fmt;
use std::path::Path;

use super::{Error, FileState, OtherUse, Problem, Process, RepairMark};

/// Names of snapshots in an error; an image may have thousands.
const NAMES: usize = 20;

impl Error {
    /// What is wrong with which file, in one line without a final stop.
    pub fn headline(&self) -> String {
        let file = self.path().map_or_else(|| "the image".to_owned(), show);
        match self.problem() {
            Problem::NotFound => format!("{file}: no such file"),
            Problem::NotARegularFile => format!("{file} is not a regular file"),
            Problem::Exists | Problem::ExistsUnforced => format!("{file} exists already"),
            Problem::PartOfChain => format!("{file} is part of the chain"),
            Problem::NotQcow2 => format!("{file} is not a qcow2 image"),
            Problem::Unsupported { feature } => {
                format!("{file} needs a feature that is not supported: {feature}")
            }
            Problem::ReadableOnly { feature } => {
                format!(
                    "{file} can be read but not written: {feature} is not supported for writing"
                )
            }
            Problem::Invalid { field, .. } => format!("{file} has an invalid {field}"),
            Problem::Corrupt { .. } => format!("{file} is corrupt"),
            Problem::BrokenData { .. } => format!("{file} has damaged data"),
            Problem::NeedsRepair { .. } => format!("{file} must be repaired before it is written"),
            Problem::Locked { other, holders } => {
                let doing = match other {
                    OtherUse::Writes => "open for writing",
                    OtherUse::Reads => "in use",
                };
                match show_processes(holders) {
                    Some(processes) => format!("{file} is {doing} by {processes}"),
                    None => format!("{file} is {doing} by another process"),
                }
            }
            Problem::WrittenElsewhere { holders, .. } => match show_processes(holders) {
                Some(processes) => format!("{file} is open for writing by {processes}"),
                None => format!("{file} is open for writing by another process"),
            },
            Problem::BesideWriter => format!("{file} is mounted with -U, and so only read"),
            Problem::KeyMissing => format!("{file} is encrypted and needs a key"),
            Problem::WrongKey => format!("{file} can't be decrypted with this key"),
            Problem::BackingLoop { .. } => format!("{file}: the backing chain is a loop"),
            Problem::BackingMissing { name, .. } => {
                format!("{file}: its backing file \"{name}\" is not there")
            }
            Problem::BackingFormatMissing { name } => {
                format!("{file} does not say which format its backing file \"{name}\" has")
            }
            Problem::ChainTooDeep { limit } => {
                format!("{file}: the backing chain is deeper than {limit} members")
            }
            Problem::Refused { target, .. } => {
                format!("{file} names {}, which the policy does not let it open", show(target))
            }
            Problem::ReadOnly => format!("{file} is read-only"),
            Problem::SizeIsFixed => format!("the size of {file} can't be changed this way"),
            Problem::ClosedForWriting => {
                format!("{file} takes no more writes since a write of its metadata failed")
            }
            Problem::OutOfRange { offset, len, size } => {
                format!("{file}: {len} bytes at {offset} are outside the disk of {size} bytes")
            }
            Problem::NoSuchSnapshot { wanted, .. } => {
                format!("{file} has no internal snapshot \"{wanted}\"")
            }
            Problem::AmbiguousSnapshot { wanted, .. } => {
                format!("{file} has several internal snapshots \"{wanted}\"")
            }
            Problem::SnapshotGone { name } => {
                format!("the internal snapshot \"{name}\" of {file} was deleted meanwhile")
            }
            Problem::NoSuchMember { wanted, .. } => {
                format!("the chain of {file} has no member \"{wanted}\"")
            }
            Problem::Usage { message } => message.clone(),
            Problem::NotMounted => format!("{file} is not a mountpoint of qchainfs"),
            Problem::Unreachable { .. } => format!("the mount at {file} does not answer"),
            Problem::OfAnotherUser { owner } => {
                format!("the mount at {file} belongs to another user (uid {owner})")
            }
            Problem::NotShared { file: source, range, .. } => format!(
                "{file} can't share the {} bytes at {} of {}",
                range.end - range.start,
                range.start,
                show(source)
            ),
            Problem::Ended => "the mount ended before it said whether that is done".into(),
            Problem::Mountpoint { .. } => format!("{file} can't be used as a mountpoint"),
            Problem::Busy { holders } => format!("{file} is still in use{}", by(holders)),
            Problem::OpenForWriting { holders } => {
                format!("the disk of {file} is open for writing{}", by(holders))
            }
            Problem::SnapshotInUse { name, holders } => {
                format!("the internal snapshot \"{name}\" of {file} is still in use{}", by(holders))
            }
            Problem::Helper { program, .. } => format!("{program} failed"),
            Problem::Retired => format!("{file} is a backing file by now"),
            Problem::BaseChanged { base, .. } => {
                format!("{} is not as {file} remembers its backing file", show(base))
            }
            Problem::Moved => format!("{file} is not the file any more that is in use"),
            Problem::Remote { headline, .. } => headline.clone(),
            Problem::Io { action, .. } => match self.path() {
                Some(path) => format!("{}: could not {action}", show(path)),
                None => format!("could not {action}"),
            },
        }
    }

    /// Why, where that is more than the headline says.
    pub fn reason(&self) -> Option<String> {
        let origin = self.0.named_by.as_deref();
        let origin = origin.map(|image| format!("it is the backing file of {}", show(image)));
        match (self.cause(), origin) {
            (Some(cause), Some(origin)) => Some(format!("{cause}; {origin}")),
            (cause, origin) => cause.or(origin),
        }
    }

    fn cause(&self) -> Option<String> {
        match self.problem() {
            Problem::ExistsUnforced => {
                Some("--force overwrites it, and what it holds is lost".into())
            }
            Problem::OfAnotherUser { .. } => Some("only that user and root may manage it".into()),
            Problem::PartOfChain => Some("a new image needs a name of its own".into()),
            Problem::OpenForWriting { .. } => Some(
                "who writes relies on what the disk held, and it would hold something else; close it first".into(),
            ),
            Problem::SnapshotInUse { .. } => Some("close it first".into()),
            Problem::Ended => Some(
                "it was unmounted or its process died; the images show whether it was done".into(),
            ),
            Problem::NotQcow2 => Some("it does not begin with the magic bytes 51 46 49 fb".into()),
            Problem::Invalid { reason, .. }
            | Problem::Refused { reason, .. }
            | Problem::Unreachable { reason }
            | Problem::NotShared { reason, .. }
            | Problem::Mountpoint { reason } => Some(reason.clone()),
            Problem::Corrupt { what } | Problem::BrokenData { what } => Some(what.clone()),
            Problem::NeedsRepair { mark } => Some(match mark {
                RepairMark::Dirty => {
                    "it was not closed cleanly and its refcounts may be wrong (dirty bit)".into()
                }
                RepairMark::Corrupt => "its header is marked corrupt".into(),
            }),
            Problem::Locked { other: OtherUse::Writes, .. } => {
                Some("two writers would destroy it, and a reader would see it half written".into())
            }
            Problem::Locked { other: OtherUse::Reads, .. } => {
                Some("whoever reads it relies on nobody writing it".into())
            }
            Problem::WrittenElsewhere { .. } => {
                Some("its backing members and internal snapshots can still be read:".into())
            }
            Problem::BesideWriter => {
                Some("another process may be writing it, and two writers would destroy it".into())
            }
            Problem::WrongKey => Some("it opens none of the image's key slots".into()),
            Problem::BackingLoop { files } => {
                let files: Vec<_> = files.iter().map(|file| show(file)).collect();
                Some(files.join(" -> "))
            }
            Problem::BackingMissing { looked, .. } => Some(format!("looked for {}", show(looked))),
            Problem::BackingFormatMissing { .. } => Some(
                "guessing it would let whoever wrote the disk choose the format, and so a file to read"
                    .into(),
            ),
            Problem::NoSuchSnapshot { present, .. } if present.is_empty() => {
                Some("it has no internal snapshots at all".into())
            }
            Problem::NoSuchSnapshot { present, .. } => {
                let (first, others) = present.split_at(present.len().min(NAMES));
                let others = match others.len() {
                    0 => String::new(),
                    count => format!(", and {count} more"),
                };
                Some(format!("it has: {}{others}", first.join(", ")))
            }
            Problem::AmbiguousSnapshot { ids, .. } => {
                let ids: Vec<String> = ids.iter().map(|id| format!("#{id}")).collect();
                Some(format!("an id says which one is meant: {}", ids.join(", ")))
            }
            Problem::NoSuchMember { count, .. } => Some(format!(
                "it has {count}, counted from 0, the active layer, to {}, the base",
                count.saturating_sub(1)
            )),
            Problem::BaseChanged { recorded, found, .. } if recorded == found => {
                Some("its bytes are others, so that what is read through the overlay may be nonsense".into())
            }
            Problem::BaseChanged { recorded, found, .. } => Some(format!(
                "it had {} and has {}; if it was changed, what is read through the overlay may be nonsense",
                show_state(recorded),
                show_state(found)
            )),
            Problem::Moved => Some(
                "it was moved or replaced, and the new image would name what is there now; move it back".into(),
            ),
            Problem::Helper { message, .. } => Some(message.clone()),
            Problem::Remote { reason, .. } => reason.clone(),
            Problem::Io { source, .. } => Some(source.to_string()),
            _ => None,
        }
    }

    /// The command to run next, where there is one to recommend.
    pub fn advice(&self) -> Option<String> {
        let file = self.path().map_or_else(|| "IMAGE".to_owned(), shell_word);
        match self.problem() {
            Problem::Locked { other: OtherUse::Writes, .. } => {
                Some(format!("qchainfs info -U {file}"))
            }
            Problem::WrittenElsewhere { address, mountpoint, .. } => Some(format!(
                "qchainfs mount -U -r {} {}",
                shell_word(Path::new(address)),
                shell_word(mountpoint)
            )),
            Problem::ReadableOnly { .. } => Some(format!("qchainfs mount -r {file} MOUNTPOINT")),
            Problem::KeyMissing => {
                Some(format!("qchainfs mount -r -o secret=FILE {file} MOUNTPOINT"))
            }
            Problem::NeedsRepair { .. } => Some(format!("qchainfs check -r all {file}")),
            Problem::Corrupt { .. } => Some(format!("qchainfs check {file}")),
            Problem::BackingFormatMissing { name } => Some(format!(
                "qemu-img rebase -u -F FORMAT -b {} {file}",
                shell_word(Path::new(name))
            )),
            Problem::BackingMissing { .. } => {
                Some(format!("qemu-img rebase -u -F FORMAT -b NEW-NAME {file}"))
            }
            Problem::Refused { option: Some(option), .. } => Some(format!(
                "qchainfs mount -o {} IMAGE MOUNTPOINT",
                shell_word(Path::new(option))
            )),
            Problem::Remote { advice, .. } => advice.clone(),
            Problem::NotMounted => Some("qchainfs ls".into()),
            Problem::Unreachable { .. } => Some(format!("qchainfs umount {file}")),
            Problem::NoSuchSnapshot { .. } | Problem::AmbiguousSnapshot { .. } => {
                Some(format!("qchainfs snapshot list {file}"))
            }
            Problem::NoSuchMember { .. } => Some(format!("qchainfs info --backing-chain {file}")),
            Problem::BaseChanged { .. } => Some(format!("qchainfs seal {file}")),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.headline())?;
        match self.reason() {
            Some(reason) => write!(f, ": {reason}"),
            None => Ok(()),
        }
    }
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

fn show_state(state: &FileState) -> String {
    let time = jiff::Timestamp::from_nanosecond(state.modified);
    let time = time.map_or_else(|_| "another time".to_owned(), |time| time.to_string());
    format!("{} bytes of {time}", state.len)
}

fn by(holders: &[String]) -> String {
    if holders.is_empty() { String::new() } else { format!(" by {}", holders.join(", ")) }
}

fn show_processes(processes: &[Process]) -> Option<String> {
    let words: Vec<_> =
        processes.iter().map(|process| format!("{} (pid {})", process.name, process.pid)).collect();
    (!words.is_empty()).then(|| words.join(", "))
}

/// `path` as a shell would have to be given it.
fn shell_word(path: &Path) -> String {
    let text = show(path);
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,@%=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_a_quote_stays_one_shell_word() {
        assert_eq!(shell_word(Path::new("it's here")), r"'it'\''s here'");
        assert_eq!(shell_word(Path::new("/a/b-c.qcow2")), "/a/b-c.qcow2");
    }

    #[test]
    fn an_option_with_a_directory_is_one_shell_word() {
        let error = Error::new(Problem::Refused {
            target: "/my disks/base.qcow2".into(),
            reason: String::new(),
            option: Some("backing_policy=allow:/my disks".into()),
        });
        let advice = "qchainfs mount -o 'backing_policy=allow:/my disks' IMAGE MOUNTPOINT";
        assert_eq!(error.advice().as_deref(), Some(advice));
    }

    #[test]
    fn of_thousands_of_snapshots_only_some_are_named() {
        let with = |count: usize| {
            let present = vec!["s".to_owned(); count];
            Error::new(Problem::NoSuchSnapshot { wanted: "x".into(), present }).reason()
        };
        assert!(with(NAMES).is_some_and(|reason| reason.ends_with("s, s")));
        assert!(with(1000).is_some_and(|reason| reason.ends_with("s, s, and 980 more")));
    }

    #[test]
    fn nobody_is_told_to_delete_anything() {
        let error = Error::new(Problem::Exists).at(Path::new("disk.qcow2"));
        assert_eq!(error.advice(), None);
    }

    #[test]
    fn a_locked_image_names_the_process() {
        let error = Error::new(Problem::Locked {
            other: OtherUse::Writes,
            holders: vec![Process { pid: 4711, name: "qemu-system-x86_64".into() }],
        })
        .at(Path::new("wrap.qcow2"));
        assert_eq!(
            error.headline(),
            "wrap.qcow2 is open for writing by qemu-system-x86_64 (pid 4711)"
        );
    }
}
