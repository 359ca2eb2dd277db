//! One connection as a state machine of plain values. It is told what the guest sent and what the
//! host's socket did, and says which packet is due next; it knows neither sockets nor queues nor
//! time. Its promises: what is sent never exceeds the guest's credit, what the guest may send never
//! exceeds the window, half a close stays half, and a reset is never answered with a reset.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use super::credit::Credit;
use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// For the agent's doorbell.
    Waiting,
    /// REQUEST is due.
    Requesting,
    /// RESPONSE or RST is due from the guest.
    Requested,
    Established,
    /// RST is due.
    Resetting,
    /// Neither side sends packets any more.
    Over,
}

/// What the guest's packet means for the host's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// The guest accepted.
    Connected,
    /// The guest refused.
    Refused,
    /// The payload is to be delivered.
    Deliver,
    /// The guest broke a rule; a reset is on its way.
    Violation(Violation),
}

/// How a guest broke the rules of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("{length} bytes where the window has room for {room}")]
    Credit { length: u32, room: u32 },
    #[error("data after its end was announced")]
    DataAfterEnd,
    #[error("{0:?} where it makes no sense")]
    OutOfPlace(Op),
}

/// What is to be sent to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Request,
    Reset,
    /// At most this many bytes of the host's.
    Data(u32),
    Shutdown(u32),
    CreditUpdate,
    CreditRequest,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    phase: Phase,
    credit: Credit,
    /// The SHUTDOWN flags that the guest sent.
    guest_ended: u32,
    /// The SHUTDOWN flags that are true of the host.
    host_ended: u32,
    /// Those that the guest was told.
    host_ended_told: u32,
}

impl Connection {
    /// A connection that is to be requested, or that waits for the agent first.
    pub(super) fn new(waits: bool) -> Self {
        Self {
            phase: if waits {
                Phase::Waiting
            } else {
                Phase::Requesting
            },
            credit: Credit::default(),
            guest_ended: 0,
            host_ended: 0,
            host_ended_told: 0,
        }
    }

    /// The agent rang.
    pub(super) fn agent_rang(&mut self) {
        if self.phase == Phase::Waiting {
            self.phase = Phase::Requesting;
        }
    }

    /// A packet of the guest's for this connection.
    pub(super) fn receive(&mut self, header: &Header) -> Effect {
        if self.is_over() {
            return Effect::None;
        }
        self.credit.hear(header);
        match (header.op, self.phase) {
            (Op::Reset, phase) => {
                self.phase = Phase::Over;
                if phase == Phase::Requested {
                    Effect::Refused
                } else {
                    Effect::None
                }
            }
            (Op::Response, Phase::Requested) => {
                self.phase = Phase::Established;
                Effect::Connected
            }
            (Op::Data, Phase::Established) => self.receive_data(header.length),
            (Op::Shutdown, Phase::Established) => {
                self.guest_ended |= header.flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
                if self.guest_ended == SHUTDOWN_RECEIVE | SHUTDOWN_SEND {
                    // It wants to forget the connection and waits for this.
                    self.phase = Phase::Resetting;
                }
                Effect::None
            }
            (Op::CreditUpdate, Phase::Established) => Effect::None,
            (Op::CreditRequest, Phase::Established) => {
                self.credit.owe_answer();
                Effect::None
            }
            (_, Phase::Resetting) => Effect::None,
            (op, _) => self.violated(Violation::OutOfPlace(op)),
        }
    }

    fn receive_data(&mut self, length: u32) -> Effect {
        let room = self.credit.room();
        if self.guest_ended & SHUTDOWN_SEND != 0 {
            return self.violated(Violation::DataAfterEnd);
        }
        if length > room {
            return self.violated(Violation::Credit { length, room });
        }
        self.credit.receive(length);
        Effect::Deliver
    }

    fn violated(&mut self, violation: Violation) -> Effect {
        self.phase = Phase::Resetting;
        Effect::Violation(violation)
    }

    /// The host's socket took bytes of the guest's, or they were thrown away because it is gone.
    pub(super) fn delivered(&mut self, bytes: u32) {
        self.credit.deliver(bytes);
    }

    /// The host will not send any more.
    pub(super) fn host_sent_all(&mut self) {
        self.host_ended |= SHUTDOWN_SEND;
    }

    /// The host will not take any more.
    pub(super) fn host_stopped_receiving(&mut self) {
        self.host_ended |= SHUTDOWN_RECEIVE;
    }

    /// The host's side vanished or is given up: the guest is told in the shortest way.
    pub(super) fn abort(&mut self) {
        self.phase = match self.phase {
            Phase::Waiting | Phase::Requesting | Phase::Over => Phase::Over,
            _ => Phase::Resetting,
        };
    }

    /// The packet that is due; `readable` says that the host's socket may have bytes.
    pub(super) fn due(&self, readable: bool) -> Option<Due> {
        match self.phase {
            Phase::Waiting | Phase::Requested | Phase::Over => None,
            Phase::Requesting => Some(Due::Request),
            Phase::Resetting => Some(Due::Reset),
            Phase::Established => self.due_established(readable),
        }
    }

    fn due_established(&self, readable: bool) -> Option<Due> {
        // While bytes of the host's may still come, only the end of its receiving can be told.
        if self.host_ended & !self.host_ended_told != 0 {
            return Some(Due::Shutdown(self.host_ended));
        }
        let credit = self.credit.available();
        if readable && self.wants_host_bytes() {
            if credit > 0 {
                return Some(Due::Data(credit));
            }
            if !self.credit.was_asked() {
                return Some(Due::CreditRequest);
            }
        }
        self.credit.is_news().then_some(Due::CreditUpdate)
    }

    /// The packet that was due is in the guest's queue; for data, `bytes` of them.
    pub(super) fn done(&mut self, due: Due, bytes: u32) {
        self.credit.tell();
        match due {
            Due::Request => self.phase = Phase::Requested,
            Due::Reset => self.phase = Phase::Over,
            Due::Data(_) => self.credit.send(bytes),
            Due::Shutdown(flags) => self.host_ended_told |= flags,
            Due::CreditRequest => self.credit.ask(),
            Due::CreditUpdate => {}
        }
    }

    /// The fields of every packet that tell the guest its credit.
    pub(super) fn window(&self) -> (u32, u32) {
        self.credit.window()
    }

    /// Whether bytes of the host's may still go to the guest.
    pub(super) fn wants_host_bytes(&self) -> bool {
        self.phase == Phase::Established
            && self.guest_ended & SHUTDOWN_RECEIVE == 0
            && self.host_ended & SHUTDOWN_SEND == 0
    }

    /// Whether the guest takes no more bytes of the host's.
    pub(super) fn guest_stopped_receiving(&self) -> bool {
        self.guest_ended & SHUTDOWN_RECEIVE != 0
    }

    /// Whether the host has everything that the guest will ever have sent.
    pub(super) fn host_has_all(&self) -> bool {
        let guest_done = self.guest_ended & SHUTDOWN_SEND != 0
            || matches!(self.phase, Phase::Resetting | Phase::Over);
        guest_done && self.credit.buffered() == 0
    }

    /// Whether the guest has not answered the request yet.
    pub(super) fn is_pending(&self) -> bool {
        matches!(
            self.phase,
            Phase::Waiting | Phase::Requesting | Phase::Requested
        )
    }

    /// Whether the request has reached the guest.
    pub(super) fn is_requested(&self) -> bool {
        self.phase == Phase::Requested
    }

    /// Whether there is nothing more to say to the guest, nor to hear from it.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }
}

#[cfg(test)]
mod tests {
    use super::super::credit::WINDOW;
    use super::super::packet::STREAM;
    use super::*;

    fn packet(op: Op) -> Header {
        Header {
            source_cid: 3,
            target_cid: 2,
            source_port: 1024,
            target_port: 70_000,
            length: 0,
            kind: STREAM,
            op,
            flags: 0,
            buffer_size: 240 * 1024,
            forwarded: 0,
        }
    }

    fn established() -> Connection {
        let mut connection = Connection::new(false);
        assert_eq!(connection.due(true), Some(Due::Request));
        connection.done(Due::Request, 0);
        assert_eq!(connection.receive(&packet(Op::Response)), Effect::Connected);
        connection
    }

    #[test]
    fn the_request_of_a_waiting_connection_goes_out_when_the_agent_rings() {
        let mut connection = Connection::new(true);
        assert_eq!(connection.due(true), None);
        connection.agent_rang();
        assert_eq!(connection.due(true), Some(Due::Request));
    }

    #[test]
    fn data_never_exceeds_the_guests_credit() {
        let mut connection = established();
        assert_eq!(connection.due(true), Some(Due::Data(240 * 1024)));
        connection.done(Due::Data(0), 240 * 1024);
        assert_eq!(connection.due(true), Some(Due::CreditRequest));
        connection.done(Due::CreditRequest, 0);
        assert_eq!(connection.due(true), None, "asked once");
        let update = Header {
            forwarded: 100,
            ..packet(Op::CreditUpdate)
        };
        connection.receive(&update);
        assert_eq!(connection.due(true), Some(Due::Data(100)));
    }

    #[test]
    fn windows_of_240_kib_never_deadlock_in_either_direction() {
        // Both sides send as much as they may, take everything, and tell only when it is due.
        let mut connection = established();
        let (mut guest_sent, mut guest_forwarded) = (0_u32, 0_u32);
        let (mut known_forwarded, mut moved) = (0_u32, 0_u64);
        for _ in 0..10_000 {
            let free = WINDOW - guest_sent.wrapping_sub(known_forwarded);
            if free > 0 {
                let length = free.min(60_000);
                let data = Header {
                    length,
                    forwarded: guest_forwarded,
                    ..packet(Op::Data)
                };
                assert_eq!(connection.receive(&data), Effect::Deliver);
                guest_sent = guest_sent.wrapping_add(length);
                connection.delivered(length);
                moved += u64::from(length);
            }
            while let Some(due) = connection.due(true) {
                let bytes = if let Due::Data(most) = due {
                    most.min(4096)
                } else {
                    0
                };
                known_forwarded = connection.window().1;
                connection.done(due, bytes);
                guest_forwarded = guest_forwarded.wrapping_add(bytes);
                moved += u64::from(bytes);
            }
            connection.receive(&Header {
                forwarded: guest_forwarded,
                ..packet(Op::CreditUpdate)
            });
        }
        assert!(moved > 2_000_000_000, "{moved}");
    }

    #[test]
    fn a_reader_that_takes_everything_reopens_the_window_without_host_data() {
        let mut connection = established();
        let data = Header {
            length: WINDOW,
            ..packet(Op::Data)
        };
        assert_eq!(connection.receive(&data), Effect::Deliver);
        assert_eq!(connection.due(false), None);
        connection.delivered(WINDOW);
        assert_eq!(connection.due(false), Some(Due::CreditUpdate));
    }

    #[test]
    fn a_guest_that_sends_beyond_its_window_is_reset() {
        let mut connection = established();
        connection.receive(&Header {
            length: WINDOW,
            ..packet(Op::Data)
        });
        let effect = connection.receive(&Header {
            length: 1,
            ..packet(Op::Data)
        });
        assert_eq!(
            effect,
            Effect::Violation(Violation::Credit { length: 1, room: 0 })
        );
        assert_eq!(connection.due(true), Some(Due::Reset));
    }

    #[test]
    fn the_guests_half_close_leaves_the_other_half_open() {
        let mut connection = established();
        connection.receive(&Header {
            length: 5,
            ..packet(Op::Data)
        });
        connection.receive(&Header {
            flags: SHUTDOWN_SEND,
            ..packet(Op::Shutdown)
        });
        assert!(
            !connection.host_has_all(),
            "five bytes are still to be delivered"
        );
        connection.delivered(5);
        assert!(connection.host_has_all());
        assert!(matches!(connection.due(true), Some(Due::Data(_))));
        assert!(!connection.is_over());
    }

    #[test]
    fn the_hosts_half_close_leaves_the_other_half_open() {
        let mut connection = established();
        connection.host_sent_all();
        assert_eq!(connection.due(true), Some(Due::Shutdown(SHUTDOWN_SEND)));
        connection.done(Due::Shutdown(SHUTDOWN_SEND), 0);
        assert_eq!(connection.due(true), None);
        let data = Header {
            length: 7,
            ..packet(Op::Data)
        };
        assert_eq!(connection.receive(&data), Effect::Deliver);
    }

    #[test]
    fn a_reset_is_never_answered() {
        let mut connection = established();
        connection.receive(&packet(Op::Reset));
        assert!(connection.is_over());
        assert_eq!(connection.due(true), None);
        let mut refused = Connection::new(false);
        refused.done(Due::Request, 0);
        assert_eq!(refused.receive(&packet(Op::Reset)), Effect::Refused);
        assert_eq!(refused.due(true), None);
        refused.abort();
        assert_eq!(refused.due(true), None);
    }

    #[test]
    fn a_full_close_of_the_guest_is_answered_with_one_reset() {
        let mut connection = established();
        let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
        connection.receive(&Header {
            flags: both,
            ..packet(Op::Shutdown)
        });
        assert_eq!(connection.due(true), Some(Due::Reset));
        connection.done(Due::Reset, 0);
        assert_eq!(connection.due(true), None);
    }

    #[test]
    fn a_second_response_or_request_resets_the_connection() {
        for op in [Op::Response, Op::Request, Op::Unknown(9)] {
            let mut connection = established();
            let effect = connection.receive(&packet(op));
            assert_eq!(effect, Effect::Violation(Violation::OutOfPlace(op)));
            assert_eq!(connection.due(false), Some(Due::Reset));
        }
    }

    #[test]
    fn data_after_the_announced_end_resets_the_connection() {
        let mut connection = established();
        connection.receive(&Header {
            flags: SHUTDOWN_SEND,
            ..packet(Op::Shutdown)
        });
        let effect = connection.receive(&Header {
            length: 1,
            ..packet(Op::Data)
        });
        assert_eq!(effect, Effect::Violation(Violation::DataAfterEnd));
    }

    #[test]
    fn giving_up_before_the_request_went_out_says_nothing_to_the_guest() {
        let mut connection = Connection::new(false);
        connection.abort();
        assert_eq!(connection.due(true), None);
        let mut connection = Connection::new(false);
        connection.done(Due::Request, 0);
        connection.abort();
        assert_eq!(connection.due(true), Some(Due::Reset));
    }
}
