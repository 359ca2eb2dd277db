//! One connection as frames. Reads and writes never block: whoever uses a stream waits for it with
//! [`poll`](super::poll) and stops reading while too much is waiting to be written.

use std::any::Any;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{self, MsgFlags, Shutdown};
use protocol::frame::{self, FrameError, FrameReader, HEADER_LEN};
use protocol::message::{Message, MessageError};
use protocol::{ErrorBody, Frame, Kind};

use super::poll::{self, Interest};
use super::process::{Piece, as_u64};
use super::room::{Crowded, Room};
use crate::log;

/// Bytes taken from the connection in one go.
const READ: usize = 16 << 10;
/// So much that was sent may lie before what waits.
const MAX_SENT: usize = 64 << 10;
/// How long a peer that was refused may go on sending.
const DRAIN: Duration = Duration::from_secs(5);

/// Why a stream is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// The peer closed it or the connection broke.
    #[error("the client has gone: {0}")]
    Gone(Errno),
    /// The peer ended it between two frames.
    #[error("the client has ended the stream")]
    Ended,
    /// What came is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A long frame began while there was no room for one.
    #[error(transparent)]
    Crowded(#[from] Crowded),
    /// A message could not be written or read.
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// What reading gave.
pub(crate) enum Input {
    /// So many frames, appended to the list.
    Frames,
    /// Nothing yet.
    Nothing,
}

/// A connection.
pub(crate) struct Stream {
    socket: OwnedFd,
    reader: FrameReader,
    room: Room,
    output: Vec<u8>,
    sent: usize,
    /// The rest of a data frame, to be sent behind `output`.
    data: Option<Piece>,
    /// Lives as long as the connection.
    _keep: Option<Box<dyn Any + Send>>,
}

impl Stream {
    /// Wraps a connected socket that does not block.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            reader: FrameReader::new(),
            room: Room::default(),
            output: Vec::new(),
            sent: 0,
            data: None,
            _keep: None,
        }
    }

    /// Keeps something for as long as the connection is open.
    pub(crate) fn keep(&mut self, thing: Box<dyn Any + Send>) {
        self._keep = Some(thing);
    }

    /// What to wait for.
    pub(crate) fn interest(&self, read: bool) -> Interest {
        Interest::new(self.socket.as_fd(), read, self.pending() > 0)
    }

    /// Bytes that wait to be sent.
    pub(crate) fn pending(&self) -> usize {
        let data = self.data.as_ref().map_or(0, |data| data.bytes().len());
        self.output
            .len()
            .saturating_sub(self.sent)
            .saturating_add(data)
    }

    /// Whether the peer still takes what is sent. A vsock peer that has closed everything is no hang-up
    /// to `poll`, so sending nothing at all is how to ask.
    pub(crate) fn is_heard(&self) -> bool {
        !matches!(
            socket::send(self.socket.as_raw_fd(), &[], MsgFlags::MSG_NOSIGNAL),
            Err(Errno::EPIPE | Errno::ENOTCONN | Errno::ECONNRESET)
        )
    }

    /// Reads once and appends the frames that became complete.
    pub(crate) fn read(&mut self, frames: &mut Vec<Frame>) -> Result<Input, StreamError> {
        let mut buffer = [0; READ];
        let count = match socket::recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => {
                self.reader.finish()?;
                return Err(StreamError::Ended);
            }
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Input::Nothing),
            Err(errno) => return Err(StreamError::Gone(errno)),
        };
        let mut rest = buffer.get(..count).unwrap_or_default();
        while let Some(frame) = self.take_frame(&mut rest)? {
            frames.push(frame);
        }
        Ok(Input::Frames)
    }

    /// Takes a frame off the front of the bytes if it ends in them. A frame that cannot be is
    /// refused by name; the stream cannot go on behind it.
    pub(crate) fn take_frame(&mut self, bytes: &mut &[u8]) -> Result<Option<Frame>, StreamError> {
        let mut take = || {
            let frame = self.reader.push(bytes)?;
            let held = self.reader.unfinished().map_or(0, |(_, held)| held);
            self.room.hold(held)?;
            Ok(frame)
        };
        let taken = take();
        let refusal = match &taken {
            Err(StreamError::Frame(error)) => ErrorBody::from(MessageError::Frame(*error)),
            Err(StreamError::Crowded(error)) => (*error).into(),
            _ => return taken,
        };
        // As far as the connection takes it now: nobody is waited for.
        self.queue(&refusal)?;
        self.flush()?;
        taken
    }

    /// Lets go of what was sent, so that a peer that reads slowly keeps no more than what waits.
    fn forget_sent(&mut self) {
        if self.sent > MAX_SENT {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Queues a message.
    pub(crate) fn queue<M: Message>(&mut self, message: &M) -> Result<(), StreamError> {
        let body = protocol::message::encode_body(message)?;
        self.forget_sent();
        // A frame begins behind the end of the one before it.
        if let Some(data) = self.data.take() {
            self.output.extend_from_slice(data.bytes());
        }
        frame::append(&mut self.output, M::KIND, &body)?;
        Ok(())
    }

    /// Sends a data frame: at once if possible, the rest is queued without being copied.
    pub(crate) fn send(&mut self, kind: Kind, piece: Piece) -> Result<(), StreamError> {
        self.flush()?;
        let head = frame::header_for(kind, piece.bytes().len())?;
        if self.pending() > 0 {
            self.forget_sent();
            if let Some(data) = self.data.take() {
                self.output.extend_from_slice(data.bytes());
            }
            self.output.extend_from_slice(&head);
            self.data = Some(piece);
            return Ok(());
        }
        let parts = [IoSlice::new(&head), IoSlice::new(piece.bytes())];
        let sent = write_parts(self.socket.as_fd(), &parts)?;
        if let Some(rest) = head.get(sent..) {
            self.output.extend_from_slice(rest);
        }
        let piece = piece.skip(as_u64(sent.saturating_sub(HEADER_LEN)));
        if piece.len() > 0 {
            self.data = Some(piece);
        }
        Ok(())
    }

    /// Sends as much of what is queued as possible now.
    pub(crate) fn flush(&mut self) -> Result<(), StreamError> {
        while self.output.len() > self.sent {
            let rest = self.output.get(self.sent..).unwrap_or_default();
            match write_some(self.socket.as_fd(), rest)? {
                0 => return Ok(()),
                sent => self.sent = self.sent.saturating_add(sent),
            }
        }
        self.output.clear();
        self.sent = 0;
        while let Some(data) = self.data.take() {
            let sent = write_some(self.socket.as_fd(), data.bytes())?;
            let rest = data.skip(as_u64(sent));
            if rest.len() > 0 {
                self.data = Some(rest);
                if sent == 0 {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// What takes frames out of the bytes, for those who take the bytes themselves.
    pub(crate) fn reader(&mut self) -> &mut FrameReader {
        &mut self.reader
    }

    /// The connection itself, for those who pass its bytes on. Nothing may be waiting in here.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Waits for bytes, past the frames, while what is queued is sent. Zero is the end.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        loop {
            self.flush()?;
            match socket::recv(self.socket.as_raw_fd(), buffer, MsgFlags::empty()) {
                Ok(count) => return Ok(count),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let mut interests = [self.interest(true)];
                    poll::wait(&mut interests, None).map_err(StreamError::Gone)?;
                }
                Err(errno) => return Err(StreamError::Gone(errno)),
            }
        }
    }

    /// An error when the peer takes nothing more.
    pub(crate) fn check_heard(&self) -> Result<(), StreamError> {
        if self.is_heard() {
            Ok(())
        } else {
            Err(StreamError::Gone(Errno::EPIPE))
        }
    }

    /// Sends everything that is queued, then these bytes, and waits for room as long as it takes.
    pub(crate) fn send_all(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        let mut rest = bytes;
        // While there is no room, the peer's leaving is looked for once.
        let mut end_seen = false;
        loop {
            self.flush()?;
            if self.pending() == 0 {
                let sent = write_some(self.socket.as_fd(), rest)?;
                rest = rest.get(sent..).unwrap_or_default();
                if rest.is_empty() {
                    return Ok(());
                }
                if sent > 0 {
                    continue;
                }
            }
            let room = Interest::new(self.socket.as_fd(), false, true);
            let mut interests = [if end_seen { room } else { room.and_end() }];
            poll::wait(&mut interests, None).map_err(StreamError::Gone)?;
            let [peer] = interests;
            if peer.hung_up() {
                return Err(StreamError::Gone(Errno::EPIPE));
            }
            if peer.ended() {
                end_seen = true;
                self.check_heard()?;
            }
        }
    }

    /// Waits for the next frame.
    pub(crate) fn next(&mut self, frames: &mut Vec<Frame>) -> Result<Frame, StreamError> {
        loop {
            self.flush()?;
            if !frames.is_empty() {
                return Ok(frames.remove(0));
            }
            let mut interests = [self.interest(self.pending() == 0)];
            poll::wait(&mut interests, None).map_err(StreamError::Gone)?;
            let [interest] = interests;
            if interest.readable() {
                self.read(frames)?;
            }
        }
    }

    /// Sends a last message and everything queued before it, and ends the stream. Waits for room,
    /// never for an answer.
    pub(crate) fn finish<M: Message>(mut self, message: &M) -> Result<(), StreamError> {
        self.queue(message)?;
        loop {
            self.flush()?;
            if self.pending() == 0 {
                break;
            }
            let mut interests = [self.interest(false)];
            poll::wait(&mut interests, None).map_err(StreamError::Gone)?;
            let [interest] = interests;
            if interest.hung_up() {
                return Err(StreamError::Gone(Errno::EPIPE));
            }
        }
        // The descriptor is closed right after; a peer that has gone meanwhile does not matter.
        let _ = socket::shutdown(self.socket.as_raw_fd(), Shutdown::Write);
        Ok(())
    }

    /// Refuses a peer that may still be sending. What it sends is thrown away for a while, so that
    /// it comes to read the refusal instead of a broken connection.
    pub(crate) fn refuse_and_drain(mut self, error: &ErrorBody) -> Result<(), StreamError> {
        self.queue(error)?;
        let now = Instant::now();
        let deadline = now.checked_add(DRAIN).unwrap_or(now);
        let mut waste = vec![0; 64 << 10];
        let mut said = false;
        while Instant::now() < deadline {
            self.flush()?;
            if self.pending() == 0 && !said {
                said = true;
                // A peer that has gone meanwhile does not matter.
                let _ = socket::shutdown(self.socket.as_raw_fd(), Shutdown::Write);
            }
            let mut interests = [self.interest(true)];
            poll::wait(&mut interests, Some(deadline)).map_err(StreamError::Gone)?;
            match socket::recv(self.socket.as_raw_fd(), &mut waste, MsgFlags::empty()) {
                Ok(0) => break,
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(StreamError::Gone(errno)),
            }
        }
        if said {
            Ok(())
        } else {
            // A peer that sends no more may still read.
            self.flush()
        }
    }

    /// Refuses what the stream was opened for.
    pub(crate) fn refuse(self, error: &ErrorBody) -> Result<(), StreamError> {
        // Escaped: the client's own text may be in it. The log bounds its rate.
        log::info(format_args!(
            "event=refused code={:?} error={:?}",
            error.code, error.message
        ));
        self.finish(error)
    }
}

fn write_parts(socket: BorrowedFd<'_>, parts: &[IoSlice<'_>]) -> Result<usize, StreamError> {
    loop {
        let socket = socket.as_raw_fd();
        match socket::sendmsg::<()>(socket, parts, &[], MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(0),
            other => return other.map_err(StreamError::Gone),
        }
    }
}

fn write_some(socket: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, StreamError> {
    loop {
        match socket::send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(0),
            other => return other.map_err(StreamError::Gone),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::Shutdown as Half;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::agent::process::Source;

    #[test]
    fn a_peer_that_has_gone_is_told_from_one_that_only_says_no_more() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let stream = Stream::new(ours.into());
        assert!(stream.is_heard());
        theirs.shutdown(Half::Write).unwrap();
        assert!(stream.is_heard());
        assert!(theirs.write_all(b"x").is_err());
        drop(theirs);
        assert!(!stream.is_heard());
    }

    #[test]
    fn a_full_connection_is_still_heard() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut stream = Stream::new(ours.into());
        let piece = Piece::new(Source::Stdout, vec![0; 1 << 20]);
        stream.send(Kind::STDOUT, piece).unwrap();
        assert!(stream.pending() > 0);
        assert!(stream.is_heard());
    }

    #[test]
    fn frames_stay_whole_however_much_the_connection_takes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut stream = Stream::new(ours.into());
        let data: Vec<u8> = (0..65_536_u32).map(|i| (i % 251) as u8).collect();
        let reading = std::thread::spawn(move || {
            let (mut reader, mut frames) = (FrameReader::new(), Vec::new());
            let mut theirs = theirs;
            let mut buffer = vec![0; 777];
            while let Ok(count @ 1..) = std::io::Read::read(&mut theirs, &mut buffer) {
                let mut rest = &buffer[..count];
                while let Some(frame) = reader.push(&mut rest).unwrap() {
                    frames.push(frame);
                }
            }
            frames
        });
        for _ in 0..40 {
            let piece = Piece::new(Source::Stderr, data.clone());
            stream.send(Kind::STDERR, piece).unwrap();
            stream
                .queue(&protocol::process::OutputGap { bytes: 5 })
                .unwrap();
        }
        stream
            .finish(&protocol::process::OutputGap { bytes: 6 })
            .unwrap();
        let frames = reading.join().unwrap();
        assert_eq!(frames.len(), 81);
        for pair in frames.chunks_exact(2) {
            assert_eq!((pair[0].kind, &pair[0].body), (Kind::STDERR, &data));
            assert_eq!(pair[1].kind, Kind::OUTPUT_GAP);
        }
    }
}
