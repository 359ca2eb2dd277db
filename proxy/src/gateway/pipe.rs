//! A byte stream between the stack and a task of this process: the edge's connection to a port of the
//! guest, or a stream to the name server. It behaves as a pair of sockets would, without descriptors
//! and without the kernel; an idle one holds no buffer. The stack never waits for its end: it hears by
//! a bell, shared by all its pipes, which of them have news.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures::task::AtomicWaker;
use nix::errno::Errno;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop::poll_proceed;

use super::slab::Token;

/// Bytes that wait in each direction at most.
const CAPACITY: usize = 64 << 10;

/// Who waited for room is told when there is so little left.
const ROOM: usize = CAPACITY / 2;

/// Which pipes have news for their stack.
#[derive(Debug, Default)]
pub(super) struct Bell {
    rung: Mutex<Vec<Token>>,
    stack: AtomicWaker,
}

impl Bell {
    fn ring(&self, token: Token) {
        lock(&self.rung).push(token);
        self.stack.wake();
    }

    /// Waits until it was rung. One waits, the stack.
    pub(super) async fn heard(&self) {
        poll_fn(|cx| {
            self.stack.register(cx.waker());
            match lock(&self.rung).is_empty() {
                true => Poll::Pending,
                false => Poll::Ready(()),
            }
        })
        .await;
    }

    /// Those that have rung since.
    pub(super) fn take(&self) -> Vec<Token> {
        std::mem::take(&mut lock(&self.rung))
    }
}

/// One direction.
#[derive(Debug, Default)]
struct Way {
    bytes: VecDeque<u8>,
    /// Nothing more comes.
    finished: bool,
    /// Its writer waits for room.
    awaited: bool,
}

impl Way {
    fn put(&mut self, bytes: &[u8]) -> usize {
        let room = CAPACITY.saturating_sub(self.bytes.len());
        let taken = bytes.get(..room).unwrap_or(bytes);
        self.bytes.extend(taken);
        taken.len()
    }

    /// Moves the oldest bytes, at most `most`; gives how many.
    fn take(&mut self, most: usize, mut into: impl FnMut(&[u8])) -> usize {
        let (first, second) = self.bytes.as_slices();
        let first = first.get(..most).unwrap_or(first);
        let rest = most.saturating_sub(first.len());
        let second = second.get(..rest).unwrap_or(second);
        into(first);
        into(second);
        let taken = first.len().saturating_add(second.len());
        self.bytes.drain(..taken);
        if self.bytes.is_empty() {
            // Most streams are idle most of the time.
            self.bytes = VecDeque::new();
        }
        taken
    }

    /// Whether the writer has to be told that there is room again, which it is once.
    fn relieved(&mut self) -> bool {
        let relieved = self.awaited && self.bytes.len() <= ROOM;
        self.awaited &= !relieved;
        relieved
    }
}

#[derive(Debug, Default)]
struct State {
    to_stack: Way,
    to_task: Way,
    /// The task, waiting for bytes or for room.
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// The stack's number for it; before it has one there is nobody to be told.
    token: Option<Token>,
    /// The stack was told of news that it has not looked at yet.
    rung: bool,
    stack_gone: bool,
    task_gone: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    bell: Arc<Bell>,
}

impl Shared {
    /// Tells the stack that there is news. Wakers are called without the lock.
    fn ring(&self, mut state: MutexGuard<'_, State>) {
        if let Some(token) = state.token
            && !state.rung
        {
            state.rung = true;
            drop(state);
            self.bell.ring(token);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under the lock is complete before anything that could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The stack's end.
#[derive(Debug)]
pub(super) struct Near(Arc<Shared>);

/// The task's end. Shutting it down ends this direction alone; dropping it ends both.
#[derive(Debug)]
pub(super) struct Far(Arc<Shared>);

/// The two ends of a new pipe.
pub(super) fn pair(bell: &Arc<Bell>) -> (Near, Far) {
    let shared = Arc::new(Shared {
        state: Mutex::default(),
        bell: Arc::clone(bell),
    });
    (Near(Arc::clone(&shared)), Far(shared))
}

/// What the stack has to know beside bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct News {
    /// The task sends nothing more.
    pub(super) finished: bool,
    /// It takes nothing more, either.
    pub(super) gone: bool,
    /// It left without taking what it was sent.
    pub(super) reset: bool,
}

impl Near {
    /// From now on the bell is rung with this number.
    pub(super) fn listen(&self, token: Token) {
        let mut state = lock(&self.0.state);
        state.token = Some(token);
        self.0.ring(state);
    }

    /// What has come about; the next change rings again.
    pub(super) fn news(&self) -> News {
        let mut state = lock(&self.0.state);
        state.rung = false;
        News {
            finished: state.to_stack.finished || state.task_gone,
            gone: state.task_gone,
            reset: state.task_gone && !state.to_task.bytes.is_empty(),
        }
    }

    /// Sends what there is room for; `EAGAIN` when there is none.
    pub(super) fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let mut state = lock(&self.0.state);
        if state.task_gone {
            return Err(Errno::EPIPE);
        }
        let sent = state.to_task.put(bytes);
        if sent == 0 {
            state.to_task.awaited = true;
            return Err(Errno::EAGAIN);
        }
        wake(state, |state| state.reader.take());
        Ok(sent)
    }

    /// Takes what has come: zero bytes at the end, `EAGAIN` when there is nothing yet.
    pub(super) fn receive(&self, into: &mut [u8]) -> Result<usize, Errno> {
        let mut state = lock(&self.0.state);
        if state.to_stack.bytes.is_empty() {
            // Who left without taking what was sent did not end the stream in order.
            return match (state.task_gone, state.to_stack.finished) {
                (true, _) if !state.to_task.bytes.is_empty() => Err(Errno::ECONNRESET),
                (false, false) => Err(Errno::EAGAIN),
                _ => Ok(0),
            };
        }
        let mut at = 0_usize;
        let taken = state.to_stack.take(into.len(), |bytes| {
            let end = at.saturating_add(bytes.len());
            if let Some(room) = into.get_mut(at..end) {
                room.copy_from_slice(bytes);
            }
            at = end;
        });
        if state.to_stack.relieved() {
            wake(state, |state| state.writer.take());
        }
        Ok(taken)
    }

    /// Says that nothing more comes.
    pub(super) fn finish(&self) {
        let mut state = lock(&self.0.state);
        state.to_task.finished = true;
        wake(state, |state| state.reader.take());
    }
}

impl Drop for Near {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.stack_gone = true;
        state.token = None;
        let wakers = [state.reader.take(), state.writer.take()];
        drop(state);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

/// Calls a waker without the lock: what it wakes may use the pipe at once.
fn wake(mut state: MutexGuard<'_, State>, which: impl FnOnce(&mut State) -> Option<Waker>) {
    let waker = which(&mut state);
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// Waits with this waker; the one before may belong to something that ends with it.
fn wait(
    mut state: MutexGuard<'_, State>,
    which: impl FnOnce(&mut State) -> &mut Option<Waker>,
    cx: &Context<'_>,
) {
    let waker = which(&mut state);
    if waker.as_ref().is_some_and(|old| old.will_wake(cx.waker())) {
        return;
    }
    let old = waker.replace(cx.waker().clone());
    drop(state);
    drop(old);
}

impl AsyncRead for Far {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let coop = std::task::ready!(poll_proceed(cx));
        let mut state = lock(&self.0.state);
        if state.to_task.bytes.is_empty() {
            if !state.to_task.finished && !state.stack_gone {
                wait(state, |state| &mut state.reader, cx);
                return Poll::Pending;
            }
        } else {
            let most = buffer.remaining();
            state.to_task.take(most, |bytes| buffer.put_slice(bytes));
            if state.to_task.relieved() {
                self.0.ring(state);
            }
        }
        coop.made_progress();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Far {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let coop = std::task::ready!(poll_proceed(cx));
        let mut state = lock(&self.0.state);
        if state.stack_gone || state.to_stack.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let mut wanted = 0_usize;
        let mut written = 0_usize;
        for slice in slices {
            wanted = wanted.saturating_add(slice.len());
            written = written.saturating_add(state.to_stack.put(slice));
        }
        if written == 0 && wanted > 0 {
            state.to_stack.awaited = true;
            wait(state, |state| &mut state.writer, cx);
            return Poll::Pending;
        }
        self.0.ring(state);
        coop.made_progress();
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = lock(&self.0.state);
        state.to_stack.finished = true;
        self.0.ring(state);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.task_gone = true;
        self.0.ring(state);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn listening() -> (Arc<Bell>, Near, Far) {
        let bell = Arc::<Bell>::default();
        let (near, far) = pair(&bell);
        near.listen(Token::from_u64(7));
        assert_eq!(bell.take(), [Token::from_u64(7)]);
        near.news();
        (bell, near, far)
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_the_bell_is_rung_once_for_what_was_not_looked_at() {
        let (bell, near, mut far) = listening();
        far.write_all(b"to the ").await.unwrap();
        far.write_all(b"stack").await.unwrap();
        assert_eq!(bell.take(), [Token::from_u64(7)]);
        near.news();
        let mut got = [0; 20];
        assert_eq!(near.receive(&mut got[..4]), Ok(4));
        assert_eq!(near.receive(&mut got[4..]), Ok(8));
        assert_eq!(&got[..12], b"to the stack");
        assert_eq!(near.receive(&mut got), Err(Errno::EAGAIN));
        assert_eq!(near.send(b"to the task"), Ok(11));
        far.read_exact(&mut got[..11]).await.unwrap();
        assert_eq!(&got[..11], b"to the task");
        assert!(bell.take().is_empty(), "reading is no news");
        let state = lock(&near.0.state);
        let capacity = state.to_task.bytes.capacity() + state.to_stack.bytes.capacity();
        assert_eq!(capacity, 0, "an idle pipe holds no buffer");
    }

    #[tokio::test]
    async fn who_waits_for_room_is_told_when_there_is_some() {
        let (bell, near, mut far) = listening();
        let piece = vec![1; 40_000];
        assert_eq!(near.send(&piece), Ok(40_000));
        assert_eq!(near.send(&piece), Ok(CAPACITY - 40_000));
        assert_eq!(near.send(&piece), Err(Errno::EAGAIN));
        let mut got = vec![0; CAPACITY];
        far.read_exact(&mut got[..1000]).await.unwrap();
        assert!(bell.take().is_empty(), "not for so little");
        far.read_exact(&mut got[..CAPACITY - 1000]).await.unwrap();
        assert_eq!(bell.take().len(), 1);
        near.news();
        // The other direction.
        let writing = tokio::spawn(async move {
            far.write_all(&vec![2; 3 * CAPACITY]).await.unwrap();
            far
        });
        let mut taken = 0;
        while taken < 3 * CAPACITY {
            match near.receive(&mut got) {
                Ok(number) => taken += number,
                Err(_) => tokio::task::yield_now().await,
            }
        }
        let _far = writing.await.unwrap();
        assert_eq!(near.receive(&mut got), Err(Errno::EAGAIN));
    }

    #[tokio::test]
    async fn ends_are_those_of_sockets() {
        let mut got = [0; 10];
        let (bell, near, mut far) = listening();
        far.write_all(b"last").await.unwrap();
        far.shutdown().await.unwrap();
        assert_eq!(bell.take().len(), 1);
        let half = News {
            finished: true,
            gone: false,
            reset: false,
        };
        assert_eq!(near.news(), half);
        assert_eq!(near.receive(&mut got), Ok(4));
        assert_eq!(near.receive(&mut got), Ok(0));
        assert_eq!(near.send(b"still heard"), Ok(11));
        near.finish();
        let mut all = Vec::new();
        far.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"still heard");
        drop(far);
        assert_eq!(bell.take().len(), 1);
        assert!(near.news().gone);
        assert_eq!(near.receive(&mut got), Ok(0));
        assert_eq!(near.send(b"x"), Err(Errno::EPIPE));

        let (_bell, near, far) = listening();
        near.send(b"not taken").unwrap();
        assert!(!near.news().reset);
        drop(far);
        assert!(near.news().reset);
        assert_eq!(near.receive(&mut got), Err(Errno::ECONNRESET));

        let (_bell, near, mut far) = listening();
        near.send(b"rest").unwrap();
        let reading = tokio::spawn(async move {
            let mut all = Vec::new();
            far.read_to_end(&mut all).await.unwrap();
            (all, far.write_all(b"x").await.unwrap_err().kind())
        });
        tokio::task::yield_now().await;
        drop(near);
        let broken = io::ErrorKind::BrokenPipe;
        assert_eq!(reading.await.unwrap(), (b"rest".to_vec(), broken));
    }
}
