//! The bytes of a file or an archive on their way to us: bounded by what was announced, counted,
//! and hashed if that was asked for. One frame is held at a time.

use std::io;
use std::task::{Context, Poll, ready};

use protocol::Kind;
use protocol::file::transfer::{FileHole, ReadEnded};
use tokio::io::ReadBuf;

use crate::agent::{Replies, Requests, out_of_order};
use crate::error::ClientError;

/// The longest hole that is given at once when its zeros have to be hashed.
const HASHED_HOLE: u64 = 4 << 20;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A part of a file, in order.
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// use client::file::{FileRead, Piece};
/// let mut disk = vm.download(FileRead::new("disk.img").sparse()).await?;
/// let mut content = 0;
/// while let Some(piece) = disk.next_piece().await? {
///     if let Piece::Data(bytes) = piece {
///         content += bytes.len();
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Content.
    Data(Vec<u8>),
    /// So many zeros that take no room.
    Hole(u64),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Inflow {
    replies: Replies,
    // The agent takes the end of our half for our leaving.
    _requests: Requests,
    path: String,
    /// How many bytes were announced.
    total: Option<u64>,
    sparse: bool,
    hasher: Option<Box<blake3::Hasher>>,
    received: u64,
    /// Zeros that were announced and not given yet.
    hole: u64,
    over: bool,
    /// What `poll_read` has of a piece that did not fit.
    data: Vec<u8>,
    at: usize,
    zeros: u64,
}

impl Inflow {
    pub(super) fn new(
        (replies, requests): (Replies, Requests),
        path: String,
        total: Option<u64>,
        sparse: bool,
        checksum: bool,
    ) -> Self {
        Self {
            replies,
            _requests: requests,
            path,
            total,
            sparse,
            hasher: checksum.then(Box::default),
            received: 0,
            hole: 0,
            over: false,
            data: Vec::new(),
            at: 0,
            zeros: 0,
        }
    }

    /// Takes over what its predecessor has read and not given, and what it has hashed.
    pub(super) fn continuing(mut self, old: &mut Self) -> Self {
        self.data = std::mem::take(&mut old.data);
        self.at = old.at;
        self.zeros = old.zeros;
        self.hasher = old.hasher.take();
        self
    }

    /// What comes is hashed behind what was hashed already.
    pub(super) fn goes_on_behind(&mut self, known: blake3::Hasher) {
        self.hasher = Some(Box::new(known));
    }

    /// How many bytes have been taken off the stream as pieces.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// The next piece; none when everything is there and right.
    pub(super) fn poll_piece(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Piece>, ClientError>> {
        loop {
            if self.hole > 0 {
                return Poll::Ready(Ok(Some(self.take_hole())));
            }
            if self.over {
                return Poll::Ready(Ok(None));
            }
            let frame = ready!(self.replies.poll_next(cx)).map_err(ClientError::repeatable)?;
            match frame.kind {
                Kind::FILE_DATA if frame.body.is_empty() => {}
                Kind::FILE_DATA => {
                    let length = u64::try_from(frame.body.len()).unwrap_or(u64::MAX);
                    self.check_room(length)?;
                    self.received = self.received.saturating_add(length);
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(&frame.body);
                    }
                    return Poll::Ready(Ok(Some(Piece::Data(frame.body))));
                }
                Kind::FILE_HOLE if self.sparse => {
                    let FileHole { length } = protocol::decode(&frame)?;
                    self.check_room(length)?;
                    self.hole = length;
                }
                Kind::READ_ENDED => {
                    self.finish(&protocol::decode(&frame)?)?;
                    self.over = true;
                }
                _ => return Poll::Ready(Err(out_of_order(&frame))),
            }
        }
    }

    fn take_hole(&mut self) -> Piece {
        let mut length = self.hole;
        if let Some(hasher) = &mut self.hasher {
            length = length.min(HASHED_HOLE);
            let mut left = usize::try_from(length).unwrap_or(usize::MAX);
            while left > 0 {
                let zeros = ZEROS.get(..left).unwrap_or(&ZEROS);
                hasher.update(zeros);
                left = left.saturating_sub(zeros.len());
            }
        }
        self.hole = self.hole.saturating_sub(length);
        self.received = self.received.saturating_add(length);
        Piece::Hole(length)
    }

    fn check_room(&self, length: u64) -> Result<(), ClientError> {
        let end = self.received.checked_add(length);
        match (end, self.total) {
            (Some(end), Some(total)) if end > total => Err(ClientError::Broken(format!(
                "the agent sent more of {} than the {total} bytes that it announced",
                self.path
            ))),
            (Some(_), _) => Ok(()),
            (None, _) => Err(ClientError::Broken("the agent's file has no end".into())),
        }
    }

    fn finish(&mut self, ended: &ReadEnded) -> Result<(), ClientError> {
        if ended.bytes != self.received {
            return Err(ClientError::Broken(format!(
                "the agent counts {} bytes of {}; {} came",
                ended.bytes, self.path, self.received
            )));
        }
        if let Some(hasher) = &self.hasher
            && ended.blake3 != Some(*hasher.finalize().as_bytes())
        {
            let path = self.path.clone();
            return Err(ClientError::Damaged { path });
        }
        match self.total {
            Some(total) if self.received < total => Err(ClientError::Changed {
                path: self.path.clone(),
                what: format!("it became shorter, {} of {total} bytes came", self.received),
            }),
            _ => Ok(()),
        }
    }

    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            let rest = self.data.get(self.at..).unwrap_or_default();
            if !rest.is_empty() {
                let count = rest.len().min(buffer.remaining());
                buffer.put_slice(rest.get(..count).unwrap_or_default());
                self.at = self.at.saturating_add(count);
                return Poll::Ready(Ok(()));
            }
            if self.zeros > 0 {
                let most = usize::try_from(self.zeros).unwrap_or(usize::MAX);
                let count = most.min(buffer.remaining()).min(ZEROS.len());
                buffer.put_slice(ZEROS.get(..count).unwrap_or_default());
                let count = u64::try_from(count).unwrap_or(u64::MAX);
                self.zeros = self.zeros.saturating_sub(count);
                return Poll::Ready(Ok(()));
            }
            match ready!(self.poll_piece(cx))? {
                Some(Piece::Data(data)) => (self.data, self.at) = (data, 0),
                Some(Piece::Hole(length)) => self.zeros = length,
                None => return Poll::Ready(Ok(())),
            }
        }
    }
}
