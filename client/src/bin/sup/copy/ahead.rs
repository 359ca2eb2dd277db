//! A file, read by a thread of its own ahead of whoever sends it. Handing over a piece costs both
//! processors more than reading it, so the pieces are large and their buffers come back.

use std::fs::File;
use std::io::{self, SeekFrom};
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncSeek, ReadBuf};
use tokio::sync::mpsc;

/// Bytes read at once.
const PIECE: usize = 512 << 10;

/// Pieces that wait.
const PIECES: usize = 2;

/// See the module.
#[derive(Debug)]
pub(super) struct Ahead {
    file: Arc<File>,
    /// Where the next byte comes from that is handed out.
    at: u64,
    reading: Option<Reading>,
}

/// What the thread has brought.
#[derive(Debug)]
struct Reading {
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
    used: std::sync::mpsc::Sender<Vec<u8>>,
    piece: Vec<u8>,
    given: usize,
}

impl Ahead {
    pub(super) fn new(file: File) -> Self {
        Self {
            file: Arc::new(file),
            at: 0,
            reading: None,
        }
    }
}

/// Starts the thread; it ends at the file's end, at an error, or when nobody takes its pieces.
fn start(file: Arc<File>, mut at: u64) -> Reading {
    let (give, pieces) = mpsc::channel(PIECES);
    let (used, back) = std::sync::mpsc::channel::<Vec<u8>>();
    tokio::task::spawn_blocking(move || {
        loop {
            let mut piece = back.try_recv().unwrap_or_default();
            piece.resize(PIECE, 0);
            let read = match file.read_at(&mut piece, at) {
                Ok(0) => return,
                Ok(count) => {
                    piece.truncate(count);
                    at = at.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
                    Ok(piece)
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = read.is_err();
            if give.blocking_send(read).is_err() || failed {
                return;
            }
        }
    });
    Reading {
        pieces,
        used,
        piece: Vec::new(),
        given: 0,
    }
}

impl AsyncRead for Ahead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let reading = this
            .reading
            .get_or_insert_with(|| start(Arc::clone(&this.file), this.at));
        if reading.given >= reading.piece.len() {
            // The thread may have ended; then it needs no buffer.
            let _ = reading.used.send(std::mem::take(&mut reading.piece));
            reading.given = 0;
            match ready!(reading.pieces.poll_recv(cx)) {
                Some(piece) => reading.piece = piece?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let rest = reading.piece.get(reading.given..).unwrap_or_default();
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(rest.get(..count).unwrap_or_default());
        reading.given = reading.given.saturating_add(count);
        this.at = this
            .at
            .saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        Poll::Ready(Ok(()))
    }
}

/// Only to a place counted from the beginning, which is all that an upload needs.
impl AsyncSeek for Ahead {
    fn start_seek(mut self: Pin<&mut Self>, position: SeekFrom) -> io::Result<()> {
        let SeekFrom::Start(at) = position else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        if at != self.at {
            self.at = at;
            self.reading = None;
        }
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<u64>> {
        Poll::Ready(Ok(self.at))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use tokio::io::{AsyncReadExt, AsyncSeekExt};

    use super::*;

    #[tokio::test]
    async fn a_file_is_read_whole_and_again_from_any_place() {
        let bytes: Vec<u8> = (0..PIECE * 4 + 17)
            .map(|at| (at ^ (at >> 9)) as u8)
            .collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file.rewind().unwrap();
        let mut ahead = Ahead::new(file);
        let mut seen = Vec::new();
        ahead.read_to_end(&mut seen).await.unwrap();
        assert!(seen == bytes);
        for at in [0, 1, PIECE, PIECE * 4 + 16, PIECE * 4 + 17, PIECE * 9] {
            ahead.seek(SeekFrom::Start(at as u64)).await.unwrap();
            // Half-way through a piece and then elsewhere, too.
            seen.clear();
            (&mut ahead).take(100).read_to_end(&mut seen).await.unwrap();
            let rest = bytes.get(at..).unwrap_or_default();
            assert!(seen == rest[..rest.len().min(100)], "from {at}");
        }
    }

    #[tokio::test]
    async fn a_place_that_is_not_counted_from_the_beginning_is_refused() {
        let mut ahead = Ahead::new(tempfile::tempfile().unwrap());
        assert!(ahead.seek(SeekFrom::End(0)).await.is_err());
    }
}
