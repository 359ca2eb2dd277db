//! What an agent reads before it does anything: frames that come before the configuration, requests
//! for processes as they are checked, and the guest's own lists of users and names.

#![no_main]

use fuzz::driver::Input;
use libfuzzer_sys::fuzz_target;
use protocol::Kind;
use protocol::frame::append;

/// With which a stream can begin.
const KINDS: [Kind; 12] = [
    Kind::CONFIGURE,
    Kind::POWER_OFF,
    Kind::HEALTH,
    Kind::SET_TIME,
    Kind::DIAL,
    Kind::START_PROCESS,
    Kind::ATTACH_PROCESS,
    Kind::LIST_PROCESSES,
    Kind::KILL_PROCESS,
    Kind::REMOVE_FILE,
    Kind::WRITE_FILE,
    Kind::UNPACK_TREE,
];

/// Whole frames, mostly of kinds that mean something.
fn frames(bytes: &[u8]) -> Vec<u8> {
    let (mut input, mut frames) = (Input(bytes), Vec::new());
    while !input.is_empty() {
        let choice = usize::from(input.byte());
        let kind = KINDS.get(choice % 16).copied();
        let kind = kind.unwrap_or_else(|| Kind(input.u16()));
        let length = usize::from(input.byte());
        append(&mut frames, kind, input.take(length)).expect("a frame");
    }
    frames
}

fuzz_target!(|bytes: &[u8]| {
    let Some((what, bytes)) = bytes.split_first() else {
        return;
    };
    match what % 5 {
        0 => fuzz::agent_stream(bytes),
        1 => fuzz::agent_stream(&frames(bytes)),
        2 => fuzz::agent_command(bytes),
        3 => {
            let mut parts = bytes.splitn(3, |byte| *byte == 0xff);
            let mut part = || parts.next().unwrap_or_default();
            fuzz::users(part(), part(), part());
        }
        _ => fuzz::hosts(bytes),
    }
});
