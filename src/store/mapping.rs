//! A file's bytes without copying them, for the kernel to take from the page cache.
#![allow(unsafe_code, reason = "maps of files, each use with its reason")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{MmapOptions, MmapRaw, UncheckedAdvice};

/// A file in the address space.
pub struct Mapping {
    map: MmapRaw,
    /// Parts of it are mapped.
    in_use: AtomicBool,
}

impl Mapping {
    /// All of `file`, as long as it is now.
    ///
    /// # Errors
    /// The operating system's answer; an empty file.
    pub fn new(file: &File) -> io::Result<Arc<Self>> {
        let map = MmapOptions::new().map_raw_read_only(file)?;
        Ok(Arc::new(Self { map, in_use: AtomicBool::new(false) }))
    }

    /// The bytes of `range`, if they are mapped. Whether the file still has them is for the caller to know; see
    /// [`MappedRun::bytes`] for what happens if not.
    pub fn run(self: &Arc<Self>, range: Range<u64>) -> Option<MappedRun> {
        let (start, end) = (usize::try_from(range.start).ok()?, usize::try_from(range.end).ok()?);
        if start >= end || end > self.map.len() {
            return None;
        }
        self.in_use.store(true, Ordering::Relaxed);
        Some(MappedRun { mapping: self.clone(), start, len: end - start })
    }

    /// Maps nothing until the next [`Self::run`], so that the page cache does not count as this process's memory for ever.
    pub fn let_go(&self) {
        if !self.in_use.swap(false, Ordering::Relaxed) {
            return;
        }
        // SAFETY: the mapping is shared and read-only, so that no bytes are lost: they stay in the page cache, and whoever
        // uses them here at the moment gets them again from there.
        let done = unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) };
        if let Err(error) = done {
            log::debug!("could not unmap a file: {error}");
        }
    }
}

/// A part of a mapped file.
pub struct MappedRun {
    mapping: Arc<Mapping>,
    start: usize,
    len: usize,
}

impl MappedRun {
    /// The bytes, for system calls only: whoever cuts the file now turns touching them into SIGBUS, but makes a system call
    /// that reads them fail.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `Mapping::run` has checked that the range is inside the mapping, which lives as long as `self`. The file is
        // a member that nobody may write; if somebody does, the kernel, which alone reads these bytes, gets either content.
        unsafe { std::slice::from_raw_parts(self.mapping.map.as_ptr().add(self.start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn bytes_are_those_of_the_file_until_it_is_cut() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..100_000_u32).map(|index| (index % 251) as u8).collect();
        file.write_all(&bytes).unwrap();
        let mapping = Mapping::new(&file).unwrap();
        assert_eq!(mapping.run(5000..70_000).unwrap().bytes(), &bytes[5000..70_000]);
        assert!(mapping.run(90_000..100_001).is_none());
        assert!(mapping.run(7..7).is_none());
        let run = mapping.run(5000..70_000).unwrap();
        mapping.let_go();
        assert_eq!(run.bytes(), &bytes[5000..70_000]);
        file.set_len(40_000).unwrap();
        assert_eq!(mapping.run(0..30_000).unwrap().bytes(), &bytes[..30_000]);
        // System calls fail on what was cut off, and nobody is killed.
        let (_reader, writer) = nix::unistd::pipe().unwrap();
        let cut = mapping.run(50_000..60_000).unwrap();
        assert_eq!(nix::unistd::write(writer, cut.bytes()), Err(nix::errno::Errno::EFAULT));
    }
}
