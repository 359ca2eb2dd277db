//! The agent in the hands of a fuzz target, which runs on the developer's own machine and perhaps as
//! root: no process is started, no file is touched but in the directory that is named, and nothing
//! of the machine is set. Built by cargo-fuzz only.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use protocol::file::manage::*;
use protocol::file::transfer::*;
use protocol::file::tree::PackTree;
use protocol::file::watch::WatchFiles;
use protocol::message::encode;
use protocol::process::StartProcess;
use protocol::processes::{
    AttachFrom, AttachProcess, ListProcesses, ProcessPage, RemoveProcess, WaitProcess,
};
use protocol::{Frame, FrameReader};

use super::file::Uploads;
use super::process::{Command, Drain, Registry, Terminals};
use super::stream::Stream;
use super::*;

/// An agent without helpers: nothing that it was asked for goes on when the stream has ended.
fn agent(
    workspace: &Path,
    logs: Option<PathBuf>,
    configuration: Configuration,
) -> Result<Arc<Agent>, Errno> {
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(Arc::new(Agent {
        machine: Machine::Borrowed,
        workspace: workspace.to_path_buf(),
        reaper: Reaper::default(),
        cgroups: None,
        drain: Drain::new()?,
        dev_null: open("/dev/null", OFlag::O_CLOEXEC, Mode::empty())?,
        proc: open("/proc", directory, Mode::empty())?,
        configuration: Mutex::new(configuration),
        registry: Registry::new(logs),
        terminals: Terminals::find(),
        uploads: Uploads::kept_in(None),
        streams: AtomicUsize::new(0),
        powering_off: AtomicBool::new(false),
    }))
}

/// Nothing is below it.
const NOWHERE: &str = "/dev/null";
/// What fits into a socket that nobody reads yet.
const MAX_INPUT: usize = 100_000;

/// Serves one stream of these bytes on this thread and gives the frames that were answered.
fn serve(agent: &Arc<Agent>, bytes: &[u8]) -> Vec<Frame> {
    let (mut client, socket) = UnixStream::pair().expect("a socket pair");
    socket.set_nonblocking(true).expect("non-blocking");
    let bytes = bytes.get(..MAX_INPUT).unwrap_or(bytes);
    client.write_all(bytes).expect("room for it");
    client.shutdown(Shutdown::Write).expect("an end");
    let answers = std::thread::scope(|scope| {
        // For one that does not read its answers the agent would wait, as it should.
        let reader = scope.spawn(|| {
            let mut answers = Vec::new();
            // What the agent left unread comes back as a reset, behind the answers.
            let _ = client.read_to_end(&mut answers);
            answers
        });
        let _ = agent.serve(Stream::new(socket.into()));
        reader.join().expect("answers")
    });
    let (mut reader, mut rest, mut frames) = (FrameReader::new(), &answers[..], Vec::new());
    while let Some(frame) = reader.push(&mut rest).expect("frames") {
        frames.push(frame);
    }
    frames
}

/// Any frames before the configuration. The one that configures ends its stream, and the next input
/// meets another agent, so that nothing behind the configuration is ever reached.
pub(crate) fn stream(bytes: &[u8]) {
    let agent = agent(NOWHERE.as_ref(), None, Configuration::Awaited).expect("an agent");
    for frame in serve(&agent, bytes) {
        let known = matches!(frame.kind, Kind::ERROR | Kind::CONFIGURED);
        assert!(known, "{frame:?}");
    }
}

/// A request for a process as it is checked, and nothing more.
pub(crate) fn command(body: &[u8]) {
    if let Ok(request) = decode_body::<StartProcess>(body) {
        let _ = Command::parse(request, Path::new(WORKSPACE), &[]);
    }
}

/// Lists the processes of which an earlier run left logs in `directory`, and reads and forgets each
/// of them. The requests are made here, from numbers.
pub(crate) fn logs(directory: &Path, value: u64) {
    let env = Vec::new();
    let logs = Some(directory.to_path_buf());
    let agent = agent(NOWHERE.as_ref(), logs, Configuration::Done { env }).expect("an agent");
    let ask = |bytes: Result<Vec<u8>, _>| serve(&agent, &bytes.unwrap_or_default());
    let page = ask(encode(&ListProcesses { after: 0 }));
    let [page] = page.as_slice() else {
        panic!("{page:?} is no answer");
    };
    let page: ProcessPage = decode_body(&page.body).expect("a page");
    for one in page.processes {
        let id = one.id;
        let timeout_ms = Some(0);
        let known = ask(encode(&WaitProcess { id, timeout_ms }));
        assert_eq!(known.len(), 1);
        let follow = false;
        for from in [AttachFrom::Oldest, AttachFrom::Offset, AttachFrom::Lines] {
            let request = AttachProcess {
                id,
                from,
                value,
                follow,
            };
            let frames = ask(encode(&request));
            let last = frames.last().map(|frame| frame.kind);
            let ends = [Kind::PROCESS_ENDED, Kind::OUTPUT_REPLAYED, Kind::ERROR];
            assert!(last.is_some_and(|kind| ends.contains(&kind)), "{last:?}");
        }
        let removed = ask(encode(&RemoveProcess { id }));
        assert_eq!(removed.len(), 1);
    }
}

/// All paths, and all that links point to: relative, and never upwards.
const PATHS: [&str; 8] = ["a", "b", "d", "d/a", "d/e", "d/l", "l", "d/e/f"];

/// Operations on files in a directory, which is the same one in every call and empty before it. The
/// requests are made here, from numbers, and of a few paths that lead nowhere else.
pub(crate) fn files(directory: &Path, bytes: &[u8]) {
    static AGENT: OnceLock<Arc<Agent>> = OnceLock::new();
    static RUN: AtomicU64 = AtomicU64::new(0);
    let agent = AGENT.get_or_init(|| {
        let env = Vec::new();
        agent(directory, None, Configuration::Done { env }).expect("an agent")
    });
    let run = RUN.fetch_add(1, Ordering::Relaxed);
    let mut bytes = bytes.iter().copied();
    // Each is a stream of its own: more of them say nothing new.
    for _ in 0..24 {
        let Some(what) = bytes.next() else { return };
        let mut byte = || bytes.next().unwrap_or(0);
        let (frames, ends) = operation(what, run, &mut byte);
        let last = serve(agent, &frames).last().map(|frame| frame.kind);
        // A watch ends with its client.
        let as_it_should = match last {
            Some(kind) => ends.contains(&kind) || kind == Kind::ERROR,
            None => ends.is_empty(),
        };
        assert!(as_it_should, "operation {what} ended with {last:?}");
    }
}

/// The frames of one operation, and with which frame it may end but for an error.
fn operation(what: u8, run: u64, byte: &mut impl FnMut() -> u8) -> (Vec<u8>, &'static [Kind]) {
    fn one<M: protocol::Message>(message: &M) -> Vec<u8> {
        encode(message).expect("a frame")
    }
    let path = |choice: u8| PATHS[usize::from(choice) % PATHS.len()].into();
    let number = |byte: &mut dyn FnMut() -> u8| match byte() {
        255 => u64::from(byte()) << 56 | 1,
        254 => u64::from(byte()) << 8,
        small => u64::from(small),
    };
    let id = |choice: u8| {
        let mut id = [choice % 3; 16];
        id[..8].copy_from_slice(&run.to_le_bytes());
        UploadId(id)
    };
    let first = byte();
    let (path, flag) = (path(first), first & 0x80 != 0);
    const DONE: &[Kind] = &[Kind::FILE_DONE];
    match what % 15 {
        0 => (one(&StatFile { path, follow: flag }), &[Kind::FILE_INFO]),
        1 => {
            let path = if byte() & 1 == 0 { Vec::new() } else { path };
            (
                one(&WalkDirectory {
                    path,
                    targets: flag,
                }),
                DONE,
            )
        }
        2 => {
            let (mode, parents) = (u32::from(byte()) | 0o700, flag);
            (
                one(&MakeDirectory {
                    path,
                    mode,
                    parents,
                }),
                DONE,
            )
        }
        3 => {
            let to = PATHS[usize::from(byte()) % PATHS.len()].into();
            (
                one(&RenameFile {
                    from: path,
                    to,
                    no_replace: flag,
                }),
                DONE,
            )
        }
        4 => (
            one(&RemoveFile {
                path,
                recursive: flag,
            }),
            &[Kind::FILES_REMOVED],
        ),
        5 => {
            let target = PATHS[usize::from(byte()) % PATHS.len()].into();
            (one(&MakeSymlink { target, path }), DONE)
        }
        6 => (one(&ReadLink { path }), &[Kind::LINK_TARGET]),
        7 => {
            let mode = u32::from(byte()) | 0o700;
            (one(&ChangeMode { path, mode }), DONE)
        }
        8 => {
            // No more than can be read in a moment.
            let length = u64::from(byte()) << 12;
            (one(&ResizeFile { path, length }), DONE)
        }
        9 => {
            let flags = byte();
            let request = ReadFile {
                path,
                offset: number(byte),
                length: (flags & 1 != 0).then(|| number(byte)),
                checksum: flags & 2 != 0,
                before: if flags & 4 != 0 { number(byte) } else { 0 },
                sparse: flags & 8 != 0,
                special: false,
            };
            (one(&request), &[Kind::READ_ENDED])
        }
        10 => {
            let flags = byte();
            let mut frames = one(&WriteFile {
                path,
                mode: WriteMode::from_wire(byte() % 4),
                permissions: flag.then_some(0o755),
                size: (flags & 1 != 0).then(|| number(byte)),
                checksum: flags & 2 != 0,
                upload: (flags & 4 != 0).then(|| id(flags >> 6)),
                offset: if flags & 8 != 0 { number(byte) } else { 0 },
            });
            for _ in 0..byte() % 4 {
                let length = byte();
                if length & 1 == 0 {
                    let data = vec![length; usize::from(length)];
                    protocol::frame::append(&mut frames, Kind::FILE_DATA, &data).expect("a frame");
                } else {
                    let length = u64::from(length) << 4;
                    frames.extend(one(&FileHole { length }));
                }
            }
            if flags & 16 != 0 {
                let blake3 = (flags & 32 != 0).then_some([7; 32]);
                frames.extend(one(&WriteEnd { blake3 }));
                return (frames, &[Kind::FILE_WRITTEN]);
            }
            // Cut off.
            (frames, &[Kind::WRITE_STARTED])
        }
        11 => {
            let upload = id(byte());
            (one(&QueryUpload { path, upload }), &[Kind::UPLOAD_STATE])
        }
        12 => {
            let upload = id(byte());
            (one(&DropUpload { path, upload }), DONE)
        }
        13 => {
            let request = PackTree {
                path: if flag { Vec::new() } else { path },
                checksum: true,
                sparse: byte() & 1 == 0,
                special: false,
            };
            (one(&request), &[Kind::READ_ENDED])
        }
        _ => {
            let request = WatchFiles {
                path,
                recursive: flag,
            };
            (one(&request), &[Kind::WATCH_STARTED, Kind::FILE_EVENTS])
        }
    }
}
