//! What the agent tells the kernel: its name, the time, random numbers nobody else has, and that
//! the loopback interface is up.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::stat::Mode;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use super::files;

/// Why the kernel did not take it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// A system call failed.
    #[error("cannot {what}: {errno}")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// Why not.
        errno: Errno,
    },
    /// A file under /proc could not be read.
    #[error(transparent)]
    File(#[from] files::FileError),
}

fn refused(what: &'static str) -> impl FnOnce(Errno) -> KernelError {
    move |errno| KernelError::Refused { what, errno }
}

pub(crate) fn set_hostname(name: &str) -> Result<(), KernelError> {
    nix::unistd::sethostname(name).map_err(refused("set the hostname"))
}

/// Sets the clock to nanoseconds since 1970.
pub(crate) fn set_clock(unix_ns: u64) -> Result<(), KernelError> {
    let time = TimeSpec::from_duration(Duration::from_nanos(unix_ns));
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(refused("set the clock"))
}

/// Sets the clock to nanoseconds since 1970 and gives by how many it was put forward.
pub(crate) fn step_clock(unix_ns: u64) -> Result<i64, KernelError> {
    let before = nix::time::clock_gettime(ClockId::CLOCK_REALTIME)
        .map(Duration::from)
        .map_err(refused("read the clock"))?;
    set_clock(unix_ns)?;
    let step = i128::from(unix_ns).saturating_sub_unsigned(before.as_nanos());
    Ok(i64::try_from(step).unwrap_or(if step > 0 { i64::MAX } else { i64::MIN }))
}

/// The identifier of this run of the kernel.
pub(crate) fn boot_id() -> Result<String, KernelError> {
    let bytes = files::read(Path::new("/proc/sys/kernel/random/boot_id"), 100)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// The kernel's `rand_pool_info` with room for 32 bytes.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    pool: [u8; 32],
}

mod request {
    //! Requests to /dev/random, by their numbers in the kernel's `linux/random.h`.
    use nix::{ioctl_none, ioctl_write_ptr_bad, request_code_write};
    ioctl_write_ptr_bad!(
        add,
        request_code_write!(b'R', 0x03, size_of::<[libc::c_int; 2]>()),
        super::PoolInfo
    );
    ioctl_none!(reseed, b'R', 0x07);
}

/// Makes all later random numbers depend on `entropy`, which counts as unguessable.
pub(crate) fn add_entropy(entropy: &[u8; 32]) -> Result<(), KernelError> {
    let device = open(
        "/dev/urandom",
        OFlag::O_RDWR | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(refused("open /dev/urandom"))?;
    let info = PoolInfo {
        entropy_bits: 256,
        bytes: 32,
        pool: *entropy,
    };
    // SAFETY: `info` has the layout that the request reads and lives across the call.
    unsafe { request::add(device.as_raw_fd(), &raw const info) }
        .map_err(refused("credit entropy"))?;
    // SAFETY: the request takes no argument.
    unsafe { request::reseed(device.as_raw_fd()) }.map_err(refused("reseed random numbers"))?;
    Ok(())
}

/// Brings the loopback interface up; the kernel gives it its addresses.
pub(crate) fn loopback_up() -> Result<(), KernelError> {
    let any = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(refused("make a socket"))?;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    // SAFETY: the request reads one `ifreq`, which lives across the call.
    let set = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    Errno::result(set)
        .map(drop)
        .map_err(refused("bring the loopback interface up"))
}
