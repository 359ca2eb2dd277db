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
