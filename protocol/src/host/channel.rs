//! Packets with descriptors over `SOCK_SEQPACKET` Unix sockets: one packet, one frame. Calls block
//! or not as the socket is set; nothing here waits by itself.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::{MAX_DESCRIPTORS, MAX_PACKET};
use crate::frame::{Frame, FrameReader};
use crate::message::{Message, MessageError, encode};

/// Why a packet could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The system refused. `WouldBlock` on a non-blocking socket means: try again when it is ready.
    #[error("host channel: {0}")]
    Io(#[from] io::Error),
    /// The message cannot be encoded.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The packet would be longer than [`MAX_PACKET`].
    #[error("message of {0} bytes; a packet holds at most {MAX_PACKET}")]
    TooLong(usize),
    /// The packet is no single frame, or part of it was cut off.
    #[error("packet is not exactly one frame")]
    NotOneFrame,
}

impl ChannelError {
    /// Whether a non-blocking socket was merely not ready.
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// A packet that was received.
#[derive(Debug)]
pub struct Packet {
    /// Its frame.
    pub frame: Frame,
    /// Its descriptors, close-on-exec, in the order they were attached.
    pub descriptors: Vec<OwnedFd>,
}

/// Sends one message with descriptors. The packet goes out whole or not at all.
pub fn send<M: Message>(
    socket: BorrowedFd<'_>,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), ChannelError> {
    send_bytes(socket, &encode(message)?, descriptors)
}

/// Sends one encoded frame with descriptors.
pub fn send_bytes(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), ChannelError> {
    if bytes.len() > MAX_PACKET || descriptors.len() > MAX_DESCRIPTORS {
        return Err(ChannelError::TooLong(bytes.len()));
    }
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        let sent = sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}

/// Receives one packet; none means that the peer has closed.
pub fn receive(socket: BorrowedFd<'_>) -> Result<Option<Packet>, ChannelError> {
    let mut buffer = vec![0; MAX_PACKET];
    let mut control = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let (length, descriptors, cut) = loop {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let received = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        );
        match received {
            Ok(message) => {
                let mut descriptors = Vec::new();
                for part in message.cmsgs().map_err(io::Error::from)? {
                    if let ControlMessageOwned::ScmRights(numbers) = part {
                        for number in numbers {
                            // SAFETY: the kernel just made this descriptor for us; nobody else
                            // knows its number.
                            descriptors.push(unsafe { OwnedFd::from_raw_fd(number) });
                        }
                    }
                }
                let cut = message
                    .flags
                    .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
                break (message.bytes, descriptors, cut);
            }
            Err(nix::Error::EINTR) => {}
            // A peer that died with unread packets of ours.
            Err(nix::Error::ECONNRESET) => return Ok(None),
            Err(error) => return Err(io::Error::from(error).into()),
        }
    };
    if length == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    let mut rest = buffer.get(..length).ok_or(ChannelError::NotOneFrame)?;
    match FrameReader::new().push(&mut rest) {
        Ok(Some(frame)) if rest.is_empty() && !cut => Ok(Some(Packet { frame, descriptors })),
        _ => Err(ChannelError::NotOneFrame),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use crate::host::vmm::{Connect, Connected};
    use crate::message::decode;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap()
    }

    #[test]
    fn a_packet_arrives_with_its_descriptors_in_order() {
        let (ours, theirs) = pair();
        let (a, mut b) = (tempfile(), tempfile());
        let connect = Connect {
            ticket: 7,
            port: 1024,
            wait_for_agent: true,
        };
        send(ours.as_fd(), &connect, &[a.as_fd(), b.as_fd()]).unwrap();
        send(ours.as_fd(), &Connected { ticket: 7 }, &[]).unwrap();
        let packet = receive(theirs.as_fd()).unwrap().unwrap();
        assert_eq!(decode::<Connect>(&packet.frame).unwrap(), connect);
        let [_, second] = <[OwnedFd; 2]>::try_from(packet.descriptors).unwrap();
        use std::io::{Read, Seek, Write};
        std::fs::File::from(second).write_all(b"through").unwrap();
        b.rewind().unwrap();
        let mut text = String::new();
        b.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        let packet = receive(theirs.as_fd()).unwrap().unwrap();
        assert_eq!(
            decode::<Connected>(&packet.frame).unwrap(),
            Connected { ticket: 7 }
        );
        assert!(packet.descriptors.is_empty());
        drop(ours);
        assert!(receive(theirs.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_packet_that_is_not_one_frame_is_refused() {
        let (ours, theirs) = pair();
        send_bytes(ours.as_fd(), b"\x09\0\0\0\0\0\0short", &[]).unwrap();
        assert!(matches!(
            receive(theirs.as_fd()),
            Err(ChannelError::NotOneFrame)
        ));
        send_bytes(ours.as_fd(), b"\0\0\0\0\0\0\0more", &[]).unwrap();
        assert!(matches!(
            receive(theirs.as_fd()),
            Err(ChannelError::NotOneFrame)
        ));
        let long = vec![0; MAX_PACKET + 1];
        assert!(matches!(
            send_bytes(ours.as_fd(), &long, &[]),
            Err(ChannelError::TooLong(_))
        ));
    }

    fn tempfile() -> std::fs::File {
        nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .unwrap()
            .into()
    }
}
