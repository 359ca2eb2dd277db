//! Speed of transfers through the agent, natively over a Unix socket, with `cat` beside it.
//! `cargo bench -p guest-init --bench files [DIRECTORY]`: the directory says what is measured, a
//! tmpfs (default /dev/shm) or a disk. Prints; asserts nothing about time.

#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use protocol::agent::Configure;
use protocol::file::transfer::{FileWritten, ReadFile, WriteEnd, WriteFile, WriteMode};
use protocol::message::{self, Message};
use protocol::{FrameReader, Kind, frame};

const SIZE: u64 = 1 << 30;

fn main() {
    let place = std::env::args_os()
        .skip(1)
        .find(|word| word != "--bench")
        .map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
    let directory = tempfile::tempdir_in(&place).unwrap();
    let agent = Agent::start(directory.path());
    let rate = |what: &str, begun: Instant| {
        let seconds = begun.elapsed().as_secs_f64();
        let mib = (SIZE >> 20) as f64 / seconds;
        println!("{what:<34} {seconds:>7.2} s {mib:>8.0} MiB/s");
    };
    println!("1 GiB in {}", place.display());
    for checksum in [false, true] {
        let with = if checksum { ", BLAKE3" } else { "" };
        let begun = Instant::now();
        agent.upload(checksum);
        rate(&format!("upload{with}"), begun);
        let begun = Instant::now();
        agent.download(checksum);
        rate(&format!("download{with}"), begun);
    }
    println!("agent's peak memory: {} KiB", agent.peak_kib());
    let source = directory.path().join("workspace/file");
    let copy = directory.path().join("copy");
    let begun = Instant::now();
    cat(&source, &copy);
    rate("cat < file > copy; sync copy", begun);
}

fn cat(source: &Path, copy: &Path) {
    // Through a pipe, as bytes from elsewhere come.
    let line = format!(
        "cat {} | cat > {}; sync {}",
        source.display(),
        copy.display(),
        copy.display()
    );
    assert!(
        Command::new("sh")
            .args(["-c", &line])
            .status()
            .unwrap()
            .success()
    );
}

struct Agent {
    child: Child,
    socket: PathBuf,
}

impl Agent {
    fn start(directory: &Path) -> Self {
        let workspace = directory.join("workspace");
        std::fs::create_dir(&workspace).unwrap();
        let socket = directory.join("s");
        let child = Command::new(env!("CARGO_BIN_EXE_guest-init"))
            .arg("agent")
            .arg("--socket")
            .arg(&socket)
            .arg("--workspace")
            .arg(&workspace)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let agent = Self { child, socket };
        while UnixStream::connect(&agent.socket).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let mut stream = agent.connect();
        send(
            &mut stream,
            &Configure {
                vm: "vm-bench000".to_owned(),
                generation: 1,
                hostname: "supvm-benc".to_owned(),
                machine_id: [7; 16],
                unix_ns: 1,
                entropy: [9; 32],
                dns: Vec::new(),
                env: Vec::new(),
                grow_disk: false,
            },
        );
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        agent
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    fn upload(&self, checksum: bool) {
        let mut stream = self.connect();
        send(
            &mut stream,
            &WriteFile {
                path: b"file".to_vec(),
                mode: WriteMode::Replace,
                permissions: None,
                size: Some(SIZE),
                checksum,
                upload: None,
                offset: 0,
            },
        );
        let mut block = Vec::new();
        for _ in 0..4 {
            frame::append(&mut block, Kind::FILE_DATA, &[7; frame::MAX_DATA]).unwrap();
        }
        for _ in 0..SIZE / (4 * frame::MAX_DATA as u64) {
            stream.write_all(&block).unwrap();
        }
        send(&mut stream, &WriteEnd { blake3: None });
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let mut reader = FrameReader::new();
        let mut rest = &answer[..];
        reader.push(&mut rest).unwrap().unwrap();
        let last = reader.push(&mut rest).unwrap().unwrap();
        let written: FileWritten = message::decode(&last).unwrap();
        assert_eq!(written.size, SIZE);
    }

    fn download(&self, checksum: bool) {
        let mut stream = self.connect();
        send(
            &mut stream,
            &ReadFile {
                path: b"file".to_vec(),
                offset: 0,
                length: None,
                checksum,
                sparse: false,
                special: false,
            },
        );
        let mut buffer = vec![0; 256 << 10];
        let mut seen: u64 = 0;
        loop {
            let count = stream.read(&mut buffer).unwrap();
            if count == 0 {
                break;
            }
            seen += count as u64;
        }
        assert!(seen > SIZE, "{seen} bytes came");
    }

    fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmHWM:"))
            .unwrap();
        line.split_ascii_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send<M: Message>(stream: &mut UnixStream, message: &M) {
    stream
        .write_all(&message::encode(message).unwrap())
        .unwrap();
}
