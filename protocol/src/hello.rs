//! The first exchange of a connection: who is there, and what may be asked.

use serde::{Deserialize, Serialize};

use crate::message::messages;

/// The generation of the public protocol that this build speaks.
pub const GENERATION: u32 = 1;

/// The name that both sides offer in TLS's application-layer protocol negotiation (RFC 7301).
pub const ALPN: &[u8] = b"supvm/1";

/// First message on the first stream of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The newest generation that the client speaks.
    pub generation: u32,
    /// The client's secret, at most [`MAX_TOKEN`] bytes.
    pub token: String,
}

/// The longest token, in bytes.
pub const MAX_TOKEN: usize = 256;

/// Answer to an accepted [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloOk {
    /// The generation that the server will speak: at most the client's.
    pub generation: u32,
    /// What the server allows on this connection.
    pub limits: Limits,
}

/// What one connection may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Streams open at the same time, the first one included. One more is answered
    /// `TooManyStreams`.
    pub max_streams: u32,
    /// The longest frame body, in bytes.
    pub max_body: u32,
    /// Virtual CPUs of one VM.
    pub max_cpus: u16,
    /// Memory of one VM, in MiB.
    pub max_memory_mib: u32,
    /// Disk of one VM, in MiB.
    pub max_disk_mib: u32,
}

messages! {
    HELLO => Hello,
    HELLO_OK => HelloOk,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::testing::golden;

    #[test]
    fn golden_hello() {
        let hello = Hello {
            generation: 1,
            token: "ab".into(),
        };
        golden(&hello, &[4, 0, 0, 0, 0x01, 0x00, 0, 1, 2, b'a', b'b']);
    }

    #[test]
    fn golden_hello_ok() {
        let limits = Limits {
            max_streams: 256,
            max_body: 1,
            max_cpus: 2,
            max_memory_mib: 3,
            max_disk_mib: 4,
        };
        let hello = HelloOk {
            generation: 1,
            limits,
        };
        golden(
            &hello,
            &[7, 0, 0, 0, 0x02, 0x00, 0, 1, 0x80, 0x02, 1, 2, 3, 4],
        );
    }
}
