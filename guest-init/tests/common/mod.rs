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
    CommandMode, OutputGap, OutputMode, ProcessEnded, ProcessStarted, SignalProcess, StartProcess,
    StdinMode,
};
use protocol::processes::{
    AttachFrom, AttachProcess, KillProcess, OutputReplayed, ProcessAttached, ProcessInfo,
    WaitProcess,
};
use protocol::{ErrorBody, Frame, FrameReader, Kind, frame};

/// Long enough for a busy machine; a test that waits so long has found a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// What one process's output may cost the agent, in KiB of memory of its own: its window of 1 MiB,
/// the same again while the log writes what has just left the window, 1 MiB of spare buffers, half a
/// mebibyte for everything else; and half of that again for what the allocator cannot give back. The
/// program's own file is not in it: 4 MiB of that may be in memory in a test's build.
pub const FLAT: u64 = 6 << 10;

/// A running agent.
pub struct Agent {
    pub child: Child,
    pub directory: tempfile::TempDir,
    cgroup: Option<PathBuf>,
    /// The agent's process, where it has another root than we have.
    inside: Option<String>,
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
        let child = Self::launch(wrapper, directory.path(), cgroup.as_deref());
        let agent = Self {
            child,
            directory,
            cgroup,
            inside: None,
        };
        agent.until_it_serves();
        agent
    }

    /// One that is process 1 of a PID namespace and whose root is a file system of its own in memory,
    /// of this many bytes, with `sh` and the named programs in it. Everything in there may be
    /// destroyed, the socket too: streams for afterwards are to be opened before. Needs root.
    pub fn start_in_a_world_of_its_own(bytes: u64, programs: &[&str]) -> Self {
        // The socket is reached by the name of the agent's root, which is not ours.
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let mut files = vec![program().display().to_string()];
        for name in ["sh"].iter().chain(programs) {
            let found = Command::new("which").arg(name).output().unwrap();
            files.push(String::from_utf8(found.stdout).unwrap().trim().to_owned());
        }
        let libraries = Command::new("ldd").args(&files).output().unwrap();
        let libraries = String::from_utf8(libraries.stdout).unwrap();
        let words = libraries.split_whitespace();
        files.extend(words.filter(|word| word.starts_with('/')).map(|word| {
            // Of a file among others `ldd` writes its name and a colon.
            word.trim_end_matches(':').to_owned()
        }));
        files.sort();
        files.dedup();
        // What is copied to a path of several names is found below all of them.
        let script = "set -e; root=$1; shift; mount -t tmpfs -o size=$1 none $root; shift; agent=$1; \
            mkdir -p $root/usr/bin $root/usr/lib $root/usr/lib64 $root/usr/sbin $root/etc; \
            for one in bin sbin lib lib64; do ln -s usr/$one $root/$one; done; \
            for file; do mkdir -p $root$(dirname $file); cp -L $file $root$file; done; \
            mv $root$agent $root/agent; \
            mkdir -p $root/proc $root/dev $root/workspace; mount -t proc none $root/proc; \
            touch $root/dev/null; mount --bind /dev/null $root/dev/null; \
            exec chroot $root /agent agent --socket /s --logs /var/lib/logs --workspace /workspace";
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let own = program().display().to_string();
        let child = Command::new("unshare")
            .args([
                "--pid",
                "--mount",
                "--fork",
                "--kill-child",
                "sh",
                "-c",
                script,
                "sh",
            ])
            .arg(&root)
            .arg(bytes.to_string())
            .arg(&own)
            .args(files.iter().filter(|file| **file != own))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut agent = Self {
            child,
            directory,
            cgroup: None,
            inside: None,
        };
        let children = format!("/proc/{0}/task/{0}/children", agent.child.id());
        eventually("the agent serves", || {
            let inner = std::fs::read_to_string(&children).unwrap_or_default();
            agent.inside = inner.split_whitespace().next().map(str::to_owned);
            agent.inside.is_some() && UnixStream::connect(agent.socket()).is_ok()
        });
        agent.configure();
        agent
    }

    /// Ends it at once, as a crash would, and starts it again in the same place.
    pub fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = Self::launch(&[], self.directory.path(), self.cgroup.as_deref());
        self.until_it_serves();
        self.configure();
    }

    fn launch(wrapper: &[&str], directory: &Path, cgroup: Option<&Path>) -> Child {
        let program = program();
        let mut command = match wrapper.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(&program);
                command
            }
            None => Command::new(program),
        };
        command
            .arg("agent")
            .arg("--socket")
            .arg(directory.join("s"))
            .arg("--workspace")
            .arg(directory.join("workspace"))
            .arg("--logs")
            .arg(directory.join("logs"));
        if let Some(cgroup) = cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        let log = std::fs::File::create(directory.join("log")).unwrap();
        command.stdin(Stdio::null()).stderr(log).spawn().unwrap()
    }

    fn until_it_serves(&self) {
        let begin = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            assert!(begin.elapsed() < PATIENCE, "no agent: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn socket(&self) -> PathBuf {
        match &self.inside {
            Some(process) => PathBuf::from(format!("/proc/{process}/root/s")),
            None => self.directory.path().join("s"),
        }
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

    /// Asks once and gives the answer.
    pub fn ask<Q: Message, A: Message>(&self, request: &Q) -> Result<A, ErrorBody> {
        let mut client = self.connect();
        client.send(request);
        let frame = client.frame().expect("an answer");
        assert_eq!(client.frame(), None, "something follows the answer");
        match message::decode(&frame) {
            Ok(answer) => Ok(answer),
            Err(message::MessageError::Refused(error)) => Err(error),
            Err(other) => panic!("{other}"),
        }
    }

    /// Waits for the end of a process.
    pub fn wait(&self, id: ProcessId) -> ProcessInfo {
        let timeout_ms = None;
        self.ask(&WaitProcess { id, timeout_ms }).unwrap()
    }

    /// What is known of a process now.
    pub fn look(&self, id: ProcessId) -> Result<ProcessInfo, ErrorBody> {
        let timeout_ms = Some(0);
        self.ask(&WaitProcess { id, timeout_ms })
    }

    /// Ends it and what it started; gives what became of it.
    pub fn kill(&self, id: ProcessId, grace_ms: Option<u32>) -> Result<ProcessInfo, ErrorBody> {
        self.ask(&KillProcess { id, grace_ms })
    }

    /// Starts what nobody follows.
    pub fn start_log(&self, request: &StartProcess) -> ProcessId {
        let mut client = self.connect();
        client.send(&StartProcess {
            output: OutputMode::Log,
            ..request.clone()
        });
        client.started();
        assert_eq!(client.frame(), None, "something follows the start");
        request.id
    }

    /// Reads the output of a process.
    pub fn replay(&self, id: ProcessId, from: AttachFrom, value: u64, follow: bool) -> Replay {
        let mut client = self.connect();
        client.send(&AttachProcess {
            id,
            from,
            value,
            follow,
        });
        client.replay()
    }

    /// Memory that the agent has for itself, in KiB.
    pub fn own_kib(&self) -> u64 {
        self.status_kib("RssAnon")
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

/// What an attach gave.
#[derive(Debug)]
pub struct Replay {
    pub attached: ProcessAttached,
    pub merged: Vec<u8>,
    /// Bytes that were said to be missing.
    pub missing: u64,
    /// The end of the process, or the offset to go on from.
    pub end: Result<ProcessEnded, u64>,
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
                // A signal, such as that of a child of the test program.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => panic!("reading from the agent: {error}"),
            }
        }
    }

    /// Everything behind the frames that were read, to the end.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.bytes);
        self.socket.read_to_end(&mut bytes).unwrap();
        bytes
    }

    pub fn error(&mut self) -> ErrorBody {
        let frame = self.frame().expect("an error frame");
        assert_eq!(frame.kind, Kind::ERROR);
        message::decode_body(&frame.body).unwrap()
    }

    pub fn started(&mut self) -> ProcessStarted {
        message::decode(&self.frame().unwrap()).unwrap()
    }

    /// Reads an attach to its last frame.
    pub fn replay(&mut self) -> Replay {
        let attached = message::decode(&self.frame().unwrap()).unwrap();
        let (mut merged, mut missing) = (Vec::new(), 0);
        let end = loop {
            let frame = self.frame().expect("a frame before the end");
            match frame.kind {
                Kind::STDOUT | Kind::STDERR => merged.extend_from_slice(&frame.body),
                Kind::OUTPUT_GAP => {
                    missing += message::decode::<OutputGap>(&frame).unwrap().bytes;
                }
                Kind::OUTPUT_REPLAYED => {
                    break Err(message::decode::<OutputReplayed>(&frame).unwrap().offset);
                }
                _ => break Ok(message::decode(&frame).unwrap()),
            }
        };
        assert_eq!(self.frame(), None, "something follows the last frame");
        Replay {
            attached,
            merged,
            missing,
            end,
        }
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

/// The agent of this build. An example is beside it in the same directory.
fn program() -> PathBuf {
    match option_env!("CARGO_BIN_EXE_guest-init") {
        Some(program) => program.into(),
        None => {
            let own = std::env::current_exe().unwrap();
            own.parent().unwrap().parent().unwrap().join("guest-init")
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
        output: OutputMode::Follow,
        user: Vec::new(),
        deadline_ms: None,
        memory_bytes: None,
        terminal: None,
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
