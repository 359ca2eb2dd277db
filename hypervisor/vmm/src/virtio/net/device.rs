//! The two queues of the network interface and its channel. Each wake-up does a bounded amount of
//! work in each direction. A channel that is full stops the transmit queue until it takes more, a
//! driver without buffers leaves frames in the channel: whoever floods slows itself.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_net;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::NetState;
use super::channel::{Channel, Incoming, Lost, Unsent};
use super::host::Inbox;
use super::receive::{Basket, Delivery, Driver};
use super::transmit::{Batch, MOST_DESCRIPTORS};
use crate::virtio::fault::Broken;
use crate::virtio::limit::LogLimit;
use crate::virtio::ring::{Chain, Ring};
use crate::virtio::transport::DeviceState;
use crate::virtio::worker::{DEVICE_TOKENS, Device, Rings};

const QUEUE_SIZES: &[u16] = &[256, 256];
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
/// Bytes of the header before each frame in the driver's buffers.
pub(super) const HEADER: usize = 12;

/// Frames per wake-up and direction.
const BUDGET: usize = 256;
/// Bytes per wake-up and direction.
const BYTE_BUDGET: usize = 4 << 20;

pub(super) struct NetDevice {
    mac: [u8; 6],
    mtu: u16,
    inbox: Arc<Inbox>,
    epoll: Option<Arc<Epoll>>,
    channel: Option<Channel>,
    /// Of the channel that comes next; each has its own.
    next_token: u64,
    driver: Driver,
    incoming: Incoming,
    unsent: Unsent,
    batch: Batch,
    basket: Basket,
    chain: Chain,
    /// The guest's frames that were dropped since a channel was attached or lost.
    unconnected: u64,
    limit: LogLimit,
}

impl NetDevice {
    pub(super) fn new(mac: [u8; 6], mtu: u16, inbox: Arc<Inbox>) -> Self {
        Self {
            mac,
            mtu,
            inbox,
            epoll: None,
            channel: None,
            next_token: DEVICE_TOKENS.saturating_add(1),
            driver: Driver::default(),
            incoming: Incoming::new(),
            unsent: Unsent::new(),
            batch: Batch::new(),
            basket: Basket::new(),
            chain: Chain::default(),
            unconnected: 0,
            limit: LogLimit::new(),
        }
    }

    fn attach_channel(&mut self, stream: UnixStream) {
        self.forget_channel();
        let channel = Channel::new(stream, self.next_token);
        self.next_token = self.next_token.wrapping_add(1).max(DEVICE_TOKENS);
        let watched =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let added = self.epoll.as_ref().map_or(Ok(()), |epoll| {
            let event = EpollEvent::new(watched, channel.token);
            epoll.ctl(ControlOperation::Add, channel.descriptor(), event)
        });
        match added {
            Ok(()) => {
                let dropped = std::mem::take(&mut self.unconnected);
                tracing::info!(dropped, "frame channel attached");
                self.channel = Some(channel);
            }
            Err(error) => {
                tracing::error!(%error, "the frame channel cannot be watched; attach another");
            }
        }
    }

    fn forget_channel(&mut self) {
        if let (Some(epoll), Some(channel)) = (&self.epoll, self.channel.take()) {
            // Closing alone is not enough where somebody has a copy of the descriptor.
            let _ = epoll.ctl(
                ControlOperation::Delete,
                channel.descriptor(),
                EpollEvent::default(),
            );
        }
        self.incoming.clear();
        self.unsent.clear();
    }

    fn lose_channel(&mut self, reason: &Lost) {
        self.forget_channel();
        tracing::warn!(%reason, "frame channel detached; the guest has no network until the next");
    }

    fn complain(&self, what: &str) {
        if let Some(suppressed) = self.limit.allow() {
            tracing::warn!(reason = what, suppressed, "frame dropped");
        }
    }

    /// Sends the guest's frames.
    fn transmit(&mut self, rings: &mut Rings) -> Result<(), Broken> {
        if let Some(channel) = &mut self.channel {
            match self.unsent.flush(channel) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(lost) => self.lose_channel(&lost),
            }
        }
        let Some(ring) = rings.get_mut(TX).and_then(Option::as_mut) else {
            return Ok(());
        };
        ring.silence()?;
        let (mut frames, mut bytes) = (0_usize, 0_usize);
        while frames < BUDGET && bytes < BYTE_BUDGET {
            self.batch.clear();
            while self.batch.has_room() && ring.pop_into(MOST_DESCRIPTORS, &mut self.chain)? {
                self.batch.add(&self.chain)?;
            }
            if self.batch.is_empty() {
                if ring.listen()? {
                    ring.silence()?;
                    continue;
                }
                return Ok(());
            }
            bytes = bytes.saturating_add(self.batch.bytes());
            frames = frames.saturating_add(match self.send_batch(ring)? {
                Some(sent) => sent,
                // The channel is full: it stirs when it takes more.
                None => return Ok(()),
            });
        }
        ring.kick_again();
        Ok(())
    }

    /// Sends the batch: how many frames are done, None when the channel is full.
    fn send_batch(&mut self, ring: &mut Ring) -> Result<Option<usize>, Broken> {
        let taken = self.channel.as_mut().map(|channel| {
            self.batch.with_vectors(ring.memory(), |vectors, length| {
                channel.send(vectors, length)
            })
        });
        match taken {
            Some(Ok(taken)) => {
                let settled = self.batch.settle(ring, taken, &mut self.unsent)?;
                if settled.malformed > 0 {
                    self.complain("the guest sent a frame too short or too long for Ethernet");
                }
                let is_full = settled.is_blocked || !self.unsent.is_empty();
                Ok((!is_full).then_some(settled.frames))
            }
            lost_or_none => {
                if let Some(Err(lost)) = lost_or_none {
                    self.lose_channel(&lost);
                }
                let dropped = self.batch.drop_all(ring)?;
                self.unconnected = self.unconnected.saturating_add(dropped as u64);
                Ok(Some(dropped))
            }
        }
    }

    /// Hands frames of the channel to the guest.
    fn receive(&mut self, rings: &mut Rings) -> Result<(), Broken> {
        let Some(ring) = rings.get_mut(RX).and_then(Option::as_mut) else {
            return Ok(());
        };
        ring.silence()?;
        let (mut frames, mut bytes) = (0_usize, 0_usize);
        while let Some(channel) = &mut self.channel {
            let frame = match self.incoming.frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => match self.incoming.fill(channel) {
                    Ok(true) => continue,
                    Ok(false) => return Ok(()),
                    Err(lost) => {
                        self.lose_channel(&lost);
                        return Ok(());
                    }
                },
                Err(lost) => {
                    self.lose_channel(&lost);
                    return Ok(());
                }
            };
            if frames >= BUDGET || bytes >= BYTE_BUDGET {
                ring.kick_again();
                return Ok(());
            }
            let length = frame.len();
            match self
                .basket
                .deliver(ring, &mut self.chain, frame, self.driver)?
            {
                Delivery::Done => {}
                Delivery::Waits => return Ok(()),
                Delivery::TooLong => {
                    self.complain("the guest's receive buffers are too small for a frame");
                }
            }
            self.incoming.consume(length);
            frames = frames.saturating_add(1);
            bytes = bytes.saturating_add(length);
        }
        Ok(())
    }
}

const fn bit(number: u32) -> u64 {
    1_u64.wrapping_shl(number)
}

impl Device for NetDevice {
    fn features(&self) -> u64 {
        bit(virtio_net::VIRTIO_NET_F_CSUM)
            | bit(virtio_net::VIRTIO_NET_F_GUEST_CSUM)
            | bit(virtio_net::VIRTIO_NET_F_MTU)
            | bit(virtio_net::VIRTIO_NET_F_MAC)
            | bit(virtio_net::VIRTIO_NET_F_MRG_RXBUF)
            | bit(virtio_net::VIRTIO_NET_F_STATUS)
    }

    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(12);
        config.extend(self.mac);
        config.extend(1_u16.to_le_bytes()); // the link is up
        config.extend(1_u16.to_le_bytes()); // pairs of queues
        config.extend(self.mtu.to_le_bytes());
        config
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn attach(&mut self, epoll: &Arc<Epoll>) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, DEVICE_TOKENS);
        epoll.ctl(ControlOperation::Add, self.inbox.event.as_raw_fd(), event)?;
        self.epoll = Some(Arc::clone(epoll));
        Ok(())
    }

    fn negotiated(&mut self, features: u64) {
        self.driver = Driver {
            merges: features & bit(virtio_net::VIRTIO_NET_F_MRG_RXBUF) != 0,
            fills_in: features & bit(virtio_net::VIRTIO_NET_F_GUEST_CSUM) != 0,
        };
    }

    fn kicked(&mut self, queue: usize, rings: &mut Rings) -> Result<(), Broken> {
        match queue {
            RX => self.receive(rings),
            _ => self.transmit(rings),
        }
    }

    fn stirred(&mut self, token: u64, events: EventSet, rings: &mut Rings) -> Result<(), Broken> {
        if token == DEVICE_TOKENS {
            match self.inbox.take() {
                Some(stream) => self.attach_channel(stream),
                None => return Ok(()),
            }
        } else {
            match &mut self.channel {
                Some(channel) if channel.token == token => channel.stirred(events),
                // An event of a channel that is gone.
                _ => return Ok(()),
            }
        }
        self.transmit(rings)?;
        self.receive(rings)
    }

    fn finish(&mut self) {
        self.forget_channel();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState {})
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        matches!(state, DeviceState::Net(_))
    }
}
