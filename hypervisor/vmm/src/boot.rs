//! Puts the kernel, its initramfs and what the 64-bit boot protocol wants to know into guest
//! memory. Runs before the guest's first instruction; reads files at offsets of its own, because
//! the descriptors are shared with other monitors; never opens anything.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, ReadVolatile, VolatileMemoryError, VolatileSlice,
};

use crate::model;

/// Why the guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The kernel is not one we can load.
    #[error("loading the guest kernel: {0}; it must be an uncompressed ELF vmlinux for x86-64")]
    Kernel(#[from] linux_loader::loader::Error),
    /// Kernel and initramfs do not fit.
    #[error(
        "kernel (up to {kernel_end:#x}) and initramfs ({initramfs} bytes) do not fit into {low} \
         bytes of memory below 4 GiB: give the machine more memory"
    )]
    TooBig {
        /// End of the kernel.
        kernel_end: u64,
        /// Length of the initramfs.
        initramfs: u64,
        /// Memory below the hole.
        low: u64,
    },
    /// A file cannot be read.
    #[error("reading the {what}: {cause}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Why.
        cause: io::Error,
    },
    /// The command line is too long.
    #[error("command line of {0} bytes; Linux takes at most {max}", max = model::CMDLINE_CAPACITY)]
    Cmdline(usize),
    /// Guest memory refused an address; a defect of ours.
    #[error("writing boot information: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What the first vCPU needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The kernel's first instruction.
    pub(crate) instruction: u64,
}

/// A file read from a position of our own, whatever others do with the descriptor.
struct Positioned<'a> {
    file: &'a File,
    position: u64,
}

impl Read for Positioned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.position)?;
        self.position = self.position.saturating_add(count as u64);
        Ok(count)
    }
}

impl Seek for Positioned<'_> {
    fn seek(&mut self, target: SeekFrom) -> io::Result<u64> {
        let target = match target {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
            SeekFrom::End(offset) => self.file.metadata()?.len().checked_add_signed(offset),
        };
        self.position = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl ReadVolatile for Positioned<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        target: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let offset = libc::off_t::try_from(self.position)
            .map_err(|_| VolatileMemoryError::IOError(io::ErrorKind::InvalidInput.into()))?;
        let guard = target.ptr_guard_mut();
        // SAFETY: the slice is valid for its length while its guard lives, and the kernel writes
        // no more than that into it.
        let count = unsafe {
            libc::pread(
                self.file.as_raw_fd(),
                guard.as_ptr().cast(),
                target.len(),
                offset,
            )
        };
        let count = usize::try_from(count)
            .map_err(|_| VolatileMemoryError::IOError(io::Error::last_os_error()))?;
        self.position = self.position.saturating_add(count as u64);
        target.bitmap().mark_dirty(0, count);
        Ok(count)
    }
}

/// Loads everything. `rsdp` is where the ACPI tables begin.
pub(crate) fn load(
    memory: &GuestMemoryMmap,
    kernel: &File,
    initramfs: &File,
    cmdline: &str,
    rsdp: GuestAddress,
    seed: &[u8; 32],
) -> Result<Entry, BootError> {
    let mut image = Positioned {
        file: kernel,
        position: 0,
    };
    let highmem = GuestAddress(model::HIGH_MEMORY_START);
    let loaded = Elf::load(memory, None, &mut image, Some(highmem))?;
    let (initramfs_start, initramfs_length) = load_initramfs(memory, initramfs, loaded.kernel_end)?;

    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    if line.len() > model::CMDLINE_CAPACITY {
        return Err(BootError::Cmdline(line.len()));
    }
    memory.write_slice(&line, GuestAddress(model::CMDLINE_ADDRESS))?;
    write_seed(memory, seed)?;

    let mut params = boot_params::default();
    params.hdr.type_of_loader = 0xff;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = 0x5372_6448; // "HdrS"
    params.hdr.version = 0x020f;
    params.hdr.loadflags = 1; // loaded high
    params.hdr.kernel_alignment = 0x0100_0000;
    params.hdr.cmd_line_ptr = model::CMDLINE_ADDRESS as u32;
    params.hdr.cmdline_size = line.len() as u32;
    params.hdr.ramdisk_image = initramfs_start as u32;
    params.hdr.ramdisk_size = initramfs_length as u32;
    params.hdr.setup_data = model::SEED_ADDRESS;
    params.acpi_rsdp_addr = rsdp.raw_value();
    let map = e820(memory);
    params.e820_entries = map.len() as u8;
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = entry;
    }
    memory.write_slice(params.as_slice(), GuestAddress(model::ZERO_PAGE_ADDRESS))?;
    Ok(Entry {
        instruction: loaded.kernel_load.raw_value(),
    })
}

/// The initramfs goes to the top of the memory below the hole, where Linux can reach it early.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    file: &File,
    kernel_end: u64,
) -> Result<(u64, u64), BootError> {
    let read = |cause| BootError::Read {
        what: "guest initramfs",
        cause,
    };
    let length = file.metadata().map_err(read)?.len();
    let low = memory
        .find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len);
    let start = low.checked_sub(length).map(|start| start & !0xfff);
    let start = match start {
        Some(start) if start >= kernel_end.max(model::HIGH_MEMORY_START) => start,
        _ => {
            return Err(BootError::TooBig {
                kernel_end,
                initramfs: length,
                low,
            });
        }
    };
    let mut image = Positioned { file, position: 0 };
    memory.read_exact_volatile_from(GuestAddress(start), &mut image, length as usize)?;
    Ok((start, length))
}

/// One `setup_data` record of type `SETUP_RNG_SEED`: the guest's random numbers are good before
/// its first device is found.
fn write_seed(memory: &GuestMemoryMmap, seed: &[u8; 32]) -> Result<(), BootError> {
    const SETUP_RNG_SEED: u32 = 9;
    let mut record = Vec::with_capacity(48);
    record.extend_from_slice(&0_u64.to_le_bytes());
    record.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    record.extend_from_slice(&(seed.len() as u32).to_le_bytes());
    record.extend_from_slice(seed);
    memory.write_slice(&record, GuestAddress(model::SEED_ADDRESS))?;
    Ok(())
}

/// The memory map that the guest is told.
fn e820(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    let entry = |start: u64, end: u64, kind| boot_e820_entry {
        addr: start,
        size: end.saturating_sub(start),
        r#type: kind,
    };
    let mut map = vec![
        entry(0, model::LOW_MEMORY_END, RAM),
        entry(model::LOW_MEMORY_END, model::HIGH_MEMORY_START, RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start.saturating_add(region.len());
        map.push(entry(start.max(model::HIGH_MEMORY_START), end, RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const ENTRY: u64 = 0x20_0000;

    /// The smallest ELF that is a kernel: one segment of `code`.
    fn kernel(code: &[u8]) -> File {
        let mut elf = Vec::new();
        elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        elf.extend_from_slice(&2_u16.to_le_bytes()); // executable
        elf.extend_from_slice(&62_u16.to_le_bytes()); // x86-64
        elf.extend_from_slice(&1_u32.to_le_bytes());
        elf.extend_from_slice(&ENTRY.to_le_bytes());
        elf.extend_from_slice(&64_u64.to_le_bytes()); // program headers follow
        elf.extend_from_slice(&0_u64.to_le_bytes());
        elf.extend_from_slice(&0_u32.to_le_bytes());
        for half in [64_u16, 56, 1, 0, 0, 0] {
            elf.extend_from_slice(&half.to_le_bytes());
        }
        elf.extend_from_slice(&1_u32.to_le_bytes()); // load
        elf.extend_from_slice(&7_u32.to_le_bytes());
        let length = code.len() as u64;
        for word in [120, ENTRY, ENTRY, length, length, 0x1000] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
        elf.extend_from_slice(code);
        file(&elf)
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn memory(bytes: usize) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
    }

    fn boot(memory: &GuestMemoryMmap, kernel: &File, initramfs: &File) -> Result<Entry, BootError> {
        let root = GuestAddress(model::ACPI_ADDRESS);
        load(memory, kernel, initramfs, "quiet", root, &[7; 32])
    }

    #[test]
    fn kernel_initramfs_command_line_and_seed_are_where_the_zero_page_says() {
        let memory = memory(16 << 20);
        let entry = boot(&memory, &kernel(b"code"), &file(b"files")).unwrap();
        assert_eq!(entry.instruction, ENTRY);
        let read = |address, length| {
            let mut bytes = vec![0; length];
            memory
                .read_slice(&mut bytes, GuestAddress(address))
                .unwrap();
            bytes
        };
        assert_eq!(read(ENTRY, 4), b"code");
        let mut params = boot_params::default();
        memory
            .read_slice(
                params.as_mut_slice(),
                GuestAddress(model::ZERO_PAGE_ADDRESS),
            )
            .unwrap();
        assert_eq!({ params.hdr.ramdisk_size }, 5);
        assert_eq!(read(u64::from(params.hdr.ramdisk_image), 5), b"files");
        assert_eq!(read(u64::from(params.hdr.cmd_line_ptr), 6), b"quiet\0");
        let seed = params.hdr.setup_data;
        assert_eq!(read(seed + 8, 8), [9, 0, 0, 0, 32, 0, 0, 0]);
        assert_eq!(read(seed + 16, 32), [7; 32]);
        assert_eq!({ params.acpi_rsdp_addr }, model::ACPI_ADDRESS);
    }

    #[test]
    fn the_memory_map_leaves_out_firmware_and_the_hole() {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 4 << 20),
            (GuestAddress(model::HOLE_END), 1 << 20),
        ])
        .unwrap();
        let map: Vec<(u64, u64, u32)> = e820(&memory)
            .iter()
            .map(|entry| (entry.addr, entry.size, entry.r#type))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, 0x6_0400, 2),
                (0x10_0000, 3 << 20, 1),
                (model::HOLE_END, 1 << 20, 1),
            ]
        );
    }

    #[test]
    fn the_descriptors_position_does_not_matter_and_stays() {
        let (kernel, initramfs) = (kernel(b"code"), file(b"files"));
        let before = (&kernel).stream_position().unwrap();
        boot(&memory(16 << 20), &kernel, &initramfs).unwrap();
        assert_eq!((&kernel).stream_position().unwrap(), before);
        assert_ne!(before, 0);
    }

    #[test]
    fn what_is_no_kernel_or_does_not_fit_is_refused_by_name() {
        let memory = memory(4 << 20);
        for bad in [&b""[..], b"\x7fELF", &[0xff; 4096]] {
            assert!(matches!(
                boot(&memory, &file(bad), &file(b"")),
                Err(BootError::Kernel(_))
            ));
        }
        let large = tempfile::tempfile().unwrap();
        large.set_len(3 << 20).unwrap();
        assert!(matches!(
            boot(&memory, &kernel(b"code"), &large),
            Err(BootError::TooBig { .. })
        ));
    }
}
