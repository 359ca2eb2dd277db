//! Saving a device and making a fresh one what it was. A saved state is trusted no more than a
//! driver: whatever no driver could have written is refused before anything has changed.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use super::queue::QueueSetup;
use super::status::Status;
use super::{VirtioMmio, VirtioMmioState};
use crate::virtio::fault::DeviceKind;

/// A saved state that does not fit the device.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is another device's.
    #[error(
        "the saved state is not one of a {0} device; restore it into a machine of its own model"
    )]
    OtherDevice(DeviceKind),
    /// A register holds what no driver could have written.
    #[error("the saved state is damaged: {0}; start the machine afresh")]
    Damaged(String),
    /// The device is already in use.
    #[error("a {0} device can only be restored before its first use")]
    InUse(DeviceKind),
}

impl VirtioMmio {
    /// The device as data. A live device is stopped for the moment and goes on afterwards.
    /// None when its worker is gone: such a machine cannot be saved.
    pub fn save(&self) -> Option<VirtioMmioState> {
        let mut registers = self.lock();
        let live = registers.status.is_live();
        if live {
            self.pause(&mut registers, false);
        }
        let device = self.worker.save();
        let state = device.map(|device| VirtioMmioState {
            status: registers.status.bits(),
            needs_reset: self.interrupt.needs_reset(),
            interrupt_status: self.interrupt.status(),
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            queues: registers.queues.iter().map(QueueSetup::save).collect(),
            device,
        });
        if live {
            self.go_live(&mut registers);
        }
        state
    }

    /// Makes a fresh device what it was when it was saved; a live one goes on at once.
    pub fn restore(&self, state: &VirtioMmioState) -> Result<(), RestoreError> {
        let mut registers = self.lock();
        if registers.status != Status::default() {
            return Err(RestoreError::InUse(self.kind));
        }
        if state.queues.len() != registers.queues.len() {
            return Err(RestoreError::OtherDevice(self.kind));
        }
        if state.driver_features & !self.features != 0 {
            return Err(RestoreError::Damaged(format!(
                "features {:#x} were never offered",
                state.driver_features
            )));
        }
        let status = Status::saved(state.status).ok_or_else(|| {
            RestoreError::Damaged(format!("no driver sets status {:#x}", state.status))
        })?;
        let mut queues = Vec::with_capacity(state.queues.len());
        for (setup, saved) in registers.queues.iter().zip(&state.queues) {
            queues.push(
                setup
                    .restore(saved, &self.memory)
                    .map_err(|refused| RestoreError::Damaged(refused.to_string()))?,
            );
        }
        if !self.worker.restore(state.device.clone()) {
            return Err(RestoreError::OtherDevice(self.kind));
        }
        registers.status = status;
        registers.device_features_select = state.device_features_select;
        registers.driver_features_select = state.driver_features_select;
        registers.driver_features = state.driver_features;
        registers.queue_select = state.queue_select;
        registers.queues = queues;
        self.interrupt.set_status(state.interrupt_status);
        self.interrupt.set_needs_reset(state.needs_reset);
        if status.is_live() {
            self.go_live(&mut registers);
        }
        self.interrupt.repeat();
        Ok(())
    }
}
