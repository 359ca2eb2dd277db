//! The credit of one connection as plain numbers: how much the guest lets the host send, and how much
//! the host lets the guest send. All counters wrap around. Its promise: neither side is ever let
//! beyond the other's buffer, and neither waits for room that the other has already made.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use super::packet::Header;

/// Bytes that the guest may send ahead of the host's reader, and the most that is kept of it.
pub(super) const WINDOW: u32 = 256 * 1024;
/// The guest hears of free room when this much of it is news.
const NEWS: u32 = WINDOW / 4;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Credit {
    // What the guest lets us send.
    guest_buffer: u32,
    guest_forwarded: u32,
    sent: u32,
    asked: bool,
    // What we let the guest send.
    received: u32,
    forwarded: u32,
    told: u32,
    owes_answer: bool,
}

impl Credit {
    /// Every packet of the guest's says how much it takes.
    pub(super) fn hear(&mut self, header: &Header) {
        self.guest_buffer = header.buffer_size;
        self.guest_forwarded = header.forwarded;
        self.asked &= self.available() == 0;
    }

    /// Bytes that may be sent now.
    pub(super) fn available(&self) -> u32 {
        self.guest_buffer
            .saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// So many bytes are in the guest's queue.
    pub(super) fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Whether the guest was asked for room and has not given any since.
    pub(super) fn was_asked(&self) -> bool {
        self.asked
    }

    /// The guest is asked for room.
    pub(super) fn ask(&mut self) {
        self.asked = true;
    }

    /// Bytes that the guest may still send.
    pub(super) fn room(&self) -> u32 {
        WINDOW.saturating_sub(self.buffered())
    }

    /// The guest sent so many bytes.
    pub(super) fn receive(&mut self, bytes: u32) {
        self.received = self.received.wrapping_add(bytes);
    }

    /// So many of them have gone to the host's reader, or into nothing because it is gone.
    pub(super) fn deliver(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes.min(self.buffered()));
    }

    /// Bytes of the guest's that the host has not taken yet.
    pub(super) fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// The guest asks how much it may send.
    pub(super) fn owe_answer(&mut self) {
        self.owes_answer = true;
    }

    /// Whether the guest is to be told of its room though nothing else is to be said.
    pub(super) fn is_news(&self) -> bool {
        self.owes_answer || self.forwarded.wrapping_sub(self.told) >= NEWS
    }

    /// The fields of every packet that tell the guest its room.
    pub(super) fn window(&self) -> (u32, u32) {
        (WINDOW, self.forwarded)
    }

    /// A packet with these fields is in the guest's queue.
    pub(super) fn tell(&mut self) {
        self.told = self.forwarded;
        self.owes_answer = false;
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::{Op, STREAM};
    use super::*;

    #[test]
    fn credit_survives_counters_that_wrap_around() {
        let mut credit = Credit {
            sent: u32::MAX - 10,
            ..Credit::default()
        };
        credit.hear(&Header {
            source_cid: 3,
            target_cid: 2,
            source_port: 1024,
            target_port: 70_000,
            length: 0,
            kind: STREAM,
            op: Op::CreditUpdate,
            flags: 0,
            buffer_size: 240 * 1024,
            forwarded: u32::MAX - 10,
        });
        credit.send(100);
        assert_eq!(credit.available(), 240 * 1024 - 100);
    }
}
