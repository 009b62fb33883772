//! Errors on stderr: what is wrong with which file, why, and the command to run next.

use crate::error::Error;

/// Prints `error` in up to three lines.
pub fn report(error: &Error) {
    eprintln!("qchainfs: {}", printable(&error.headline()));
    if let Some(reason) = error.reason() {
        eprintln!("  {}", printable(&reason));
    }
    if let Some(advice) = error.advice() {
        eprintln!("      {}", printable(&advice));
    }
}

/// Names come from files that others wrote: control characters must not reach a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
