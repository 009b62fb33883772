//! How the connection to the kernel's FUSE gets onto a mountpoint, and off it again.
//!
//! Root mounts by itself, everybody else through the setuid helper `fusermount3`. A mountpoint
//! `/dev/fd/N` is a connection that `mount.fuse3 -o drop_privileges` has mounted before it started
//! this program.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::{fstat, makedev};
use nix::sys::statfs::statfs;
use nix::unistd::{geteuid, getgid, getuid};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::in_use;
use super::mount_table::{TYPE, mount_on};
use super::tree::Layout;
use crate::error::{At, Doing, Error, Problem, Result};
use crate::image::Writability;

/// The part of [`TYPE`] behind the dot.
const SUBTYPE: &str = "qchainfs";

/// The device whose every open is a new connection.
const DEVICE: &str = "/dev/fuse";

/// Bytes that one read request asks for at most. The kernel splits what is larger into parts that are answered side by side,
/// of views that it caches, and parts of this size stay in the processors' caches.
const MAX_READ: u32 = 256 << 10;

/// The setuid helper, unless `FUSERMOUNT_PATH` names another.
const HELPER: &str = "fusermount3";
/// A program that starts another lets it have its open files for a moment: a mount that is busy may be idle soon.
const TRIES_WHILE_BUSY: u32 = 6;
const PAUSE_WHILE_BUSY: Duration = Duration::from_millis(40);

/// How a mount is to look to the kernel. It is always `nosuid`, `nodev` and `default_permissions`.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// The image, shown as the source of the mount; absolute, since `findmnt` knows no directory.
    pub source: PathBuf,
    /// Whether anything may be written.
    pub writability: Writability,
    /// Who may look inside.
    pub audience: Audience,
    /// What mount(8) was asked for beyond that.
    pub flags: Vec<MountFlag>,
}

/// Who may look inside a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// Only the user who mounted it; not even root.
    Owner,
    /// Everybody whom the file modes allow (`allow_other`).
    Everyone,
}

/// Flags of mount(8) that a FUSE mount can do with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountFlag {
    /// No file can be executed.
    NoExec,
    /// Access times are not kept.
    NoAtime,
}

impl MountFlag {
    fn name(self) -> &'static str {
        match self {
            Self::NoExec => "noexec",
            Self::NoAtime => "noatime",
        }
    }

    fn bit(self) -> MsFlags {
        match self {
            Self::NoExec => MsFlags::MS_NOEXEC,
            Self::NoAtime => MsFlags::MS_NOATIME,
        }
    }
}

/// Mounts onto `mountpoint`, a directory or a regular file, and returns the connection, on which
/// the kernel's INIT request waits.
///
/// What a crashed process of ours left mounted there is unmounted first. On `/dev/fd/N` nothing
/// is mounted and `options` are not used: the result is a duplicate of descriptor N, which itself
/// stays open.
///
/// # Errors
///
/// [`Problem::Mountpoint`] says why the place, or FUSE as a whole, can't be used;
/// [`Problem::Helper`] what `fusermount3` complains about; [`Problem::Io`] is any other refusal of
/// the kernel.
pub fn attach(mountpoint: &Path, options: &AttachOptions) -> Result<OwnedFd> {
    if let Some(number) = passed_descriptor(mountpoint) {
        return take_passed(number).at(mountpoint);
    }
    let place = find(mountpoint)?;
    make_room(&place).and_then(|()| attach_at(&place, options)).at(&place)
}

/// What can be mounted onto `mountpoint`, judged by what is there; dead mounts of ours are removed from it first.
///
/// # Errors
/// As [`attach`].
pub fn layout_at(mountpoint: &Path) -> Result<Layout> {
    if passed_descriptor(mountpoint).is_some() {
        // Where that is mounted can't be found out.
        return Ok(Layout::Directory);
    }
    let place = find(mountpoint)?;
    make_room(&place).and_then(|()| kind_of(&place)).at(&place).map(|kind| match kind {
        libc::S_IFREG => Layout::File,
        _ => Layout::Directory,
    })
}

fn find(mountpoint: &Path) -> Result<PathBuf> {
    resolve(mountpoint).map_err(|error| match error.errno() {
        libc::ENOENT => unusable("there is no such directory or file").at(mountpoint),
        _ => error,
    })
}

/// The type of `place` as `stat` says it, where it is one that can be mounted onto.
fn kind_of(place: &Path) -> Result<u32> {
    let kind = fs::metadata(place).doing("look at the mountpoint")?.mode() & libc::S_IFMT;
    if kind != libc::S_IFDIR && kind != libc::S_IFREG {
        return Err(unusable("it is neither a directory nor a regular file"));
    }
    Ok(kind)
}

/// How to treat those who still use a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detach {
    /// Leave the mount as it is while anybody uses it.
    WhenIdle,
    /// Take it out of the directory tree now; who has it open can go on until he closes it.
    Now,
}

/// Takes our mount off `mountpoint`. Does nothing for `/dev/fd/N`, where it is not ours to unmount.
///
/// # Errors
///
/// [`Problem::NotMounted`] if the topmost mount there is not ours, [`Problem::Busy`] if
/// [`Detach::WhenIdle`] found users, [`Problem::Helper`] if `fusermount3` failed.
pub fn detach(mountpoint: &Path, how: Detach) -> Result<()> {
    if passed_descriptor(mountpoint).is_some() {
        return Ok(());
    }
    let place = resolve(mountpoint)?;
    // umount(2) would as readily take away somebody else's file system.
    if mount_on(&place).is_none_or(|mount| mount.kind != TYPE) {
        return Err(Error::new(Problem::NotMounted).at(&place));
    }
    detach_from(&place, how).at(&place)
}

/// `mountpoint` without links and relative parts. The kernel finds a mountpoint without asking
/// what is mounted there, so that this works on dead mounts too.
pub(super) fn resolve(mountpoint: &Path) -> Result<PathBuf> {
    // A trailing slash, which `components` drops, would look inside.
    let mountpoint: PathBuf = mountpoint.components().collect();
    mountpoint.canonicalize().doing("find the mountpoint").at(&mountpoint)
}

/// N, if `mountpoint` is `/dev/fd/N`.
fn passed_descriptor(mountpoint: &Path) -> Option<RawFd> {
    let number: u16 = mountpoint.to_str()?.strip_prefix("/dev/fd/")?.parse().ok()?;
    Some(number.into())
}

fn take_passed(number: RawFd) -> Result<OwnedFd> {
    let (here, there) = UnixStream::pair().doing("create a pair of sockets")?;
    // A bare number becomes a descriptor with an owner by a trip through a socket.
    let rights = [number];
    let rights = [ControlMessage::ScmRights(&rights)];
    sendmsg::<()>(there.as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::empty(), None)
        .map_err(|_| unusable("there is no such open file descriptor"))?;
    let connection = receive_descriptor(&here)?;

    let status = fstat(&connection).doing("look at the file descriptor")?;
    if status.st_mode & libc::S_IFMT != libc::S_IFCHR || status.st_rdev != makedev(10, 229) {
        return Err(unusable("the file descriptor is not a FUSE connection"));
    }
    Ok(connection)
}

/// Removes dead mounts of ours from `place`.
fn make_room(place: &Path) -> Result<()> {
    while let Some(mount) = mount_on(place).filter(|mount| mount.kind == TYPE) {
        // Unlike stat(2), this is never answered from the kernel's caches.
        if !statfs(place).is_err_and(|errno| is_dead(errno as i32)) {
            return Err(unusable(format!("{} is mounted there already", mount.source.display())));
        }
        log::warn!("{}: unmounting what a crashed process left there", place.display());
        detach_from(place, Detach::Now)?;
    }
    Ok(())
}

/// Whether an error number says that the process behind a mount is dead, or just dying.
pub fn is_dead(errno: i32) -> bool {
    // The last is what a request gets that was to go over io_uring to a process that is ending.
    [libc::ENOTCONN, libc::ECONNABORTED, libc::ECANCELED].contains(&errno)
}

fn attach_at(place: &Path, options: &AttachOptions) -> Result<OwnedFd> {
    let kind = kind_of(place)?;
    if geteuid().is_root() {
        match attach_as_root(place, kind, options) {
            // Root of a container, perhaps.
            Err(error) if error.errno() == libc::EPERM => {
                log::debug!("{error}; trying {HELPER}");
            }
            done => return done,
        }
    }
    attach_by_helper(place, options)
}

fn attach_as_root(place: &Path, kind: u32, options: &AttachOptions) -> Result<OwnedFd> {
    let connection = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(|error| {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => no_fuse(),
            _ => Error::io("open /dev/fuse", error),
        }
    })?;
    let everyone = match options.audience {
        Audience::Owner => "",
        Audience::Everyone => ",allow_other",
    };
    let data = format!(
        "fd={},rootmode={kind:o},user_id={},group_id={},default_permissions,max_read={MAX_READ}{everyone}",
        connection.as_raw_fd(),
        getuid(),
        getgid(),
    );
    nix::mount::mount(
        Some(&options.source),
        place,
        Some(TYPE),
        mount_flags(options),
        Some(data.as_str()),
    )
    .map_err(|errno| match errno {
        Errno::ENODEV => no_fuse(),
        _ => Error::io("mount the file system", errno.into()),
    })?;
    Ok(connection.into())
}

fn mount_flags(options: &AttachOptions) -> MsFlags {
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if options.writability == Writability::ReadOnly {
        flags |= MsFlags::MS_RDONLY;
    }
    options.flags.iter().fold(flags, |flags, flag| flags | flag.bit())
}

fn attach_by_helper(place: &Path, options: &AttachOptions) -> Result<OwnedFd> {
    let (here, there) = UnixStream::pair().doing("create a pair of sockets")?;
    let arguments = [OsStr::new("-o"), &helper_options(options), OsStr::new("--"), place.as_ref()];
    // As standard input, the socket reaches the helper and no other child that is started now.
    run_helper(&arguments, OwnedFd::from(there).into()).map_err(|error| match error.problem() {
        Problem::Helper { message, .. } if message.contains("user_allow_other") => unusable(
            "a user may open his mount to others (allow_other) only where /etc/fuse.conf has a \
             line that says so: echo user_allow_other | sudo tee -a /etc/fuse.conf",
        ),
        _ => error,
    })?;
    receive_descriptor(&here)
}

/// The value of the helper's `-o`.
fn helper_options(options: &AttachOptions) -> OsString {
    let mut words = vec!["nosuid", "nodev", "default_permissions"];
    if options.writability == Writability::ReadOnly {
        words.push("ro");
    }
    if options.audience == Audience::Everyone {
        words.push("allow_other");
    }
    words.extend(options.flags.iter().map(|flag| flag.name()));

    let mut text =
        format!("{},max_read={MAX_READ},subtype={SUBTYPE},fsname=", words.join(",")).into_bytes();
    text.extend(escape(options.source.as_os_str()));
    OsString::from_vec(text)
}

/// `value` as an option list must have it, where a comma would begin the next option.
fn escape(value: &OsStr) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(value.len());
    for &byte in value.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    escaped
}

fn detach_from(place: &Path, how: Detach) -> Result<()> {
    for _ in 0..TRIES_WHILE_BUSY {
        match try_to_detach(place, how)? {
            Attempt::Done => return Ok(()),
            Attempt::Busy => thread::sleep(PAUSE_WHILE_BUSY),
        }
    }
    match try_to_detach(place, how)? {
        Attempt::Done => Ok(()),
        Attempt::Busy => Err(Error::new(Problem::Busy { holders: in_use::holders(place) })),
    }
}

/// How an attempt to unmount ended that has not failed for good.
enum Attempt {
    Done,
    Busy,
}

fn try_to_detach(place: &Path, how: Detach) -> Result<Attempt> {
    if geteuid().is_root() {
        let lazily = match how {
            Detach::WhenIdle => MntFlags::empty(),
            Detach::Now => MntFlags::MNT_DETACH,
        };
        match nix::mount::umount2(place, MntFlags::UMOUNT_NOFOLLOW | lazily) {
            Err(Errno::EPERM) => {}
            Err(Errno::EBUSY) => return Ok(Attempt::Busy),
            Err(Errno::EINVAL) => return Err(Error::new(Problem::NotMounted)),
            done => return done.doing("unmount the file system").map(|()| Attempt::Done),
        }
    }
    let lazily = match how {
        Detach::WhenIdle => "-u",
        Detach::Now => "-uz",
    };
    let arguments = [OsStr::new(lazily), OsStr::new("--"), place.as_ref()];
    let Err(error) = run_helper(&arguments, Stdio::null()) else { return Ok(Attempt::Done) };
    match error.problem() {
        Problem::Helper { message, .. } if message.contains("busy") => Ok(Attempt::Busy),
        // It looks only at mounts of the user who asks.
        Problem::Helper { message, .. } if message.contains("not found in") => {
            Err(Error::io("unmount the file system", Errno::EPERM.into()))
        }
        _ => Err(error),
    }
}

/// Runs `fusermount3`, which sends what it opens to its standard input.
fn run_helper(arguments: &[&OsStr], stdin: Stdio) -> Result<()> {
    let helper = |message| Error::new(Problem::Helper { program: HELPER, message });
    let program = env::var_os("FUSERMOUNT_PATH").unwrap_or_else(|| HELPER.into());
    let output = Command::new(&program)
        .args(arguments)
        .env("_FUSE_COMMFD", "0")
        .stdin(stdin)
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => helper(format!(
                "{} is not there, and without root's rights no mount is done or undone but by it: \
                 install the package fuse3, or name the program in FUSERMOUNT_PATH",
                Path::new(&program).display()
            )),
            _ => helper(error.to_string()),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint = complaint.trim().trim_start_matches("fusermount3: ");
    Err(helper(match complaint {
        "" => output.status.to_string(),
        _ => complaint.to_owned(),
    }))
}

/// The descriptor that waits in `socket`.
fn receive_descriptor(socket: &UnixStream) -> Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )
    .map_err(io::Error::from)
    .doing("receive the FUSE connection")?;

    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor
        .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
        .doing("receive the FUSE connection")
}

fn unusable(reason: impl Into<String>) -> Error {
    Error::new(Problem::Mountpoint { reason: reason.into() })
}

fn no_fuse() -> Error {
    unusable(
        "the kernel offers no FUSE here: sudo modprobe fuse (a container has to be started with \
         --device /dev/fuse --cap-add SYS_ADMIN)",
    )
}

#[cfg(test)]
mod tests {
    use super::super::mount_table::our_mount;
    use super::*;

    fn options(source: &str) -> AttachOptions {
        AttachOptions {
            source: source.into(),
            writability: Writability::ReadOnly,
            audience: Audience::Everyone,
            flags: vec![MountFlag::NoExec],
        }
    }

    #[test]
    fn an_image_name_cannot_smuggle_in_an_option() {
        assert_eq!(escape(OsStr::new(r"/a,suid\b")), br"/a\,suid\\b");
        assert_eq!(
            helper_options(&options("/a,dev.qcow2")),
            *format!(
                "nosuid,nodev,default_permissions,ro,allow_other,noexec,max_read={MAX_READ},subtype=qchainfs,\
                 fsname=/a\\,dev.qcow2"
            )
        );
    }

    #[test]
    fn only_a_number_below_dev_fd_is_a_passed_descriptor() {
        assert_eq!(passed_descriptor(Path::new("/dev/fd/7")), Some(7));
        assert_eq!(passed_descriptor(Path::new("/dev/fd/-1")), None);
        assert_eq!(passed_descriptor(Path::new("/dev/fd/7/x")), None);
        assert_eq!(passed_descriptor(Path::new("/mnt")), None);
    }

    #[test]
    fn a_passed_descriptor_must_be_a_fuse_connection() {
        let file = fs::File::open("/dev/null").expect("open /dev/null");
        let path = format!("/dev/fd/{}", file.as_raw_fd());
        let error = attach(Path::new(&path), &options("/a")).expect_err("not /dev/fuse");
        assert!(matches!(error.problem(), Problem::Mountpoint { .. }), "{error}");
        let error = attach(Path::new("/dev/fd/60000"), &options("/a")).expect_err("not open");
        assert!(matches!(error.problem(), Problem::Mountpoint { .. }), "{error}");
    }

    #[test]
    fn a_mountpoint_of_another_kind_is_not_ours_to_unmount() {
        assert_eq!(our_mount(Path::new("/proc/")), None);
        let error = detach(Path::new("/proc"), Detach::WhenIdle).expect_err("not ours");
        assert!(matches!(error.problem(), Problem::NotMounted), "{error}");
    }

    #[test]
    fn a_mountpoint_must_be_there_and_hold_something() {
        for place in ["/no/such/place", "/dev/null"] {
            let error = attach(Path::new(place), &options("/a")).expect_err("unusable");
            assert!(matches!(error.problem(), Problem::Mountpoint { .. }), "{error}");
        }
    }
}
