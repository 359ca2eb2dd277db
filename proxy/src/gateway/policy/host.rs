//! The host's own addresses, shared by the policies of all VMs: without a rule no VM reaches the
//! host by them. They are read from the kernel and read again when the kernel says that they
//! changed.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{PoisonError, RwLock};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;

/// Groups of netlink messages: an IPv4 or IPv6 address came or went (`RTMGRP_IPV4_IFADDR`,
/// `RTMGRP_IPV6_IFADDR`).
const ADDRESS_GROUPS: u32 = 0x10 | 0x100;

/// The set.
#[derive(Debug, Default)]
pub struct HostAddresses(RwLock<HashSet<IpAddr>>);

impl HostAddresses {
    /// These addresses.
    pub fn new(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let host = Self::default();
        host.set(addresses);
        host
    }

    /// Replaces the set; every decision after this call goes by the new one.
    pub fn set(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        let addresses = addresses.into_iter().map(|a| a.to_canonical()).collect();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    /// Whether an address is one of the host's.
    pub fn contains(&self, address: IpAddr) -> bool {
        let set = self.0.read().unwrap_or_else(PoisonError::into_inner);
        set.contains(&address.to_canonical())
    }

    /// Replaces the set by what the kernel has now in this process's network namespace.
    pub fn read(&self) -> io::Result<()> {
        self.set(interface_addresses()?);
        Ok(())
    }

    /// Reads the set and keeps it as the kernel has it, until the future is dropped. It ends only
    /// with an error; the set stays as it was last read.
    pub async fn follow(&self) -> io::Result<()> {
        let events = events()?;
        // After the subscription: no change is missed between the two.
        self.read()?;
        loop {
            let mut ready = events.readable().await?;
            let mut changed = false;
            // What a message says does not matter, and neither do lost ones (ENOBUFS): the whole
            // set is read again. Bounded, so that a storm of changes is answered by one reading.
            let mut buffer = [0; 4096];
            for _ in 0..1024 {
                match recv(
                    events.get_ref().as_raw_fd(),
                    &mut buffer,
                    MsgFlags::MSG_DONTWAIT,
                ) {
                    Ok(_) | Err(nix::Error::ENOBUFS) => changed = true,
                    Err(nix::Error::EAGAIN) => {
                        ready.clear_ready();
                        break;
                    }
                    Err(nix::Error::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if changed {
                self.read()?;
            }
        }
    }
}

/// Every address of every interface.
pub fn interface_addresses() -> io::Result<Vec<IpAddr>> {
    let of_interface = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    };
    Ok(nix::ifaddrs::getifaddrs()?
        .filter_map(of_interface)
        .collect())
}

fn events() -> io::Result<AsyncFd<OwnedFd>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkRoute,
    )?;
    bind(
        socket.as_fd().as_raw_fd(),
        &NetlinkAddr::new(0, ADDRESS_GROUPS),
    )?;
    // SAFETY: the descriptor is owned, and neither closed nor replaced before the AsyncFd is
    // dropped: nothing here takes it out again.
    unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_loopback_addresses_are_read_from_the_kernel() {
        let host = HostAddresses::default();
        host.read().unwrap();
        assert!(host.contains("127.0.0.1".parse().unwrap()));
        assert!(host.contains("::ffff:127.0.0.1".parse().unwrap()));
        assert!(!host.contains("8.8.8.8".parse().unwrap()));
    }

    #[test]
    fn an_address_that_comes_is_the_hosts_and_one_that_goes_is_not() {
        // A thread's own network namespace, which ends with the thread.
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let ip = |arguments: &str| {
                let ok = Command::new("ip")
                    .args(arguments.split(' '))
                    .status()
                    .unwrap();
                assert!(ok.success(), "ip {arguments}");
            };
            ip("link set lo up");
            ip("address add 192.0.2.9/32 dev lo");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let host = Arc::new(HostAddresses::default());
                let wait = |address: &'static str, there: bool| {
                    let host = Arc::clone(&host);
                    async move {
                        while host.contains(address.parse().unwrap()) != there {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                    }
                };
                let changes = async {
                    wait("192.0.2.9", true).await;
                    ip("address add 198.51.100.9/32 dev lo");
                    wait("198.51.100.9", true).await;
                    ip("-6 address add 2001:db8::9/128 dev lo");
                    wait("2001:db8::9", true).await;
                    ip("address del 198.51.100.9/32 dev lo");
                    wait("198.51.100.9", false).await;
                };
                tokio::select! {
                    result = host.follow() => panic!("{result:?}"),
                    () = tokio::time::sleep(Duration::from_secs(60)) => panic!("never seen"),
                    () = changes => {}
                }
            });
        })
        .join()
        .unwrap();
    }
}
