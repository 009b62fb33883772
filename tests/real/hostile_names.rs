//! Names of backing and data files by which an image tries to have something else opened.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::support::images::{Images, io, poke};
use crate::support::mounted::Mounted;
use crate::support::oracle::reads_as;
use crate::support::tools::{Outcome, args, qchainfs, run};
use crate::support::watchdog::{LIMIT, Watchdog};
use crate::support::{K, M};

/// What an image may name.
#[derive(Debug, Clone, Copy)]
enum Named {
    BackingFile,
    DataFile,
}

/// A directory `home` with an image, and things around it that are none of its business.
struct Surroundings {
    images: Images,
    _socket: UnixListener,
}

impl Surroundings {
    fn new() -> Self {
        let images = Images::new();
        for directory in ["home", "home/below", "there"] {
            fs::create_dir(images.path(directory)).expect("make a directory");
        }
        fs::write(images.path("there/secret"), vec![7; 1 << 20]).expect("write a secret");
        symlink("../there/secret", images.path("home/link")).expect("link");
        symlink("../there", images.path("home/directory-link")).expect("link");
        symlink("/proc/self/root", images.path("home/root")).expect("link");
        mkfifo(&images.path("home/pipe"), Mode::S_IRWXU).expect("make a pipe");
        let socket = UnixListener::bind(images.path("home/socket")).expect("make a socket");
        Self { images, _socket: socket }
    }

    /// An image in `home` that names a file in these very bytes.
    fn naming(&self, named: Named, name: &[u8]) -> PathBuf {
        let image = self.images.create("home/top.qcow2", M, "");
        let at = match named {
            Named::BackingFile => {
                let format = [&0xe279_2aca_u32.to_be_bytes()[..], &3_u32.to_be_bytes(), b"raw"];
                poke(&image, 112, &[&format.concat()[..], &[0; 13]].concat());
                poke(&image, 8, &[&4096_u64.to_be_bytes()[..], &length(name)].concat());
                4096
            }
            Named::DataFile => {
                poke(&image, 72, &4_u64.to_be_bytes());
                poke(&image, 112, &[&0x4441_5441_u32.to_be_bytes()[..], &length(name)].concat());
                poke(&image, 120, &[0; 1100]);
                120
            }
        };
        poke(&image, at, name);
        image
    }
}

fn length(name: &[u8]) -> [u8; 4] {
    u32::try_from(name.len()).expect("a short name").to_be_bytes()
}

fn policy(policy: &str) -> Vec<OsString> {
    args!["-o", format!("backing_policy={policy}")].to_vec()
}

/// What `map` says, which does not take long.
fn map(options: &[OsString], image: &Path) -> Outcome {
    let start = Instant::now();
    let outcome = qchainfs(&[&args!["map"], options, &args![image]].concat());
    assert!(start.elapsed() < Duration::from_secs(10), "too slow: {outcome}");
    outcome
}

#[test]
fn no_name_leads_out_of_the_directory_of_the_image() {
    let around = Surroundings::new();
    let absolute = around.images.path("there/secret").display().to_string();
    let names = [
        "../there/secret",
        "below/../../there/secret",
        "link",
        "directory-link/secret",
        "directory-link",
        "root/etc/passwd",
        "/etc/passwd",
        "/proc/self/exe",
        "/proc/self/fd/0",
        "/proc/self/cwd/Cargo.toml",
        "/dev/zero",
        "/dev/fuse",
        "/dev/loop-control",
        "..",
        "/",
        &absolute,
    ];
    for named in [Named::BackingFile, Named::DataFile] {
        for name in names {
            let image = around.naming(named, name.as_bytes());
            for options in [vec![], policy("same-dir")] {
                let said = map(&options, &image).fails(13);
                assert!(said.contains("backing_policy=allow:"), "{named:?} {name}: {said}");
            }
            map(&policy("deny"), &image).fails(13);
        }
    }
    // The same by the other ways to say it.
    for name in [
        format!("file:{absolute}"),
        format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{absolute}"}}}}"#),
        format!(r#"json:{{"driver":"raw","file.filename":"{absolute}"}}"#),
    ] {
        let image = around.naming(Named::BackingFile, name.as_bytes());
        let said = map(&[], &image).fails(13);
        assert!(said.contains("backing_policy=allow:"), "{name}: {said}");
        map(&policy("any"), &image).ok();
    }
}

#[test]
fn what_is_no_regular_file_is_refused_also_where_any_file_is_allowed() {
    let around = Surroundings::new();
    for named in [Named::BackingFile, Named::DataFile] {
        for name in ["pipe", "socket", "below", "..", "/dev/zero", "/dev/tty", "/dev/loop-control"]
        {
            let image = around.naming(named, name.as_bytes());
            let said = map(&policy("any"), &image).fails(1);
            assert!(said.contains("not a regular file"), "{named:?} {name}: {said}");
        }
    }
    let said = map(&[], &around.naming(Named::BackingFile, b"pipe")).fails(1);
    assert!(said.contains("not a regular file"), "{said}");
}

#[test]
fn a_pipe_is_not_even_opened() {
    let around = Surroundings::new();
    let pipe = around.images.path("home/pipe");
    let (writer, rescued) = (pipe.clone(), pipe.clone());
    let free = |pipe: &Path| fs::File::options().read(true).write(true).open(pipe);
    let _watchdog = Watchdog::start("a writer to a pipe".into(), LIMIT, move || {
        let _ = free(&rescued);
    });
    // Waits for a reader.
    let writer = thread::spawn(move || fs::File::options().write(true).open(writer));
    thread::sleep(Duration::from_millis(100));
    for named in [Named::BackingFile, Named::DataFile] {
        map(&policy("any"), &around.naming(named, b"pipe")).fails(1);
    }
    assert!(!writer.is_finished(), "somebody opened the pipe");
    let reader = free(&pipe).expect("open the pipe");
    writer.join().expect("a writer").expect("open the pipe");
    drop(reader);
}

#[test]
fn names_that_would_spoil_a_terminal_or_a_log_do_not() {
    let around = Surroundings::new();
    let longest = [b'a'; 1023];
    let names: &[(&[u8], &[i32])] = &[
        (b"x\nqchainfs all is well", &[10]),
        (b"../there/\x1b[31mred\r\n", &[10]),
        (b"no\xff\xfetext", &[10]),
        (b"a\0b", &[1]),
        (b"\0", &[1]),
        (&longest, &[1]),
    ];
    for named in [Named::BackingFile, Named::DataFile] {
        for (name, codes) in names {
            let image = around.naming(named, name);
            let outcome = map(&[], &image);
            let code = outcome.code.expect("a code");
            assert!(codes.contains(&code), "{outcome}");
            let said = outcome.fails(code);
            assert!(!said.contains(['\x1b', '\r', '\0']), "{said:?}");
            if name.contains(&0) {
                assert!(said.contains("file name") && said.contains("NUL"), "{said}");
            }
            assert!(!qchainfs(&args!["info", image]).stdout.contains(['\x1b', '\r', '\0']));
        }
    }
    // What is merely strange is read.
    let strange = "below/line\nline\x1b";
    fs::write(around.images.path("home").join(strange), [5; 4096]).expect("write a base");
    let image = around.naming(Named::BackingFile, strange.as_bytes());
    let mounted = Mounted::read_only(&image);
    reads_as(&mounted.disk(), &image);
    mounted.umount();
}

#[test]
fn the_longest_name_that_an_image_can_hold_is_followed() {
    let around = Surroundings::new();
    fs::write(around.images.path("home/base"), [5; 4096]).expect("write a base");
    let name = format!("{}{}base", "./".repeat(509), "/");
    assert_eq!(name.len(), 1023);
    let image = around.naming(Named::BackingFile, name.as_bytes());
    let mounted = Mounted::read_only(&image);
    reads_as(&mounted.disk(), &image);
    mounted.umount();
}

#[test]
fn a_colon_before_the_first_slash_is_a_protocol_and_no_file() {
    let images = Images::new();
    images.create("a:b.qcow2", M, "");
    io(&images.path("./a:b.qcow2"), &["write -P 5 0 1M"]);
    let top = images.create("top.qcow2", M, "");
    let rebase = |name: &OsStr, format: &str| {
        run("qemu-img", &args!["rebase", "-u", "-f", "qcow2", "-b", name, "-F", format, top]);
    };
    let read = || {
        let mounted = Mounted::new(&top);
        reads_as(&mounted.disk(), &top);
        mounted.umount();
    };
    rebase("./a:b.qcow2".as_ref(), "qcow2");
    read();
    let absolute = images.path("a:b.qcow2");
    rebase(absolute.as_os_str(), "qcow2");
    read();
    let mut file = OsString::from("file:");
    file.push(&absolute);
    rebase(&file, "qcow2");
    read();
    let file = format!(r#"{{"driver":"file","filename":"{}"}}"#, absolute.display());
    rebase(format!(r#"json:{{"driver":"qcow2","file":{file}}}"#).as_ref(), "qcow2");
    read();
    for (name, protocol) in [
        ("a:b.qcow2", "a"),
        ("nbd://localhost:1/x", "nbd"),
        ("nbd:unix:/run/x", "nbd"),
        ("ssh://localhost/etc/passwd", "ssh"),
        ("https://localhost/x", "https"),
        ("fat:rw:/tmp", "fat"),
        ("host_device:/dev/loop0", "host_device"),
        ("blkdebug::base.qcow2", "blkdebug"),
        (":", "\"\""),
    ] {
        let around = Surroundings::new();
        let image = around.naming(Named::BackingFile, name.as_bytes());
        for options in [vec![], policy("any")] {
            let said = map(&options, &image).fails(14);
            assert!(said.contains(protocol), "{name}: {said}");
        }
    }
}

#[test]
fn no_description_means_more_than_a_file() {
    let around = Surroundings::new();
    let base = around.images.path("home/base").display().to_string();
    fs::write(&base, [5; 4096]).expect("write a base");
    let file = format!(r#"{{"driver":"file","filename":"{base}"}}"#);
    let deep = format!("{}{}", r#"{"file":"#.repeat(110), "}".repeat(110));
    for description in [
        String::new(),
        "null".into(),
        format!("[{file}]"),
        deep,
        format!(r#"{{"driver":"raw","file":{file}}} {{}}"#),
        format!(r#"{{"driver":"raw","file":{file},"offset":512}}"#),
        format!(r#"{{"driver":"raw","file":{file},"backing":{{"file":{file}}}}}"#),
        format!(r#"{{"driver":"raw","file":{{"driver":"raw","file":{file}}}}}"#),
        format!(r#"{{"driver":"raw","file":{{"driver":"host_device","filename":"{base}"}}}}"#),
        format!(
            r#"{{"driver":"raw","file":{{"driver":"file","filename":"{base}","aio":"native"}}}}"#
        ),
        format!(r#"{{"driver":"raw","file.filename":"{base}","file":{file}}}"#),
        format!(r#"{{"driver":"qcow2","data-file":{file},"file":{file}}}"#),
        format!(r#"{{"driver":"vmdk","file":{file}}}"#),
        format!(r#"{{"driver":"file","filename":"{base}"}}"#),
        r#"{"driver":"raw","file":"a node"}"#.into(),
        r#"{"driver":"null-co"}"#.into(),
        r#"{"driver":"raw","file":{"driver":"file","filename":["a"]}}"#.into(),
    ] {
        let name = format!("json:{description}");
        assert!(name.len() <= 1023, "{name}");
        let image = around.naming(Named::BackingFile, name.as_bytes());
        for options in [vec![], policy("any")] {
            let said = map(&options, &image).fails(14);
            assert!(said.contains("json:"), "{description}: {said}");
        }
    }
    // A name inside a description is a name of a file, whatever it looks like.
    for name in ["nbd://localhost:1/x", "json:{}", "file:base"] {
        let description = format!(r#"json:{{"driver":"raw","file.filename":"{name}"}}"#);
        map(&policy("any"), &around.naming(Named::BackingFile, description.as_bytes())).fails(10);
    }
}

#[test]
fn a_directory_that_is_a_link_is_judged_by_where_it_leads() {
    let around = Surroundings::new();
    let images = &around.images;
    let base = images.create("there/base.qcow2", M, "");
    io(&base, &["write -P 7 0 512k"]);
    let out = images.path("home/out.qcow2");
    let name = "directory-link/base.qcow2";
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", out]);
    let said = Mounted::refused(&[], &out, 13);
    assert!(said.contains("there"), "where it leads is not told: {said}");
    let mounted =
        Mounted::with(&policy(&format!("allow:{}", images.path("there").display())), &out);
    reads_as(&mounted.disk(), &out);
    mounted.umount();
    // A chain that is reached by a link is as good as by its own name.
    let top = images.path("there/top.qcow2");
    let name = "base.qcow2";
    run("qemu-img", &args!["create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", top]);
    io(&top, &[format!("write -P 8 {} 64k", 100 * K)]);
    let linked = images.path("home/directory-link/top.qcow2");
    let mounted = Mounted::read_only(&linked);
    reads_as(&mounted.disk(), &linked);
    mounted.umount();
    // QEMU takes a relative name from beside the link; what is there is not where the image is.
    let alias = images.path("home/alias.qcow2");
    symlink("../there/top.qcow2", &alias).expect("link");
    fs::copy(&base, images.path("home/base.qcow2")).expect("copy a base");
    Mounted::refused(&args!["-r"], &alias, 13);
    let mounted = Mounted::with(&[&args!["-r"], &policy("any")[..]].concat(), &alias);
    reads_as(&mounted.disk(), &alias);
    mounted.umount();
}
