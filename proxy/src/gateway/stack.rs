//! One VM's running stack, as whoever attached the VM holds it. The stack is a task of its own: a
//! defect in it ends this VM's network and nothing else.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::FutureExt;
use protocol::network::{Egress, NetworkCounters};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use super::counters::Counters;
use super::engine::{Engine, Orders};
use super::stream::{ConnectError, GuestStream};
use super::{Common, StackSettings};
use crate::Quiet;

/// Orders that may wait for the stack.
const ORDERS: usize = 64;

static QUIET: Quiet = Quiet::new();

/// How a stack ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The other end of the frame channel was closed.
    Closed,
    /// The frame channel carried what no device may send, or failed.
    Broken,
    /// A defect of ours.
    Panicked,
}

/// What the stack is told.
pub(super) enum Order {
    Connect {
        port: u16,
        reply: oneshot::Sender<Result<GuestStream, ConnectError>>,
    },
    #[cfg(test)]
    Panic,
}

/// A running stack. Dropping it ends everything of it.
#[derive(Debug)]
pub struct Stack {
    orders: mpsc::Sender<Order>,
    egress: watch::Sender<Egress>,
    counters: Arc<Counters>,
    ended: watch::Receiver<Option<Ended>>,
    task: AbortHandle,
}

impl Stack {
    /// Starts the stack of a VM on its frame channel, a stream socket. Must be called within the
    /// runtime.
    pub fn start(
        settings: StackSettings,
        frames: OwnedFd,
        common: Arc<Common>,
    ) -> io::Result<Self> {
        let counters = Arc::<Counters>::default();
        let (orders, orders_in) = mpsc::channel(ORDERS);
        let (egress, egress_in) = watch::channel(settings.egress.clone());
        let (end, ended) = watch::channel(None);
        let mut engine = Engine::new(
            &settings,
            frames,
            Arc::clone(&common),
            Arc::clone(&counters),
        )?;
        let vm = settings.vm;
        let task = tokio::spawn(async move {
            let told = Orders {
                orders: orders_in,
                egress: egress_in,
            };
            let run = AssertUnwindSafe(engine.run(told)).catch_unwind().await;
            let (how, why) = match run {
                Ok(Ok(())) => (Ended::Closed, None),
                Ok(Err(error)) => (Ended::Broken, Some(error.to_string())),
                Err(_) => {
                    common.panics.fetch_add(1, Ordering::Relaxed);
                    (Ended::Panicked, Some("a panic".to_owned()))
                }
            };
            if let Some(why) = why
                && let Some(left_out) = QUIET.allow()
            {
                tracing::warn!(%vm, why, left_out, "the network of a VM has ended");
            }
            // The channel is closed before anybody is told, so that a new one can follow.
            drop(engine);
            end.send_replace(Some(how));
        });
        Ok(Self {
            orders,
            egress,
            counters,
            ended,
            task: task.abort_handle(),
        })
    }

    /// Changes what the VM may reach. `offline` ends open connections to the world.
    pub fn update(&self, egress: Egress) {
        self.egress.send_replace(egress);
    }

    /// What was counted since the start.
    pub fn counters(&self) -> NetworkCounters {
        self.counters.read()
    }

    /// Connects to a TCP port of the guest, from the gateway's address.
    pub async fn connect(&self, port: u16) -> Result<GuestStream, ConnectError> {
        let (reply, answer) = oneshot::channel();
        self.orders
            .send(Order::Connect { port, reply })
            .await
            .map_err(|_| ConnectError::Gone)?;
        answer.await.unwrap_or(Err(ConnectError::Gone))
    }

    /// Waits until the stack has ended by itself.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(how) => how.unwrap_or(Ended::Panicked),
            Err(_) => Ended::Panicked,
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use protocol::host::MAX_ETHERNET_FRAME;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::super::Checksums;
    use super::*;

    fn start(common: &Arc<Common>) -> (Stack, UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let settings = StackSettings {
            vm: "vm-1234abcd".parse().unwrap(),
            hostname: "supvm-1234".into(),
            egress: Egress::default(),
            checksums: Checksums::Trusted,
        };
        let stack = Stack::start(settings, ours.into(), Arc::clone(common)).unwrap();
        (stack, UnixStream::from_std(theirs).unwrap())
    }

    async fn ended(stack: &Stack) -> Ended {
        tokio::time::timeout(Duration::from_secs(20), stack.ended())
            .await
            .unwrap()
    }

    /// A question for the gateway's address, and the length of the answer.
    async fn works(channel: &mut UnixStream) {
        let mut frame = vec![0, 0, 0, 42];
        frame.extend([0xff; 6]);
        frame.extend([2, 0x73, 0x75, 0x70, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend([2, 0x73, 0x75, 0x70, 0, 2, 10, 213, 0, 2]);
        frame.extend([0, 0, 0, 0, 0, 0, 10, 213, 0, 1]);
        channel.write_all(&frame).await.unwrap();
        let mut answer = [0; 46];
        let read = channel.read_exact(&mut answer);
        tokio::time::timeout(Duration::from_secs(20), read)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(answer[..4], [0, 0, 0, 42]);
    }

    #[tokio::test]
    async fn a_panic_ends_its_own_stack_and_is_counted() {
        let common = Common::new();
        let (broken, mut broken_channel) = start(&common);
        let (sound, mut sound_channel) = start(&common);
        works(&mut broken_channel).await;
        broken.orders.send(Order::Panic).await.ok().unwrap();
        assert_eq!(ended(&broken).await, Ended::Panicked);
        assert_eq!(common.panics(), 1);
        // The channel's other end hears of it.
        assert_eq!(broken_channel.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(broken.connect(80).await.unwrap_err(), ConnectError::Gone);
        works(&mut sound_channel).await;
        drop(sound);
    }

    #[tokio::test]
    async fn a_length_that_no_frame_has_ends_the_channel() {
        let giant = u32::try_from(MAX_ETHERNET_FRAME).unwrap() + 1;
        for length in [0, giant, u32::MAX] {
            let common = Common::new();
            let (stack, mut channel) = start(&common);
            works(&mut channel).await;
            channel.write_all(&length.to_be_bytes()).await.unwrap();
            assert_eq!(ended(&stack).await, Ended::Broken);
            assert_eq!(channel.read(&mut [0]).await.unwrap(), 0);
            assert_eq!(common.panics(), 0);
        }
    }

    #[tokio::test]
    async fn a_channel_that_ends_within_a_frame_is_closed() {
        let common = Common::new();
        let (stack, mut channel) = start(&common);
        works(&mut channel).await;
        channel.write_all(&[0, 0, 0, 60, 1, 2]).await.unwrap();
        drop(channel);
        assert_eq!(ended(&stack).await, Ended::Closed);
    }

    #[tokio::test]
    async fn dropping_a_stack_closes_its_channel() {
        let common = Common::new();
        let (stack, mut channel) = start(&common);
        works(&mut channel).await;
        drop(stack);
        assert_eq!(channel.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_guest_that_does_not_answer_is_not_waited_for_without_end() {
        let common = Common::new();
        let (stack, _channel) = start(&common);
        assert_eq!(stack.connect(80).await.unwrap_err(), ConnectError::TimedOut);
    }
}
