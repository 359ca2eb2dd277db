//! The header of a vsock packet as a value: 44 bytes, copied out of guest memory once, and what its
//! operation means. (The `virtio-vsock` crate's packet takes a chain of two descriptors at most;
//! Linux sends payloads in more.)
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

/// Bytes of a header.
pub(super) const HEADER_SIZE: usize = 44;
/// The CID of the host.
pub(super) const HOST_CID: u64 = 2;
/// The type of a stream, the only one there is here.
pub(super) const STREAM: u16 = 1;

/// The sender of a SHUTDOWN will not receive any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender of a SHUTDOWN will not send any more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    Unknown(u16),
}

impl Op {
    const fn from_wire(op: u16) -> Self {
        match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    const fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) source_cid: u64,
    pub(super) target_cid: u64,
    pub(super) source_port: u32,
    pub(super) target_port: u32,
    pub(super) length: u32,
    pub(super) kind: u16,
    pub(super) op: Op,
    pub(super) flags: u32,
    pub(super) buffer_size: u32,
    pub(super) forwarded: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            source_cid: u64::from_le_bytes(take(&mut rest)),
            target_cid: u64::from_le_bytes(take(&mut rest)),
            source_port: u32::from_le_bytes(take(&mut rest)),
            target_port: u32::from_le_bytes(take(&mut rest)),
            length: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: Op::from_wire(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buffer_size: u32::from_le_bytes(take(&mut rest)),
            forwarded: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let fields = self
            .source_cid
            .to_le_bytes()
            .into_iter()
            .chain(self.target_cid.to_le_bytes())
            .chain(self.source_port.to_le_bytes())
            .chain(self.target_port.to_le_bytes())
            .chain(self.length.to_le_bytes())
            .chain(self.kind.to_le_bytes())
            .chain(self.op.to_wire().to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.buffer_size.to_le_bytes())
            .chain(self.forwarded.to_le_bytes());
        for (to, from) in bytes.iter_mut().zip(fields) {
            *to = from;
        }
        bytes
    }

    /// The reset that answers this packet.
    pub(super) const fn reset(&self) -> Self {
        Self {
            source_cid: self.target_cid,
            target_cid: self.source_cid,
            source_port: self.target_port,
            target_port: self.source_port,
            length: 0,
            // Linux ignores a reset of a type it does not know.
            kind: STREAM,
            op: Op::Reset,
            flags: 0,
            buffer_size: 0,
            forwarded: 0,
        }
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut value = [0; N];
    if let Some((now, later)) = rest.split_first_chunk::<N>() {
        value = *now;
        *rest = later;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_44_little_endian_bytes_in_the_order_of_the_specification() {
        let header = Header {
            source_cid: 2,
            target_cid: 3,
            source_port: 0x0102_0304,
            target_port: 1024,
            length: 5,
            kind: STREAM,
            op: Op::Data,
            flags: 6,
            buffer_size: 7,
            forwarded: 8,
        };
        let bytes = header.to_bytes();
        assert_eq!(
            bytes[..20],
            [2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1]
        );
        assert_eq!(bytes[20..32], [0, 4, 0, 0, 5, 0, 0, 0, 1, 0, 5, 0]);
        assert_eq!(bytes[32..], [6, 0, 0, 0, 7, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(Header::parse(&bytes), header);
    }
}
