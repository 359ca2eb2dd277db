//! What can go wrong between a client and a VM, as fields: who has to change something, and
//! whether the same request may be sent again.

use std::io;

use protocol::message::MessageError;
use protocol::{ErrorBody, ErrorCode, Fault, FrameError, Retry};

use crate::endpoint::Endpoint;

/// Who has to change something for the request to succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Side {
    /// Whoever made the request.
    Caller,
    /// The software in the VM.
    Guest,
    /// The appliance.
    Host,
    /// The way there.
    Network,
}

/// Why a request was not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// A TLS endpoint needs the appliance's certificate authority.
    #[error("{endpoint} needs the appliance's CA certificate: name its PEM file in SUP_CA")]
    NoCa {
        /// Where to.
        endpoint: Endpoint,
    },
    /// Nobody answers there.
    #[error("cannot connect to {endpoint}: {cause}")]
    Connect {
        /// Where to.
        endpoint: Endpoint,
        /// What the system said.
        cause: io::Error,
    },
    /// The TLS handshake failed.
    #[error("no trusted connection to {endpoint}: {cause}")]
    Tls {
        /// Where to.
        endpoint: Endpoint,
        /// What TLS found.
        cause: io::Error,
    },
    /// The endpoint was too slow while the connection was made.
    #[error("{endpoint} did not answer within {seconds} s")]
    TooSlow {
        /// Where to.
        endpoint: Endpoint,
        /// How long we waited.
        seconds: u64,
    },
    /// The appliance or the agent answered with an error.
    #[error("{}", _0.message)]
    Refused(ErrorBody),
    /// The connection to the appliance ended.
    #[error("the connection to the appliance was lost: {0}")]
    Lost(String),
    /// The stream into the VM ended before the command did.
    #[error("the VM stopped or its agent died before the command ended")]
    AgentGone,
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Broken(String),
    /// The request cannot be sent as it is.
    #[error("the request cannot be sent: {0}")]
    Unsendable(String),
    /// The system gave no random numbers.
    #[error("no random numbers from the system: {0}")]
    Random(getrandom::Error),
}

impl ClientError {
    /// Who has to change something.
    pub fn side(&self) -> Side {
        match self {
            Self::NoCa { .. } | Self::Unsendable(_) | Self::Random(_) => Side::Caller,
            Self::Connect { .. } | Self::TooSlow { .. } | Self::Tls { .. } | Self::Lost(_) => {
                Side::Network
            }
            Self::AgentGone => Side::Guest,
            Self::Broken(_) => Side::Host,
            Self::Refused(error) => match error.fault {
                Fault::Caller => Side::Caller,
                Fault::Guest => Side::Guest,
                _ => Side::Host,
            },
        }
    }

    /// Whether the same request may be sent again, as the appliance says.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Refused(error) => error.retry,
            _ => Retry::No,
        }
    }

    /// The appliance's or the agent's error number.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(error) => Some(error.code),
            _ => None,
        }
    }

    /// More lines, such as the end of a VM's console; empty when there are none.
    pub fn detail(&self) -> &str {
        match self {
            Self::Refused(error) => &error.detail,
            _ => "",
        }
    }

    /// What a person can do about it; empty when the message says so itself.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Connect { .. } | Self::TooSlow { .. } => {
                "check that the appliance runs and that SUP_ENDPOINT names it"
            }
            Self::Tls { .. } => "check that SUP_CA is this appliance's CA certificate",
            Self::Lost(_) => "try again",
            Self::AgentGone => "see `sup inspect` for how the VM ended",
            Self::Broken(_) => "check that client and appliance fit together with `sup version`",
            Self::Refused(error) if error.code == ErrorCode::Unauthenticated => {
                "check that SUP_TOKEN is a token of this appliance"
            }
            _ => "",
        }
    }
}

impl From<MessageError> for ClientError {
    fn from(error: MessageError) -> Self {
        match error {
            MessageError::Refused(body) => Self::Refused(body),
            other => Self::Broken(other.to_string()),
        }
    }
}

impl From<FrameError> for ClientError {
    fn from(error: FrameError) -> Self {
        Self::Broken(error.to_string())
    }
}
