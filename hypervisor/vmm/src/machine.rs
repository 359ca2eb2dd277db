//! A whole machine: made from its descriptors, run until it ends, taken apart in order. This is the
//! main thread; it waits for control, for the vsock device and for the machine's end, and does no
//! work of the guest's.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Barrier};

use kvm_bindings::{KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use protocol::host::vmm::VmmConfig;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::console_log::ConsoleLog;
use crate::control::{Control, HostEnds, Next};
use crate::descriptors::Descriptors;
use crate::ending::{Cause, Told, panic_message, teller};
use crate::model::{self, MachineModel};
use crate::platform::Platform;
use crate::serial::Console;
use crate::vcpu::Vcpus;
use crate::virtio::block::{FileBackend, block};
use crate::virtio::net::net;
use crate::virtio::rng::rng;
use crate::virtio::vsock::{VsockEventReceiver, VsockEvents, vsock};
use crate::virtio::{FaultSink, VirtioMmio};
use crate::{acpi, boot, cpuid, memory, registers, seccomp, vcpu};

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// The configuration cannot be read.
    #[error("reading the machine's configuration: {0}")]
    Config(io::Error),
    /// It is no configuration.
    #[error("the machine's configuration is malformed: {0}")]
    Malformed(postcard::Error),
    /// The model's number.
    #[error("machine model {0} is unknown to this build; it knows 1")]
    Model(u32),
    /// The number of vCPUs.
    #[error("{0} vCPUs; a machine has 1 to {max}", max = model::MAX_CPUS)]
    Cpus(u16),
    /// KVM refused something.
    #[error("{what}: {cause}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// What it said.
        cause: kvm_ioctls::Error,
    },
    /// The kernel refused something else.
    #[error("{what}: {cause}")]
    System {
        /// What was asked.
        what: &'static str,
        /// What it said.
        cause: io::Error,
    },
    /// Interrupt routes; a defect of ours.
    #[error("interrupt routing table too long")]
    Routes,
    /// See there.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    /// See there.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// See there.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// See there.
    #[error(transparent)]
    Cpuid(#[from] cpuid::CpuidError),
    /// See there.
    #[error(transparent)]
    Registers(#[from] registers::RegisterError),
    /// See there.
    #[error(transparent)]
    Serial(#[from] crate::serial::SerialError),
    /// See there.
    #[error(transparent)]
    Vcpu(#[from] vcpu::VcpuError),
    /// See there.
    #[error(transparent)]
    Seccomp(#[from] seccomp::SeccompError),
    /// Guest memory refused an address; a defect of ours.
    #[error("writing the VM generation: {0}")]
    GenerationPage(#[from] vm_memory::GuestMemoryError),
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |cause| MachineError::Kvm { what, cause }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |cause| MachineError::System { what, cause }
}

/// A machine that is about to run.
pub(crate) struct Machine {
    platform: Arc<Platform>,
    control: Control<HostEnds>,
    vsock_events: VsockEventReceiver,
    told: Told,
    vcpus: Vcpus,
    gate: Arc<Barrier>,
    log: Arc<ConsoleLog>,
    epoll: Epoll,
    // Dropped after the vCPUs have stopped.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
    _generation_changed: EventFd,
}

impl Machine {
    /// Makes the machine; its vCPUs wait. `cmdline` replaces the model's kernel command line where
    /// a test needs another.
    pub(crate) fn new(
        descriptors: Descriptors,
        log: Arc<ConsoleLog>,
        cmdline: Option<&str>,
    ) -> Result<Self, MachineError> {
        let config = read_config(&descriptors.config)?;
        MachineModel::from_number(config.model).ok_or(MachineError::Model(config.model))?;
        if !(1..=model::MAX_CPUS).contains(&config.cpus) {
            return Err(MachineError::Cpus(config.cpus));
        }
        // SAFETY: the descriptor was handed over as /dev/kvm and belongs to nobody else.
        let kvm_device = unsafe { Kvm::from_raw_fd(descriptors.kvm.into_raw_fd()) };
        let memory = memory::map(descriptors.memory, config.memory_mib)?;
        let vm = create_vm(&kvm_device)?;
        memory::give_to_kvm(&vm, &memory)?;

        let (teller, told) = teller().map_err(system("making an event"))?;
        let faults = {
            let (teller, log) = (teller.clone(), Arc::clone(&log));
            FaultSink::new(move |fault| {
                if fault.reason.is_fatal() {
                    teller.tell(Cause::DeviceFault(fault.to_string()));
                } else {
                    log.note(&format!("device needs a reset: {fault}"));
                }
            })
        };
        let device = |what| system(what);
        let disk = Box::new(FileBackend::new(descriptors.disk));
        let disk =
            block(memory.clone(), disk, faults.clone()).map_err(device("making the disk"))?;
        let random =
            rng(memory.clone(), faults.clone()).map_err(device("making the entropy device"))?;
        let (events, vsock_events) = VsockEvents::channel().map_err(system("making an event"))?;
        let (sockets, vsock_host) = vsock(memory.clone(), model::GUEST_CID, faults.clone(), events)
            .map_err(device("making the vsock device"))?;
        let (network, net_host) = net(memory.clone(), model::GUEST_MAC, model::GUEST_MTU, faults)
            .map_err(device("making the network device"))?;
        let ends = HostEnds {
            vsock: vsock_host,
            net: net_host,
        };
        let virtio = vec![
            (model::SLOT_BLOCK, disk),
            (model::SLOT_VSOCK, sockets),
            (model::SLOT_RNG, random),
            (model::SLOT_NET, network),
        ];
        let slots: Vec<usize> = virtio.iter().map(|(slot, _)| *slot).collect();
        let console = Console::new(Arc::clone(&log))?;
        vm.register_irqfd(console.interrupt(), model::COM1_GSI)
            .map_err(kvm("connecting COM1's interrupt"))?;
        for (slot, device) in &virtio {
            connect_virtio(&vm, *slot, device)?;
        }
        let generation_changed = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(system("making an event"))?;
        vm.register_irqfd(&generation_changed, model::GED_GSI)
            .map_err(kvm("connecting the generation's interrupt"))?;
        let platform = Arc::new(Platform::new(console, virtio));

        let seed: [u8; 32] = random_bytes().map_err(system("getting randomness"))?;
        let generation: [u8; 16] = random_bytes().map_err(system("getting randomness"))?;
        memory.write_slice(&generation, GuestAddress(model::VMGENID_ADDRESS))?;
        let rsdp = acpi::write(&memory, config.cpus, &slots)?;
        registers::write_boot_tables(&memory)?;
        let entry = boot::load(
            &memory,
            &descriptors.kernel,
            &descriptors.initramfs,
            cmdline.unwrap_or(model::CMDLINE),
            rsdp,
            &seed,
        )?;
        let vcpus = create_vcpus(&kvm_device, &vm, config.cpus, entry)?;
        let gate = Arc::new(Barrier::new(vcpus.len().saturating_add(1)));
        let vcpus = Vcpus::start(vcpus, &platform, &teller, &log, &gate)?;
        let control = Control::new(descriptors.listen, config.run, config.model, ends)
            .map_err(system("preparing the control socket"))?;
        Ok(Self {
            platform,
            control,
            vsock_events,
            told,
            vcpus,
            gate,
            log,
            epoll: Epoll::new().map_err(system("making an epoll descriptor"))?,
            _vm: vm,
            _memory: memory,
            _generation_changed: generation_changed,
        })
    }

    /// Lets the guest run until the machine ends. Everything it wrote is on stable storage then.
    pub(crate) fn run(self) -> Cause {
        let Self {
            platform,
            mut control,
            vsock_events,
            told,
            vcpus,
            gate,
            log,
            epoll,
            _vm,
            _memory,
            _generation_changed,
        } = self;
        let confined = seccomp::confine_process();
        let cause = match &confined {
            Ok(()) => {
                gate.wait();
                let serving = || serve(&epoll, &mut control, &vsock_events, &told, &log);
                // Whatever happens here, the disk is synced and the end has a reason.
                match catch_unwind(AssertUnwindSafe(serving)) {
                    Ok(Ok(cause)) => cause,
                    Ok(Err(error)) => Cause::Failed(format!("waiting for events: {error}")),
                    Err(panic) => {
                        Cause::Failed(format!("the monitor panicked: {}", panic_message(&*panic)))
                    }
                }
            }
            Err(error) => {
                // The vCPUs still wait and never run; the process ends with them.
                return Cause::Failed(error.to_string());
            }
        };
        vcpus.stop();
        platform.shut_down();
        log.flush();
        for complaint in platform.complaints() {
            log.note(&complaint);
        }
        cause
    }
}

fn read_config(file: &File) -> Result<VmmConfig, MachineError> {
    /// A configuration is a few dozen bytes.
    const LONGEST: usize = 4096;
    let mut bytes = vec![0; LONGEST];
    let mut length = 0;
    while let Some(rest) = bytes.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match file
            .read_at(rest, length as u64)
            .map_err(MachineError::Config)?
        {
            0 => break,
            count => length = length.saturating_add(count),
        }
    }
    bytes.truncate(length);
    postcard::from_bytes(&bytes).map_err(MachineError::Malformed)
}

fn create_vm(device: &Kvm) -> Result<VmFd, MachineError> {
    let vm = device.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
    vm.set_identity_map_address(model::IDENTITY_MAP_ADDRESS)
        .map_err(kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(model::TSS_ADDRESS)
        .map_err(kvm("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
    // Every GSI goes to the I/O APIC only. Nothing is connected to the old interrupt controller,
    // which a guest without legacy devices never masks.
    let routes: Vec<kvm_irq_routing_entry> = (0..model::IO_APIC_PINS)
        .map(|pin| {
            let mut entry = kvm_irq_routing_entry {
                gsi: pin,
                type_: kvm_bindings::KVM_IRQ_ROUTING_IRQCHIP,
                ..Default::default()
            };
            entry.u.irqchip.irqchip = kvm_bindings::KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = pin;
            entry
        })
        .collect();
    let routes = KvmIrqRouting::from_entries(&routes).map_err(|_| MachineError::Routes)?;
    vm.set_gsi_routing(&routes)
        .map_err(kvm("KVM_SET_GSI_ROUTING"))?;
    Ok(vm)
}

fn connect_virtio(vm: &VmFd, slot: usize, device: &VirtioMmio) -> Result<(), MachineError> {
    /// virtio-mmio: the register to which a driver writes the index of a queue with work.
    const QUEUE_NOTIFY: u64 = 0x50;
    let window = model::VIRTIO_MMIO_ADDRESS + slot as u64 * model::VIRTIO_MMIO_SIZE;
    let register = IoEventAddress::Mmio(window + QUEUE_NOTIFY);
    for (index, event) in (0_u32..).zip(device.queue_notifiers()) {
        vm.register_ioevent(event, &register, index)
            .map_err(kvm("connecting a virtio queue"))?;
    }
    vm.register_irqfd(device.interrupt(), model::VIRTIO_GSI + slot as u32)
        .map_err(kvm("connecting a virtio interrupt"))
}

fn create_vcpus(
    device: &Kvm,
    vm: &VmFd,
    cpus: u16,
    entry: boot::Entry,
) -> Result<Vec<VcpuFd>, MachineError> {
    let supported = cpuid::supported(device)?;
    let mut vcpus = Vec::new();
    for number in 0..cpus {
        let vcpu = vm
            .create_vcpu(u64::from(number))
            .map_err(kvm("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(&cpuid::table(&supported, number, cpus)?)
            .map_err(kvm("KVM_SET_CPUID2"))?;
        registers::set_msrs(&vcpu)?;
        registers::set_local_apic(&vcpu)?;
        if number == 0 {
            registers::set_boot_state(&vcpu, entry)?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

fn random_bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut rest: &mut [u8] = &mut bytes;
    while !rest.is_empty() {
        // SAFETY: writes at most the slice's length into it.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        rest = rest.get_mut(count..).unwrap_or_default();
    }
    Ok(bytes)
}

const LISTEN: u64 = 0;
const CONNECTION: u64 = 1;
const VSOCK: u64 = 2;
const END: u64 = 3;
const LOG: u64 = 4;

/// Waits for events until the machine has a reason to end.
fn serve(
    epoll: &Epoll,
    control: &mut Control<HostEnds>,
    vsock_events: &VsockEventReceiver,
    told: &Told,
    log: &ConsoleLog,
) -> io::Result<Cause> {
    let add = |fd: BorrowedFd<'_>, token| {
        let event = EpollEvent::new(EventSet::IN, token);
        epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    };
    add(control.listen(), LISTEN)?;
    let event = |event: &EventFd, token| {
        let wanted = EpollEvent::new(EventSet::IN, token);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), wanted)
    };
    event(vsock_events.event(), VSOCK)?;
    event(told.event(), END)?;
    add(log.flush_due(), LOG)?;
    let mut ready = [EpollEvent::default(); 8];
    loop {
        let count = match epoll.wait(-1, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        for event in ready.iter().take(count) {
            match event.data() {
                LISTEN => {
                    if control.accept()
                        && let Some(connection) = control.connection()
                    {
                        add(connection, CONNECTION)?;
                    }
                }
                CONNECTION => {
                    if control.serve() == Next::SwitchOff {
                        return Ok(Cause::SwitchedOff);
                    }
                }
                VSOCK => {
                    for event in vsock_events.take() {
                        control.vsock(event);
                    }
                }
                LOG => log.flush(),
                _ => {
                    if let Some(cause) = told.cause() {
                        return Ok(cause);
                    }
                }
            }
        }
    }
}
