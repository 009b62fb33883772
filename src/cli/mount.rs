//! `qchainfs mount`.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{getegid, geteuid};

use super::background::{self, Role};
use super::mount_options::{ChangedBases, HELP, Options, Unknown};
use super::views::{ChainArgument, is_top, not_the_top};
use super::{exit, logging};
use crate::chain::{Address, Chain, Layer, MemberChoice, OpenOptions, View};
use crate::error::{Doing, Error, OtherUse, Problem, Result};
use crate::image::Writability;
use crate::mount::{BesideWriter, MountOptions, Ownership, Session, Stop, TreeOptions};
use crate::store::TemporaryDirectory;

const READ_ONLY: Writability = Writability::ReadOnly;

/// Show every member and snapshot of an image's chain as raw disk files
#[derive(clap::Args)]
#[command(allow_missing_positional = true)]
pub struct Arguments {
    /// Write nothing: the same as -o ro
    #[arg(short, long)]
    read_only: bool,
    /// Read beside a process that writes the image, such as a running virtual machine: shows the
    /// backing files and the internal snapshots, and not the active layer
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Stay in front
    #[arg(short, long)]
    foreground: bool,
    #[arg(short, value_name = "OPTIONS", help = HELP)]
    options: Vec<String>,
    #[command(flatten)]
    chain: ChainArgument,
    /// The top image of the chain, or the address of a view (IMAGE[N], IMAGE@SNAPSHOT): a
    /// read-only mount with that at its root
    #[arg(value_name = "ADDRESS", required_unless_present = "chain")]
    image: Option<OsString>,
    /// An empty directory; or a regular file, which then is the disk of that one view
    mountpoint: PathBuf,
}

/// A mount, ready to be done.
pub struct Plan {
    /// The view at the root; its image is absolute.
    pub address: Address,
    /// The address and the mountpoint as the user said them.
    pub said: (OsString, PathBuf),
    /// The files of the chain, the base first, where headers are not to be asked.
    pub layers: Option<Vec<Layer>>,
    /// The mountpoint, absolute.
    pub mountpoint: PathBuf,
    /// What was said behind `-o`.
    pub options: Options,
}

/// Runs the verb.
pub fn run(arguments: Arguments) -> Result<ExitCode> {
    let words = arguments.options.iter().map(String::as_str);
    let words = words.chain(arguments.force_share.then_some("force_share"));
    let mut options = Options::parse(words, Unknown::Refuse)?;
    if arguments.read_only {
        options.writability = match options.writability {
            Some(Writability::Writable) => {
                return Err(Error::usage("-r and -o rw contradict each other"));
            }
            Some(Writability::BesideWriter) => Some(Writability::BesideWriter),
            Some(Writability::ReadOnly) | None => Some(READ_ONLY),
        };
    }
    let plan = match (arguments.chain.layers()?, &arguments.image) {
        (None, Some(image)) => Plan::new(image, &arguments.mountpoint, options)?,
        (None, None) => return Err(Error::usage("an address is missing")),
        (Some(layers), address) => {
            Plan::composed(layers, address.as_ref(), &arguments.mountpoint, options)?
        }
    };
    if arguments.foreground { plan.serve_in_front() } else { plan.serve_in_background() }
}

impl Plan {
    /// Makes names absolute, so that they mean the same from any directory.
    pub fn new(image: &OsString, mountpoint: &Path, options: Options) -> Result<Self> {
        let mut address = Address::parse(image);
        address.image = absolute(&address.image)?;
        let said = (image.clone(), mountpoint.to_path_buf());
        Ok(Self { address, said, layers: None, mountpoint: absolute(mountpoint)?, options })
    }

    /// The same for a chain of `layers`; without an address, for the view of the last one.
    fn composed(
        mut layers: Vec<Layer>,
        address: Option<&OsString>,
        mountpoint: &Path,
        mut options: Options,
    ) -> Result<Self> {
        if options.writability == Some(Writability::Writable) {
            return Err(Error::usage("a chain by --chain can only be mounted read-only"));
        }
        options.writability = options.writability.or(Some(READ_ONLY));
        for layer in &mut layers {
            layer.path = absolute(&layer.path)?;
        }
        let mut address = match (address, layers.last()) {
            (Some(address), _) => Address::parse(address),
            (None, Some(top)) => {
                Address { image: top.path.clone(), member: MemberChoice::Index(0), snapshot: None }
            }
            (None, None) => return Err(Error::usage("a chain has at least one file")),
        };
        let image = address.image.clone().into_os_string();
        let said = (image, mountpoint.to_path_buf());
        address.image = absolute(&address.image)?;
        let mountpoint = absolute(mountpoint)?;
        Ok(Self { address, said, layers: Some(layers), mountpoint, options })
    }

    /// Mounts and returns once the mount answers.
    pub fn serve_in_background(&self) -> Result<ExitCode> {
        match background::split()? {
            Role::Launcher(code) => Ok(code),
            Role::Background => {
                logging::to_system();
                self.serve(background::ready)
            }
        }
    }

    fn serve_in_front(&self) -> Result<ExitCode> {
        logging::to_stderr();
        self.serve(|| {
            if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
                log::debug!("systemd could not be told: {error}");
            }
            Ok(())
        })
    }

    /// Mounts, calls `ready`, and serves until the end.
    fn serve(&self, ready: impl FnOnce() -> Result<()>) -> Result<ExitCode> {
        be_gentle_to_memory();
        // Until here a signal simply ends the program: nothing is mounted and nothing written.
        let (root, first_member) = self.open_root().map_err(|error| self.advised(error))?;
        if root.is_torn() && self.options.beside_writer == BesideWriter::Everything {
            log::warn!(
                "disk.raw is what is in the file of {}: another process may be writing it, and its bytes may be \
                 half of a change",
                self.address.image.display()
            );
        }
        self.look_at_bases(root.chain())?;
        let signals = block_signals()?;
        let session = Session::mount(root, &self.mount_options(first_member)?)?;
        stop_on(signals, session.stop())?;
        // The kernel queues what is asked before the first thread listens: the mount answers from here on.
        if let Err(error) = ready() {
            log::error!("{error}");
        }
        session.run()?;
        Ok(ExitCode::from(exit::DONE))
    }

    /// Opens the view at the root, and says which member of the image's chain it belongs to.
    fn open_root(&self) -> Result<(View, usize)> {
        if self.address.member == MemberChoice::Index(0) && self.address.snapshot.is_none() {
            return Ok((Arc::new(self.open_top()?).view(0)?, 0));
        }
        if self.options.writability == Some(Writability::Writable) {
            return Err(Error::usage("only the active layer can be mounted writable"));
        }
        let whole = Arc::new(self.open_chain(self.options.writability.unwrap_or(READ_ONLY))?);
        let view = self.address.find(&whole)?;
        let (index, snapshot) = (view.member(), view.snapshot_tree());
        drop(view);
        let part = Arc::into_inner(whole).ok_or_else(|| Error::usage("the chain is in use"))?;
        let part = Arc::new(part.from_member(index)?);
        let root = match snapshot {
            Some(snapshot) => part.snapshot_view(0, snapshot)?,
            None => part.view(0)?,
        };
        Ok((root, index))
    }

    /// Backing files must not change, and who changed one should hear of it.
    fn look_at_bases(&self, chain: &Chain) -> Result<()> {
        // Whoever says himself what the chain is does not ask what headers remember.
        if self.layers.is_some() {
            return Ok(());
        }
        for changed in chain.changed_bases()? {
            match self.options.changed_bases {
                ChangedBases::Refuse => return Err(changed),
                ChangedBases::Warn => log::warn!("{changed}"),
            }
        }
        Ok(())
    }

    /// `error`, or if another process writes the image, the way to see most of it all the same.
    fn advised(&self, error: Error) -> Error {
        let is_top = error.path() == Some(&self.address.image) && self.layers.is_none();
        match error.problem() {
            Problem::Locked { other: OtherUse::Writes, holders } if is_top => {
                let (address, mountpoint) = self.said.clone();
                let holders = holders.clone();
                let problem = Problem::WrittenElsewhere { holders, address, mountpoint };
                Error::new(problem).at(&self.address.image)
            }
            _ => error,
        }
    }

    fn open_options(&self, writability: Writability) -> OpenOptions {
        OpenOptions {
            writability,
            policy: self.options.policy.clone(),
            secrets: self.options.secrets.clone(),
            sharing: self.options.sharing,
            ..OpenOptions::default()
        }
    }

    /// Opens the whole chain: writable if the user says so or, if he says nothing, if the file is.
    fn open_top(&self) -> Result<Chain> {
        let wanted = self.options.writability.unwrap_or(Writability::Writable);
        match self.open_chain(wanted) {
            Err(error)
                if self.options.writability.is_none()
                    && is_write_protected(&error)
                    && error.path() == Some(&self.address.image) =>
            {
                log::warn!("{error}: mounting read-only");
                self.open_chain(READ_ONLY)
            }
            opened => opened,
        }
    }

    fn open_chain(&self, writability: Writability) -> Result<Chain> {
        let Some(layers) = &self.layers else {
            return Chain::open(&self.address.image, &self.open_options(writability));
        };
        let chain = Chain::compose(layers, &self.open_options(writability))?;
        if is_top(&chain, &self.address.image) { Ok(chain) } else { Err(not_the_top(&chain)) }
    }

    fn mount_options(&self, first_member: usize) -> Result<MountOptions> {
        let options = &self.options;
        let scratch = match &options.scratch {
            Some(directory) => Some(Arc::new(TemporaryDirectory::open(directory)?)),
            None => None,
        };
        Ok(MountOptions {
            mountpoint: self.mountpoint.clone(),
            tree: TreeOptions {
                image: self.address.image.clone(),
                first_member,
                ownership: Ownership {
                    uid: options.uid.unwrap_or_else(|| geteuid().as_raw()),
                    gid: options.gid.unwrap_or_else(|| getegid().as_raw()),
                    umask: options.umask,
                },
                growth: options.growth,
                discard: options.discard,
                scratch,
                beside_writer: options.beside_writer,
            },
            audience: options.audience,
            flags: options.flags.clone(),
            threads: options.threads,
            way: options.way,
        })
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).doing("find out the current directory")
}

/// Whether the file itself can't be written, rather than being locked or broken.
fn is_write_protected(error: &Error) -> bool {
    let Problem::Io { source, .. } = error.problem() else { return false };
    matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// Blocks the signals that end the program, before there are threads that could get them.
fn block_signals() -> Result<SigSet> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().doing("block signals")?;
    Ok(signals)
}

/// Ends the session when a signal comes.
fn stop_on(signals: SigSet, stop: Stop) -> Result<()> {
    let work = move || {
        while signals.wait().is_ok() {
            stop.request();
        }
    };
    thread::Builder::new().name("signals".into()).spawn(work).doing("start a thread")?;
    Ok(())
}

/// Tells the kernel that memory it wants back may depend on us: freeing it must not wait for our own files. Only the
/// mighty may say so; without it all works, but a machine that is out of memory can hang.
fn be_gentle_to_memory() {
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        log::debug!("could not become an I/O flusher: {error}");
    }
}
