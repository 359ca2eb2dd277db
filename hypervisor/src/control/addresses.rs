//! The host's addresses, which the API's certificate names: what they are, and that they have
//! changed. The kernel tells of changes; nothing here looks by itself.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;

/// Most addresses that a certificate names.
const MOST: usize = 32;

/// The kernel's news of addresses.
pub(crate) struct AddressNews(AsyncFd<OwnedFd>);

impl AddressNews {
    /// Listens from now on.
    pub(crate) fn listen() -> io::Result<Self> {
        // linux/rtnetlink.h: RTMGRP_IPV4_IFADDR and RTMGRP_IPV6_IFADDR.
        const GROUPS: u32 = 0x10 | 0x100;
        let news = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )?;
        bind(news.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
        // SAFETY: the descriptor is owned, and neither closed nor replaced before the AsyncFd is
        // dropped: nothing here takes it out again.
        let news = unsafe { AsyncFd::register(news) };
        Ok(Self(news.map_err(io::Error::from)?))
    }

    /// Waits until there was some. What it was does not matter: the reader looks at everything.
    pub(crate) async fn wait(&self) -> io::Result<()> {
        let mut buffer = vec![0; 32 << 10];
        loop {
            let mut guard = self.0.readable().await?;
            let mut some = false;
            loop {
                let number = self.0.get_ref().as_raw_fd();
                match recv(number, &mut buffer, MsgFlags::empty()) {
                    // More than fitted is news as well.
                    Ok(_) | Err(nix::Error::ENOBUFS) => some = true,
                    Err(nix::Error::EINTR) => {}
                    Err(nix::Error::EAGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            guard.clear_ready();
            if some {
                return Ok(());
            }
        }
    }
}

/// The addresses of this host's interfaces, loopback aside, in order.
pub(crate) fn host_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    let mut addresses: Vec<IpAddr> = interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            if let Some(v4) = address.as_sockaddr_in() {
                return Some(IpAddr::from(v4.ip()));
            }
            address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip()))
        })
        .filter(|address| !address.is_loopback())
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses.truncate(MOST);
    addresses
}
