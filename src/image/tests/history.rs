//! What a disk may hold after a power cut.

use super::*;

/// A guest's disk writes a sector whole or not at all.
pub const SECTOR: usize = 512;

/// The states of a disk since the last flush, and its snapshots.
pub struct History {
    states: Vec<Vec<u8>>,
    /// Bytes that are old or new as one.
    grain: usize,
    /// A change was told to have failed: later flushes promise nothing about it.
    pub failed: bool,
    snapshots: Vec<(String, Vec<u8>)>,
    /// The snapshot that is being made.
    beginning: Option<String>,
}

impl History {
    pub fn new(disk: Vec<u8>, grain: usize) -> Self {
        Self { states: vec![disk], grain, failed: false, snapshots: Vec::new(), beginning: None }
    }

    pub fn newest(&self) -> &Vec<u8> {
        &self.states[self.states.len() - 1]
    }

    /// All that was changed so far is durable.
    pub fn flushed(&mut self) {
        if !self.failed {
            self.states.drain(..self.states.len() - 1);
        }
    }

    /// `change` is being made.
    pub fn changes(&mut self, change: Change) {
        let mut next = self.newest().clone();
        change.apply_to_model(&mut next);
        self.states.push(next);
    }

    /// The disk is being made longer or shorter.
    pub fn resizes(&mut self, size: u64) {
        let mut next = self.newest().clone();
        next.resize(size as usize, 0);
        self.states.push(next);
    }

    /// A snapshot is being made.
    pub fn begins_snapshot(&mut self, name: &str) {
        self.beginning = Some(name.to_owned());
    }

    /// The snapshot that was begun is there, or could not be made.
    pub fn ends_snapshot<T, E>(&mut self, result: &std::result::Result<T, E>) {
        let name = self.beginning.take().expect("a snapshot was begun");
        if result.is_ok() {
            self.snapshots.push((name, self.newest().clone()));
            self.flushed();
        }
    }

    /// Panics unless each sector, or byte, of `found` is what it was at the last flush or at any time since.
    pub fn assert_allows(&self, found: &[u8], context: &str) {
        let sizes: Vec<usize> = self.states.iter().map(Vec::len).collect();
        assert!(sizes.contains(&found.len()), "{context}: {} bytes, not {sizes:?}", found.len());
        for (index, piece) in found.chunks(self.grain).enumerate() {
            let at = index * self.grain;
            assert!(
                self.states.iter().any(|disk| disk.get(at..at + piece.len()) == Some(piece)),
                "{context}: what is at byte {at} (now {:#x}) is neither old nor new",
                piece[0]
            );
        }
    }

    /// Panics unless `image` has all snapshots, and at most the one that is being made besides, each as the disk was.
    pub fn assert_snapshots(&self, image: &Image, below: &dyn Below, context: &str) {
        let trees = image.snapshots();
        let made = self.snapshots.len();
        let most = made + usize::from(self.beginning.is_some());
        assert!((made..=most).contains(&trees.len()), "{context}: {} snapshots", trees.len());
        let beginning = self.beginning.iter().map(|name| (name, self.newest()));
        let expected = self.snapshots.iter().map(|(name, disk)| (name, disk)).chain(beginning);
        for (tree, (name, disk)) in trees.iter().zip(expected) {
            assert_eq!(&tree.entry().name, name, "{context}");
            assert_same(&read_snapshot(image, tree, below), disk, &format!("{context}, {name}"));
        }
    }
}
