//! What a hostile appliance or agent answers a client, cut anywhere, through the client's own reader of
//! frames: never more than one frame is held, the frames are those that the protocol's reader sees
//! at once, and each body is read as the replies that a client waits for.

#![no_main]
#![allow(dead_code)]

// The client's TLS and command line are not wanted here: this one file of it is.
#[path = "../../client/src/frames.rs"]
mod frames;

/// The errors that the reader of frames has to tell.
mod error {
    #[derive(Debug, thiserror::Error)]
    pub(crate) enum ClientError {
        #[error("lost: {0}")]
        Lost(String),
        #[error("unsendable: {0}")]
        Unsendable(String),
        #[error(transparent)]
        Frame(#[from] protocol::FrameError),
    }

    impl ClientError {
        pub(crate) fn lost(reason: impl ToString) -> Self {
            Self::Lost(reason.to_string())
        }
    }
}

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use libfuzzer_sys::fuzz_target;
use protocol::message::{MessageError, decode};
use protocol::{Frame, FrameReader, Message};
use tokio::io::{AsyncRead, ReadBuf};

/// Bytes that come in pieces of this size, with a pause after each.
struct Pieces<'a> {
    bytes: &'a [u8],
    size: usize,
    pause: bool,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        room: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.pause = !self.pause;
        if self.pause {
            return Poll::Pending;
        }
        let most = self.size.min(room.remaining()).min(self.bytes.len());
        let (now, later) = self.bytes.split_at(most);
        room.put_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(()))
    }
}

/// Polls until it is done: there is nothing to wait for. Every other poll is of a new call, as when
/// a caller gives one up.
fn next(reader: &mut frames::Frames<Pieces<'_>>) -> Result<Option<Frame>, error::ClientError> {
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(done) = pin!(reader.next()).poll(&mut context) {
            return done;
        }
    }
}

fn reply<M: Message>(frame: &Frame) {
    match decode::<M>(frame) {
        // What a person is shown of a refusal.
        Err(MessageError::Refused(error)) => drop(error.to_string()),
        Err(error) => drop(error.to_string()),
        Ok(_) => {}
    }
}

fuzz_target!(|bytes: &[u8]| {
    let [size, cut, bytes @ ..] = bytes else {
        return;
    };
    let mut whole = Vec::new();
    let (mut reader, mut rest) = (FrameReader::new(), bytes);
    while let Ok(Some(frame)) = reader.push(&mut rest) {
        whole.push(frame);
    }
    let (before, after) = bytes.split_at(bytes.len().min(usize::from(*cut)));
    let pieces = Pieces {
        bytes: after,
        size: usize::from(*size) + 1,
        pause: false,
    };
    // Some of it was read before, as behind the answer that opens a stream.
    let mut reader = frames::Frames::resume(pieces, before);
    let mut seen = Vec::new();
    while let Ok(Some(frame)) = next(&mut reader) {
        reply::<protocol::hello::HelloOk>(&frame);
        reply::<protocol::vm::VmInfo>(&frame);
        reply::<protocol::vm::VmPage>(&frame);
        reply::<protocol::vm::Deleted>(&frame);
        reply::<protocol::vm::Opened>(&frame);
        reply::<protocol::vm::Console>(&frame);
        reply::<protocol::network::NetworkInfo>(&frame);
        reply::<protocol::network::LinkCreated>(&frame);
        reply::<protocol::process::ProcessStarted>(&frame);
        reply::<protocol::process::ProcessEnded>(&frame);
        seen.push(frame);
    }
    assert_eq!(seen, whole);
});
