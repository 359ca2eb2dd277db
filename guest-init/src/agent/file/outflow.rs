//! Bulk data on its way out. Content is put straight into data frames in one buffer of fixed size,
//! with the messages between them in their place, and leaves when the buffer is full.

use protocol::frame::{self, HEADER_LEN, Kind, MAX_DATA};
use protocol::message::Message;

use super::budget::Budget;
use crate::agent::stream::{Stream, StreamError};

/// Frames of data that leave in one go.
const FRAMES: usize = 4;
const FRAME: usize = HEADER_LEN + MAX_DATA;

/// Zeros to hash.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// After so many zeros it is looked whether the client still waits.
const LOOK: u64 = 256 << 20;

/// What an agent that sends data has to say.
pub(crate) struct Outflow<'a> {
    stream: &'a mut Stream,
    buffer: Box<[u8]>,
    filled: usize,
    /// Where the data frame begins that is being filled.
    open: Option<usize>,
    hasher: Option<blake3::Hasher>,
    bytes: u64,
    _budget: Budget,
}

impl<'a> Outflow<'a> {
    /// Begins; with `checksum` all content is hashed.
    pub(crate) fn new(stream: &'a mut Stream, checksum: bool) -> Self {
        let budget = Budget::take();
        let length = budget.choose(FRAMES, 1).saturating_mul(FRAME);
        Self {
            stream,
            buffer: vec![0; length].into_boxed_slice(),
            filled: 0,
            open: None,
            hasher: checksum.then(blake3::Hasher::new),
            bytes: 0,
            _budget: budget,
        }
    }

    /// Bytes of content so far, holes included.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The checksum of them if it was asked for.
    pub(crate) fn checksum(&self) -> Option<[u8; 32]> {
        self.hasher
            .as_ref()
            .map(|hasher| *hasher.finalize().as_bytes())
    }

    /// Lets somebody hash what counts in the checksum and is not sent.
    pub(crate) fn hash_before<E>(
        &mut self,
        hash: impl FnOnce(&mut blake3::Hasher, &Stream) -> Result<(), E>,
    ) -> Result<(), E> {
        match &mut self.hasher {
            Some(hasher) => hash(hasher, self.stream),
            None => Ok(()),
        }
    }

    /// The connection, for waiting.
    pub(crate) fn stream(&self) -> &Stream {
        self.stream
    }

    /// Room for content; never empty. What is put there counts once it is [added](Self::add).
    pub(crate) fn room(&mut self) -> Result<&mut [u8], StreamError> {
        if self.open.is_none() {
            if self.filled.saturating_add(FRAME) > self.buffer.len() {
                self.flush()?;
            }
            self.open = Some(self.filled);
            self.filled = self.filled.saturating_add(HEADER_LEN);
        }
        let start = self.open.unwrap_or(0);
        let end = start.saturating_add(FRAME).min(self.buffer.len());
        Ok(self.buffer.get_mut(self.filled..end).unwrap_or_default())
    }

    /// So many bytes were put into the [room](Self::room).
    pub(crate) fn add(&mut self, count: usize) -> Result<(), StreamError> {
        let end = self.filled.saturating_add(count);
        if let Some(hasher) = &mut self.hasher {
            hasher.update(self.buffer.get(self.filled..end).unwrap_or_default());
        }
        self.filled = end;
        self.bytes = self
            .bytes
            .saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        match self.open {
            Some(start) if end.saturating_sub(start) >= FRAME => self.close(),
            _ => Ok(()),
        }
    }

    /// Puts in a message at this place.
    pub(crate) fn message<M: Message>(&mut self, message: &M) -> Result<(), StreamError> {
        self.close()?;
        let bytes = protocol::message::encode(message)?;
        if self.filled.saturating_add(bytes.len()) > self.buffer.len() {
            self.flush()?;
        }
        let end = self.filled.saturating_add(bytes.len());
        match self.buffer.get_mut(self.filled..end) {
            Some(place) => {
                place.copy_from_slice(&bytes);
                self.filled = end;
                Ok(())
            }
            None => self.stream.send_all(&bytes),
        }
    }

    /// Counts zeros that the client is told of by a message.
    pub(crate) fn zeros(&mut self, count: u64) -> Result<(), StreamError> {
        self.bytes = self.bytes.saturating_add(count);
        if let Some(hasher) = &mut self.hasher {
            hash_zeros(hasher, count, self.stream)?;
        }
        Ok(())
    }

    /// Sends everything.
    pub(crate) fn flush(&mut self) -> Result<(), StreamError> {
        self.close()?;
        let all = self.buffer.get(..self.filled).unwrap_or_default();
        self.stream.send_all(all)?;
        self.filled = 0;
        Ok(())
    }

    /// Ends the frame that is being filled.
    fn close(&mut self) -> Result<(), StreamError> {
        let Some(start) = self.open.take() else {
            return Ok(());
        };
        let body = start.saturating_add(HEADER_LEN);
        let length = self.filled.saturating_sub(body);
        if length == 0 {
            self.filled = start;
            return Ok(());
        }
        let header = frame::header_for(Kind::FILE_DATA, length)?;
        if let Some(place) = self.buffer.get_mut(start..body) {
            place.copy_from_slice(&header);
        }
        Ok(())
    }
}

/// Hashes zeros, as long as somebody waits for it.
pub(crate) fn hash_zeros(
    hasher: &mut blake3::Hasher,
    count: u64,
    stream: &Stream,
) -> Result<(), StreamError> {
    let mut left = count;
    let mut unlooked: u64 = 0;
    while left > 0 {
        let turn = usize::try_from(left).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
        hasher.update(ZEROS.get(..turn).unwrap_or_default());
        let turn = u64::try_from(turn).unwrap_or(left);
        left = left.saturating_sub(turn);
        unlooked = unlooked.saturating_add(turn);
        if unlooked >= LOOK {
            unlooked = 0;
            stream.check_heard()?;
        }
    }
    Ok(())
}
