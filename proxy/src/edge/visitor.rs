//! The byte stream of a visitor who speaks HTTP/1.1, on its way to hyper. It hands over one head at
//! a time, after [`framing`](super::framing) found nothing wrong with it, and no byte of the next
//! message before. In place of a malformed head hyper gets a harmless request, whose answer says
//! what was wrong and is the last.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::activity::Activity;
use super::framing::{Chunks, Framing, Malformed, head_end, judge};

/// What hyper gets in place of a malformed head.
const STAND_IN: &[u8] = b"GET / HTTP/1.1\r\nHost: malformed\r\nConnection: close\r\n\r\n";

/// Bytes read at a time while a head is coming in.
const PIECE: usize = 4 * 1024;

/// How long, and how much, a visitor is still listened to after the last answer.
const FAREWELL: Duration = Duration::from_secs(2);
const FAREWELL_BYTES: usize = 1024 * 1024;

/// What the stream and the service that answers its requests tell each other.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    malformed: Mutex<Option<Malformed>>,
    /// From now on the bytes are no HTTP.
    tunnel: AtomicBool,
    /// The head that is coming in took too long.
    expired: AtomicBool,
    /// The first lines of the heads that hyper has not parsed yet.
    #[cfg(any(test, fuzzing))]
    judged: Mutex<std::collections::VecDeque<Vec<u8>>>,
}

impl Signals {
    /// Whether the request that hyper has just parsed stands for a malformed one.
    pub(crate) fn malformed(&self) -> Option<Malformed> {
        *self
            .malformed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A request that hyper has parsed is the one that was judged.
    #[cfg(any(test, fuzzing))]
    #[allow(clippy::panic)]
    pub(crate) fn compare(&self, method: &http::Method, uri: &http::Uri) {
        let mut judged = self.judged.lock().unwrap_or_else(PoisonError::into_inner);
        let line = judged.pop_front().unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let seen = format!("{method} {uri}");
        let same = line.starts_with(method.as_str())
            && line.split(' ').nth(1).is_some_and(|target| {
                let target = target.split('#').next().unwrap_or_default();
                target.ends_with(uri.path()) || target.contains(uri.path())
            });
        assert!(same, "hyper took {seen} for a request, judged was {line:?}");
    }

    /// What follows the current head is no HTTP.
    pub(crate) fn tunnel(&self) {
        self.tunnel.store(true, Ordering::Release);
    }

    /// The head that is coming in took too long.
    pub(crate) fn expire(&self) {
        self.expired.store(true, Ordering::Release);
    }
}

/// The stream.
#[derive(Debug)]
pub(crate) struct Visitor<T> {
    inner: T,
    activity: Arc<Activity>,
    signals: Arc<Signals>,
    state: State,
    /// Read from `inner`, not looked at yet but for the first `seen` bytes.
    raw: Vec<u8>,
    seen: usize,
    /// Judged, on its way to hyper from `at` on.
    out: Vec<u8>,
    at: usize,
    head_bytes: usize,
    header_fields: usize,
    farewell: Option<Farewell>,
}

/// After our end of the stream is closed: what a visitor still sends is read and thrown away for a
/// while. If the socket were closed with bytes unread, the kernel would take our last answer back.
#[derive(Debug)]
struct Farewell {
    deadline: Pin<Box<Sleep>>,
    left: usize,
}

#[derive(Debug)]
enum State {
    Head,
    Length(u64),
    Chunked(Chunks),
    /// Nothing more is read.
    Ended,
}

impl<T> Visitor<T> {
    pub(crate) fn new(
        inner: T,
        activity: Arc<Activity>,
        signals: Arc<Signals>,
        head_bytes: usize,
        header_fields: usize,
    ) -> Self {
        Self {
            inner,
            activity,
            signals,
            state: State::Head,
            raw: Vec::new(),
            seen: 0,
            out: Vec::new(),
            at: 0,
            head_bytes,
            header_fields,
            farewell: None,
        }
    }

    /// Looks for a head in what was read.
    fn take_head(&mut self) -> bool {
        if self.seen == 0 {
            // Empty lines before a request are allowed.
            let blank = |byte: &u8| matches!(byte, b'\r' | b'\n');
            let start = self.raw.iter().take_while(|byte| blank(byte)).count();
            self.raw.drain(..start);
        }
        let end = head_end(&self.raw, self.seen);
        self.seen = self.raw.len();
        match end {
            Some(end) if end <= self.head_bytes => {
                let rest = self.raw.split_off(end);
                let head = std::mem::replace(&mut self.raw, rest);
                self.seen = 0;
                match judge(&head, self.header_fields) {
                    Ok(framing) => {
                        self.state = match framing {
                            Framing::Length(0) => State::Head,
                            Framing::Length(length) => State::Length(length),
                            Framing::Chunked => State::Chunked(Chunks::default()),
                        };
                        #[cfg(any(test, fuzzing))]
                        {
                            let line = head.split(|byte| matches!(byte, b'\r' | b'\n'));
                            let line = line.take(1).flatten().copied().collect();
                            let judged = self.signals.judged.lock();
                            judged
                                .unwrap_or_else(PoisonError::into_inner)
                                .push_back(line);
                        }
                        self.out = head;
                        self.at = 0;
                    }
                    Err(malformed) => self.refuse(malformed),
                }
            }
            None if self.raw.len() <= self.head_bytes => {
                if !self.raw.is_empty() {
                    self.activity.head_began();
                }
                return false;
            }
            _ => self.refuse(Malformed::TooLarge),
        }
        self.activity.head_ended();
        true
    }

    fn refuse(&mut self, malformed: Malformed) {
        *self
            .signals
            .malformed
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(malformed);
        self.state = State::Ended;
        self.raw = Vec::new();
        self.out = STAND_IN.to_vec();
        self.at = 0;
    }

    /// Hands over what was judged.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) {
        let rest = self.out.get(self.at..).unwrap_or_default();
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(rest.get(..count).unwrap_or_default());
        self.at = self.at.saturating_add(count);
        if self.at >= self.out.len() {
            self.out = Vec::new();
            self.at = 0;
        }
    }

    /// Hands over bytes that were read already, at most `most`.
    fn give_raw(&mut self, buffer: &mut ReadBuf<'_>, most: u64) -> usize {
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let count = self.raw.len().min(buffer.remaining()).min(most);
        buffer.put_slice(self.raw.get(..count).unwrap_or_default());
        self.raw.drain(..count);
        if self.raw.is_empty() {
            self.raw = Vec::new();
        }
        self.seen = 0;
        count
    }
}

impl<T: AsyncRead + Unpin> Visitor<T> {
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            if !self.raw.is_empty() && self.seen < self.raw.len() && self.take_head() {
                return Poll::Ready(Ok(true));
            }
            let mut piece = [0; PIECE];
            let mut read = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut self.inner).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(false));
            }
            self.raw.extend_from_slice(read.filled());
        }
    }

    /// Reads a part of a body of which `most` bytes are left.
    fn poll_length(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
        most: u64,
    ) -> Poll<io::Result<usize>> {
        if !self.raw.is_empty() {
            return Poll::Ready(Ok(self.give_raw(buffer, most)));
        }
        let room = usize::try_from(most)
            .unwrap_or(usize::MAX)
            .min(buffer.remaining());
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(room));
        ready!(Pin::new(&mut self.inner).poll_read(cx, &mut part))?;
        let count = part.filled().len();
        buffer.advance(count);
        Poll::Ready(Ok(count))
    }

    /// Reads a part of a chunked body; what was read beyond its end is kept.
    fn poll_chunked(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let count = ready!(self.poll_length(cx, buffer, u64::MAX))?;
        let State::Chunked(chunks) = &mut self.state else {
            return Poll::Ready(Ok(()));
        };
        let filled = buffer.filled().get(before..).unwrap_or_default();
        match chunks.follow(filled) {
            Ok(None) => {}
            Ok(Some(end)) => {
                if end < count {
                    let mut next = filled.get(end..).unwrap_or_default().to_vec();
                    next.append(&mut self.raw);
                    self.raw = next;
                    buffer.set_filled(before.saturating_add(end));
                }
                self.seen = 0;
                self.state = State::Head;
            }
            Err(_) => {
                self.state = State::Ended;
                let error = io::Error::new(io::ErrorKind::InvalidData, "malformed chunked body");
                return Poll::Ready(Err(error));
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Visitor<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if !this.out.is_empty() {
            this.give(buffer);
            return Poll::Ready(Ok(()));
        }
        if this.signals.tunnel.load(Ordering::Acquire) {
            if !this.raw.is_empty() {
                this.give_raw(buffer, u64::MAX);
                return Poll::Ready(Ok(()));
            }
            return Pin::new(&mut this.inner).poll_read(cx, buffer);
        }
        match this.state {
            State::Head => {
                if this.signals.expired.load(Ordering::Acquire) {
                    this.refuse(Malformed::Slow);
                    this.give(buffer);
                    return Poll::Ready(Ok(()));
                }
                if ready!(this.poll_head(cx))? {
                    this.give(buffer);
                }
                Poll::Ready(Ok(()))
            }
            State::Length(left) => {
                let count = ready!(this.poll_length(cx, buffer, left))?;
                this.state = match left.saturating_sub(count as u64) {
                    0 => State::Head,
                    left => State::Length(left),
                };
                Poll::Ready(Ok(()))
            }
            State::Chunked(_) => this.poll_chunked(cx, buffer),
            // hyper takes an end for that of the visitor, who would then get no answer. The
            // connection ends with the answer to the stand-in.
            State::Ended => Poll::Pending,
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Visitor<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, bytes));
        self.activity.wrote();
        Poll::Ready(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write_vectored(cx, slices));
        self.activity.wrote();
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.farewell.is_none() {
            ready!(Pin::new(&mut this.inner).poll_shutdown(cx))?;
            if matches!(this.state, State::Head) || this.signals.tunnel.load(Ordering::Acquire) {
                return Poll::Ready(Ok(()));
            }
        }
        let farewell = this.farewell.get_or_insert_with(|| Farewell {
            deadline: Box::pin(tokio::time::sleep(FAREWELL)),
            left: FAREWELL_BYTES,
        });
        while farewell.left > 0 && farewell.deadline.as_mut().poll(cx).is_pending() {
            let mut piece = [0; PIECE];
            let mut read = ReadBuf::new(&mut piece);
            match ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read)) {
                Ok(()) if !read.filled().is_empty() => {
                    farewell.left = farewell.left.saturating_sub(read.filled().len());
                }
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
