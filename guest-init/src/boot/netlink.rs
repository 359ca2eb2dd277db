//! The kernel's links, addresses, routes and neighbours, set by netlink: just what this machine's one
//! interface needs. The kernel answers within the call, so nothing here waits.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    socket,
};

/// Bytes of a netlink header.
const HEADER: usize = 16;

/// A conversation with the kernel.
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// A request that grows by its fields: numbers are in the machine's own order.
struct Request(Vec<u8>);

impl Request {
    fn new(body: &[&[u8]]) -> Self {
        let mut bytes = vec![0; HEADER];
        for part in body {
            bytes.extend_from_slice(part);
        }
        Self(bytes)
    }

    fn with(mut self, kind: u16, value: &[u8]) -> Self {
        const ATTRIBUTE: usize = 4;
        let length = u16::try_from(value.len().saturating_add(ATTRIBUTE)).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

impl Netlink {
    pub(super) fn open() -> Result<Self, Errno> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Brings an interface up.
    pub(super) fn set_up(&mut self, interface: u32) -> Result<(), Errno> {
        let up = u32::try_from(libc::IFF_UP).unwrap_or(1).to_ne_bytes();
        // Family and type are free; then index, flags, and which flags change.
        let request = Request::new(&[&[0; 4], &interface.to_ne_bytes(), &up, &up]);
        self.ask(libc::RTM_NEWLINK, 0, request)
    }

    /// Gives an interface an address that nobody else has, usable at once.
    pub(super) fn add_address(
        &mut self,
        interface: u32,
        address: IpAddr,
        prefix: u8,
    ) -> Result<(), Errno> {
        const NO_DETECTION: u8 = 0x02; // IFA_F_NODAD
        let bytes = octets(address);
        let body = [
            family(address),
            prefix,
            NO_DETECTION,
            libc::RT_SCOPE_UNIVERSE,
        ];
        let request = Request::new(&[&body, &interface.to_ne_bytes()])
            .with(libc::IFA_LOCAL, &bytes)
            .with(libc::IFA_ADDRESS, &bytes);
        self.ask(libc::RTM_NEWADDR, MAKE, request)
    }

    /// Makes `gateway` the way to everywhere.
    pub(super) fn add_default_route(
        &mut self,
        interface: u32,
        gateway: IpAddr,
    ) -> Result<(), Errno> {
        // Lengths of destination and source, type of service, then where it belongs.
        let body = [
            family(gateway),
            0,
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_BOOT,
            libc::RT_SCOPE_UNIVERSE,
            libc::RTN_UNICAST,
        ];
        let request = Request::new(&[&body, &[0; 4]])
            .with(libc::RTA_GATEWAY, &octets(gateway))
            .with(libc::RTA_OIF, &interface.to_ne_bytes());
        self.ask(libc::RTM_NEWROUTE, MAKE, request)
    }

    /// Says which hardware address a router has, for good.
    pub(super) fn add_router(
        &mut self,
        interface: u32,
        router: IpAddr,
        hardware: [u8; 6],
    ) -> Result<(), Errno> {
        const ROUTER: u8 = 0x80; // NTF_ROUTER
        let permanent = libc::NUD_PERMANENT.to_ne_bytes();
        let flags = match router {
            IpAddr::V4(_) => 0,
            IpAddr::V6(_) => ROUTER,
        };
        let body = [family(router), 0, 0, 0];
        let request = Request::new(&[&body, &interface.to_ne_bytes(), &permanent, &[flags, 0]])
            .with(libc::NDA_DST, &octets(router))
            .with(libc::NDA_LLADDR, &hardware);
        self.ask(libc::RTM_NEWNEIGH, MAKE, request)
    }

    fn ask(&mut self, kind: u16, flags: i32, request: Request) -> Result<(), Errno> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = request.0;
        let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags);
        let header = u32::try_from(bytes.len())
            .unwrap_or(u32::MAX)
            .to_ne_bytes()
            .into_iter()
            .chain(kind.to_ne_bytes())
            .chain(flags.unwrap_or(u16::MAX).to_ne_bytes())
            .chain(self.sequence.to_ne_bytes());
        for (to, from) in bytes.iter_mut().zip(header) {
            *to = from;
        }
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut answer = [0; 1024];
        let length = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
        // The only answer to such a request: an error number, negative, or zero.
        let answer = answer.get(..length).unwrap_or_default();
        let is_result = answer.get(4..6) == Some(&NLMSG_ERROR.to_ne_bytes());
        let result = answer.get(HEADER..).and_then(<[u8]>::first_chunk);
        match result.filter(|_| is_result) {
            Some(number) => match i32::from_ne_bytes(*number) {
                0 => Ok(()),
                number => Err(Errno::from_raw(number.saturating_neg())),
            },
            None => Err(Errno::EBADMSG),
        }
    }
}

const NLMSG_ERROR: u16 = 2;
/// What is there already is put in order.
const MAKE: i32 = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

fn family(address: IpAddr) -> u8 {
    let family = match address {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    u8::try_from(family).unwrap_or(0)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
