//! The state in which a vCPU starts: 64-bit mode for the first, as the boot protocol wants it, and
//! the MSRs and local APIC lines that firmware would have set. Other vCPUs wait for their start-up
//! interrupt and set themselves up.

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};
use x86_64::registers::rflags::RFlags;
use x86_64::structures::gdt::DescriptorFlags;
use x86_64::structures::paging::PageTableFlags;

use crate::boot::Entry;
use crate::model;

/// Why a vCPU cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegisterError {
    /// KVM refused.
    #[error("setting a vCPU's {what}: {cause}")]
    Kvm {
        /// Which registers.
        what: &'static str,
        /// What KVM said.
        cause: kvm_ioctls::Error,
    },
    /// KVM took only some of the MSRs.
    #[error("KVM does not know MSR {0:#x}")]
    Msr(u32),
    /// The MSR list cannot be made; a defect of ours.
    #[error("MSR list too long")]
    TooManyMsrs,
    /// Guest memory refused an address; a defect of ours.
    #[error("writing boot tables: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> RegisterError {
    move |cause| RegisterError::Kvm { what, cause }
}

/// Segment selectors of the boot protocol: code 0x10, data 0x18.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

/// Writes the page tables (the first GiB, mapped to itself) and the segment table.
pub(crate) fn write_boot_tables(memory: &GuestMemoryMmap) -> Result<(), RegisterError> {
    let table = (PageTableFlags::PRESENT | PageTableFlags::WRITABLE).bits();
    let page = table | PageTableFlags::HUGE_PAGE.bits();
    memory.write_obj(
        model::PDPT_ADDRESS | table,
        GuestAddress(model::PML4_ADDRESS),
    )?;
    memory.write_obj(model::PD_ADDRESS | table, GuestAddress(model::PDPT_ADDRESS))?;
    for number in 0..512_u64 {
        let entry = number << 21 | page;
        memory.write_obj(entry, GuestAddress(model::PD_ADDRESS + number * 8))?;
    }
    let gdt = [
        0,
        0,
        DescriptorFlags::KERNEL_CODE64.bits(),
        DescriptorFlags::KERNEL_DATA.bits(),
    ];
    for (number, entry) in (0_u64..).zip(gdt) {
        memory.write_obj(entry, GuestAddress(model::GDT_ADDRESS + number * 8))?;
    }
    memory.write_obj(0_u64, GuestAddress(model::IDT_ADDRESS))?;
    Ok(())
}

/// Sets up the vCPU that boots.
pub(crate) fn set_boot_state(vcpu: &VcpuFd, entry: Entry) -> Result<(), RegisterError> {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: CODE_SELECTOR,
        type_: 0b1011, // execute, read, accessed
        present: 1,
        dpl: 0,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: 0b0011, // read, write, accessed
        db: 1,
        l: 0,
        ..code
    };
    let mut sregs = vcpu.get_sregs().map_err(kvm("segments"))?;
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        limit: 0xffff,
        type_: 0b1011, // busy task
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = model::GDT_ADDRESS;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = model::IDT_ADDRESS;
    sregs.idt.limit = 7;
    sregs.cr0 = (Cr0Flags::PROTECTED_MODE_ENABLE
        | Cr0Flags::EXTENSION_TYPE
        | Cr0Flags::NUMERIC_ERROR
        | Cr0Flags::PAGING)
        .bits();
    sregs.cr3 = model::PML4_ADDRESS;
    sregs.cr4 = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits();
    sregs.efer = (EferFlags::LONG_MODE_ENABLE | EferFlags::LONG_MODE_ACTIVE).bits();
    vcpu.set_sregs(&sregs).map_err(kvm("segments"))?;

    vcpu.set_regs(&kvm_regs {
        rip: entry.instruction,
        rsp: model::BOOT_STACK_POINTER,
        rbp: model::BOOT_STACK_POINTER,
        rsi: model::ZERO_PAGE_ADDRESS,
        rflags: RFlags::from_bits_retain(2).bits(), // bit 1 is always set
        ..Default::default()
    })
    .map_err(kvm("registers"))?;

    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })
    .map_err(kvm("floating point state"))
}

/// MSRs that firmware would have left behind, on every vCPU.
pub(crate) fn set_msrs(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    const MTRRS_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    for (index, data) in [
        (IA32_MISC_ENABLE, FAST_STRINGS),
        (IA32_MTRR_DEF_TYPE, MTRRS_ENABLED_WRITE_BACK),
    ] {
        let msrs = Msrs::from_entries(&[kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }])
        .map_err(|_| RegisterError::TooManyMsrs)?;
        if vcpu.set_msrs(&msrs).map_err(kvm("MSRs"))? != 1 {
            return Err(RegisterError::Msr(index));
        }
    }
    Ok(())
}

/// Connects the local APIC's two lines as a PC does: LINT0 to the interrupt controller, LINT1 to
/// the non-maskable interrupt.
pub(crate) fn set_local_apic(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXT_INT: u8 = 0b111;
    const NMI: u8 = 0b100;
    let mut lapic = vcpu.get_lapic().map_err(kvm("local APIC"))?;
    set_delivery_mode(&mut lapic, LVT_LINT0, EXT_INT);
    set_delivery_mode(&mut lapic, LVT_LINT1, NMI);
    vcpu.set_lapic(&lapic).map_err(kvm("local APIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u8) {
    // Bits 8 to 10 of the register are the second byte's lowest three.
    if let Some(byte) = lapic.regs.get_mut(register + 1) {
        *byte = (*byte as u8 & !0b111 | mode) as _;
    }
}
