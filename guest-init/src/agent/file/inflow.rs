//! Bulk data on its way in, out of one buffer of fixed size. Data frames are handed on whole as far
//! as the buffer holds one, because pieces that begin anywhere cost a checksum and the page cache
//! half as much again; other frames are small and come whole.

use std::collections::VecDeque;

use protocol::Frame;
use protocol::frame::{FrameError, HEADER_LEN, Header, Kind};

use super::budget::Budget;
use crate::agent::stream::{Stream, StreamError};

/// Bytes taken from the connection in one go.
const BUFFER: usize = 256 << 10;
/// The same for one of many.
const SMALL: usize = 32 << 10;

/// What comes next.
pub(crate) enum Piece<'a> {
    /// Content, in order; never empty.
    Data(&'a [u8]),
    /// Another frame than data.
    Frame(Frame),
}

/// The frames of a client that sends data.
pub(crate) struct Inflow {
    whole: VecDeque<Frame>,
    /// The body of a data frame that had come whole.
    current: Vec<u8>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Bytes of the data frame that has begun which have not been handed on.
    data_left: usize,
    _budget: Budget,
}

impl Inflow {
    /// Begins with the frames that came behind the request.
    pub(crate) fn new(early: Vec<Frame>) -> Self {
        let budget = Budget::take();
        Self {
            whole: early.into(),
            current: Vec::new(),
            buffer: vec![0; budget.choose(BUFFER, SMALL)].into_boxed_slice(),
            start: 0,
            end: 0,
            data_left: 0,
            _budget: budget,
        }
    }

    /// Waits for the next piece. The end of the stream is an error here.
    pub(crate) fn next(&mut self, stream: &mut Stream) -> Result<Piece<'_>, StreamError> {
        loop {
            if let Some(frame) = self.whole.pop_front() {
                if frame.kind != Kind::FILE_DATA {
                    return Ok(Piece::Frame(frame));
                }
                if !frame.body.is_empty() {
                    self.current = frame.body;
                    return Ok(Piece::Data(&self.current));
                }
                continue;
            }
            if self.start >= self.end {
                self.fill(stream)?;
                continue;
            }
            if self.data_left > 0 {
                self.gather(stream)?;
                let begin = self.start;
                let last = begin.saturating_add(self.data_left).min(self.end);
                self.start = last;
                self.data_left = self.data_left.saturating_sub(last.saturating_sub(begin));
                return Ok(Piece::Data(
                    self.buffer.get(begin..last).unwrap_or_default(),
                ));
            }
            self.begin_frame(stream)?;
        }
    }

    /// Looks at what stands in the buffer between two frames, or within one that comes whole.
    fn begin_frame(&mut self, stream: &mut Stream) -> Result<(), StreamError> {
        let mut rest = self.buffer.get(self.start..self.end).unwrap_or_default();
        if stream.reader().finish().is_ok()
            && let Some(head) = rest.first_chunk::<HEADER_LEN>()
        {
            let header = Header::parse(*head)?;
            if header.kind == Kind::FILE_DATA {
                self.start = self.start.saturating_add(HEADER_LEN);
                self.data_left = usize::try_from(header.length).unwrap_or(usize::MAX);
                return Ok(());
            }
        }
        if let Some(frame) = stream.take_frame(&mut rest)? {
            self.whole.push_back(frame);
        }
        self.start = self.end.saturating_sub(rest.len());
        Ok(())
    }

    /// Waits for the rest of the data frame that stands at the front, if there is room for it. When
    /// the stream ends before, what has come is handed on first.
    fn gather(&mut self, stream: &mut Stream) -> Result<(), StreamError> {
        let missing = |inflow: &Self| {
            let here = inflow.end.saturating_sub(inflow.start);
            inflow.data_left.min(inflow.buffer.len()) > here
        };
        if self.start > 0 && missing(self) {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
        }
        while missing(self) {
            let room = self.buffer.get_mut(self.end..).unwrap_or_default();
            match stream.receive(room) {
                Ok(0) | Err(StreamError::Gone(_)) => break,
                Ok(count) => self.end = self.end.saturating_add(count),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn fill(&mut self, stream: &mut Stream) -> Result<(), StreamError> {
        (self.start, self.end) = (0, 0);
        self.end = stream.receive(&mut self.buffer)?;
        if self.end == 0 {
            stream.reader().finish()?;
            return Err(match self.data_left {
                0 => StreamError::Ended,
                missing => FrameError::Truncated { missing }.into(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use protocol::frame;

    use super::*;

    #[test]
    fn data_comes_through_however_it_is_cut() {
        for cut in [1, 3, 7, 8, 1000, 70_000, 300_000] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let sender = std::thread::spawn(move || {
                let mut bytes = Vec::new();
                for size in [0_usize, 1, 65_536, 5, 100_000] {
                    frame::append(&mut bytes, Kind::FILE_DATA, &vec![7; size]).unwrap();
                    frame::append(&mut bytes, Kind::WRITE_END, &[size as u8]).unwrap();
                }
                for piece in bytes.chunks(cut) {
                    theirs.write_all(piece).unwrap();
                }
            });
            let mut stream = Stream::new(ours.into());
            let mut early = Vec::new();
            let mut inflow = Inflow::new(vec![stream.next(&mut early).unwrap()]);
            inflow.whole.extend(early);
            let (mut seen, mut sizes) = (0, Vec::new());
            loop {
                match inflow.next(&mut stream) {
                    Ok(Piece::Data(data)) => {
                        assert!(data.iter().all(|byte| *byte == 7));
                        seen += data.len();
                    }
                    Ok(Piece::Frame(frame)) => {
                        assert_eq!(frame.body, [seen as u8]);
                        sizes.push(std::mem::take(&mut seen));
                    }
                    Err(StreamError::Ended) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            assert_eq!(sizes, [0, 1, 65_536, 5, 100_000], "cut into {cut}");
            sender.join().unwrap();
        }
    }

    #[test]
    fn a_data_frame_comes_in_one_piece_if_the_buffer_holds_it() {
        for cut in [1000, 70_000] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let sender = std::thread::spawn(move || {
                let mut bytes = Vec::new();
                for size in [65_536_usize, 65_536, 17, 65_536, BUFFER, BUFFER + 3] {
                    frame::append(&mut bytes, Kind::FILE_DATA, &vec![7; size]).unwrap();
                }
                for piece in bytes.chunks(cut) {
                    theirs.write_all(piece).unwrap();
                }
            });
            let mut stream = Stream::new(ours.into());
            let mut inflow = Inflow::new(Vec::new());
            let mut sizes = Vec::new();
            while let Ok(Piece::Data(data)) = inflow.next(&mut stream) {
                sizes.push(data.len());
            }
            assert_eq!(sizes, [65_536, 65_536, 17, 65_536, BUFFER, BUFFER, 3]);
            sender.join().unwrap();
        }
    }

    #[test]
    fn an_end_inside_a_data_frame_is_no_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut bytes = Vec::new();
        frame::append(&mut bytes, Kind::FILE_DATA, &[1; 10]).unwrap();
        theirs.write_all(&bytes[..12]).unwrap();
        drop(theirs);
        let mut stream = Stream::new(ours.into());
        let mut inflow = Inflow::new(Vec::new());
        assert!(matches!(inflow.next(&mut stream), Ok(Piece::Data(data)) if data.len() == 5));
        assert!(matches!(
            inflow.next(&mut stream),
            Err(StreamError::Frame(FrameError::Truncated { missing: 5 }))
        ));
    }
}
