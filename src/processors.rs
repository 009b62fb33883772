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

/// How many the kernel reckons with, also those that are switched off; `None` where that can't be known for sure.
pub fn possible() -> Option<u16> {
    let listed = count_in(fs::read_to_string("/sys/devices/system/cpu/possible").ok()?.trim())?;
    // A container may be shown fewer there. Here is a column for each.
    let columns = fs::read_to_string("/proc/softirqs").ok()?;
    let columns = columns.lines().next()?.split_whitespace().count();
    (usize::from(listed) == columns).then_some(listed)
}

/// How many numbers a list such as `0-3,8` names.
fn count_in(list: &str) -> Option<u16> {
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        last.parse::<u16>().ok()?.checked_sub(first.parse().ok()?)?.checked_add(1)
    };
    list.split(',').try_fold(0u16, |sum, range| sum.checked_add(count(range)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processors_of_a_list_are_counted() {
        assert_eq!(count_in("0"), Some(1));
        assert_eq!(count_in("0-1"), Some(2));
        assert_eq!(count_in("0-3,8-11,15"), Some(9));
        assert_eq!(count_in(""), None);
        assert_eq!(count_in("3-1"), None);
    }
}
