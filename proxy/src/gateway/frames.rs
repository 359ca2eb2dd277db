//! Frames from the guest: the bytes of its channel, read many at a time, and cut into frames. The
//! lengths before them are the guest's word: one that is zero or too large ends the channel.

use std::io;
use std::os::fd::BorrowedFd;

use protocol::host::MAX_ETHERNET_FRAME;

use super::link::PREFIX;
use super::world;

/// Several of the largest frames.
const CAPACITY: usize = 4 * (PREFIX + MAX_ETHERNET_FRAME);

/// A length that no frame can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes; the VM's device may send 1 to {MAX_ETHERNET_FRAME}")]
pub(super) struct BadLength(u32);

/// What is known of the channel after a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// There may be more.
    More,
    /// Nothing more for now.
    Drained,
    /// The other end is closed.
    Ended,
}

/// Bytes that were read and not yet looked at.
#[derive(Debug, Default)]
pub(super) struct Frames {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Frames {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; CAPACITY].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// The next frame that is there completely.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, BadLength> {
        let Some((prefix, rest)) = self
            .buffer
            .get(self.start..self.end)
            .and_then(|bytes| bytes.split_first_chunk::<PREFIX>())
        else {
            return Ok(None);
        };
        let number = u32::from_be_bytes(*prefix);
        let length = usize::try_from(number).unwrap_or(usize::MAX);
        if length == 0 || length > MAX_ETHERNET_FRAME {
            return Err(BadLength(number));
        }
        let Some(frame) = rest.get(..length) else {
            return Ok(None);
        };
        self.start = self.start.saturating_add(PREFIX).saturating_add(length);
        Ok(Some(frame))
    }

    /// Reads what there is room for; called when [`Self::next`] had no frame.
    pub(super) fn read(&mut self, channel: BorrowedFd<'_>) -> io::Result<Read> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
        }
        let Some(room) = self.buffer.get_mut(self.end..) else {
            return Ok(Read::Drained);
        };
        let size = room.len();
        match world::receive(channel, room) {
            Ok(0) => Ok(Read::Ended),
            Ok(count) => {
                self.end = self.end.saturating_add(count);
                Ok(if count < size {
                    Read::Drained
                } else {
                    Read::More
                })
            }
            Err(nix::Error::EAGAIN) => Ok(Read::Drained),
            Err(nix::Error::EINTR) => Ok(Read::More),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;

    fn read_all(bytes: &[u8], piece: usize) -> Result<Vec<Vec<u8>>, BadLength> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut frames = Frames::new();
        let mut got = Vec::new();
        for piece in bytes.chunks(piece) {
            theirs.write_all(piece).unwrap();
            frames.read(ours.as_fd()).unwrap();
            while let Some(frame) = frames.next()? {
                got.push(frame.to_vec());
            }
        }
        Ok(got)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            lengths in prop::collection::vec(1_usize..3000, 1..20),
            piece in 1_usize..5000,
        ) {
            let sent: Vec<Vec<u8>> = lengths.iter().map(|length| vec![7; *length]).collect();
            let mut bytes = Vec::new();
            for frame in &sent {
                bytes.extend(u32::try_from(frame.len()).unwrap().to_be_bytes());
                bytes.extend(frame);
            }
            prop_assert_eq!(read_all(&bytes, piece).unwrap(), sent);
        }
    }

    #[test]
    fn zero_and_giant_lengths_are_refused_and_the_largest_is_not() {
        assert_eq!(read_all(&[0; 4], 4), Err(BadLength(0)));
        let giant = u32::try_from(MAX_ETHERNET_FRAME).unwrap() + 1;
        assert_eq!(read_all(&giant.to_be_bytes(), 4), Err(BadLength(giant)));
        let mut largest = (giant - 1).to_be_bytes().to_vec();
        largest.extend(vec![1; MAX_ETHERNET_FRAME]);
        assert_eq!(read_all(&largest, 50_000).unwrap().len(), 1);
    }
}
