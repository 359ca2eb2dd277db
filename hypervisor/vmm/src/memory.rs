//! Guest memory: the memory file that control made, mapped shared and split around the hole below
//! 4 GiB. Never anonymous memory: the file is what a snapshot keeps and what control accounts for.

use std::fs::File;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::model;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// Not a size that the model allows.
    #[error(
        "memory of {0} MiB; a machine has {min} to {max} MiB",
        min = model::MIN_MEMORY_MIB,
        max = model::MAX_MEMORY_MIB
    )]
    Size(u32),
    /// The file is not as long as the memory should be.
    #[error("the memory file holds {actual} bytes; {expected} are configured")]
    FileSize {
        /// As configured.
        expected: u64,
        /// As found.
        actual: u64,
    },
    /// The file's state cannot be read.
    #[error("memory file: {0}")]
    File(#[from] std::io::Error),
    /// It cannot be mapped.
    #[error("mapping guest memory: {0}")]
    Map(#[from] vm_memory::mmap::MmapRegionError),
    /// Regions overlap or overflow.
    #[error("guest memory regions: {0}")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
    /// A region does not fit into the address space.
    #[error("guest memory at {0:#x} does not fit")]
    Unfit(u64),
    /// KVM refused a region.
    #[error("giving memory at {start:#x} to KVM: {cause}")]
    Kvm {
        /// Where it begins.
        start: u64,
        /// What KVM said.
        cause: kvm_ioctls::Error,
    },
}

/// Where the parts of a memory of `bytes` lie: start address and length.
pub(crate) fn layout(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(model::HOLE_START);
    let mut parts = vec![(0, low)];
    if bytes > low {
        parts.push((model::HOLE_END, bytes.saturating_sub(low)));
    }
    parts
}

/// Maps the memory file.
pub(crate) fn map(file: File, mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    if !(model::MIN_MEMORY_MIB..=model::MAX_MEMORY_MIB).contains(&mib) {
        return Err(MemoryError::Size(mib));
    }
    let expected = u64::from(mib) << 20;
    let actual = file.metadata()?.len();
    if actual != expected {
        return Err(MemoryError::FileSize { expected, actual });
    }
    let file = Arc::new(file);
    let mut offset = 0_u64;
    let mut regions = Vec::new();
    for (start, length) in layout(expected) {
        let size = usize::try_from(length).map_err(|_| MemoryError::Unfit(start))?;
        let mapping = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
            .build()?;
        // Where the host allows it; small pages do as well.
        // SAFETY: the range is the mapping just made; the advice changes no content.
        unsafe { libc::madvise(mapping.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        let region =
            GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Unfit(start))?;
        regions.push(region);
        offset = offset.saturating_add(length);
    }
    Ok(GuestMemoryMmap::from_regions(regions)?)
}

/// Gives the memory to a virtual machine. The mapping must live as long as the machine runs, which
/// the caller ensures by keeping `memory` until every vCPU has stopped.
pub(crate) fn give_to_kvm(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in (0_u32..).zip(memory.iter()) {
        let start = region.start_addr().raw_value();
        let host = region
            .get_host_address(vm_memory::MemoryRegionAddress(0))
            .map_err(|_| MemoryError::Unfit(start))?;
        let kvm_region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start,
            memory_size: region.len(),
            userspace_addr: host.addr() as u64,
        };
        // SAFETY: the range is a mapping of this process that outlives the vCPUs, and regions do
        // not overlap: `layout` made them.
        unsafe { vm.set_user_memory_region(kvm_region) }
            .map_err(|cause| MemoryError::Kvm { start, cause })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    fn memory_file(bytes: u64) -> File {
        let fd: OwnedFd =
            nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
                .unwrap();
        let file = File::from(fd);
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn memory_goes_round_the_hole() {
        assert_eq!(layout(128 << 20), [(0, 128 << 20)]);
        assert_eq!(layout(3 << 30), [(0, 3 << 30)]);
        assert_eq!(layout(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }

    #[test]
    fn both_sides_of_the_hole_are_parts_of_one_file() {
        use std::os::unix::fs::FileExt;
        use vm_memory::Bytes;
        let file = memory_file(4 << 30);
        let memory = map(file.try_clone().unwrap(), 4096).unwrap();
        memory.write_obj(7_u8, GuestAddress(0x1000)).unwrap();
        memory.write_obj(8_u8, GuestAddress(4 << 30)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0x1000).unwrap();
        assert_eq!(byte, [7]);
        file.read_exact_at(&mut byte, 3 << 30).unwrap();
        assert_eq!(byte, [8]);
        assert!(memory.write_obj(9_u8, GuestAddress(3 << 30)).is_err());
    }

    #[test]
    fn a_size_that_is_no_machine_or_not_the_files_is_refused() {
        assert!(matches!(
            map(memory_file(1 << 20), 1),
            Err(MemoryError::Size(1))
        ));
        assert!(matches!(
            map(memory_file(128 << 20), 256),
            Err(MemoryError::FileSize { .. })
        ));
    }
}
