//! The device status and the order in which a driver may move it (virtio 1.2, 2.1 and 3.1). Plain
//! values: it starts nothing and stops nothing, it says what a write means.

/// The bits a driver has set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Status(u32);

/// What a write of the status register means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Back to power-on.
    Reset,
    /// The status becomes this; nothing else happens.
    Set(Status),
    /// The driver says its features are final; the status becomes this if they are acceptable.
    Features(Status),
    /// The driver says it is ready; the device goes live with this status.
    Live(Status),
    /// The driver gave up; the device stops.
    Failed(Status),
}

/// A status that may not follow the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum OutOfOrder {
    #[error("status {to:#x} takes back bits of {from:#x}; only a reset may")]
    TakesBack { from: u32, to: u32 },
    #[error("status {to:#x} after {from:#x} skips a step")]
    Skips { from: u32, to: u32 },
    #[error("status {to:#x} has bits that no driver may set")]
    UnknownBits { to: u32 },
    #[error("status {to:#x} after the driver gave up; only a reset may follow")]
    AfterFailed { to: u32 },
}

impl Status {
    pub(super) const ACKNOWLEDGE: u32 = 1;
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const NEEDS_RESET: u32 = 0x40;
    pub(super) const FAILED: u32 = 0x80;

    pub(super) const fn bits(self) -> u32 {
        self.0
    }

    /// A status that was saved; None when no driver could have written it.
    pub(super) const fn saved(bits: u32) -> Option<Self> {
        match bits & !Self::FAILED {
            0 | 1 | 3 | 11 | 15 => Some(Self(bits)),
            _ => None,
        }
    }

    const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    pub(super) const fn may_negotiate(self) -> bool {
        self.has(Self::DRIVER) && !self.has(Self::FEATURES_OK) && !self.has(Self::FAILED)
    }

    pub(super) const fn may_set_up_queues(self) -> bool {
        self.has(Self::FEATURES_OK) && !self.has(Self::DRIVER_OK) && !self.has(Self::FAILED)
    }

    pub(super) const fn is_live(self) -> bool {
        self.has(Self::DRIVER_OK) && !self.has(Self::FAILED)
    }

    /// What writing `value` means now. NEEDS_RESET is the device's bit: a driver that writes back
    /// what it read is not blamed for it.
    pub(super) const fn write(self, value: u32) -> Result<Step, OutOfOrder> {
        if value == 0 {
            return Ok(Step::Reset);
        }
        let from = self.0;
        let to = value & !Self::NEEDS_RESET;
        let known =
            Self::ACKNOWLEDGE | Self::DRIVER | Self::DRIVER_OK | Self::FEATURES_OK | Self::FAILED;
        if to & !known != 0 {
            return Err(OutOfOrder::UnknownBits { to });
        }
        if self.has(Self::FAILED) {
            return Err(OutOfOrder::AfterFailed { to });
        }
        if to & Self::FAILED != 0 {
            return Ok(Step::Failed(Self(from | Self::FAILED)));
        }
        if from & !to != 0 {
            return Err(OutOfOrder::TakesBack { from, to });
        }
        let next = Self(to);
        let gained = to & !from;
        // ACKNOWLEDGE and DRIVER may come in one write; each later step must be able to read the
        // answer to the one before it.
        let driver_first = gained & Self::DRIVER != 0 && !next.has(Self::ACKNOWLEDGE);
        let features_first = gained & Self::FEATURES_OK != 0 && !self.has(Self::DRIVER);
        let live_first = gained & Self::DRIVER_OK != 0 && !self.has(Self::FEATURES_OK);
        if driver_first || features_first || live_first {
            return Err(OutOfOrder::Skips { from, to });
        }
        if gained & Self::FEATURES_OK != 0 {
            Ok(Step::Features(next))
        } else if gained & Self::DRIVER_OK != 0 {
            Ok(Step::Live(next))
        } else {
            Ok(Step::Set(next))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_the_specification_is_taken() {
        let mut status = Status::default();
        for (value, live) in [(1, false), (3, false), (11, false), (15, true)] {
            status = match status.write(value) {
                Ok(Step::Set(s) | Step::Features(s) | Step::Live(s)) => s,
                _ => Status(u32::MAX),
            };
            assert_eq!((status.bits(), status.is_live()), (value, live));
        }
        assert_eq!(status.write(0), Ok(Step::Reset));
    }

    #[test]
    fn every_shortcut_is_refused() {
        let at = Status;
        for (from, to) in [
            (0, 2),
            (0, 4),
            (0, 8),
            (0, 15),
            (1, 5),
            (1, 9),
            (1, 11),
            (3, 7),
            (3, 15),
        ] {
            assert_eq!(
                at(from).write(to),
                Err(OutOfOrder::Skips { from, to }),
                "{from} -> {to}"
            );
        }
        assert!(matches!(
            at(15).write(11),
            Err(OutOfOrder::TakesBack { .. })
        ));
        assert!(matches!(
            at(3).write(0x13),
            Err(OutOfOrder::UnknownBits { .. })
        ));
        assert!(matches!(
            at(0x83).write(0x8b),
            Err(OutOfOrder::AfterFailed { .. })
        ));
        assert!(matches!(at(15).write(0x80), Ok(Step::Failed(_))));
        assert_eq!(at(3).write(0x43), Ok(Step::Set(at(3))));
    }
}
