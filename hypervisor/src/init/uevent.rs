//! The kernel's news of devices. Only the kernel's own messages count; when some were lost, that is
//! told, so that the reader looks at everything again.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, setsockopt,
    socket, sockopt,
};

/// One piece of news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// A device came or changed.
    Device(Device),
    /// The kernel had more to tell than fitted.
    Lost,
}

/// What is told of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Device {
    /// `block`, `net`, `input` and so on.
    pub(super) subsystem: String,
    /// What to look for in `modules.alias`; empty when nothing.
    pub(super) modalias: String,
}

/// The socket on which the kernel tells.
#[derive(Debug)]
pub(super) struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    /// Listens from now on.
    pub(super) fn listen() -> nix::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            flags,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20))?;
        const KERNEL: u32 = 1;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL))?;
        Ok(Self { socket })
    }

    /// Becomes readable when there is news.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next piece of news, if there is one.
    pub(super) fn next(&self) -> Option<News> {
        let mut buffer = [0; 8192];
        loop {
            match recvfrom::<NetlinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((length, Some(sender))) if sender.pid() == 0 => {
                    if let Some(device) = buffer.get(..length).and_then(parse) {
                        return Some(News::Device(device));
                    }
                }
                // Not from the kernel.
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(nix::Error::ENOBUFS) => return Some(News::Lost),
                Err(_) => return None,
            }
        }
    }
}

/// Reads `add@/devices/...` and the variables behind it; none when the device went away.
fn parse(message: &[u8]) -> Option<Device> {
    let text = std::str::from_utf8(message).ok()?;
    let mut parts = text.split('\0');
    let (action, _) = parts.next()?.split_once('@')?;
    if action == "remove" {
        return None;
    }
    let mut device = Device::default();
    for part in parts {
        match part.split_once('=') {
            Some(("SUBSYSTEM", value)) => device.subsystem = value.to_owned(),
            Some(("MODALIAS", value)) => device.modalias = value.to_owned(),
            _ => {}
        }
    }
    Some(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_came_is_read_and_one_that_went_is_not() {
        let message = b"add@/devices/pci0000:00/virtio1\0ACTION=add\0SUBSYSTEM=virtio\0MODALIAS=virtio:d00000002v00001AF4\0SEQNUM=7\0";
        let device = parse(message).unwrap();
        assert_eq!(device.subsystem, "virtio");
        assert_eq!(device.modalias, "virtio:d00000002v00001AF4");
        assert_eq!(parse(b"remove@/devices/x\0ACTION=remove\0"), None);
        assert_eq!(parse(b"libudev\0\xfe\xed"), None);
        assert_eq!(parse(b""), None);
    }
}
