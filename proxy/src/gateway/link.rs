//! Frames to the guest: one buffer in which frames are built where they are later written from,
//! many with one call. It never grows: when it is full, whoever makes frames has to wait until the
//! guest has taken some.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use protocol::host::MAX_ETHERNET_FRAME;
use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol};

use super::Checksums;
use super::address::{GATEWAY_MAC, GUEST_MAC, MTU};
use super::bucket::Bucket;
use super::counters::{Counters, add, count};
use super::world;

/// The length before each frame.
pub(super) const PREFIX: usize = 4;

/// The Ethernet header.
const ETHERNET: usize = 14;

/// With so much waiting no new data is put behind it.
const FULL: usize = 256 << 10;

/// With so much waiting not even answers are made, so no frame of the guest is looked at.
const CHOKED: usize = 512 << 10;

const CAPACITY: usize = CHOKED + 2 * (PREFIX + MAX_ETHERNET_FRAME);

/// The way to one guest.
pub(super) struct Link {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Nobody takes frames any more.
    closed: bool,
    /// Where frames are sent to.
    pub(super) guest_mac: EthernetAddress,
    /// Something could not be sent because the buffer was full or a limit reached.
    pub(super) refused: bool,
    /// The acknowledgement number of the TCP segment that was sent last.
    pub(super) last_ack: Option<u32>,
    /// The time of this turn.
    pub(super) now: Instant,
    pub(super) bytes: Bucket,
    pub(super) packets: Bucket,
    checksums: Checksums,
    counters: Arc<Counters>,
}

impl Link {
    pub(super) fn new(checksums: Checksums, counters: Arc<Counters>, now: Instant) -> Self {
        Self {
            // Zeroed memory is not there before it is used.
            buffer: vec![0; CAPACITY].into_boxed_slice(),
            start: 0,
            end: 0,
            closed: false,
            guest_mac: GUEST_MAC,
            refused: false,
            last_ack: None,
            now,
            bytes: Bucket::new(0, now),
            packets: Bucket::new(0, now),
            checksums,
            counters,
        }
    }

    fn waiting(&self) -> usize {
        self.end.saturating_sub(self.start)
    }

    /// No new data may be put in.
    pub(super) fn full(&self) -> bool {
        self.waiting() >= FULL || self.limited_until().is_some()
    }

    /// Not even an answer may be put in.
    pub(super) fn choked(&self) -> bool {
        self.waiting() >= CHOKED
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Until when the VM's limits let nothing through.
    pub(super) fn limited_until(&self) -> Option<Instant> {
        self.bytes
            .closed_until(self.now)
            .max(self.packets.closed_until(self.now))
    }

    /// Throws away what is waiting and what comes, because nobody takes it any more: who waits for
    /// room would wait for ever, and with it the end of the channel for being seen.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.start = 0;
        self.end = 0;
    }

    /// Writes what is waiting. Whether the channel took all.
    pub(super) fn flush(&mut self, channel: BorrowedFd<'_>) -> io::Result<bool> {
        while let Some(waiting) = self.buffer.get(self.start..self.end)
            && !waiting.is_empty()
        {
            match world::send(channel, waiting) {
                Ok(written) => self.start = self.start.saturating_add(written).min(self.end),
                Err(nix::Error::EAGAIN) => return Ok(false),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.start = 0;
        self.end = 0;
        Ok(true)
    }

    /// Sends one frame of this type with a payload of at most `most` bytes. `fill` says how many
    /// there are, or that there is nothing to send. Whether a frame was sent.
    pub(super) fn frame(
        &mut self,
        to: EthernetAddress,
        kind: Option<EthernetProtocol>,
        most: usize,
        fill: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> bool {
        let overhead = PREFIX.saturating_add(ETHERNET);
        let size = most.saturating_add(overhead);
        if most > MTU {
            return false;
        }
        if self.closed {
            self.start = 0;
            self.end = 0;
        }
        if self.end.saturating_add(size) > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end = self.waiting();
            self.start = 0;
        }
        let Some(room) = self
            .buffer
            .get_mut(self.end..)
            .and_then(|rest| rest.get_mut(..size))
        else {
            return false;
        };
        let Some((head, payload)) = room.split_at_mut_checked(overhead) else {
            return false;
        };
        let Some(length) = fill(payload) else {
            return false;
        };
        let length = length.min(most);
        // The first half byte of an IP packet is its version.
        let kind = kind.unwrap_or(match payload.first() {
            Some(byte) if byte >> 4 == 6 => EthernetProtocol::Ipv6,
            _ => EthernetProtocol::Ipv4,
        });
        self.last_ack = acknowledges(kind, payload).or(self.last_ack);
        let frame_length = length.saturating_add(ETHERNET);
        let Some((prefix, ethernet)) = head.split_first_chunk_mut::<PREFIX>() else {
            return false;
        };
        *prefix = u32::try_from(frame_length).unwrap_or(0).to_be_bytes();
        let mut ethernet = EthernetFrame::new_unchecked(ethernet);
        ethernet.set_src_addr(GATEWAY_MAC);
        ethernet.set_dst_addr(to);
        ethernet.set_ethertype(kind);
        self.end = self.end.saturating_add(PREFIX).saturating_add(frame_length);
        self.bytes.take(frame_length, self.now);
        self.packets.take(1, self.now);
        count(&self.counters.frames_in);
        add(&self.counters.bytes_in, frame_length);
        true
    }

    /// Sends one IP packet of at most `most` bytes to the guest.
    pub(super) fn packet(
        &mut self,
        most: usize,
        fill: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> bool {
        self.frame(self.guest_mac, None, most, fill)
    }

    /// As smoltcp sees it, with one packet from the guest or none.
    pub(super) fn device<'a>(&'a mut self, packet: Option<&'a [u8]>) -> Device<'a> {
        Device { packet, link: self }
    }

    /// What smoltcp makes and checks. A header of IP always has its sum, because every kernel
    /// checks it; TCP's costs a look at every byte, which a channel in memory does not need.
    pub(super) fn checksums(&self) -> ChecksumCapabilities {
        let mut sums = ChecksumCapabilities::default();
        if self.checksums == Checksums::Trusted {
            sums.tcp = Checksum::None;
            sums.udp = Checksum::None;
        }
        sums
    }
}

/// The acknowledgement number of a TCP packet without options or extensions of IP, as our own are.
fn acknowledges(kind: EthernetProtocol, packet: &[u8]) -> Option<u32> {
    let (protocol, tcp) = match kind {
        EthernetProtocol::Ipv4 => (packet.get(9)?, packet.get(20..)?),
        EthernetProtocol::Ipv6 => (packet.get(6)?, packet.get(40..)?),
        _ => return None,
    };
    let number = tcp.get(8..)?.first_chunk::<4>()?;
    (*protocol == 6).then(|| u32::from_be_bytes(*number))
}

/// See [`Link::device`].
pub(super) struct Device<'a> {
    packet: Option<&'a [u8]>,
    link: &'a mut Link,
}

pub(super) struct Received<'a>(&'a [u8]);

pub(super) struct Sending<'a>(&'a mut Link);

impl phy::Device for Device<'_> {
    type RxToken<'b>
        = Received<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Sending<'b>
    where
        Self: 'b;

    fn receive(
        &mut self,
        _now: smoltcp::time::Instant,
    ) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let packet = self.packet.take()?;
        Some((Received(packet), Sending(self.link)))
    }

    fn transmit(&mut self, _now: smoltcp::time::Instant) -> Option<Self::TxToken<'_>> {
        if self.link.full() {
            self.link.refused = true;
            return None;
        }
        Some(Sending(self.link))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities.checksum = self.link.checksums();
        capabilities
    }
}

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(self.0)
    }
}

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut fill = Some(fill);
        let mut result = None;
        self.0.packet(length, |buffer| {
            result = fill.take().map(|fill| fill(buffer));
            Some(length)
        });
        match (result, fill) {
            (Some(result), _) => result,
            // A packet beyond the buffer, which the limits above exclude: it is made and lost.
            (None, Some(fill)) => fill(&mut vec![0; length]),
            (None, None) => unreachable!("the closure was called or is still there"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours, theirs)
    }

    fn link() -> Link {
        Link::new(Checksums::Real, Arc::default(), Instant::now())
    }

    #[test]
    fn frames_are_written_with_their_lengths_one_behind_the_other() {
        let mut link = link();
        for length in [20, 60] {
            assert!(link.packet(100, |buffer| {
                buffer[0] = 0x45;
                Some(length)
            }));
        }
        assert!(!link.packet(100, |_| None));
        let (ours, theirs) = pair();
        assert!(link.flush(ours.as_fd()).unwrap());
        let mut bytes = [0; 200];
        let got = nix::unistd::read(&theirs, &mut bytes).unwrap();
        assert_eq!(got, 4 + 34 + 4 + 74);
        assert_eq!(bytes[..4], 34_u32.to_be_bytes());
        assert_eq!(bytes[4..10], GUEST_MAC.0);
        assert_eq!(bytes[16..18], [8, 0]);
        assert_eq!(bytes[38..42], 74_u32.to_be_bytes());
    }

    #[test]
    fn a_guest_that_takes_nothing_stops_whoever_sends() {
        let mut link = link();
        let (ours, _theirs) = pair();
        let mut sent = 0;
        while !link.choked() {
            assert!(link.packet(MTU, |_| Some(MTU)));
            assert!(sent < 100, "no end");
            sent += 1;
            link.flush(ours.as_fd()).unwrap();
        }
        assert!(link.full());
        // What is choked still has room for an answer that is being made.
        assert!(link.packet(MTU, |_| Some(MTU)));
    }
}
