//! A packet socket on one interface that lets through only what a DHCP client needs, as a device of
//! smoltcp's. What the kernel refuses is a packet that was not there: nothing here panics.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, recv, send};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// The longest frame that is read or sent.
const LONGEST: usize = 1514;
/// Frames that are read before others have their turn.
const FRAMES_PER_TURN: u32 = 64;

/// The socket.
#[derive(Debug)]
pub(super) struct Packets {
    socket: OwnedFd,
    budget: Cell<u32>,
}

impl Packets {
    /// Opens it on the interface with this number. Needs CAP_NET_RAW.
    pub(super) fn open(interface: u32) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Protocol zero hears nothing: no frame slips in before the filter is there.
        // SAFETY: socket(2) takes numbers only.
        let number = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        nix::Error::result(number)?;
        // SAFETY: the kernel just made this descriptor for us.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        attach_filter(socket.as_fd())?;
        bind(socket.as_fd(), interface)?;
        Ok(Self {
            socket,
            budget: Cell::new(0),
        })
    }

    /// Becomes readable when a frame has come.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Begins a turn, in which a bounded number of frames is read.
    pub(super) fn begin_turn(&self) {
        self.budget.set(FRAMES_PER_TURN);
    }
}

fn bind(socket: BorrowedFd<'_>, interface: u32) -> io::Result<()> {
    // The type of all frames, in network byte order.
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol,
        sll_ifindex: i32::try_from(interface).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the pointer is to a live address of the length that is told.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    nix::Error::result(bound)?;
    Ok(())
}

/// Lets through ARP and the unfragmented UDP datagrams for port 68.
fn attach_filter(socket: BorrowedFd<'_>) -> io::Result<()> {
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HEADER_LENGTH: u16 = 0xb1;
    const LOAD_HALF_BEHIND: u16 = 0x48;
    const EQUAL: u16 = 0x15;
    const ANY_BIT: u16 = 0x45;
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        step(LOAD_HALF, 0, 0, 12),
        step(EQUAL, 8, 0, 0x0806),
        step(EQUAL, 0, 8, 0x0800),
        step(LOAD_BYTE, 0, 0, 23),
        step(EQUAL, 0, 6, 17),
        step(LOAD_HALF, 0, 0, 20),
        step(ANY_BIT, 4, 0, 0x1fff),
        step(LOAD_HEADER_LENGTH, 0, 0, 14),
        step(LOAD_HALF_BEHIND, 0, 0, 16),
        step(EQUAL, 0, 1, 68),
        step(RETURN, 0, 0, LONGEST as u32),
        step(RETURN, 0, 0, 0),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program, which lives until after the call.
    let attached = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of_val(&filter) as libc::socklen_t,
        )
    };
    nix::Error::result(attached)?;
    Ok(())
}

impl Device for Packets {
    type RxToken<'a> = Received;
    type TxToken<'a> = ToSend<'a>;

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = LONGEST;
        // A server on this very host leaves the checksum to a network card that is not there.
        capabilities.checksum.udp = Checksum::Tx;
        capabilities
    }

    fn receive(&mut self, _: Instant) -> Option<(Received, ToSend<'_>)> {
        self.budget.set(self.budget.get().checked_sub(1)?);
        let mut frame = vec![0; LONGEST];
        let length = recv(self.socket.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT).ok()?;
        frame.truncate(length);
        Some((Received(frame), ToSend(&self.socket)))
    }

    fn transmit(&mut self, _: Instant) -> Option<ToSend<'_>> {
        Some(ToSend(&self.socket))
    }
}

/// A frame that came.
#[derive(Debug)]
pub(super) struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

/// Leave to send a frame.
#[derive(Debug)]
pub(super) struct ToSend<'a>(&'a OwnedFd);

impl TxToken for ToSend<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut frame = vec![0; length];
        let result = write(&mut frame);
        // A frame that is not sent is a frame that is lost: DHCP sends again.
        if let Err(error) = send(self.0.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT) {
            tracing::debug!(%error, "frame not sent");
        }
        result
    }
}
