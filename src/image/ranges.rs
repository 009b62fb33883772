//! Range locks over the guest's disk: what touches the same clusters waits for each other, nothing else does.

use std::collections::VecDeque;
use std::sync::PoisonError;

use super::sync::{Condvar, Mutex};
use crate::units::GuestRange;

/// The ranges in use, in the order in which they were asked for.
///
/// A request waits only for conflicting requests before it, so nobody starves. Whoever holds a range must not ask for
/// a second one.
#[derive(Default)]
pub struct RangeLocks {
    requests: Mutex<Requests>,
    released: Condvar,
}

#[derive(Default)]
struct Requests {
    next: u64,
    queue: VecDeque<Request>,
}

struct Request {
    number: u64,
    range: GuestRange,
    mode: Mode,
}

/// What a holder does with its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Relies on the mapping as it is: reads, and overwrites of allocated clusters.
    Shared,
    /// May change the mapping: allocation, discard, zeroing.
    Exclusive,
}

/// A range that is held until this is dropped.
#[must_use]
pub struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    number: u64,
}

impl RangeLocks {
    /// Waits until `range` can be held.
    pub fn lock(&self, range: GuestRange, mode: Mode) -> RangeGuard<'_> {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let number = requests.next;
        requests.next += 1;
        requests.queue.push_back(Request { number, range, mode });
        while requests.must_wait(number) {
            requests = self.released.wait(requests).unwrap_or_else(PoisonError::into_inner);
        }
        RangeGuard { locks: self, number }
    }

    /// How many hold a range or wait for one.
    #[cfg(test)]
    pub fn requests(&self) -> usize {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).queue.len()
    }
}

impl Requests {
    fn must_wait(&self, number: u64) -> bool {
        let Some(own) = self.queue.iter().find(|request| request.number == number) else {
            return false;
        };
        self.queue
            .iter()
            .take_while(|earlier| earlier.number != number)
            .any(|earlier| earlier.conflicts_with(own))
    }
}

impl Request {
    fn conflicts_with(&self, other: &Self) -> bool {
        (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive)
            && self.range.overlaps(other.range)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut requests = self.locks.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.queue.retain(|request| request.number != self.number);
        let waiters = !requests.queue.is_empty();
        drop(requests);
        if waiters {
            self.locks.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GuestOffset;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset::new(start), len)
    }

    #[test]
    fn readers_share_a_range_and_other_ranges_are_free() {
        let locks = RangeLocks::default();
        let _a = locks.lock(range(0, 10), Mode::Shared);
        let _b = locks.lock(range(5, 10), Mode::Shared);
        let _c = locks.lock(range(15, 1), Mode::Exclusive);
    }

    #[test]
    fn whoever_holds_a_range_exclusively_is_alone_and_sharers_see_each_other_only() {
        const ALONE: u32 = 1000;
        let locks = RangeLocks::default();
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4_u32 {
                let (locks, inside) = (&locks, &inside);
                scope.spawn(move || {
                    for round in 0..500 {
                        let (mode, weight) = match (thread + round) % 2 {
                            0 => (Mode::Shared, 1),
                            _ => (Mode::Exclusive, ALONE),
                        };
                        let _guard = locks.lock(range(thread.into(), 5), mode);
                        let others = inside.fetch_add(weight, Ordering::SeqCst);
                        std::thread::yield_now();
                        assert!(others == 0 || mode == Mode::Shared && others < ALONE);
                        inside.fetch_sub(weight, Ordering::SeqCst);
                    }
                });
            }
        });
    }
}
