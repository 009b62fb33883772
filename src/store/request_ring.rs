//! One place in a queue of the kernel's FUSE, over io_uring: it hands a request over in memory that both share, and takes
//! the answer to it together with the wish for the next.
//!
//! The kernel's Documentation/filesystems/fuse-io-uring.rst. Here because only this floor talks to the kernel about memory; what the
//! requests mean is said elsewhere.
#![allow(unsafe_code, reason = "memory that the kernel writes to, each use with its reason")]

use std::fs::File;
use std::io;
use std::mem::{ManuallyDrop, size_of};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use memmap2::MmapMut;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What the header has for itself, so that the payload begins with a page.
const HEADER_SPACE: usize = 4096;
/// Where in that space the two `struct iovec` are.
const PLACES: usize = 2048;
/// Where `struct io_uring_sqe` says how many pieces of memory `addr` is about.
const LEN_IN_ENTRY: usize = 24;
const _: () = assert!(size_of::<Entry128>() == 128);

/// How long to wait when the kernel is short of memory.
const AFTER_SHORTAGE: Duration = Duration::from_millis(1);

/// `FUSE_IO_URING_CMD_REGISTER`: a new place waits for its first request.
const REGISTER: u32 = 1;
/// `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`: here is the answer, and what is next?
const COMMIT_AND_FETCH: u32 = 2;

/// A request, or the answer to one, without its payload: `struct fuse_uring_req_header`.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RequestHeader {
    /// The header of the request, or of its answer.
    pub header: [u8; 128],
    /// What belongs to this operation alone.
    pub operation: [u8; 128],
    flags: u64,
    commit_id: u64,
    payload_len: u32,
    padding: u32,
    reserved: u64,
}

/// A request in the memory that is shared with the kernel, and the place for the answer.
pub struct Request<'a> {
    /// All but the payload.
    pub header: &'a mut RequestHeader,
    /// As long as a payload can be; of a request, the first [`RequestHeader::payload_len`] bytes count.
    pub payload: &'a mut [u8],
}

impl RequestHeader {
    /// Bytes of the payload that belong to the request.
    pub fn payload_len(&self) -> usize {
        self.payload_len as usize
    }
}

/// What each command to the kernel carries: `struct fuse_uring_cmd_req`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Command {
    flags: u64,
    commit_id: u64,
    queue: u16,
    padding: [u8; 6],
}

/// A place in a queue, for one request at a time, used by one thread.
pub struct RequestRing {
    ring: IoUring<Entry128, cqueue::Entry>,
    device: Arc<File>,
    queue: u16,
    /// A [`RequestHeader`] at the start, then where that and the payload are, for the kernel; the payload from the second page
    /// on. Not given back while the kernel may write to it.
    memory: ManuallyDrop<MmapMut>,
    /// The kernel has been asked for a request and has not answered.
    under_way: bool,
}

impl RequestRing {
    /// A place in the queue of the processor `queue` of the connection `device`, for payloads of at most `payload` bytes.
    ///
    /// # Errors
    /// No io_uring, or none for us; no memory.
    pub fn new(device: Arc<File>, queue: u16, payload: usize) -> io::Result<Self> {
        let ring = IoUring::<Entry128, cqueue::Entry>::builder().setup_submit_all().build(1)?;
        let mut memory = MmapMut::map_anon(HEADER_SPACE + payload)?;
        let start = memory.as_mut_ptr().expose_provenance();
        let places = [start, size_of::<RequestHeader>(), start + HEADER_SPACE, payload];
        memory[PLACES..][..size_of_val(&places)].copy_from_slice(places.as_bytes());
        let memory = ManuallyDrop::new(memory);
        Ok(Self { ring, device, queue, memory, under_way: false })
    }

    /// Takes the place in the queue, and waits for the first request. From then on the calling thread is the one that serves it.
    ///
    /// # Errors
    /// A kernel that doesn't let us.
    pub fn register(&mut self) -> io::Result<Request<'_>> {
        self.exchange(REGISTER, 0)
    }

    /// Gives the answer that is in the memory, with a payload of `len` bytes, and waits for the next request.
    ///
    /// # Errors
    /// `ENOTCONN` when there will be none.
    pub fn answer(&mut self, len: usize) -> io::Result<Request<'_>> {
        let header = self.parts().header;
        header.payload_len = u32::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let commit_id = header.commit_id;
        self.exchange(COMMIT_AND_FETCH, commit_id)
    }

    fn exchange(&mut self, code: u32, commit_id: u64) -> io::Result<Request<'_>> {
        let mut command = [0; 80];
        let fields = Command { flags: 0, commit_id, queue: self.queue, padding: [0; 6] };
        command[..size_of::<Command>()].copy_from_slice(fields.as_bytes());
        let places = self.memory[PLACES..].as_ptr().expose_provenance() as u64;
        let device = types::Fd(self.device.as_raw_fd());
        let mut entry =
            opcode::UringCmd80::new(device, code).cmd(command).addr(Some(places)).build();
        // SAFETY: the entry is the kernel's structure of 128 bytes, and the four at 24 are its `len`, which the library sets
        // for other operations only.
        unsafe { (&raw mut entry).cast::<u32>().byte_add(LEN_IN_ENTRY).write(2) };
        // SAFETY: the descriptor is open as long as `device` is there. The memory at `places`, and what that tells of,
        // stays mapped until it has answered: `drop` sees to that. Nobody here looks at it meanwhile, since `self` is borrowed.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
        self.under_way = true;
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Somebody waits for the answer: where the kernel is short of something, it gets it later.
                Err(error) if is_shortage(&error) => thread::sleep(AFTER_SHORTAGE),
                Err(error) => return Err(error),
            }
            let Some(answer) = self.ring.completion().next() else { continue };
            self.under_way = false;
            return match answer.result() {
                0 => Ok(self.parts()),
                error => Err(io::Error::from_raw_os_error(-error)),
            };
        }
    }

    fn parts(&mut self) -> Request<'_> {
        let (header, payload) = self.memory.split_at_mut(HEADER_SPACE);
        let header = RequestHeader::mut_from_prefix(header).map(|(header, _)| header);
        Request { header: header.expect("a page has room for a header and is aligned"), payload }
    }
}

fn is_shortage(error: &io::Error) -> bool {
    let shortages = [libc::EAGAIN, libc::EBUSY, libc::ENOMEM];
    error.raw_os_error().is_some_and(|errno| shortages.contains(&errno))
}

impl Drop for RequestRing {
    fn drop(&mut self) {
        // What the kernel may still write to is lost rather than given to somebody else.
        if !self.under_way {
            // SAFETY: this is the end of `self`, so that nobody uses `memory` any more.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}
