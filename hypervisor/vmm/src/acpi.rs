//! The ACPI tables of the machine: hardware-reduced, so that there is no PM timer, no SCI, no
//! legacy device. They only describe; what the registers do is in [`crate::platform`].

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method,
    Name, Notify, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::model;

const OEM: [u8; 6] = *b"SUPVM ";
const TABLE: [u8; 8] = *b"MODEL1  ";

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AcpiError {
    /// They outgrew their place; a defect of ours.
    #[error("ACPI tables of {0} bytes do not fit into {max}", max = model::ACPI_SIZE)]
    TooLong(usize),
    /// Guest memory refused an address; a defect of ours.
    #[error("writing ACPI tables: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes the tables for `cpus` vCPUs and the virtio devices in `slots`; gives the RSDP's address.
pub(crate) fn write(
    memory: &GuestMemoryMmap,
    cpus: u16,
    slots: &[usize],
) -> Result<GuestAddress, AcpiError> {
    // The root pointer first, at a place that never moves; then each table behind the last.
    let mut area = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: &dyn Aml| {
        let address = model::ACPI_ADDRESS + area.len() as u64;
        table.to_aml_bytes(&mut area);
        area.resize(area.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = place(&dsdt(slots));
    let fadt = place(&fadt(dsdt));
    let madt = place(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt);

    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    area.splice(..root.len(), root);
    if area.len() as u64 > model::ACPI_SIZE {
        return Err(AcpiError::TooLong(area.len()));
    }
    memory.write_slice(&area, GuestAddress(model::ACPI_ADDRESS))?;
    Ok(GuestAddress(model::ACPI_ADDRESS))
}

fn port(number: u16) -> GAS {
    GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, number.into())
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut table = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd)
        .flag(Flags::Headless);
    // No VGA (2), no PCIe ASPM (4), no CMOS clock (5); not set: legacy devices (0), i8042 (1).
    table.iapc_boot_arch = (1_u16 << 2 | 1 << 4 | 1 << 5).into();
    table.reset_reg = port(model::RESET_PORT);
    table.reset_value = model::RESET_VALUE;
    table.sleep_control_reg = port(model::SLEEP_CONTROL_PORT);
    table.sleep_status_reg = port(model::SLEEP_STATUS_PORT);
    table.hypervisor_vendor_identity = u64::from_le_bytes(*b"SUPVM\0\0\0").into();
    table.finalize()
}

fn madt(cpus: u16) -> impl Aml {
    let mut table = MADT::new(
        OEM,
        TABLE,
        1,
        LocalInterruptController::Address(model::LOCAL_APIC_ADDRESS),
    );
    table.add_structure(IoApic::new(0, model::IO_APIC_ADDRESS, 0));
    for cpu in 0..cpus.min(model::MAX_CPUS) as u8 {
        table.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    table
}

fn dsdt(slots: &[usize]) -> impl Aml {
    let mut code = Vec::new();
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&model::S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut code);

    // COM1
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(
                            model::COM1_PORT,
                            model::COM1_PORT,
                            1,
                            model::COM1_PORTS as u8,
                        ),
                        &Interrupt::new(true, true, false, false, model::COM1_GSI),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut code);

    // pvpanic
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "PEVT".into(),
            vec![
                &Name::new("_HID".into(), &"QEMU0001"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&IO::new(
                        model::PVPANIC_PORT,
                        model::PVPANIC_PORT,
                        1,
                        1,
                    )]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut code);

    // The VM generation identifier, and the event device that says when it has changed.
    let address = AddressSpace::new_memory(
        AddressSpaceCacheable::Cacheable,
        true,
        model::VMGENID_ADDRESS,
        model::VMGENID_ADDRESS + 0xfff,
        None,
    );
    let (low, high) = (model::VMGENID_ADDRESS as u32, 0_u32);
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "VGEN".into(),
                vec![
                    &Name::new("_HID".into(), &"VMGENCTR"),
                    &Name::new("_CID".into(), &"VM_Gen_Counter"),
                    &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                    &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&address])),
                ],
            ),
            &Device::new(
                "GED_".into(),
                vec![
                    &Name::new("_HID".into(), &"ACPI0013"),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Interrupt::new(
                            true,
                            true,
                            false,
                            false,
                            model::GED_GSI,
                        )]),
                    ),
                    &Method::new(
                        "_EVT".into(),
                        1,
                        true,
                        vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80_u8)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut code);

    for &slot in slots {
        let window = model::VIRTIO_MMIO_ADDRESS + slot as u64 * model::VIRTIO_MMIO_SIZE;
        Scope::new(
            "_SB_".into(),
            vec![&Device::new(
                format!("VR{slot:02}").as_str().into(),
                vec![
                    &Name::new("_HID".into(), &"LNRO0005"),
                    &Name::new("_UID".into(), &(slot as u8)),
                    &Name::new("_CCA".into(), &acpi_tables::aml::ONE),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &Memory32Fixed::new(
                                true,
                                window as u32,
                                model::VIRTIO_MMIO_SIZE as u32,
                            ),
                            &Interrupt::new(
                                true,
                                true,
                                false,
                                false,
                                model::VIRTIO_GSI + slot as u32,
                            ),
                        ]),
                    ),
                ],
            )],
        )
        .to_aml_bytes(&mut code);
    }

    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    table.append_slice(&code);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(cpus: u16) -> (GuestMemoryMmap, u64) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let root = write(&memory, cpus, &[0, 1, 2]).unwrap();
        (memory, root.0)
    }

    fn table(memory: &GuestMemoryMmap, address: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    #[test]
    fn every_table_is_reachable_from_the_root_and_sums_to_zero() {
        let (memory, root) = tables(2);
        let mut rsdp = [0; 36];
        memory.read_slice(&mut rsdp, GuestAddress(root)).unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte));
        assert_eq!(sum(&rsdp), 0);
        let xsdt = table(
            &memory,
            u64::from_le_bytes(rsdp[24..32].try_into().unwrap()),
        );
        assert_eq!(sum(&xsdt), 0);
        let mut names = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let found = table(&memory, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&found), 0, "{:?}", &found[..4]);
            if &found[..4] == b"FACP" {
                let dsdt = u64::from_le_bytes(found[140..148].try_into().unwrap());
                let dsdt = table(&memory, dsdt);
                assert_eq!(&dsdt[..4], b"DSDT");
                assert_eq!(sum(&dsdt), 0);
                let ids = dsdt.windows(8).filter(|id| id == b"LNRO0005").count();
                assert_eq!(ids, 3);
            }
            names.push(found[..4].to_vec());
        }
        assert_eq!(names, [b"FACP", b"APIC"]);
    }

    #[test]
    fn the_largest_machine_fits() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let slots: Vec<usize> = (0..model::VIRTIO_SLOTS).collect();
        write(&memory, model::MAX_CPUS, &slots).unwrap();
    }
}
