//! Messages on their way to a child that may be slow. The supervisor never waits for a child: what
//! its socket does not take is queued, and a queue that is full means that the child is stuck.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use protocol::host::channel::{ChannelError, send_bytes};
use protocol::message::{Message, encode};

/// Most messages in the queue: more than answering for every VM at once takes.
const CAPACITY: usize = 16 << 10;

/// The child takes nothing any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutboxError {
    /// It has not read for too long.
    #[error("{CAPACITY} messages wait unread")]
    Full,
    /// It has closed, or something worse.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// Encoded messages, first in, first out.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    queue: VecDeque<Vec<u8>>,
}

impl Outbox {
    /// Queues a message and sends what the socket takes.
    pub(super) fn send<M: Message>(
        &mut self,
        socket: BorrowedFd<'_>,
        message: &M,
    ) -> Result<(), OutboxError> {
        if self.queue.len() >= CAPACITY {
            return Err(OutboxError::Full);
        }
        self.queue
            .push_back(encode(message).map_err(ChannelError::from)?);
        self.flush(socket)
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self, socket: BorrowedFd<'_>) -> Result<(), OutboxError> {
        while let Some(bytes) = self.queue.front() {
            match send_bytes(socket, bytes, &[]) {
                Ok(()) => {
                    self.queue.pop_front();
                }
                Err(error) if error.would_block() => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether something waits for the socket to become writable.
    pub(super) fn is_waiting(&self) -> bool {
        !self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use protocol::host::channel::receive;
    use protocol::host::supervisor::ShutDown;
    use protocol::message::decode;

    use super::*;
    use crate::supervisor::sockets::pair;

    #[test]
    fn a_child_that_does_not_read_is_stuck_in_the_end_and_what_it_reads_is_in_order() {
        let (ours, theirs) = pair().unwrap();
        let mut outbox = Outbox::default();
        let mut sent = 0;
        let error = loop {
            match outbox.send(ours.as_fd(), &ShutDown { deadline_ms: sent }) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, OutboxError::Full));
        assert!(outbox.is_waiting());
        for expected in 0..sent {
            outbox.flush(ours.as_fd()).unwrap();
            let packet = receive(theirs.as_fd()).unwrap().unwrap();
            let message: ShutDown = decode(&packet.frame).unwrap();
            assert_eq!(message.deadline_ms, expected);
        }
        assert!(!outbox.is_waiting());
    }
}
