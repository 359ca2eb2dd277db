//! Control and proxy. Proxy listens on the socket it was started with; control connects and tells
//! it what to serve. Proxy passes the requests of clients on, each with the client's token, because
//! control checks tokens and proxy keeps nothing. While no control is there, requests wait.

use serde::{Deserialize, Serialize};

use crate::frame::Kind;
use crate::message::messages;

/// Kinds of this module.
impl Kind {
    /// [`Serve`], control to proxy, answered by [`Kind::SERVING`].
    pub const SERVE: Self = Self(0x8300);
    /// [`Serving`].
    pub const SERVING: Self = Self(0x8301);
    /// [`ApiRequest`], proxy to control.
    pub const API_REQUEST: Self = Self(0x8302);
    /// [`ApiReply`], control to proxy.
    pub const API_REPLY: Self = Self(0x8303);
    /// [`ApiAbandoned`], proxy to control.
    pub const API_ABANDONED: Self = Self(0x8304);
}

/// The names of the descriptors that proxy is started with.
pub mod descriptor {
    /// Its listening control socket (`SOCK_SEQPACKET`).
    pub const LISTEN: &str = "listen";
    /// The API's listening Unix stream socket.
    pub const API: &str = "api";
}

/// What to serve. Sent again, it replaces what was said before without ending connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serve {
    /// Address and port for the API over TLS, such as `[::]:7443`; empty for none.
    pub api_address: String,
    /// The certificate chain to show, leaf first, each in DER.
    pub certificates: Vec<Vec<u8>>,
    /// The leaf's private key, PKCS #8 in DER.
    pub key: Vec<u8>,
    /// Streams that one connection may have open.
    pub max_streams: u32,
    /// Connections at the same time, over all clients.
    pub max_connections: u32,
}

/// Answer to [`Serve`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// Where the API listens, with the actual port; empty for nowhere.
    pub api_address: String,
    /// Why it does not listen there; empty when all is well.
    pub message: String,
}

/// A client's request. `Hello` comes this way too; control answers it like any other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiRequest {
    /// Chosen by proxy, given back in the answer.
    pub ticket: u64,
    /// What the client's `Hello` said.
    pub token: String,
    /// The frame's kind.
    pub kind: u16,
    /// The frame's body, at most [`MAX_REQUEST`](crate::vm::MAX_REQUEST) bytes.
    pub body: Vec<u8>,
}

/// The answer. When its kind is `OPENED` it carries one descriptor: the stream to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiReply {
    /// The request's.
    pub ticket: u64,
    /// The answer's kind.
    pub kind: u16,
    /// The answer's body.
    pub body: Vec<u8>,
}

/// The client went away before the answer: nobody waits for it any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiAbandoned {
    /// The request's.
    pub ticket: u64,
}

messages! {
    SERVE => Serve,
    SERVING => Serving,
    API_REQUEST => ApiRequest,
    API_REPLY => ApiReply,
    API_ABANDONED => ApiAbandoned,
}
