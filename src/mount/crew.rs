//! How many of the session's threads wait for the kernel's requests.
//!
//! The kernel wakes the thread that has waited longest. With as many threads as processors these soon stay where their caches
//! are, and large reads, which the kernel asks for in parts, are copied side by side; each thread more makes the others move.
//! But a thread that waits for a disk uses no processor, and another must take its place. So there are more threads than
//! processors, and those that are too many rest as long as the answers of the others are quick. They can't do so in `fuser`'s
//! loop, but between the answer to a request and the return from it.
//!
//! Every [`REST`] each of them looks whether it is still not needed: whatever the threads at work are blocked by, somebody comes
//! back for the next request.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a thread that is not needed looks away.
const REST: Duration = Duration::from_millis(20);
/// An answer that took longer has probably waited for a disk.
const QUICK: Duration = Duration::from_micros(60);
/// What moving this many bytes takes at most about a microsecond.
const BYTES_A_MICROSECOND: u64 = 2048;
/// So many quick answers are the rule, and not luck.
const MANY: u64 = 64;
/// One slow answer among so many quick ones is the scheduler's doing.
const RARELY: u64 = 32;

/// The threads of a session.
pub(super) struct Crew {
    processors: usize,
    /// Threads that have answered a request before and don't rest.
    at_work: AtomicUsize,
    quick: AtomicU64,
    slow: AtomicU64,
}

/// Answers of all threads until now.
#[derive(Debug, Clone, Copy)]
struct Answers {
    quick: u64,
    slow: u64,
}

thread_local! {
    /// How many answers of this thread were quick, in a row; `None` before the first.
    static IN_A_ROW: Cell<Option<u64>> = const { Cell::new(None) };
}

/// A request that is being answered. Dropped after the answer.
pub(super) struct Turn<'a> {
    crew: &'a Crew,
    begun: Instant,
    enough: Duration,
}

impl Crew {
    /// A crew on so many processors.
    pub fn new(processors: usize) -> Self {
        Self {
            processors: processors.max(1),
            at_work: AtomicUsize::new(0),
            quick: AtomicU64::new(0),
            slow: AtomicU64::new(0),
        }
    }

    /// The calling thread begins to answer a request that moves `bytes` bytes.
    pub fn turn(&self, bytes: u64) -> Turn<'_> {
        if IN_A_ROW.get().is_none() {
            IN_A_ROW.set(Some(0));
            self.at_work.fetch_add(1, Ordering::Relaxed);
        }
        let enough = QUICK + Duration::from_micros(bytes / BYTES_A_MICROSECOND);
        Turn { crew: self, begun: Instant::now(), enough }
    }

    /// Rests as long as there are enough others and all of them are quick.
    fn rest(&self) {
        let fewer = |at_work| (at_work > self.processors).then(|| at_work - 1);
        if self.at_work.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).is_err() {
            return;
        }
        let mut before = self.answers();
        loop {
            std::thread::sleep(REST);
            let now = self.answers();
            if now.since(before).need_help() {
                break;
            }
            before = now;
        }
        self.at_work.fetch_add(1, Ordering::Relaxed);
    }

    fn answers(&self) -> Answers {
        Answers {
            quick: self.quick.load(Ordering::Relaxed),
            slow: self.slow.load(Ordering::Relaxed),
        }
    }
}

impl Answers {
    fn since(self, before: Self) -> Self {
        Self { quick: self.quick - before.quick, slow: self.slow - before.slow }
    }

    /// Whether whoever gave these may be blocked. Where there was nothing to do they look the same, and waiting for requests
    /// costs less than looking for a need.
    fn need_help(self) -> bool {
        self.quick < MANY || self.slow > self.quick / RARELY
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.begun.elapsed() > self.enough {
            self.crew.slow.fetch_add(1, Ordering::Relaxed);
            IN_A_ROW.set(Some(0));
            return;
        }
        self.crew.quick.fetch_add(1, Ordering::Relaxed);
        let in_a_row = IN_A_ROW.get().unwrap_or_default() + 1;
        IN_A_ROW.set(Some(in_a_row));
        if in_a_row >= MANY {
            self.crew.rest();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_wait_for_a_disk_or_for_nothing_need_help_and_busy_ones_do_not() {
        assert!(Answers { quick: 0, slow: 2 }.need_help());
        assert!(Answers { quick: 0, slow: 0 }.need_help());
        assert!(Answers { quick: 1000, slow: 200 }.need_help());
        assert!(!Answers { quick: 1000, slow: 20 }.need_help());
    }

    #[test]
    fn a_thread_rests_only_if_there_are_more_than_processors_and_comes_back_when_the_others_stop() {
        let crew = Crew::new(2);
        crew.at_work.store(2, Ordering::Relaxed);
        crew.rest();
        assert_eq!(crew.at_work.load(Ordering::Relaxed), 2);
        crew.at_work.store(3, Ordering::Relaxed);
        std::thread::scope(|scope| {
            let resting = scope.spawn(|| crew.rest());
            while crew.at_work.load(Ordering::Relaxed) == 3 {
                std::thread::yield_now();
            }
            resting.join().unwrap();
        });
        assert_eq!(crew.at_work.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_slow_answer_ends_a_row_of_quick_ones() {
        let crew = Crew::new(1);
        let mut slow = crew.turn(0);
        slow.enough = Duration::ZERO;
        IN_A_ROW.set(Some(MANY));
        drop(slow);
        assert_eq!(IN_A_ROW.get(), Some(0));
        assert_eq!(crew.answers().slow, 1);
    }
}
