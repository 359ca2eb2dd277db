//! What the tests of files ask, and how.

use protocol::file::transfer::{
    FileHole, FileWritten, ReadEnded, ReadFile, ReadStarted, UploadId, WriteEnd, WriteFile,
    WriteMode, WriteStarted,
};
use protocol::message::{self, Message};
use protocol::{ErrorBody, Kind};

use super::{Agent, Client};

/// One request and its answer.
pub fn ask<Q: Message, A: Message>(agent: &Agent, request: &Q) -> A {
    let mut client = agent.connect();
    client.send(request);
    let frame = client.frame().expect("an answer");
    assert_eq!(client.frame(), None, "something follows the answer");
    message::decode(&frame).unwrap_or_else(|error| panic!("{error}"))
}

/// One request and its refusal.
pub fn refusal<Q: Message>(agent: &Agent, request: &Q) -> ErrorBody {
    let mut client = agent.connect();
    client.send(request);
    let error = client.error();
    assert_eq!(client.frame(), None, "something follows the error");
    error
}

pub fn read_request(path: &str) -> ReadFile {
    ReadFile {
        path: path.as_bytes().to_vec(),
        offset: 0,
        length: None,
        checksum: false,
        before: 0,
        sparse: false,
        special: false,
    }
}

/// A file as it was read.
pub struct Read {
    pub started: ReadStarted,
    pub bytes: Vec<u8>,
    pub holes: u64,
    pub ended: ReadEnded,
}

pub fn read(agent: &Agent, request: &ReadFile) -> Read {
    let mut client = agent.connect();
    client.send(request);
    let started =
        message::decode(&client.frame().unwrap()).unwrap_or_else(|error| panic!("{error}"));
    let (mut bytes, mut holes) = (Vec::new(), 0);
    let ended = loop {
        let frame = client.frame().expect("a frame before the end");
        match frame.kind {
            Kind::FILE_DATA => bytes.extend_from_slice(&frame.body),
            Kind::FILE_HOLE => {
                let FileHole { length } = message::decode(&frame).unwrap();
                holes += length;
                bytes.resize(bytes.len() + usize::try_from(length).unwrap(), 0);
            }
            _ => break message::decode(&frame).unwrap_or_else(|error| panic!("{error}")),
        }
    };
    assert_eq!(client.frame(), None, "something follows the last frame");
    Read {
        started,
        bytes,
        holes,
        ended,
    }
}

pub fn write_request(path: &str) -> WriteFile {
    WriteFile {
        path: path.as_bytes().to_vec(),
        mode: WriteMode::Replace,
        permissions: None,
        size: None,
        checksum: false,
        upload: None,
        offset: 0,
    }
}

/// A write that has begun.
pub fn begin(agent: &Agent, request: &WriteFile) -> Client {
    let mut client = agent.connect();
    client.send(request);
    let frame = client.frame().expect("an answer");
    message::decode::<WriteStarted>(&frame).unwrap_or_else(|error| panic!("{error}"));
    client
}

pub fn data(client: &mut Client, bytes: &[u8]) {
    for piece in bytes.chunks(protocol::frame::MAX_DATA) {
        client.send_raw(Kind::FILE_DATA, piece);
    }
}

pub fn end(mut client: Client) -> Result<FileWritten, ErrorBody> {
    client.send(&WriteEnd { blake3: None });
    let frame = client.frame().expect("an answer");
    match message::decode(&frame) {
        Ok(written) => Ok(written),
        Err(message::MessageError::Refused(error)) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

pub fn write(agent: &Agent, request: &WriteFile, bytes: &[u8]) -> Result<FileWritten, ErrorBody> {
    let mut client = begin(agent, request);
    data(&mut client, bytes);
    end(client)
}

pub fn upload_id(number: u8) -> UploadId {
    UploadId([number; 16])
}

/// Bytes that do not repeat soon.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state: u32 = 1;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}
