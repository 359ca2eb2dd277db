//! An agent in a directory of its own, and a client that speaks to it with nothing but `protocol`.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

pub mod files;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use protocol::agent::{Configure, Configured};
use protocol::id::ProcessId;
use protocol::message::{self, Message};
use protocol::process::{
    CommandMode, ProcessEnded, ProcessStarted, SignalProcess, StartProcess, StdinMode,
};
use protocol::{ErrorBody, Frame, FrameReader, Kind, frame};

/// Long enough for a busy machine; a test that waits so long has found a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running agent.
pub struct Agent {
    pub child: Child,
    pub directory: tempfile::TempDir,
    cgroup: Option<PathBuf>,
}

impl Agent {
    /// Starts and configures one.
    pub fn start() -> Self {
        let agent = Self::start_unconfigured(&[], None);
        agent.configure();
        agent
    }

    /// One with control groups. Needs root and a cgroup2 file system; fails without them.
    pub fn start_with_cgroup() -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mounted = mounts
            .lines()
            .find_map(|line| {
                let mut fields = line.split(' ').skip(1);
                let place = fields.next()?;
                (fields.next()? == "cgroup2").then_some(place)
            })
            .expect("a cgroup2 file system is mounted");
        let name = format!(
            "guest-init-test-{}-{:?}",
            std::process::id(),
            Instant::now()
        );
        let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric()).collect();
        let cgroup = Path::new(mounted).join(name);
        let agent = Self::start_unconfigured(&[], Some(cgroup));
        agent.configure();
        agent
    }

    /// Starts one below the given command, such as `unshare`.
    pub fn start_unconfigured(wrapper: &[&str], cgroup: Option<PathBuf>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("workspace")).unwrap();
        let program = env!("CARGO_BIN_EXE_guest-init");
        let mut command = match wrapper.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
            None => Command::new(program),
        };
        command
            .arg("agent")
            .arg("--socket")
            .arg(directory.path().join("s"))
            .arg("--workspace")
            .arg(directory.path().join("workspace"));
        if let Some(cgroup) = &cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let child = command.stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let agent = Self {
            child,
            directory,
            cgroup,
        };
        let begin = Instant::now();
        while UnixStream::connect(agent.socket()).is_err() {
            assert!(begin.elapsed() < PATIENCE, "no agent: {}", agent.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    pub fn workspace(&self) -> PathBuf {
        self.directory.path().join("workspace")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    pub fn cgroup(&self) -> &Path {
        self.cgroup.as_deref().unwrap()
    }

    pub fn connect(&self) -> Client {
        Client::new(UnixStream::connect(self.socket()).unwrap())
    }

    pub fn configure(&self) -> Configured {
        let mut client = self.connect();
        client.send(&configuration());
        message::decode(&client.frame().unwrap()).unwrap()
    }

    /// Runs a shell command to its end.
    pub fn shell(&self, line: &str) -> Output {
        self.run(&shell(line))
    }

    pub fn run(&self, request: &StartProcess) -> Output {
        let mut client = self.connect();
        client.send(request);
        client.output()
    }

    /// A line of /proc/PID/status of the agent, in KiB.
    pub fn status_kib(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_ascii_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    }

    pub fn descriptors(&self) -> usize {
        let directory = format!("/proc/{}/fd", self.child.id());
        std::fs::read_dir(directory).unwrap().count()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(cgroup) = &self.cgroup {
            let _ = std::fs::write(cgroup.join("cgroup.kill"), "1");
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(cgroup) = &self.cgroup {
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_secs(5) {
                for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
                    let _ = std::fs::remove_dir(entry.path());
                }
                if std::fs::remove_dir(cgroup).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// What a process said and how it ended.
#[derive(Debug)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// Both, in the order of the frames.
    pub merged: Vec<u8>,
    pub started: bool,
    pub ended: ProcessEnded,
}

impl Output {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

/// One stream to the agent.
pub struct Client {
    pub socket: UnixStream,
    reader: FrameReader,
    bytes: Vec<u8>,
}

impl Client {
    pub fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            socket,
            reader: FrameReader::new(),
            bytes: Vec::new(),
        }
    }

    pub fn send<M: Message>(&mut self, message: &M) {
        self.socket
            .write_all(&message::encode(message).unwrap())
            .unwrap();
    }

    pub fn send_raw(&mut self, kind: Kind, body: &[u8]) {
        let mut bytes = Vec::new();
        frame::append(&mut bytes, kind, body).unwrap();
        self.socket.write_all(&bytes).unwrap();
    }

    pub fn signal(&mut self, signal: i32) {
        let signal = u8::try_from(signal).unwrap();
        self.send(&SignalProcess { signal });
    }

    /// The next frame; none at the end of the stream.
    pub fn frame(&mut self) -> Option<Frame> {
        loop {
            let mut rest = &self.bytes[..];
            let frame = self.reader.push(&mut rest).unwrap();
            let used = self.bytes.len() - rest.len();
            self.bytes.drain(..used);
            if frame.is_some() {
                return frame;
            }
            let mut buffer = [0; 64 << 10];
            match self.socket.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.bytes.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("reading from the agent: {error}"),
            }
        }
    }

    pub fn error(&mut self) -> ErrorBody {
        let frame = self.frame().expect("an error frame");
        assert_eq!(frame.kind, Kind::ERROR);
        message::decode_body(&frame.body).unwrap()
    }

    pub fn started(&mut self) -> ProcessStarted {
        message::decode(&self.frame().unwrap()).unwrap()
    }

    /// Reads to the last frame and checks that nothing follows it.
    pub fn output(&mut self) -> Output {
        let mut started = false;
        let (mut stdout, mut stderr, mut merged) = (Vec::new(), Vec::new(), Vec::new());
        let ended = loop {
            let frame = self.frame().expect("a frame before the end");
            match frame.kind {
                Kind::PROCESS_STARTED => started = true,
                Kind::STDOUT => {
                    stdout.extend_from_slice(&frame.body);
                    merged.extend_from_slice(&frame.body);
                }
                Kind::STDERR => {
                    stderr.extend_from_slice(&frame.body);
                    merged.extend_from_slice(&frame.body);
                }
                _ => break message::decode(&frame).unwrap(),
            }
        };
        assert_eq!(self.frame(), None, "something follows the last frame");
        Output {
            stdout,
            stderr,
            merged,
            started,
            ended,
        }
    }
}

pub fn configuration() -> Configure {
    Configure {
        vm: "vm-test0000".to_owned(),
        generation: 1,
        hostname: "supvm-test".to_owned(),
        machine_id: [7; 16],
        unix_ns: 1,
        entropy: [9; 32],
        dns: vec!["10.213.0.1".to_owned()],
        env: vec![("FROM_VM".to_owned(), "yes".to_owned())],
        grow_disk: true,
    }
}

fn fresh_id() -> ProcessId {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut id = [0; 16];
    id[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    ProcessId(id)
}

pub fn shell(line: &str) -> StartProcess {
    StartProcess {
        id: fresh_id(),
        mode: CommandMode::Shell,
        command: vec![line.as_bytes().to_vec()],
        cwd: Vec::new(),
        env: Vec::new(),
        stdin: StdinMode::Null,
    }
}

pub fn argv(arguments: &[&str]) -> StartProcess {
    StartProcess {
        mode: CommandMode::Argv,
        command: arguments
            .iter()
            .map(|one| one.as_bytes().to_vec())
            .collect(),
        ..shell("")
    }
}

/// Waits for something that another process does. Ends in a failure, not in a hang.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
