//! What can go wrong: the problem, the file it concerns, the cause below it and the errno above it.
//!
//! Code makes errors from facts; `words` alone turns them into sentences.

mod words;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, boxed so that results stay small.
pub struct Error(Box<Inner>);

struct Inner {
    path: Option<PathBuf>,
    /// The image that names that file as its backing file.
    named_by: Option<PathBuf>,
    problem: Problem,
}

/// What went wrong, as facts.
#[derive(Debug)]
#[non_exhaustive]
pub enum Problem {
    /// No file of that name.
    NotFound,
    /// A directory, device, pipe or socket where a regular file was expected.
    NotARegularFile,
    /// A file that must not be overwritten is there already.
    Exists,
    /// A file that is overwritten only by force is there already.
    ExistsUnforced,
    /// A file that is part of a chain was to be made anew.
    PartOfChain,
    /// The file lacks the qcow2 magic.
    NotQcow2,
    /// The format has it, this program does not (yet).
    Unsupported {
        /// The feature by its name.
        feature: String,
    },
    /// The image can be read; to write it, this program lacks something.
    ReadableOnly {
        /// The feature by its name.
        feature: &'static str,
    },
    /// A field of the header or of a table holds what the format does not allow.
    Invalid {
        /// The field, in the specification's words.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Metadata that was valid at open turns out to be impossible.
    Corrupt {
        /// What was found, and where.
        what: String,
    },
    /// Data that does not decompress. The tables are as good as before, so that nothing else is affected.
    BrokenData {
        /// What was found.
        what: String,
    },
    /// The image's header says that it must be repaired before it is written.
    NeedsRepair {
        /// Which of the header's marks says so.
        mark: RepairMark,
    },
    /// Another process holds the image.
    Locked {
        /// What that process does with it.
        other: OtherUse,
        /// The processes, as far as they can be seen.
        holders: Vec<Process>,
    },
    /// Another process writes the image that was to be mounted, most of which can be read all the same.
    WrittenElsewhere {
        /// The processes, as far as they can be seen.
        holders: Vec<Process>,
        /// What was to be mounted, as the user said it.
        address: OsString,
        /// And where.
        mountpoint: PathBuf,
    },
    /// The image is only read, since another process may write it.
    BesideWriter,
    /// The image is encrypted and nobody gave a key.
    KeyMissing,
    /// The key that was given does not open the image.
    WrongKey,
    /// A member names itself, directly or through others.
    BackingLoop {
        /// The files from the top down to the one that repeats.
        files: Vec<PathBuf>,
    },
    /// The backing file is not there.
    BackingMissing {
        /// The name as the header has it.
        name: String,
        /// Where it was looked for.
        looked: PathBuf,
    },
    /// The header names a backing file but not its format.
    BackingFormatMissing {
        /// The name as the header has it.
        name: String,
    },
    /// More members than anyone stacks on purpose.
    ChainTooDeep {
        /// The greatest depth that is opened.
        limit: usize,
    },
    /// The policy on implied opens says no.
    Refused {
        /// The file that would have been opened.
        target: PathBuf,
        /// Why not.
        reason: String,
        /// The mount option that would allow it, if one does.
        option: Option<String>,
    },
    /// The object can't be written.
    ReadOnly,
    /// The size of a disk can't be changed this way.
    SizeIsFixed,
    /// A write or sync of metadata failed before; the image takes no more writes until it is opened anew.
    ClosedForWriting,
    /// An offset or length outside the disk.
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// The image has no snapshot of that name or id.
    NoSuchSnapshot {
        /// What was asked for.
        wanted: String,
        /// What there is.
        present: Vec<String>,
    },
    /// The image has several snapshots of that name.
    AmbiguousSnapshot {
        /// What was asked for.
        wanted: String,
        /// Their ids.
        ids: Vec<String>,
    },
    /// The snapshot was deleted while somebody still looked at it.
    SnapshotGone {
        /// Its name.
        name: String,
    },
    /// The chain has no such member.
    NoSuchMember {
        /// What was asked for.
        wanted: String,
        /// How many members there are.
        count: usize,
    },
    /// An argument that makes no sense.
    Usage {
        /// What is wrong with it.
        message: String,
    },
    /// Nothing of ours is mounted there.
    NotMounted,
    /// Nobody takes commands for a mount.
    Unreachable {
        /// Why not.
        reason: String,
    },
    /// A copy that shall share data can't.
    NotShared {
        /// The file that has the data.
        file: PathBuf,
        /// Where.
        range: Range<u64>,
        /// Why not.
        reason: String,
    },
    /// Only its owner and root may manage a mount.
    OfAnotherUser {
        /// The owner's number.
        owner: u32,
    },
    /// A mount is gone, and has not said whether it did what it was asked for.
    Ended,
    /// The mountpoint can't be used.
    Mountpoint {
        /// Why not.
        reason: String,
    },
    /// Somebody still uses the mount.
    Busy {
        /// The processes and devices, as far as they can be seen.
        holders: Vec<String>,
    },
    /// The disk was to become another one, and somebody could write to it.
    OpenForWriting {
        /// As in [`Problem::Busy`].
        holders: Vec<String>,
    },
    /// An internal snapshot was to be deleted, and somebody has its disk open or its scratch twin holds changes.
    SnapshotInUse {
        /// Its name.
        name: String,
        /// As in [`Problem::Busy`].
        holders: Vec<String>,
    },
    /// A helper program failed or is not there.
    Helper {
        /// The program.
        program: &'static str,
        /// What it said.
        message: String,
    },
    /// The image is no longer the active layer: another one was put on top of it.
    Retired,
    /// The name of an open file leads to another one by now.
    Moved,
    /// The backing file is not as its overlay, the file that the error concerns, remembers it.
    BaseChanged {
        /// The backing file.
        base: PathBuf,
        /// What is remembered of it.
        recorded: FileState,
        /// What it is. Where this is the same, its bytes are others.
        found: FileState,
    },
    /// What the process behind a mount could not do, in its words.
    Remote {
        /// See [`Error::headline`].
        headline: String,
        /// See [`Error::reason`].
        reason: Option<String>,
        /// See [`Error::advice`].
        advice: Option<String>,
        /// See [`Error::kind`].
        kind: Kind,
    },
    /// The operating system said no.
    Io {
        /// What was being done, as a verb phrase: "read the L1 table".
        action: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// What a look at a file tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileState {
    /// Length in bytes.
    pub len: u64,
    /// When it was last modified, in nanoseconds since 1970.
    pub modified: i128,
}

/// Marks in a header that forbid writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepairMark {
    /// Incompatible bit 0: refcounts may be wrong.
    Dirty,
    /// Incompatible bit 1: structures may be wrong.
    Corrupt,
}

/// What another process does with an image that we want.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtherUse {
    /// It writes, or may write.
    Writes,
    /// It reads and does not tolerate a writer.
    Reads,
}

/// A process as an error message shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its name, from `/proc/PID/comm`.
    pub name: String,
}

/// Classes of errors that a script can branch on (see `cli::exit`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Anything without a class of its own.
    Failed,
    /// A wrong argument.
    Usage,
    /// An image, member or snapshot is not there.
    NotFound,
    /// Another process holds the image.
    Locked,
    /// The key of an encrypted image is missing or wrong.
    Key,
    /// The policy on implied opens refused a file.
    Policy,
    /// The image needs a feature that is not supported.
    Unsupported,
}

impl Error {
    /// The error for `problem`, without a file yet.
    pub fn new(problem: Problem) -> Self {
        Self(Box::new(Inner { path: None, named_by: None, problem }))
    }

    /// An answer of the operating system, with what was being done.
    pub fn io(action: &'static str, source: io::Error) -> Self {
        Self::new(Problem::Io { action, source })
    }

    /// Impossible metadata.
    pub fn corrupt(what: impl Into<String>) -> Self {
        Self::new(Problem::Corrupt { what: what.into() })
    }

    /// Compressed data that is damaged.
    pub fn broken_data(what: impl Into<String>) -> Self {
        Self::new(Problem::BrokenData { what: what.into() })
    }

    /// A field that holds what the format does not allow.
    pub fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::new(Problem::Invalid { field, reason: reason.into() })
    }

    /// A feature that is refused by its name.
    pub fn unsupported(feature: impl Into<String>) -> Self {
        Self::new(Problem::Unsupported { feature: feature.into() })
    }

    /// An argument that makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Problem::Usage { message: message.into() })
    }

    /// Names the file that the error concerns, unless a floor below has named it already.
    #[must_use]
    pub fn at(mut self, path: &Path) -> Self {
        self.0.path.get_or_insert_with(|| path.to_path_buf());
        self
    }

    /// Says that the file is the backing file of `image`: the user need never have heard of it.
    #[must_use]
    pub fn named_by(mut self, image: &Path) -> Self {
        self.0.named_by = Some(image.to_path_buf());
        self
    }

    /// What went wrong.
    pub fn problem(&self) -> &Problem {
        &self.0.problem
    }

    /// The file that the error concerns, where there is one.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The class that decides the exit code.
    pub fn kind(&self) -> Kind {
        match &self.0.problem {
            Problem::NotFound
            | Problem::BackingMissing { .. }
            | Problem::NoSuchSnapshot { .. }
            | Problem::SnapshotGone { .. }
            | Problem::NoSuchMember { .. } => Kind::NotFound,
            Problem::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Kind::NotFound
            }
            Problem::Locked { .. } | Problem::WrittenElsewhere { .. } => Kind::Locked,
            Problem::KeyMissing | Problem::WrongKey => Kind::Key,
            Problem::Refused { .. } | Problem::BaseChanged { .. } => Kind::Policy,
            Problem::Unsupported { .. } | Problem::ReadableOnly { .. } => Kind::Unsupported,
            Problem::Usage { .. } | Problem::AmbiguousSnapshot { .. } => Kind::Usage,
            Problem::Remote { kind, .. } => *kind,
            _ => Kind::Failed,
        }
    }

    /// What a system call on the mount answers.
    pub fn errno(&self) -> i32 {
        match &self.0.problem {
            Problem::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Problem::NotFound | Problem::NoSuchSnapshot { .. } | Problem::NoSuchMember { .. } => {
                libc::ENOENT
            }
            Problem::ReadOnly | Problem::BesideWriter => libc::EROFS,
            Problem::SizeIsFixed => libc::EPERM,
            Problem::OutOfRange { .. } => libc::ENOSPC,
            Problem::SnapshotGone { .. } => libc::ESTALE,
            Problem::Usage { .. } | Problem::AmbiguousSnapshot { .. } => libc::EINVAL,
            Problem::Unsupported { .. } => libc::EOPNOTSUPP,
            Problem::Locked { .. }
            | Problem::Busy { .. }
            | Problem::OpenForWriting { .. }
            | Problem::SnapshotInUse { .. } => libc::EBUSY,
            Problem::Exists | Problem::ExistsUnforced | Problem::PartOfChain => libc::EEXIST,
            _ => libc::EIO,
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({:?})", self.0.problem, self.0.path)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.problem {
            Problem::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Names the file on the error side of a result.
pub trait At<T> {
    /// See [`Error::at`].
    ///
    /// # Errors
    /// The one that was there, with the name.
    fn at(self, path: &Path) -> Result<T>;
}

impl<T> At<T> for Result<T> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|error| error.at(path))
    }
}

/// Says what was being done when the operating system said no.
pub trait Doing<T> {
    /// See [`Error::io`].
    ///
    /// # Errors
    /// The operating system's answer, with what was being done.
    fn doing(self, action: &'static str) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, action: &'static str) -> Result<T> {
        self.map_err(|source| Error::io(action, source))
    }
}

impl<T> Doing<T> for nix::Result<T> {
    fn doing(self, action: &'static str) -> Result<T> {
        self.map_err(|errno| Error::io(action, errno.into()))
    }
}
