//! Errors on stderr: what is wrong with which file, why, and the command to run next.

use std::io::Write;

use crate::error::Error;

/// Prints `error` in up to three lines.
pub fn report(error: &Error) {
    let mut text = format!("qchainfs: {}\n", printable(&error.headline()));
    if let Some(reason) = error.reason() {
        text += &format!("  {}\n", printable(&reason));
    }
    if let Some(advice) = error.advice() {
        text += &format!("      {}\n", printable(&advice));
    }
    // Where nobody can be told, the exit code must do.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Names come from files that others wrote: control characters must not reach a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
