//! Requests by way of io_uring: each processor has a queue of its own, and an answer and the next request change hands in one
//! system call.
//!
//! The threads of a queue may run on any processor: bound to the queue's own they were no faster with small requests, and
//! those that belong to one large read would wait for each other.
//!
//! `fuser` doesn't know this way. What goes over it is decoded in `serve`, with the structures of `wire`; a connection that is
//! begun so is served so to its end, also what the kernel still sends to the device.

mod serve;
mod wire;

use std::fs::{self, File};
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use fuser::InitFlags;
use rustix::param::page_size;
use zerocopy::{FromBytes, IntoBytes};

use self::serve::{Asked, serve};
use self::wire::{
    InHeader, InitIn, InitOut, InvalEntry, InvalInode, MAJOR, MINOR, OutHeader, WriteIn, notice,
    opcode,
};
use super::service::{MAX_BACKGROUND, MAX_REQUEST, Service, WANTED};
use super::tree::Outdated;
use crate::processors;
use crate::store::{Request, RequestHeader, RequestRing};

/// Threads that are many on any machine; on a large one fewer of them belong to each processor.
const MANY_THREADS: usize = 128;
/// What the kernel wants to have room for besides a payload when it is asked for a request by the device.
const REQUEST_ROOM: usize = MAX_REQUEST as usize + 4096;

/// A connection whose requests come by io_uring.
pub(super) struct RingSession {
    device: Arc<File>,
    service: Arc<Service>,
    servants: Vec<Servant>,
}

/// A thread with a place in a queue, which it takes when it is told to begin. If nobody will tell it, it ends.
struct Servant {
    begin: Sender<()>,
    thread: JoinHandle<io::Result<()>>,
}

/// Tells the kernel something unasked.
pub(super) struct Notifier(Arc<File>);

impl RingSession {
    /// Makes all ready to serve `connection` with at most `threads` threads, as far as each processor has one. Nothing has been
    /// said to the kernel then. `None` where this machine doesn't have this way.
    ///
    /// The kernel serves nobody before each queue has a place: what can fail does so here, before it is told of any.
    pub fn prepare(
        service: &Arc<Service>,
        connection: BorrowedFd<'_>,
        threads: Option<usize>,
    ) -> Option<Self> {
        let queues = processors::possible().filter(|_| is_enabled())?;
        let each = threads_a_queue(queues, threads);
        let prepare = || {
            let device = Arc::new(File::from(connection.try_clone_to_owned()?));
            let numbers = (0..queues).flat_map(|queue| std::iter::repeat_n(queue, each));
            let servants = numbers.map(|queue| Servant::hire(queue, service, &device));
            let servants = servants.collect::<io::Result<_>>()?;
            Ok(Self { device, service: service.clone(), servants })
        };
        let prepared: io::Result<_> = prepare();
        prepared
            .inspect_err(|error| log::warn!("going on without FUSE over io_uring: {error}"))
            .ok()
    }

    /// Answers the kernel's first request.
    ///
    /// # Errors
    /// A kernel whose protocol is another.
    pub fn begin(&self) -> io::Result<()> {
        shake_hands(&self.device)
    }

    /// A way to tell the kernel something.
    pub fn notifier(&self) -> Notifier {
        Notifier(self.device.clone())
    }

    /// Answers requests until the mount is gone.
    ///
    /// # Errors
    /// A connection that breaks.
    pub fn run(self) -> io::Result<()> {
        for servant in &self.servants {
            // One that is not there any more has run into a bug, which joining it tells.
            let _ = servant.begin.send(());
        }
        let mut served = serve_device(&self.service, &self.device);
        for Servant { thread, .. } in self.servants {
            let ended = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            served = served.and(ended);
        }
        served
    }
}

impl Servant {
    fn hire(queue: u16, service: &Arc<Service>, device: &Arc<File>) -> io::Result<Self> {
        let place = RequestRing::new(device.clone(), queue, MAX_REQUEST as usize)?;
        let (service, device) = (service.clone(), device.clone());
        let (begin, begun) = mpsc::channel();
        let work = move || match begun.recv() {
            Ok(()) => serve_place(place, &service, &device),
            Err(_) => Ok(()),
        };
        let thread = thread::Builder::new().name(format!("fuse-{queue}")).spawn(work)?;
        Ok(Self { begin, thread })
    }
}

impl Notifier {
    /// Makes the kernel forget what it can't rely on any more.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it didn't know it.
    pub fn forget(&self, outdated: &Outdated) -> io::Result<()> {
        match outdated {
            Outdated::Name { parent, name } => {
                let namelen = name.len() as u32;
                let what = InvalEntry { parent: parent.0, namelen, flags: 0 };
                send(&self.0, notice::INVAL_ENTRY, 0, &[what.as_bytes(), name.as_bytes(), &[0]])
            }
            Outdated::Content(inode) => {
                let what = InvalInode { ino: inode.0, off: 0, len: 0 };
                send(&self.0, notice::INVAL_INODE, 0, &[what.as_bytes()])
            }
        }
    }
}

/// How many threads serve each queue. One that waits for a disk does not answer, and a disk that is far away is fast only if it
/// is asked for much at once, maybe all from one processor. Of the threads that are free the kernel takes the one that was
/// last at work, so that more cost little.
fn threads_a_queue(queues: u16, wanted: Option<usize>) -> usize {
    let queues = usize::from(queues);
    wanted.map_or((MANY_THREADS / queues).clamp(4, 16), |threads| (threads / queues).max(1))
}

/// Whether the kernel offers this way: who runs the machine decides that.
fn is_enabled() -> bool {
    fs::read_to_string("/sys/module/fuse/parameters/enable_uring")
        .is_ok_and(|value| value.trim() == "Y")
}

/// Agrees with the kernel on what each can.
fn shake_hands(device: &File) -> io::Result<()> {
    let mut room = vec![0; REQUEST_ROOM];
    let len = receive(device, &mut room)?.ok_or(ErrorKind::NotConnected)?;
    let invalid = || io::Error::new(ErrorKind::InvalidData, "the kernel's first request is none");
    let (header, rest) = InHeader::read_from_prefix(&room[..len]).map_err(|_| invalid())?;
    let (init, _) = InitIn::read_from_prefix(rest).map_err(|_| invalid())?;
    if header.opcode != opcode::INIT || init.major != MAJOR {
        return Err(invalid());
    }
    let offered = InitFlags::from_bits_retain(u64::from(init.flags) | u64::from(init.flags2) << 32);
    let wanted = WANTED
        | InitFlags::FUSE_ASYNC_READ
        | InitFlags::FUSE_BIG_WRITES
        | InitFlags::FUSE_MAX_PAGES
        | InitFlags::FUSE_INIT_EXT
        | InitFlags::FUSE_OVER_IO_URING;
    let agreed = (offered & wanted).bits();
    let answer = InitOut {
        major: MAJOR,
        minor: MINOR,
        max_readahead: init.max_readahead,
        flags: agreed as u32,
        flags2: (agreed >> 32) as u32,
        max_background: MAX_BACKGROUND,
        congestion_threshold: MAX_BACKGROUND / 4 * 3,
        max_write: MAX_REQUEST,
        max_pages: (MAX_REQUEST as usize / page_size()) as u16,
        time_gran: 1,
        ..InitOut::default()
    };
    send(device, 0, header.unique, &[answer.as_bytes()])
}

/// Serves one place in a queue, to the end.
fn serve_place(mut place: RequestRing, service: &Service, device: &File) -> io::Result<()> {
    let mut next = place.register();
    loop {
        let len = match next {
            Ok(request) => serve_request(service, request),
            Err(error) if is_end(&error) => return Ok(()),
            Err(error) => {
                // The kernel goes back to the device where it refuses a place.
                log::warn!("a thread goes on without FUSE over io_uring: {error}");
                return serve_device(service, device);
            }
        };
        next = place.answer(len);
    }
}

/// Puts the answer where the request was. Answers the length of its payload.
fn serve_request(service: &Service, request: Request<'_>) -> usize {
    let given = request.header.payload_len();
    let RequestHeader { header, operation, .. } = request.header;
    let asked = InHeader::read_from_prefix(header).expect("it has 128 bytes").0;
    let served = serve(service, &Asked { header: &asked, operation, given }, request.payload);
    let (error, len) = match served {
        Ok(len) => (0, len),
        Err(errno) => (-(errno as i32), 0),
    };
    let answer = OutHeader { len: answer_len(len), error, unique: asked.unique };
    header[..size_of::<OutHeader>()].copy_from_slice(answer.as_bytes());
    len
}

/// Serves what comes by the device, to the end: what needs no answer, and everything where the kernel went back to this way.
fn serve_device(service: &Service, device: &File) -> io::Result<()> {
    let (mut room, mut payload) = (vec![0; REQUEST_ROOM], Vec::new());
    while let Some(len) = receive(device, &mut room)? {
        let Ok((header, body)) = InHeader::read_from_prefix(&room[..len]) else { continue };
        // Interrupts, too, need none: what is under way comes to its end.
        if matches!(header.opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) {
            continue;
        }
        let (operation, given) = match header.opcode {
            opcode::LOOKUP => (&[][..], body),
            opcode::WRITE => body.split_at(body.len().min(size_of::<WriteIn>())),
            _ => (body, &[][..]),
        };
        payload.resize(REQUEST_ROOM, 0);
        payload[..given.len()].copy_from_slice(given);
        let asked = Asked { header: &header, operation, given: given.len() };
        let sent = match serve(service, &asked, &mut payload) {
            Ok(len) => send(device, 0, header.unique, &[&payload[..len]]),
            Err(errno) => send(device, -(errno as i32), header.unique, &[]),
        };
        if let Err(error) = sent {
            // Whoever asked may be gone.
            log::debug!("an answer was not taken: {error}");
        }
    }
    Ok(())
}

/// The next request from the device, of so many bytes; `None` when there will be none.
fn receive(mut device: &File, room: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match device.read(room) {
            Ok(len) => return Ok(Some(len)),
            Err(error) if is_end(&error) => return Ok(None),
            // A request that was taken back meanwhile is no error.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::NotFound
                ) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Sends an answer or, with 0 for `unique`, a notice.
fn send(mut device: &File, error: i32, unique: u64, parts: &[&[u8]]) -> io::Result<()> {
    let len = answer_len(parts.iter().map(|part| part.len()).sum());
    let header = OutHeader { len, error, unique };
    let mut slices = vec![IoSlice::new(header.as_bytes())];
    slices.extend(parts.iter().map(|part| IoSlice::new(part)));
    // The kernel takes it at once or not at all.
    device.write_vectored(&slices).map(|_| ())
}

fn answer_len(payload: usize) -> u32 {
    (size_of::<OutHeader>() + payload) as u32
}

/// Whether an error only says that the mount is gone.
fn is_end(error: &io::Error) -> bool {
    let ends = [libc::ENODEV, libc::ENOTCONN, libc::ECONNABORTED];
    error.raw_os_error().is_some_and(|errno| ends.contains(&errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_queue_has_a_thread_and_by_default_others_for_when_that_waits() {
        assert_eq!(threads_a_queue(2, None), 16);
        assert_eq!(threads_a_queue(16, None), 8);
        assert_eq!(threads_a_queue(256, None), 4);
        assert_eq!(threads_a_queue(2, Some(1)), 1);
        assert_eq!(threads_a_queue(2, Some(16)), 8);
    }
}
