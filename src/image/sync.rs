//! Locks and atomics of an image: those of the standard library.
//!
//! In tests with the feature `interleavings` they are those of shuttle, which runs the threads of a test one at a time
//! and chooses at each lock who goes on (`tests::interleavings`).

#[cfg(all(test, feature = "interleavings"))]
pub use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, atomic};
#[cfg(not(all(test, feature = "interleavings")))]
pub use std::sync::{Condvar, Mutex, MutexGuard, RwLock, atomic};
