//! A vCPU's thread: runs the guest, answers its exits, tells why it ended. It is stopped from
//! outside by a signal that makes the next KVM_RUN return at once. Whatever a guest does here ends
//! at worst its own machine.
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

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::console_log::ConsoleLog;
use crate::ending::{Cause, Teller, panic_message};
use crate::platform::Platform;
use crate::seccomp;

/// Why a vCPU's thread cannot be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VcpuError {
    /// No signal handler.
    #[error("installing the handler that stops vCPUs: {0}")]
    Handler(vmm_sys_util::errno::Error),
    /// No thread.
    #[error("starting a vCPU's thread: {0}")]
    Thread(io::Error),
}

thread_local! {
    /// The byte in the page shared with KVM that makes this thread's vCPU return; null while there
    /// is none.
    static RETURN: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let now = RETURN.get();
    if !now.is_null() {
        // SAFETY: the page is mapped as long as the pointer is set, which only this thread changes.
        unsafe { now.write_volatile(1) };
    }
}

/// A thread's stack: its loop is flat, devices have threads of their own.
const STACK: usize = 256 << 10;

/// The threads of a machine.
pub(crate) struct Vcpus {
    stop: Arc<AtomicBool>,
    threads: Vec<Thread>,
}

struct Thread {
    /// Set before the thread waits at the gate.
    id: Arc<OnceLock<libc::pid_t>>,
    handle: JoinHandle<()>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; they wait at `gate` before the first instruction.
    pub(crate) fn start(
        vcpus: Vec<VcpuFd>,
        platform: &Arc<Platform>,
        teller: &Teller,
        log: &Arc<ConsoleLog>,
        gate: &Arc<Barrier>,
    ) -> Result<Self, VcpuError> {
        register_signal_handler(SIGRTMIN(), interrupt).map_err(VcpuError::Handler)?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (number, mut vcpu) in vcpus.into_iter().enumerate() {
            let (platform, teller) = (Arc::clone(platform), teller.clone());
            let (gate, stop) = (Arc::clone(gate), Arc::clone(&stop));
            let log = Arc::clone(log);
            let id = Arc::new(OnceLock::new());
            let own_id = Arc::clone(&id);
            let handle = std::thread::Builder::new()
                .name(format!("vcpu{number}"))
                .stack_size(STACK)
                .spawn(move || {
                    // SAFETY: takes nothing, changes nothing.
                    own_id.get_or_init(|| unsafe { libc::gettid() });
                    gate.wait();
                    let end = catch_unwind(AssertUnwindSafe(|| {
                        seccomp::confine_vcpu()
                            .map_err(|error| Cause::Failed(error.to_string()))
                            .err()
                            .or_else(|| run(&mut vcpu, &platform, &log, &stop))
                    }));
                    RETURN.set(ptr::null_mut());
                    let cause = end.unwrap_or_else(|panic| {
                        let message = panic_message(&*panic);
                        Some(Cause::Failed(format!("vCPU {number} panicked: {message}")))
                    });
                    if let Some(cause) = cause {
                        teller.tell(cause);
                    }
                })
                .map_err(VcpuError::Thread)?;
            threads.push(Thread { id, handle });
        }
        Ok(Self { stop, threads })
    }

    /// Stops every vCPU and waits until they stand.
    pub(crate) fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        let process = libc::pid_t::try_from(std::process::id()).unwrap_or(0);
        for id in self.threads.iter().filter_map(|thread| thread.id.get()) {
            // Not pthread_kill, which may use a system call that a monitor is refused. A thread that
            // has ended meanwhile is no thread of this process any more, and nobody is signalled.
            // SAFETY: plain numbers; the signal has a handler since before the thread began.
            unsafe { libc::syscall(libc::SYS_tgkill, process, *id, SIGRTMIN()) };
        }
        for thread in self.threads {
            // A panic was caught and told inside.
            let _ = thread.handle.join();
        }
    }
}

/// Runs the guest until the machine is stopped (none) or ends.
fn run(
    vcpu: &mut VcpuFd,
    platform: &Platform,
    log: &ConsoleLog,
    stop: &AtomicBool,
) -> Option<Cause> {
    RETURN.set(&raw mut vcpu.get_kvm_run().immediate_exit);
    loop {
        // Looked at after the signal's pointer is set: a stop comes either before this, and is
        // seen, or after it, and makes the next run return at once.
        if stop.load(Ordering::SeqCst) {
            return None;
        }
        let end = match vcpu.run() {
            Ok(exit) => handle(exit, platform),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                vcpu.set_kvm_immediate_exit(0);
                None
            }
            Err(error) => Some(Cause::Failed(format!("KVM_RUN: {error}"))),
        };
        if let Some(cause) = end {
            if matches!(cause, Cause::Failed(_) | Cause::TripleFault) {
                log_registers(vcpu, log);
            }
            return Some(cause);
        }
    }
}

/// Answers one exit; a cause if it was the last.
fn handle(exit: VcpuExit<'_>, platform: &Platform) -> Option<Cause> {
    match exit {
        VcpuExit::IoOut(port, data) => return platform.port_write(port, data),
        VcpuExit::IoIn(port, data) => platform.port_read(port, data),
        VcpuExit::MmioWrite(address, data) => platform.memory_write(address, data),
        VcpuExit::MmioRead(address, data) => platform.memory_read(address, data),
        VcpuExit::Shutdown => return Some(Cause::TripleFault),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        VcpuExit::SystemEvent(kind, _) => return Some(system_event(kind)),
        VcpuExit::FailEntry(reason, cpu) => {
            return Some(Cause::Failed(format!(
                "the processor refused the guest's state: reason {reason:#x} on CPU {cpu}"
            )));
        }
        VcpuExit::InternalError => {
            return Some(Cause::Failed("KVM_EXIT_INTERNAL_ERROR".to_owned()));
        }
        other => return Some(Cause::Failed(format!("unexpected exit: {other:?}"))),
    }
    None
}

fn system_event(kind: u32) -> Cause {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Cause::PoweredOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => Cause::Reset,
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => Cause::GuestPanic,
        other => Cause::Failed(format!("unexpected system event {other}")),
    }
}

/// For the machine's owner and for the host's log: once per vCPU, because the machine ends with it.
fn log_registers(vcpu: &VcpuFd, log: &ConsoleLog) {
    if let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) {
        let text = format!(
            "rip={:#x} rsp={:#x} rflags={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
            regs.rip, regs.rsp, regs.rflags, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer
        );
        log.note(&format!("vCPU cannot go on: {text}"));
        tracing::error!(registers = text, "vCPU cannot go on");
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::model;
    use crate::serial::Console;

    fn log() -> Arc<ConsoleLog> {
        Arc::new(ConsoleLog::new(tempfile::tempfile().unwrap()).unwrap())
    }

    fn platform() -> Platform {
        Platform::new(Console::new(log()).unwrap(), Vec::new())
    }

    #[test]
    fn each_exit_that_ends_a_machine_has_its_reason() {
        let platform = platform();
        let s5 = [5 << 2 | 1 << 5];
        let cases = [
            (
                VcpuExit::IoOut(model::SLEEP_CONTROL_PORT, &s5),
                Some(Cause::PoweredOff),
            ),
            (VcpuExit::IoOut(model::RESET_PORT, &[1]), Some(Cause::Reset)),
            (
                VcpuExit::IoOut(model::PVPANIC_PORT, &[1]),
                Some(Cause::GuestPanic),
            ),
            (VcpuExit::Shutdown, Some(Cause::TripleFault)),
            (VcpuExit::IoOut(model::COM1_PORT, b"x"), None),
            (VcpuExit::MmioWrite(0xdead_0000, &[0; 4]), None),
        ];
        for (exit, expected) in cases {
            let name = format!("{exit:?}");
            assert_eq!(handle(exit, &platform), expected, "{name}");
        }
        for exit in [
            VcpuExit::InternalError,
            VcpuExit::FailEntry(1, 0),
            VcpuExit::Hlt,
        ] {
            let name = format!("{exit:?}");
            assert!(
                matches!(handle(exit, &platform), Some(Cause::Failed(_))),
                "{name}"
            );
        }
    }

    /// A virtual machine of one page with this real-mode code at 0x1000.
    fn tiny_guest(code: &[u8]) -> Option<(kvm_ioctls::VmFd, GuestMemoryMmap, VcpuFd)> {
        let vm = match kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm()) {
            Ok(vm) => vm,
            Err(error) => {
                println!("SKIPPED: /dev/kvm cannot be used here: {error}");
                return None;
            }
        };
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        memory.write_slice(code, GuestAddress(0x1000)).unwrap();
        crate::memory::give_to_kvm(&vm, &memory).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        regs.rip = 0x1000;
        regs.rflags = 2;
        vcpu.set_regs(&regs).unwrap();
        Some((vm, memory, vcpu))
    }

    fn start(vcpu: VcpuFd, teller: &Teller, gate: &Arc<Barrier>) -> Vcpus {
        Vcpus::start(vec![vcpu], &Arc::new(platform()), teller, &log(), gate).unwrap()
    }

    #[test]
    fn a_vcpu_that_never_exits_can_be_stopped() {
        let Some((_vm, _memory, vcpu)) = tiny_guest(&[0xeb, 0xfe]) else {
            return;
        };
        let (teller, told) = crate::ending::teller().unwrap();
        let gate = Arc::new(Barrier::new(2));
        let vcpus = start(vcpu, &teller, &gate);
        gate.wait();
        vcpus.stop();
        assert_eq!(told.cause(), None);
    }

    #[test]
    fn a_guests_last_port_write_reaches_the_main_thread() {
        // mov dx, 0x602; mov al, 1; out dx, al
        let Some((_vm, _memory, vcpu)) = tiny_guest(&[0xba, 0x02, 0x06, 0xb0, 0x01, 0xee]) else {
            return;
        };
        let (teller, told) = crate::ending::teller().unwrap();
        let gate = Arc::new(Barrier::new(2));
        let vcpus = start(vcpu, &teller, &gate);
        gate.wait();
        let mut waiting = [nix::poll::PollFd::new(
            // SAFETY: the event lives to the end of the test.
            unsafe { std::os::fd::BorrowedFd::borrow_raw(told.event().as_raw_fd()) },
            nix::poll::PollFlags::POLLIN,
        )];
        assert_eq!(nix::poll::poll(&mut waiting, 30_000_u16).unwrap(), 1);
        assert_eq!(told.cause(), Some(Cause::Reset));
        vcpus.stop();
    }
}
