//! Machine models: every number that a guest can see and that must be the same on every host and
//! in every later version. A released model never changes; a different machine is a new model.
//! Nothing here may depend on the host, the settings or the VM.

/// The machine that every VM sees, by number. The number is in the VM's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineModel {
    /// The first one.
    One,
}

impl MachineModel {
    /// The model with this number, if this build knows it.
    pub fn from_number(number: u32) -> Option<Self> {
        (number == 1).then_some(Self::One)
    }

    /// Its number in records and messages.
    pub fn number(self) -> u32 {
        match self {
            Self::One => 1,
        }
    }
}

/// Least guest memory: a kernel with its initramfs does not start reliably in less.
pub const MIN_MEMORY_MIB: u32 = 128;
/// Most guest memory, 1 TiB: what fits under 40 physical address bits, which every host has.
pub const MAX_MEMORY_MIB: u32 = 1 << 20;
/// Most vCPUs: the local APIC's eight-bit identifiers reach 254, far beyond what one VM needs.
pub const MAX_CPUS: u16 = 64;

/// End of the memory below 4 GiB; device windows, I/O APIC and local APIC follow. 1 GiB of hole
/// leaves room for PCI, should a later model have it.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where memory goes on above the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Boot information: the GDT, out of the way of everything Linux touches early.
pub const GDT_ADDRESS: u64 = 0x500;
/// Boot information: the interrupt descriptor table, empty.
pub const IDT_ADDRESS: u64 = 0x520;
/// Boot information: Linux's "zero page".
pub const ZERO_PAGE_ADDRESS: u64 = 0x7000;
/// Boot information: initial stack pointer (grows down, below the page tables).
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// Boot information: page map level 4.
pub const PML4_ADDRESS: u64 = 0x9000;
/// Boot information: page directory pointers.
pub const PDPT_ADDRESS: u64 = 0xa000;
/// Boot information: page directory, 512 pages of 2 MiB.
pub const PD_ADDRESS: u64 = 0xb000;
/// Boot information: the random seed that Linux takes as `SETUP_RNG_SEED`.
pub const SEED_ADDRESS: u64 = 0xc000;
/// Boot information: the kernel's command line.
pub const CMDLINE_ADDRESS: u64 = 0x2_0000;
/// Longest command line, final zero included: what Linux accepts.
pub const CMDLINE_CAPACITY: usize = 2048;
/// End of conventional memory, as on a PC.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// ACPI tables, where a PC's firmware has them; not RAM in the memory map.
pub const ACPI_ADDRESS: u64 = 0xe_0000;
/// Bytes for ACPI tables; the VM generation page follows.
pub const ACPI_SIZE: u64 = 0x1_f000;
/// The page with the VM generation identifier (at its offset 0).
pub const VMGENID_ADDRESS: u64 = 0xf_f000;
/// Where the kernel may begin: the end of the first MiB.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// First virtio-mmio window.
pub const VIRTIO_MMIO_ADDRESS: u64 = 0xd000_0000;
/// Bytes of each virtio-mmio window; one page, so that each can be mapped alone.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Windows there are (slots).
pub const VIRTIO_SLOTS: usize = 15;
/// GSI of the first virtio slot; the next slot has the next one. There are no legacy devices, so
/// 8 to 22 are free of meaning.
pub const VIRTIO_GSI: u32 = 8;
/// virtio slot of the disk.
pub const SLOT_BLOCK: usize = 0;
/// virtio slot of the vsock device.
pub const SLOT_VSOCK: usize = 1;
/// virtio slot of the entropy device.
pub const SLOT_RNG: usize = 2;
/// virtio slot of the network device.
pub const SLOT_NET: usize = 3;
/// virtio slot kept for the balloon.
pub const SLOT_BALLOON: usize = 4;

/// Address of the I/O APIC, as KVM has it.
pub const IO_APIC_ADDRESS: u32 = 0xfec0_0000;
/// Pins of KVM's I/O APIC, and so GSIs.
pub const IO_APIC_PINS: u32 = 24;
/// Address of the local APICs, as KVM has it.
pub const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel without unrestricted guest; in the hole, never RAM.
pub const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page that KVM needs there for an identity map.
pub const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// First port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Ports of COM1.
pub const COM1_PORTS: u16 = 8;
/// GSI of COM1, as on a PC.
pub const COM1_GSI: u32 = 4;
/// Port of pvpanic, as QEMU has it.
pub const PVPANIC_PORT: u16 = 0x505;
/// Port of ACPI's sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Port of ACPI's sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Port of ACPI's reset register.
pub const RESET_PORT: u16 = 0x602;
/// What the guest writes to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5 in [`SLEEP_CONTROL_PORT`].
pub const S5_SLEEP_TYPE: u8 = 5;
/// GSI of the generic event device, the last pin, behind the virtio slots.
pub const GED_GSI: u32 = 23;

/// The guest's vsock address.
pub const GUEST_CID: u64 = 3;

/// The guest's Ethernet address. Each VM has a network of its own, so that all can have the same.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x73, 0x75, 0x70, 0x00, 0x02];
/// Largest IP packet of the guest's network: a multiple of 16 below 64 KiB.
pub const GUEST_MTU: u16 = 65_520;

/// The kernel's command line. `quiet`: each character on the console is an exit. `8250.nr_uarts`:
/// there is one port. `pci=off`: there is no PCI to look for. `reboot=a`: through the ACPI reset register, trying nothing else first.
/// `panic=-1`: a panic ends at once, after pvpanic was told. `cryptomgr.notests`, `no_timer_check`:
/// self-tests of a machine that has none of the defects they look for.
pub const CMDLINE: &str = "console=ttyS0 quiet pci=off reboot=a panic=-1 8250.nr_uarts=1 no_timer_check \
     cryptomgr.notests tsc=reliable";

/// Paravirtual features of KVM that the guest is told of: what changes nothing in the guest's view
/// over a snapshot. clocksource (0), no I/O delay (1), clocksource2 (3), steal time (5), PV EOI
/// (6), PV unhalt (7), TLB flush (9), send IPI (11), sched yield (13), stable clock (24). No
/// asynchronous page faults: they would be in flight in a snapshot.
pub const KVM_FEATURES: u32 = bits(&[0, 1, 3, 5, 6, 7, 9, 11, 13, 24]);

/// The word with these bits set.
pub const fn bits(numbers: &[u32]) -> u32 {
    let mut word = 0;
    let mut i = 0;
    while i < numbers.len() {
        word |= 1 << numbers[i];
        i += 1;
    }
    word
}

/// CPUID bits that a guest may see, by leaf. What is not listed reads as zero.
pub mod cpuid {
    use super::bits;

    /// Highest basic leaf: 0xd (XSAVE); TSC and frequency leaves differ between hosts.
    pub const MAX_BASIC: u32 = 0xd;
    /// Highest extended leaf.
    pub const MAX_EXTENDED: u32 = 0x8000_0021;
    /// 1.ECX: SSE3, PCLMUL, SSSE3, FMA, CX16, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, AES,
    /// XSAVE, OSXSAVE (KVM keeps it), AVX, F16C, RDRAND. TSC deadline and hypervisor are added.
    pub const LEAF_1_ECX: u32 = bits(&[
        0, 1, 9, 12, 13, 17, 19, 20, 21, 22, 23, 25, 26, 27, 28, 29, 30,
    ]);
    /// 1.EDX: everything up to SSE2 but the debug store, thermal and serial-number bits.
    pub const LEAF_1_EDX: u32 = bits(&[
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 28,
    ]);
    /// 6.EAX: the APIC timer runs always (ARAT).
    pub const LEAF_6_EAX: u32 = bits(&[2]);
    /// 7.0.EBX: FSGSBASE, TSC_ADJUST, BMI1, AVX2, SMEP, BMI2, ERMS, INVPCID, AVX512F, DQ, RDSEED,
    /// ADX, SMAP, IFMA, CLFLUSHOPT, CLWB, CD, SHA, BW, VL. No TSX: it is disabled by microcode here
    /// and there.
    pub const LEAF_7_EBX: u32 = bits(&[
        0, 1, 3, 5, 7, 8, 9, 10, 16, 17, 18, 19, 20, 21, 23, 24, 28, 29, 30, 31,
    ]);
    /// 7.0.ECX: VBMI, UMIP, PKU, OSPKE (KVM keeps it), VBMI2, GFNI, VAES, VPCLMUL, VNNI, BITALG,
    /// VPOPCNTDQ, RDPID. No five-level paging: it costs and gains nothing at 1 TiB.
    pub const LEAF_7_ECX: u32 = bits(&[1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 14, 22]);
    /// 7.0.EDX: FSRM, MD_CLEAR, SERIALIZE, AVX512_FP16, and what guards against speculation:
    /// SPEC_CTRL, STIBP, FLUSH_L1D, ARCH_CAPABILITIES, SSBD.
    pub const LEAF_7_EDX: u32 = bits(&[4, 10, 14, 23, 26, 27, 28, 29, 31]);
    /// 7.1.EAX: AVX_VNNI, AVX512_BF16, fast short string operations.
    pub const LEAF_7_1_EAX: u32 = bits(&[4, 5, 10, 11, 12]);
    /// 7.2.EDX: speculation controls.
    pub const LEAF_7_2_EDX: u32 = bits(&[0, 1, 2, 4, 5]);
    /// 0xd: x87, SSE, AVX, AVX-512 (three parts), PKRU.
    pub const XSTATE: u32 = bits(&[0, 1, 2, 5, 6, 7, 9]);
    /// 0xd.1.EAX: XSAVEOPT, XSAVEC, XGETBV with ECX=1. No supervisor states.
    pub const LEAF_D_1_EAX: u32 = bits(&[0, 1, 2]);
    /// 0x8000_0001.ECX: LAHF, CMP_LEGACY, CR8, ABM, SSE4A, misaligned SSE, prefetch, TOPOEXT.
    pub const LEAF_80000001_ECX: u32 = bits(&[0, 1, 4, 5, 6, 7, 8, 22]);
    /// 0x8000_0001.EDX: SYSCALL, NX, MMXEXT, FXSR_OPT, 1 GiB pages, RDTSCP, long mode, and AMD's
    /// copies of leaf 1.
    pub const LEAF_80000001_EDX: u32 = bits(&[
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 22, 23, 24, 25, 26, 27, 29,
    ]);
    /// 0x8000_0008.EBX: CLZERO, XSAVEERPTR, WBNOINVD and speculation controls.
    pub const LEAF_80000008_EBX: u32 = bits(&[0, 2, 9, 12, 14, 15, 17, 24, 25, 26, 28]);
    /// 0x8000_0021.EAX: facts that let Linux skip work-arounds.
    pub const LEAF_80000021_EAX: u32 = bits(&[0, 2, 6, 8, 27, 28, 29]);
}
