//! How many processors there are.

use std::fs;
use std::num::NonZero;
use std::sync::OnceLock;
use std::thread;

/// How many threads of this process can run at the same time.
pub fn usable() -> usize {
    static USABLE: OnceLock<usize> = OnceLock::new();
    *USABLE.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}

/// How many the kernel reckons with, also those that are switched off; `None` where it doesn't say.
pub fn possible() -> Option<u16> {
    let list = fs::read_to_string("/sys/devices/system/cpu/possible").ok()?;
    last_in(list.trim())?.checked_add(1)
}

/// The greatest number in a list such as `0-3,8`.
fn last_in(list: &str) -> Option<u16> {
    list.rsplit(['-', ',']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_processor_of_a_list_is_found() {
        assert_eq!(last_in("0"), Some(0));
        assert_eq!(last_in("0-1"), Some(1));
        assert_eq!(last_in("0-3,8-11"), Some(11));
        assert_eq!(last_in(""), None);
    }
}
