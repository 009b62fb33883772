//! Where log lines go: to stderr, or once in the background to the system's log.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;

use env_logger::{Builder, Env, Target};

/// Logs to stderr what `RUST_LOG` asks for, else warnings and errors.
pub fn to_stderr() {
    // A second logger can't be set; whoever was first keeps logging.
    let _ = builder().format_timestamp(None).format_target(false).try_init();
}

/// Logs to the system's log, and to stderr as long as that leads somewhere.
pub fn to_system() {
    let _ = builder()
        .format(|out, record| writeln!(out, "{}", record.args()))
        .target(Target::Pipe(Box::new(SystemLog::default())))
        .try_init();
}

fn builder() -> Builder {
    Builder::from_env(Env::default().default_filter_or("warn"))
}

/// The system's log, or stderr while nobody listens there.
#[derive(Default)]
struct SystemLog {
    socket: Option<UnixDatagram>,
}

impl Write for SystemLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Facility "daemon", severity "warning": 3 * 8 + 4.
        let mut message = format!("<28>qchainfs[{}]: ", std::process::id()).into_bytes();
        message.extend(line);
        if self.socket.is_none() {
            self.socket = connect().ok();
        }
        let sent = self.socket.as_ref().map(|socket| socket.send(&message));
        if !matches!(sent, Some(Ok(_))) {
            self.socket = None;
        }
        // Stderr leads nowhere once in the background; before that it is where the user looks.
        let _ = io::stderr().write_all(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn connect() -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect("/dev/log")?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
