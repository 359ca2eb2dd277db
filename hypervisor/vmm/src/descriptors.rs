//! The descriptors that a monitor is handed, by name. What was not handed over is closed, so that
//! nothing of the parent's stays reachable.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use protocol::host::vmm::descriptor;
use protocol::host::{DESCRIPTORS_VARIABLE, FIRST_DESCRIPTOR};

/// Why the descriptors are not all there.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// No list of names.
    #[error(
        "{DESCRIPTORS_VARIABLE} is not set: a monitor is started by the supervisor, not by hand"
    )]
    NoNames,
    /// One is missing.
    #[error("no descriptor named `{0}` was handed over")]
    Missing(&'static str),
    /// The numbers after the last could not be closed.
    #[error("closing other descriptors: {0}")]
    Close(std::io::Error),
}

/// All that a monitor has of the world.
#[derive(Debug)]
pub struct Descriptors {
    /// Its listening control socket.
    pub listen: OwnedFd,
    /// Holds the configuration.
    pub config: File,
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// Guest memory.
    pub memory: File,
    /// The disk image.
    pub disk: File,
    /// The guest kernel.
    pub kernel: File,
    /// The guest's initramfs.
    pub initramfs: File,
    /// The console log.
    pub log: File,
}

impl Descriptors {
    /// Takes what the supervisor handed to this process and closes everything else.
    ///
    /// # Safety
    /// The process must just have been started: nothing else may own descriptors from
    /// [`FIRST_DESCRIPTOR`] on.
    pub unsafe fn from_environment() -> Result<Self, DescriptorError> {
        let names = std::env::var(DESCRIPTORS_VARIABLE).map_err(|_| DescriptorError::NoNames)?;
        let names: Vec<&str> = names.split(',').filter(|name| !name.is_empty()).collect();
        let end = FIRST_DESCRIPTOR + names.len() as RawFd;
        // SAFETY: closes only numbers that the caller says nobody owns.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, end, u32::MAX, 0) };
        if closed != 0 {
            return Err(DescriptorError::Close(std::io::Error::last_os_error()));
        }
        let mut handed: Vec<(&str, OwnedFd)> = (FIRST_DESCRIPTOR..end)
            .zip(names)
            .filter(|&(number, _)| {
                nix::fcntl::fcntl(
                    // SAFETY: only asks whether the number is open.
                    unsafe { std::os::fd::BorrowedFd::borrow_raw(number) },
                    nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
                )
                .is_ok()
            })
            .map(|(number, name)| {
                // SAFETY: it is open, and the caller says that nobody else owns it.
                (name, unsafe { OwnedFd::from_raw_fd(number) })
            })
            .collect();
        let mut take = |name: &'static str| {
            let at = handed.iter().position(|(handed, _)| *handed == name);
            at.map(|at| handed.swap_remove(at).1)
                .ok_or(DescriptorError::Missing(name))
        };
        Ok(Self {
            listen: take(descriptor::LISTEN)?,
            config: take(descriptor::CONFIG)?.into(),
            kvm: take(descriptor::KVM)?,
            memory: take(descriptor::MEMORY)?.into(),
            disk: take(descriptor::DISK)?.into(),
            kernel: take(descriptor::KERNEL)?.into(),
            initramfs: take(descriptor::INITRAMFS)?.into(),
            log: take(descriptor::LOG)?.into(),
        })
    }
}
