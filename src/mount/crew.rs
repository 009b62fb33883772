//! How many of the session's threads wait for the kernel's requests.
//!
//! The kernel wakes the thread that has waited longest, so that with many of them each request meets one whose caches are
//! cold, and on few processors they only take these from each other and from whoever asks. One thread answers one reader
//! fastest. So threads rest here while fewer can do the work; they can't do so in `fuser`'s loop, but between the answer to
//! a request and the return from it.
//!
//! No rest is longer than [`REST`]: whatever the threads at work are blocked by, somebody comes back for the next request.

use std::cell::Cell;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest time off.
const REST: Duration = Duration::from_millis(20);
/// A thread that found its next request sooner did not have to sleep for it.
const NO_WAIT: Duration = Duration::from_micros(4);
/// An answer that took longer has probably waited for a disk.
const QUICK: Duration = Duration::from_micros(60);
/// What moving this many bytes takes about a microsecond.
const BYTES_A_MICROSECOND: u64 = 4096;
/// So many requests in a row must agree before anything changes.
const AGREEING: u32 = 8;

/// The threads of a session.
pub(super) struct Crew {
    processors: usize,
    state: Mutex<State>,
    recalled: Condvar,
}

/// What all threads do.
#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// Answering a request.
    answering: usize,
    /// Waiting for one, as far as they have answered one before.
    waiting: usize,
    resting: usize,
    /// Of the resting, how many shall come back.
    recalled: usize,
}

thread_local! {
    static OWN: Cell<Habits> = const { Cell::new(Habits { done: None, waits: 0, no_waits: 0, quick: 0 }) };
}

/// What one thread has met with lately, each in a row.
#[derive(Debug, Clone, Copy)]
struct Habits {
    /// When it answered its last request.
    done: Option<Instant>,
    /// Requests that it had to wait for.
    waits: u32,
    /// Requests that were there already.
    no_waits: u32,
    /// Requests that were answered at once.
    quick: u32,
}

/// What a thread does after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Wait,
    WaitAndRecall,
    Rest,
}

/// A request that is being answered. Dropped after the answer.
pub(super) struct Turn<'a> {
    crew: &'a Crew,
    begun: Instant,
    bytes: u64,
}

impl Crew {
    /// A crew on so many processors.
    pub fn new(processors: usize) -> Self {
        Self { processors: processors.max(1), state: Mutex::default(), recalled: Condvar::new() }
    }

    /// The calling thread begins to answer a request that moves `bytes` bytes.
    pub fn turn(&self, bytes: u64) -> Turn<'_> {
        let begun = Instant::now();
        let mut own = OWN.get();
        let mut state = self.state();
        state.answering += 1;
        if let Some(done) = own.done {
            state.waiting = state.waiting.saturating_sub(1);
            if begun - done <= NO_WAIT + moving(bytes) {
                (own.waits, own.no_waits) = (0, own.no_waits.saturating_add(1));
            } else {
                (own.waits, own.no_waits) = (own.waits.saturating_add(1), 0);
            }
        }
        drop(state);
        OWN.set(own);
        Turn { crew: self, begun, bytes }
    }

    fn rest(&self) {
        let mut state = self.state();
        state.resting += 1;
        let deadline = Instant::now() + REST;
        while state.recalled == 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            state = match self.recalled.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        state.recalled = state.recalled.saturating_sub(1);
        state.resting -= 1;
        state.waiting += 1;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut own = OWN.get();
        let quick = now - self.begun <= QUICK + 2 * moving(self.bytes);
        own.quick = if quick { own.quick.saturating_add(1) } else { 0 };
        let mut state = self.crew.state();
        state.answering -= 1;
        let next = own.next(&state, self.crew.processors);
        match next {
            Next::Rest => {}
            Next::Wait | Next::WaitAndRecall => state.waiting += 1,
        }
        if next == Next::WaitAndRecall {
            state.recalled += 1;
            own.no_waits = 0;
        }
        drop(state);
        match next {
            Next::Wait => {}
            Next::WaitAndRecall => self.crew.recalled.notify_one(),
            Next::Rest => {
                self.crew.rest();
                // Unless it is needed now, it rests again after the first request that it gets.
                own.no_waits = 0;
            }
        }
        own.done = Some(Instant::now());
        OWN.set(own);
    }
}

impl Habits {
    fn next(&self, others: &State, processors: usize) -> Next {
        let at_work = others.answering + others.waiting + 1;
        let not_needed = others.waiting > 0 && self.waits >= AGREEING;
        let in_the_way = at_work > processors && self.quick >= AGREEING;
        if at_work > 1 && (not_needed || in_the_way) {
            return Next::Rest;
        }
        let help = others.waiting == 0 && self.no_waits >= AGREEING;
        if help && at_work < processors && others.resting > others.recalled {
            return Next::WaitAndRecall;
        }
        Next::Wait
    }
}

fn moving(bytes: u64) -> Duration {
    Duration::from_micros(bytes / BYTES_A_MICROSECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn habits(waits: u32, no_waits: u32, quick: u32) -> Habits {
        Habits { done: None, waits, no_waits, quick }
    }

    fn state(answering: usize, waiting: usize, resting: usize) -> State {
        State { answering, waiting, resting, recalled: 0 }
    }

    #[test]
    fn a_thread_that_waits_beside_another_rests() {
        assert_eq!(habits(8, 0, 8).next(&state(0, 1, 2), 2), Next::Rest);
        assert_eq!(habits(8, 0, 8).next(&state(0, 0, 3), 2), Next::Wait);
    }

    #[test]
    fn a_thread_with_too_much_to_do_calls_another() {
        assert_eq!(habits(0, 8, 8).next(&state(0, 0, 3), 2), Next::WaitAndRecall);
        assert_eq!(habits(0, 8, 8).next(&state(1, 0, 2), 2), Next::Wait);
        assert_eq!(habits(0, 8, 8).next(&state(0, 0, 0), 2), Next::Wait);
    }

    #[test]
    fn quick_answers_need_no_more_threads_than_processors_but_slow_ones_may() {
        assert_eq!(habits(0, 8, 8).next(&state(2, 0, 1), 2), Next::Rest);
        assert_eq!(habits(0, 8, 0).next(&state(2, 0, 1), 2), Next::Wait);
    }

    #[test]
    fn somebody_always_comes_back_though_all_others_are_blocked() {
        let crew = Crew::new(2);
        std::thread::scope(|scope| {
            let blocked = crew.turn(0);
            let rested = scope.spawn(|| crew.rest());
            rested.join().unwrap();
            drop(blocked);
        });
        assert_eq!(crew.state().resting, 0);
    }
}
