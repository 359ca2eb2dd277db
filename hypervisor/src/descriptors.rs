//! The open descriptors that a role's process was started with, by name. They are taken once, at
//! start-up and before any thread exists; a descriptor that was not announced is never touched.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use protocol::host::{DESCRIPTORS_VARIABLE, FIRST_DESCRIPTOR, MAX_DESCRIPTORS};

/// Why the descriptors could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// They were taken before: a number must not get two owners.
    #[error("the descriptors of this process were taken before")]
    TakenTwice,
    /// More names than a process is ever started with.
    #[error(
        "{DESCRIPTORS_VARIABLE} names {0} descriptors; at most {MAX_DESCRIPTORS} are handed over"
    )]
    TooMany(usize),
    /// A number that should be open is not.
    #[error(
        "descriptor {number} (`{name}`) named by {DESCRIPTORS_VARIABLE} is not open: {cause}; \
         roles are started by `supvm init` or `supvm serve`, not by hand"
    )]
    NotOpen {
        /// Its name.
        name: String,
        /// Its number.
        number: RawFd,
        /// What the system said.
        cause: nix::Error,
    },
    /// The process was not handed what its role needs.
    #[error(
        "this role needs a descriptor named `{0}`; \
         roles are started by `supvm init` or `supvm serve`, not by hand"
    )]
    Missing(String),
}

/// Named descriptors, close-on-exec, each owned once.
#[derive(Debug, Default)]
pub struct Descriptors {
    named: Vec<(String, OwnedFd)>,
}

static TAKEN: AtomicBool = AtomicBool::new(false);

impl Descriptors {
    /// Takes what `SUPVM_DESCRIPTORS` names, numbers [`FIRST_DESCRIPTOR`] and up. Call it once,
    /// before the process opens anything of its own.
    pub fn take_from_environment() -> Result<Self, DescriptorError> {
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err(DescriptorError::TakenTwice);
        }
        let text = std::env::var(DESCRIPTORS_VARIABLE).unwrap_or_default();
        let names: Vec<&str> = text.split(',').filter(|name| !name.is_empty()).collect();
        if names.len() > MAX_DESCRIPTORS {
            return Err(DescriptorError::TooMany(names.len()));
        }
        let mut named = Vec::with_capacity(names.len());
        for (number, name) in (FIRST_DESCRIPTOR..).zip(names) {
            // SAFETY: fcntl(2) on a number that may not be open is an error, nothing worse; the
            // number is given an owner only after it is known to be open, and the flag above
            // makes sure that it is the only one.
            let descriptor = unsafe { take(number) }.map_err(|cause| DescriptorError::NotOpen {
                name: name.to_owned(),
                number,
                cause,
            })?;
            named.push((name.to_owned(), descriptor));
        }
        Ok(Self { named })
    }

    /// Descriptors that this process made itself.
    pub fn from_named<N: Into<String>>(named: impl IntoIterator<Item = (N, OwnedFd)>) -> Self {
        let named = named.into_iter().map(|(name, fd)| (name.into(), fd));
        Self {
            named: named.collect(),
        }
    }

    /// Takes the descriptor called `name`.
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, DescriptorError> {
        self.take_if_there(name)
            .ok_or_else(|| DescriptorError::Missing(name.to_owned()))
    }

    /// Takes the descriptor called `name` where a role can do without.
    pub fn take_if_there(&mut self, name: &str) -> Option<OwnedFd> {
        let at = self.named.iter().position(|(other, _)| other == name)?;
        Some(self.named.swap_remove(at).1)
    }
}

/// # Safety
/// Nobody else in this process may own `number`.
unsafe fn take(number: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: fcntl(2) knows nothing of owners; a closed number is answered EBADF.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    nix::Error::result(flags)?;
    // SAFETY: the number is open and, by this function's contract, nobody else's.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(&descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(descriptor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_handed_out_once() {
        let (left, right) = nix::unistd::pipe().unwrap();
        let mut descriptors = Descriptors::from_named([("left", left), ("right", right)]);
        descriptors.take("left").unwrap();
        assert!(matches!(
            descriptors.take("left"),
            Err(DescriptorError::Missing(name)) if name == "left"
        ));
        assert!(descriptors.take_if_there("right").is_some());
        assert!(descriptors.take_if_there("right").is_none());
    }
}
