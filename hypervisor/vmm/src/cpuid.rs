//! What CPUID tells the guest: the host's answer cut down to the model's allow-list, with topology
//! of our own. Anything that KVM supports but the model does not name stays invisible, so that a
//! newer host is not a different machine.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX as SIGNIFICANT_INDEX, KVM_MAX_CPUID_ENTRIES,
    kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use crate::model::{self, cpuid as allowed};

const HYPERVISOR: u32 = 0x4000_0000;
const EXTENDED: u32 = 0x8000_0000;

/// Why there is no CPUID table.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CpuidError {
    /// KVM did not say what it supports.
    #[error("asking KVM for the supported CPUID: {0}")]
    Supported(kvm_ioctls::Error),
    /// More entries than KVM takes; a defect of ours.
    #[error("CPUID table of {0} entries")]
    TooMany(usize),
}

/// The host's answer.
pub(crate) fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, CpuidError> {
    let mut entries = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(CpuidError::Supported)?
        .as_slice()
        .to_vec();
    if kvm.check_extension(Cap::TscDeadlineTimer)
        && let Some(leaf) = entries.iter_mut().find(|entry| entry.function == 1)
    {
        leaf.ecx |= 1 << 24;
    }
    Ok(entries)
}

/// The table for one vCPU out of `cpus`.
pub(crate) fn table(
    supported: &[kvm_cpuid_entry2],
    cpu: u16,
    cpus: u16,
) -> Result<CpuId, CpuidError> {
    let entries = filter(supported, cpu, cpus);
    CpuId::from_entries(&entries).map_err(|_| CpuidError::TooMany(entries.len()))
}

fn filter(supported: &[kvm_cpuid_entry2], cpu: u16, cpus: u16) -> Vec<kvm_cpuid_entry2> {
    let (cpu, cpus) = (u32::from(cpu), u32::from(cpus.max(1)));
    // Bits of the APIC identifier that number a core.
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    let mut out: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter_map(|&entry| leaf(entry, cpu, cpus, core_bits))
        .collect();
    let topology = [
        // One thread per core.
        (0, 0, 1, 1_u32 << 8),
        // All cores in one package.
        (1, core_bits, cpus, 2 << 8 | 1),
        (2, 0, 0, 2),
    ];
    for (index, eax, ebx, ecx) in topology {
        out.push(kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: SIGNIFICANT_INDEX,
            eax,
            ebx,
            ecx,
            edx: cpu,
            ..Default::default()
        });
    }
    xsave_size(&mut out);
    out
}

/// One of the host's entries as the guest sees it, if it does.
fn leaf(
    mut entry: kvm_cpuid_entry2,
    cpu: u32,
    cpus: u32,
    core_bits: u32,
) -> Option<kvm_cpuid_entry2> {
    let e = &mut entry;
    let only = |e: &mut kvm_cpuid_entry2, masks: [u32; 4]| {
        e.eax &= masks[0];
        e.ebx &= masks[1];
        e.ecx &= masks[2];
        e.edx &= masks[3];
    };
    const ALL: u32 = u32::MAX;
    match (e.function, e.index) {
        (0, _) => e.eax = allowed::MAX_BASIC,
        (1, _) => {
            only(
                e,
                [
                    ALL,
                    0xff00,
                    allowed::LEAF_1_ECX | 1 << 24,
                    allowed::LEAF_1_EDX,
                ],
            );
            e.ebx |= cpu << 24 | cpus << 16;
            e.ecx |= 1 << 31;
            if cpus > 1 {
                e.edx |= 1 << 28;
            } else {
                e.edx &= !(1 << 28);
            }
        }
        (2, _) => {}
        // Caches: first and second level belong to one core, the third to all.
        (4, _) => {
            if e.eax & 0x1f == 0 {
                return None;
            }
            let sharing = if (e.eax >> 5) & 7 >= 3 { cpus - 1 } else { 0 };
            e.eax = (e.eax & 0x3ff) | sharing << 14 | ((1 << core_bits) - 1) << 26;
        }
        (6, _) => only(e, [allowed::LEAF_6_EAX, 0, 0, 0]),
        (7, 0) => {
            e.eax = e.eax.min(2);
            only(
                e,
                [
                    ALL,
                    allowed::LEAF_7_EBX,
                    allowed::LEAF_7_ECX,
                    allowed::LEAF_7_EDX,
                ],
            );
        }
        (7, 1) => only(e, [allowed::LEAF_7_1_EAX, 0, 0, 0]),
        (7, 2) => only(e, [0, 0, 0, allowed::LEAF_7_2_EDX]),
        (0xd, 0) => only(e, [allowed::XSTATE, ALL, ALL, 0]),
        (0xd, 1) => only(e, [allowed::LEAF_D_1_EAX, ALL, 0, 0]),
        (0xd, index) if index < 32 && allowed::XSTATE & 1 << index != 0 => {}
        (HYPERVISOR, _) => e.eax = HYPERVISOR + 1,
        (0x4000_0001, _) => only(e, [model::KVM_FEATURES, 0, 0, 0]),
        (EXTENDED, _) => e.eax = e.eax.min(allowed::MAX_EXTENDED),
        (0x8000_0001, _) => only(
            e,
            [
                ALL,
                0,
                allowed::LEAF_80000001_ECX,
                allowed::LEAF_80000001_EDX,
            ],
        ),
        (0x8000_0002..=0x8000_0006, _) => {}
        (0x8000_0008, _) => {
            only(e, [0xffff, allowed::LEAF_80000008_EBX, 0, 0]);
            e.ecx = core_bits << 12 | (cpus - 1);
        }
        (0x8000_001d, _) => {
            if e.eax & 0x1f == 0 {
                return None;
            }
            let sharing = if (e.eax >> 5) & 7 >= 3 { cpus - 1 } else { 0 };
            e.eax = (e.eax & 0x3ff) | sharing << 14;
        }
        (0x8000_001e, _) => only(e, [0, 0, 0, 0]),
        (0x8000_0021, _) => only(e, [allowed::LEAF_80000021_EAX, 0, 0, 0]),
        _ => return None,
    }
    if e.function == 0x8000_001e {
        e.eax = cpu;
        e.ebx = cpu & 0xff;
    }
    Some(entry)
}

/// The size of the largest XSAVE area (0xd.0.ECX) is that of the states which are left.
fn xsave_size(entries: &mut [kvm_cpuid_entry2]) {
    const LEGACY_AND_HEADER: u32 = 576;
    let size = entries
        .iter()
        .filter(|entry| entry.function == 0xd && entry.index >= 2)
        .map(|entry| entry.eax.saturating_add(entry.ebx))
        .fold(LEGACY_AND_HEADER, u32::max);
    if let Some(main) = entries
        .iter_mut()
        .find(|entry| entry.function == 0xd && entry.index == 0)
    {
        main.ecx = size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() -> Vec<kvm_cpuid_entry2> {
        let leaves = [
            (0, 0),
            (1, 0),
            (3, 0),
            (5, 0),
            (7, 0),
            (7, 1),
            (0xa, 0),
            (0xb, 0),
            (0xd, 0),
            (0xd, 1),
            (0xd, 2),
            (0xd, 17),
            (0xd, 18),
            (0x12, 0),
            (0x14, 0),
            (0x1d, 0),
            (HYPERVISOR, 0),
            (0x4000_0001, 0),
            (EXTENDED, 0),
            (0x8000_0001, 0),
            (0x8000_0007, 0),
            (0x8000_000a, 0),
            (0x8000_001f, 0),
            (0x9000_0000, 0),
        ];
        leaves
            .map(|(function, index)| kvm_cpuid_entry2 {
                function,
                index,
                eax: u32::MAX,
                ebx: u32::MAX,
                ecx: u32::MAX,
                edx: u32::MAX,
                ..Default::default()
            })
            .to_vec()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, index))
            .unwrap()
    }

    #[test]
    fn what_the_model_does_not_name_is_invisible() {
        let seen = filter(&everything(), 0, 2);
        for hidden in [
            3,
            5,
            0xa,
            0x12,
            0x14,
            0x1d,
            0x8000_0007,
            0x8000_000a,
            0x8000_001f,
            0x9000_0000,
        ] {
            assert!(
                seen.iter().all(|entry| entry.function != hidden),
                "{hidden:#x}"
            );
        }
        assert!(
            seen.iter()
                .all(|entry| (entry.function, entry.index) != (0xd, 17))
        );
        let one = find(&seen, 1, 0);
        assert_eq!(one.ecx & 1 << 5, 0, "VMX");
        assert_ne!(one.ecx & 1 << 31, 0, "hypervisor");
        assert_eq!(find(&seen, 0x8000_0001, 0).ecx & 1 << 2, 0, "SVM");
        assert_eq!(find(&seen, 7, 0).ebx & 1 << 11, 0, "RTM");
        assert_eq!(find(&seen, 0, 0).eax, 0xd);
    }

    #[test]
    fn each_vcpu_is_a_core_of_its_own_in_one_package() {
        for cpu in 0..3 {
            let seen = filter(&everything(), cpu, 3);
            let cpu = u32::from(cpu);
            assert_eq!(find(&seen, 1, 0).ebx >> 24, cpu);
            let core = find(&seen, 0xb, 1);
            assert_eq!((core.eax, core.ebx, core.edx), (2, 3, cpu));
        }
    }
}
