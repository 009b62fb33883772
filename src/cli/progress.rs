//! How far long work is: on stderr, never on stdout.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::json;

/// Time between two messages at least.
const INTERVAL: Duration = Duration::from_millis(200);
/// Characters between the ends of the bar.
const BAR: u64 = 40;

/// How progress is shown.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// A bar on a terminal, else nothing
    Auto,
    /// A line of JSON now and then
    Json,
}

/// Shows progress.
pub struct Progress {
    style: Style,
    last: Option<Instant>,
    /// A bar stands on the terminal's current line.
    drawn: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Nothing,
    Bar,
    Json,
}

impl Progress {
    /// Shows nothing.
    pub fn hidden() -> Self {
        Self { style: Style::Nothing, last: None, drawn: false }
    }

    /// Shows progress in `form`.
    pub fn new(form: Form) -> Self {
        let style = match form {
            Form::Json => Style::Json,
            Form::Auto if std::io::stderr().is_terminal() => Style::Bar,
            Form::Auto => Style::Nothing,
        };
        Self { style, ..Self::hidden() }
    }

    /// `done` of `total` of what `stage` does are done.
    pub fn update(&mut self, stage: &str, done: u64, total: u64) {
        let finished = done >= total;
        let recent = self.last.is_some_and(|last| last.elapsed() < INTERVAL);
        if self.style == Style::Nothing || (recent && !finished) {
            return;
        }
        self.last = Some(Instant::now());
        let done = done.min(total);
        let of = |parts: u64| {
            let share = u128::from(done) * u128::from(parts) / u128::from(total.max(1));
            if total == 0 { parts } else { share as u64 }
        };
        if self.style == Style::Json {
            let line = json!({
                "stage": stage,
                "current-progress": done,
                "total-progress": total,
            });
            return say(&format!("{line}\n"));
        }
        let full = of(BAR) as usize;
        let bar = format!("{}{}", "=".repeat(full), " ".repeat(BAR as usize - full));
        say(&format!("\r{stage:<8} [{bar}] {:>3}%", of(100)));
        self.drawn = true;
    }

    /// Prints a line of text on stderr.
    pub fn line(&mut self, text: &str) {
        self.clear();
        say(&format!("{text}\n"));
    }

    /// Removes the bar.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.drawn) {
            say("\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Where nobody can be told, the exit code must do.
fn say(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}
