//! Logs of processes as an earlier run, or the guest's owner, may have left them on the disk: an
//! agent that starts on them lists, reads and forgets what it can, and answers every request.

#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use fuzz::driver::Input;
use libfuzzer_sys::fuzz_target;
use protocol::id::ProcessId;
use protocol::message::encode_body;
use protocol::process::{CommandMode, OutputMode, ProcessEnd, ProcessEnded};
use protocol::processes::ProcessInfo;
use tempfile::TempDir;

fn place() -> &'static PathBuf {
    static PLACE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, logs) = PLACE.get_or_init(|| {
        let place = tempfile::tempdir().expect("a directory");
        let logs = place.path().join("logs");
        (place, logs)
    });
    logs
}

/// What a record says of its process.
fn about(id: ProcessId, input: &mut Input<'_>) -> Vec<u8> {
    let what = input.byte();
    let ended = ProcessEnded {
        end: ProcessEnd::Exited,
        exit_code: what,
        signal: 0,
        output_open: false,
        message: String::new(),
    };
    let info = ProcessInfo {
        id,
        number: input.number(),
        pid: input.u32(),
        mode: CommandMode::Argv,
        command: vec![vec![what]],
        output: OutputMode::Log,
        terminal: false,
        started_unix_ms: input.number(),
        ended_unix_ms: input.number(),
        ended: (what & 1 == 1).then_some(ended),
        bytes: input.number(),
        dropped: input.number(),
    };
    encode_body(&info).expect("a body")
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let place = place();
    let _ = std::fs::remove_dir_all(place);
    std::fs::create_dir(place).expect("a directory");
    let value = input.number();
    for _ in 0..input.byte() % 6 {
        let id = ProcessId([input.byte() % 3; 16]);
        let name = format!("{:016x}-{id}.{:016x}", input.number(), input.number());
        let mut content = b"supvmlg1".to_vec();
        for _ in 0..input.byte() % 8 {
            let tag = input.byte() % 6;
            let body = match tag {
                3 | 4 => about(id, &mut input),
                _ => {
                    let length = usize::from(input.byte()) * 8;
                    input.take(length).to_vec()
                }
            };
            let length = match input.byte() {
                0xff => input.u32(),
                _ => body.len() as u32,
            };
            content.push(tag);
            content.extend(length.to_le_bytes());
            content.extend(body);
        }
        // And some bytes of any kind, or fewer than there should be.
        match input.byte() {
            0xff => content.truncate(usize::from(input.u16())),
            length => content.extend(input.take(usize::from(length % 32))),
        }
        std::fs::write(place.join(name), content).expect("a file");
    }
    fuzz::agent_logs(place, value);
});
