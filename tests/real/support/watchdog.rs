//! Ends a hung test run without leaving mounts, loop devices or processes behind.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::mem;
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Seconds that a test may hold anything that has to be cleaned up.
pub const LIMIT: u64 = 120;

type Rescue = Box<dyn FnOnce() + Send>;

static RESCUES: Mutex<BTreeMap<u64, Rescue>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicU64 = AtomicU64::new(0);

/// While it lives, a deadline runs. At the deadline the rescues of all watchdogs run, oldest first
/// (a qchainfs mount before the loop device on it), and the process aborts.
pub struct Watchdog {
    id: u64,
    _stop: Sender<()>,
}

impl Watchdog {
    /// Watches over `what`; `rescue` must clean it up and must not wait for it.
    pub fn start(what: String, seconds: u64, rescue: impl FnOnce() + Send + 'static) -> Self {
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        rescues().insert(id, Box::new(rescue));
        let test = thread::current().name().unwrap_or("a test").to_owned();
        let (stop, stopped) = channel::<()>();
        thread::spawn(move || {
            let answer = stopped.recv_timeout(Duration::from_secs(seconds));
            if answer == Err(RecvTimeoutError::Timeout) {
                give_up(&test, &what, seconds);
            }
        });
        Self { id, _stop: stop }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        rescues().remove(&self.id);
    }
}

fn rescues() -> MutexGuard<'static, BTreeMap<u64, Rescue>> {
    RESCUES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes past the capture of the test harness, which would be lost with the process.
fn give_up(test: &str, what: &str, seconds: u64) {
    let _ = writeln!(io::stderr(), "\n{test} hung: {what} was not over after {seconds} s");
    for rescue in mem::take(&mut *rescues()).into_values() {
        rescue();
    }
    process::abort();
}

/// Waits until `condition` holds; panics if it does not within twenty seconds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}
