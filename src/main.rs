//! The program `qchainfs`.

use std::process::ExitCode;

fn main() -> ExitCode {
    qchainfs::cli::run(std::env::args_os())
}
