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

#[cfg(fuzzing)]
pub use control::fuzz as fuzz_control;
pub use descriptors::{DescriptorError, Descriptors};
pub use ending::Cause;

/// Runs a machine to its end. The process is confined afterwards and can do little else but exit.
pub fn run(descriptors: Descriptors) -> Ending {
    run_with(descriptors, None)
}

/// As [`run`], with another kernel command line than the model's; for tests of the monitor itself.
pub fn run_with(descriptors: Descriptors, cmdline: Option<&str>) -> Ending {
    tell_panics();
    raise_descriptor_limit();
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

/// A panic is one log line. The standard library's own report may look for files, which would kill
/// a confined process where only one device had to end.
fn tell_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(place, message, "panic");
    }));
}

/// Each stream into the guest is a descriptor: as many as the supervisor allows.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "limit of descriptors not raised");
    }
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
