//! The worked example of docs/protocol.md is what this crate writes.

#![allow(clippy::unwrap_used)]

use protocol::hello::{Hello, HelloOk, Limits};
use protocol::id::ProcessId;
use protocol::process::{
    CommandMode, OutputMode, ProcessEnd, ProcessEnded, ProcessStarted, StartProcess, StdinMode,
};
use protocol::vm::{OpenVm, Opened};
use protocol::{ErrorBody, ErrorCode, Kind, encode, frame};

#[test]
fn the_documented_bytes_are_the_ones_on_the_wire() {
    let mut stdout = Vec::new();
    frame::append(&mut stdout, Kind::STDOUT, b"hi\n").unwrap();
    let limits = Limits {
        max_streams: 64,
        max_body: 1_114_112,
        max_cpus: 16,
        max_memory_mib: 32 << 10,
        max_disk_mib: 1 << 20,
    };
    let hello = Hello {
        generation: 1,
        token: "secret".into(),
    };
    let hello_ok = HelloOk {
        generation: 1,
        limits,
    };
    let opened = Opened {
        id: "vm-1234abcd".parse().unwrap(),
        generation: 1,
    };
    let start = StartProcess {
        id: ProcessId(std::array::from_fn(|index| index as u8)),
        mode: CommandMode::Argv,
        command: vec![b"echo".to_vec(), b"hi".to_vec()],
        cwd: Vec::new(),
        env: Vec::new(),
        stdin: StdinMode::Null,
        output: OutputMode::Follow,
        user: Vec::new(),
        deadline_ms: None,
        memory_bytes: None,
        terminal: None,
    };
    let ended = ProcessEnded {
        end: ProcessEnd::Exited,
        exit_code: 0,
        signal: 0,
        output_open: false,
        message: String::new(),
    };
    let open = OpenVm {
        vm: "web".parse().unwrap(),
    };
    let written = [
        ('C', encode(&hello).unwrap()),
        ('S', encode(&hello_ok).unwrap()),
        ('C', encode(&open).unwrap()),
        ('S', encode(&opened).unwrap()),
        ('C', encode(&start).unwrap()),
        ('S', encode(&ProcessStarted { pid: 412 }).unwrap()),
        ('S', stdout),
        ('S', encode(&ended).unwrap()),
        (
            'S',
            encode(&ErrorBody::caller(ErrorCode::VmNotFound, "no")).unwrap(),
        ),
    ];
    assert_eq!(documented(), written);
}

/// The lines of the page that begin with a side and hold nothing but hexadecimal digits.
fn documented() -> Vec<(char, Vec<u8>)> {
    include_str!("../../docs/protocol.md")
        .lines()
        .filter_map(|line| {
            let rest = line.strip_prefix("    ")?;
            let (side, digits) = rest.split_once(' ')?;
            let side = side.chars().next().filter(|_| side.len() == 1)?;
            let digits: Vec<char> = digits.chars().filter(|digit| *digit != ' ').collect();
            let bytes = digits
                .chunks(2)
                .map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16))
                .collect::<Result<_, _>>()
                .ok()?;
            Some((side, bytes))
        })
        .collect()
}
