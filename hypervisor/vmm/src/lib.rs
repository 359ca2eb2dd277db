//! The machine monitor: one process, one virtual machine. It gets everything it works with as open
//! descriptors, confines itself before the guest's first instruction, and ends with the reason why
//! the machine ended. It knows no paths, no network and no policy.

mod acpi;
mod boot;
pub mod console_log;
mod control;
mod cpuid;
mod descriptors;
pub mod ending;
mod machine;
mod memory;
pub mod model;
pub mod platform;
mod registers;
mod seccomp;
pub mod serial;
mod vcpu;
pub mod virtio;

use std::sync::Arc;

use protocol::host::vmm::Ending;

use console_log::ConsoleLog;
use machine::Machine;

pub use descriptors::{DescriptorError, Descriptors};
pub use ending::Cause;

/// Runs a machine to its end. The process is confined afterwards and can do little else but exit.
pub fn run(descriptors: Descriptors) -> Ending {
    run_with(descriptors, None)
}

/// As [`run`], with another kernel command line than the model's; for tests of the monitor itself.
pub fn run_with(descriptors: Descriptors, cmdline: Option<&str>) -> Ending {
    let log = match descriptors.log.try_clone().and_then(ConsoleLog::new) {
        Ok(log) => Arc::new(log),
        Err(error) => {
            tracing::error!(%error, "console log cannot be used");
            return Ending::Failed;
        }
    };
    let cause = match Machine::new(descriptors, Arc::clone(&log), cmdline) {
        Ok(machine) => {
            tracing::info!("machine starts");
            machine.run()
        }
        Err(error) => Cause::Failed(error.to_string()),
    };
    log.note(&cause.to_string());
    tracing::info!(%cause, "machine ended");
    cause.ending()
}

/// The `vmm` role: takes the descriptors that the supervisor handed over and runs the machine. The
/// result is the process's exit code.
pub fn main() -> u8 {
    // SAFETY: the role was just started and has opened nothing yet.
    let ending = match unsafe { Descriptors::from_environment() } {
        Ok(descriptors) => run(descriptors),
        Err(error) => {
            tracing::error!(%error, "monitor cannot start");
            Ending::Failed
        }
    };
    ending.to_wire()
}
