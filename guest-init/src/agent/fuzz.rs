//! The agent in the hands of a fuzz target, which runs on the developer's own machine and perhaps as
//! root: no process is started, no file is touched but in the directory that is named, and nothing
//! of the machine is set. Built by cargo-fuzz only.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
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
fn agent(logs: Option<PathBuf>, configuration: Configuration) -> Result<Arc<Agent>, Errno> {
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(Arc::new(Agent {
        machine: Machine::Borrowed,
        workspace: PathBuf::from("/dev/null"),
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
    let agent = agent(None, Configuration::Awaited).expect("an agent");
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
    let agent = agent(Some(directory.to_path_buf()), Configuration::Done { env });
    let agent = agent.expect("an agent");
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
