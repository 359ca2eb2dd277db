//! What the guest reaches through ports and through memory that is not RAM: the console, pvpanic,
//! ACPI's sleep and reset registers, the virtio windows. Every access is a guest's: unknown
//! addresses read as ones and swallow writes, and no access may fail or block.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::ending::Cause;
use crate::model;
use crate::serial::Console;
use crate::virtio::{VirtioMmio, VirtioMmioState};

/// ACPI: "go to sleep" in the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;
/// pvpanic: the guest panicked and nobody will handle it.
const PANICKED: u8 = 1;

/// All of them.
pub struct Platform {
    console: Mutex<Console>,
    virtio: Vec<(usize, VirtioMmio)>,
}

impl Platform {
    /// With virtio devices by slot.
    pub fn new(console: Console, virtio: Vec<(usize, VirtioMmio)>) -> Self {
        Self {
            console: Mutex::new(console),
            virtio,
        }
    }

    /// Writes to a port. Some writes end the machine.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<Cause> {
        let &value = data.first()?;
        match port {
            model::COM1_PORT..=COM1_LAST => {
                let register = port.wrapping_sub(model::COM1_PORT) as u8;
                let mut console = self.console();
                // A string write (outsb) brings many bytes at once.
                for &byte in data {
                    console.write(register, byte);
                }
                None
            }
            model::SLEEP_CONTROL_PORT => {
                let sleep_type = (value >> 2) & 7;
                (value & SLEEP_ENABLE != 0 && sleep_type == model::S5_SLEEP_TYPE)
                    .then_some(Cause::PoweredOff)
            }
            model::RESET_PORT => (value == model::RESET_VALUE).then_some(Cause::Reset),
            model::PVPANIC_PORT => (value & PANICKED != 0).then_some(Cause::GuestPanic),
            _ => None,
        }
    }

    /// Reads from a port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match port {
            model::COM1_PORT..=COM1_LAST => {
                let register = port.wrapping_sub(model::COM1_PORT) as u8;
                let mut console = self.console();
                data.fill_with(|| console.read(register));
            }
            // No wake-up is pending; a panic is the one event we know.
            model::SLEEP_CONTROL_PORT | model::SLEEP_STATUS_PORT | model::RESET_PORT => {
                data.fill(0);
            }
            model::PVPANIC_PORT => data.fill(PANICKED),
            _ => data.fill(0xff),
        }
    }

    /// Writes to memory that is not RAM.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.window(address) {
            device.write(offset, data);
        }
    }

    /// Reads from memory that is not RAM.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.window(address) {
            device.read(offset, data);
        }
    }

    fn window(&self, address: u64) -> Option<(&VirtioMmio, u64)> {
        let offset = address.checked_sub(model::VIRTIO_MMIO_ADDRESS)?;
        let slot = usize::try_from(offset / model::VIRTIO_MMIO_SIZE).ok()?;
        let (_, device) = self.virtio.iter().find(|(number, _)| *number == slot)?;
        Some((device, offset % model::VIRTIO_MMIO_SIZE))
    }

    /// Ends every device: I/O in flight is finished and written through.
    pub fn shut_down(&self) {
        for (_, device) in &self.virtio {
            device.shut_down();
        }
    }

    /// What drivers wrote in vain, for the machine's owner to read.
    pub fn complaints(&self) -> Vec<String> {
        self.virtio
            .iter()
            .filter_map(|(_, device)| {
                Some(format!("{}: {}", device.kind(), device.last_refusal()?))
            })
            .collect()
    }

    /// What a snapshot keeps of all devices. None when one of them is dead.
    pub fn save(&self) -> Option<State> {
        let virtio = self
            .virtio
            .iter()
            .map(|(slot, device)| Some((*slot, device.save()?)))
            .collect::<Option<_>>()?;
        Some(State {
            console: self.console().save(),
            virtio,
        })
    }

    fn console(&self) -> MutexGuard<'_, Console> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The devices of a machine as data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// COM1.
    pub console: crate::serial::State,
    /// virtio devices by slot.
    pub virtio: Vec<(usize, VirtioMmioState)>,
}

const COM1_LAST: u16 = model::COM1_PORT + model::COM1_PORTS - 1;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::console_log::ConsoleLog;

    fn platform() -> Platform {
        let log = ConsoleLog::new(tempfile::tempfile().unwrap()).unwrap();
        Platform::new(Console::new(Arc::new(log)).unwrap(), Vec::new())
    }

    #[test]
    fn sleeping_in_s5_powers_off_and_nothing_else_does() {
        let platform = platform();
        assert_eq!(
            platform.port_write(model::SLEEP_CONTROL_PORT, &[5 << 2 | 1 << 5]),
            Some(Cause::PoweredOff)
        );
        assert_eq!(
            platform.port_write(model::SLEEP_CONTROL_PORT, &[5 << 2]),
            None
        );
        assert_eq!(
            platform.port_write(model::SLEEP_CONTROL_PORT, &[3 << 2 | 1 << 5]),
            None
        );
        assert_eq!(platform.port_write(model::SLEEP_STATUS_PORT, &[0x80]), None);
    }

    #[test]
    fn the_reset_register_resets() {
        let platform = platform();
        assert_eq!(
            platform.port_write(model::RESET_PORT, &[1]),
            Some(Cause::Reset)
        );
        assert_eq!(platform.port_write(model::RESET_PORT, &[0]), None);
    }

    #[test]
    fn pvpanic_tells_a_panic_but_not_a_handled_crash() {
        let platform = platform();
        let mut events = [0];
        platform.port_read(model::PVPANIC_PORT, &mut events);
        assert_eq!(events, [PANICKED]);
        assert_eq!(
            platform.port_write(model::PVPANIC_PORT, &[1]),
            Some(Cause::GuestPanic)
        );
        assert_eq!(platform.port_write(model::PVPANIC_PORT, &[2]), None);
    }

    #[test]
    fn what_is_nowhere_reads_as_ones_and_swallows_writes() {
        let platform = platform();
        let mut data = [0; 4];
        platform.port_read(0x64, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(platform.port_write(0x64, &[0xfe]), None);
        assert_eq!(platform.port_write(model::RESET_PORT, &[]), None);
        data.fill(0);
        platform.memory_read(model::VIRTIO_MMIO_ADDRESS, &mut data);
        assert_eq!(data, [0xff; 4]);
        platform.memory_write(u64::MAX, &[1]);
        platform.memory_write(0, &[1]);
    }
}
