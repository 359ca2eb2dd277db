//! COM1, an 8250 whose output is the console log. It takes no input: the console is for reading
//! what a guest said, everything else goes through the agent.
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

use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::console_log::ConsoleLog;

/// Why a port could not be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// No event descriptor.
    #[error("serial port: {0}")]
    Event(#[from] io::Error),
    /// The state is none of a serial port.
    #[error("serial port state cannot be restored: {0}")]
    State(String),
}

/// The interrupt line; KVM holds the other end.
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

#[derive(Debug)]
struct Output(Arc<ConsoleLog>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.0.guest_byte(byte);
        }
        Ok(bytes.len())
    }

    // Called after each character; the log knows when to write.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port.
pub struct Console {
    port: Serial<Line, NoEvents, Output>,
    line: EventFd,
}

impl Console {
    /// A port after power-on.
    pub fn new(log: Arc<ConsoleLog>) -> Result<Self, SerialError> {
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self {
            port: Serial::new(Line(line.try_clone()?), Output(log)),
            line,
        })
    }

    /// A port as it was saved. Its interrupt is raised again when one is pending.
    pub fn restore(log: Arc<ConsoleLog>, state: &State) -> Result<Self, SerialError> {
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let port = Serial::from_state(
            &state.clone().into(),
            Line(line.try_clone()?),
            NoEvents,
            Output(log),
        )
        .map_err(|error| SerialError::State(error.to_string()))?;
        Ok(Self { port, line })
    }

    /// What a snapshot keeps.
    pub fn save(&self) -> State {
        self.port.state().into()
    }

    /// The interrupt line.
    pub fn interrupt(&self) -> &EventFd {
        &self.line
    }

    /// The guest reads a register.
    pub fn read(&mut self, register: u8) -> u8 {
        self.port.read(register)
    }

    /// The guest writes a register.
    pub fn write(&mut self, register: u8, value: u8) {
        // Only the interrupt can fail, when its counter is full: then one is pending anyway.
        let _ = self.port.write(register, value);
    }
}

/// The registers of a serial port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

macro_rules! same_fields {
    ($from:ty => $to:ident) => {
        impl From<$from> for $to {
            fn from(state: $from) -> Self {
                Self {
                    baud_divisor_low: state.baud_divisor_low,
                    baud_divisor_high: state.baud_divisor_high,
                    interrupt_enable: state.interrupt_enable,
                    interrupt_identification: state.interrupt_identification,
                    line_control: state.line_control,
                    line_status: state.line_status,
                    modem_control: state.modem_control,
                    modem_status: state.modem_status,
                    scratch: state.scratch,
                    in_buffer: state.in_buffer,
                }
            }
        }
    };
}
same_fields!(SerialState => State);
same_fields!(State => SerialState);

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> Arc<ConsoleLog> {
        Arc::new(ConsoleLog::new(tempfile::tempfile().unwrap()).unwrap())
    }

    #[test]
    fn a_restored_port_goes_on_where_it_was_and_raises_its_interrupt_again() {
        let mut port = Console::new(log()).unwrap();
        port.write(7, 0x5a);
        port.write(1, 0b10); // interrupt when the transmitter is empty
        port.write(0, b'x');
        port.interrupt().read().unwrap();
        let state = port.save();
        let mut again = Console::restore(log(), &state).unwrap();
        assert_eq!(again.save(), state);
        assert_eq!(again.read(7), 0x5a);
        assert!(
            again.interrupt().read().is_ok(),
            "no interrupt after the restore"
        );
    }
}
