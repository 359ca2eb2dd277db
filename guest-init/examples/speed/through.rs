//! The same through the agent.

use std::io::{IoSlice, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use protocol::Kind;
use protocol::file::transfer::{FileWritten, ReadEnded, WriteEnd};
use protocol::frame::{HEADER_LEN, Header, MAX_DATA, header_for};
use protocol::message::decode_body;
use protocol::process::{ProcessEnded, StartProcess};

use crate::common::Agent;
use crate::common::files::{read_request, write_request};
use crate::content::{self, BLOCK, Check};

pub(crate) fn output(agent: &Agent, request: &StartProcess, size: u64) {
    let mut client = agent.connect();
    // Each run is a process of its own.
    client.send(&StartProcess {
        id: crate::common::shell("").id,
        ..request.clone()
    });
    let mut check = Check::default();
    let last = frames(&mut client.socket, Kind::STDOUT, &mut check);
    assert_eq!(last.0, Kind::PROCESS_ENDED);
    let ended: ProcessEnded = decode_body(&last.1).unwrap();
    assert_eq!(ended.exit_code, 0);
    check.end(size);
}

pub(crate) fn upload(agent: &Agent, path: &Path, size: u64, checksum: bool) {
    let mut client = agent.connect();
    let mut request = write_request("");
    request.path = path.as_os_str().as_bytes().to_vec();
    request.size = Some(size);
    request.checksum = checksum;
    client.send(&request);
    let mut sent = 0;
    while sent < size {
        // As many frames at once as a block has.
        let head = header_for(Kind::FILE_DATA, MAX_DATA).unwrap();
        let mut parts = Vec::new();
        for frame in 0..(BLOCK / MAX_DATA) as u64 {
            parts.push(IoSlice::new(&head));
            let at = sent + frame * MAX_DATA as u64;
            parts.push(IoSlice::new(content::at(at, MAX_DATA)));
        }
        let mut rest = &mut parts[..];
        while !rest.is_empty() {
            let count = client.socket.write_vectored(rest).unwrap();
            IoSlice::advance_slices(&mut rest, count);
        }
        sent += BLOCK as u64;
    }
    client.send(&WriteEnd { blake3: None });
    client.frame().expect("the write has begun");
    let last = client.frame().expect("the write has ended");
    let written: FileWritten = protocol::message::decode(&last).unwrap();
    assert_eq!((written.size, written.blake3.is_some()), (size, checksum));
}

pub(crate) fn download(agent: &Agent, path: &Path, size: u64, checksum: bool) {
    let mut client = agent.connect();
    let mut request = read_request("");
    request.path = path.as_os_str().as_bytes().to_vec();
    request.checksum = checksum;
    client.send(&request);
    let mut check = Check::default();
    let last = frames(&mut client.socket, Kind::FILE_DATA, &mut check);
    assert_eq!(last.0, Kind::READ_ENDED);
    let _: ReadEnded = decode_body(&last.1).unwrap();
    check.end(size);
}

/// Checks all frames of one kind; gives the last frame before the end.
fn frames(socket: &mut UnixStream, kind: Kind, check: &mut Check) -> (Kind, Vec<u8>) {
    let mut buffer = vec![0; BLOCK];
    let (mut start, mut end) = (0, 0);
    let mut last = (Kind::ERROR, Vec::new());
    // The header of the frame that is under way, and how much of its body is missing.
    let (mut current, mut left) = (Kind::ERROR, 0);
    loop {
        if left == 0 && end - start >= HEADER_LEN {
            let head = *buffer[start..].first_chunk().unwrap();
            let head = Header::parse(head).unwrap();
            start += HEADER_LEN;
            (current, left) = (head.kind, head.length as usize);
            if current != kind {
                last = (current, Vec::new());
            }
            continue;
        }
        if left > 0 && end > start {
            let count = left.min(end - start);
            let bytes = &buffer[start..start + count];
            if current == kind {
                check.take(bytes);
            } else {
                last.1.extend_from_slice(bytes);
            }
            start += count;
            left -= count;
            continue;
        }
        buffer.copy_within(start..end, 0);
        (start, end) = (0, end - start);
        match socket.read(&mut buffer[end..]).unwrap() {
            0 => return last,
            count => end += count,
        }
    }
}
