//! A device's line to its driver: the interrupt status bits, the edge-triggered event that carries
//! them, and whether the device asks to be reset. Shared by the transport (vCPU threads) and the
//! device's worker, so it must never take a lock that either holds while waiting for the other.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::fault::{Broken, DeviceFault, DeviceKind, FaultSink};
use super::limit::LogLimit;

const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// See the module.
#[derive(Debug)]
pub(super) struct Interrupt {
    kind: DeviceKind,
    status: AtomicU32,
    needs_reset: AtomicBool,
    event: EventFd,
    faults: FaultSink,
    reason: Mutex<Option<Broken>>,
    limit: LogLimit,
}

impl Interrupt {
    pub(super) fn new(kind: DeviceKind, faults: FaultSink) -> io::Result<Self> {
        Ok(Self {
            kind,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            faults,
            reason: Mutex::new(None),
            limit: LogLimit::new(),
        })
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::Release);
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(super) fn used_buffers(&self) {
        self.raise(USED_BUFFER);
    }

    /// Raises the interrupt again for whatever the status still holds (after a restore).
    pub(super) fn repeat(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        // The counter can only be full when 2^64-2 edges wait unseen: the next reader sees one.
        let _ = self.event.write(1);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn last_reason(&self) -> Option<Broken> {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The device stops until it is reset. The machine hears of it, of a driver that breaks its
    /// device again and again as often as the log does.
    pub(super) fn break_device(&self, reason: Broken) {
        let allowed = self.limit.allow();
        if let Some(suppressed) = allowed {
            tracing::warn!(device = %self.kind, %reason, suppressed, "device needs a reset");
        }
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.clone());
        if allowed.is_some() || reason.is_fatal() {
            self.faults.report(DeviceFault {
                device: self.kind,
                reason,
            });
        }
        self.needs_reset.store(true, Ordering::Release);
        self.raise(CONFIG_CHANGE);
    }

    /// Back to the state after power-on; the last reason stays readable.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    pub(super) fn set_needs_reset(&self, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::Release);
    }
}
