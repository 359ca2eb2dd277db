//! What can go wrong between a client and a VM, as fields: who has to change something, and
//! whether the same request may be sent again.

use std::io;

use protocol::message::MessageError;
use protocol::{ErrorBody, ErrorCode, Fault, FrameError, Retry};

use crate::endpoint::Endpoint;
use crate::file::FileError;

/// Who has to change something for the request to succeed.
///
/// ```no_run
/// # async fn example(client: client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// if let Err(error) = client.list().await {
///     let whose = match error.side() {
///         client::Side::Network => "the way there",
///         client::Side::Caller => "the request",
///         _ => "the appliance or the VM",
///     };
///     println!("{whose}: {error}");
/// }
/// # Ok(())
/// # }
/// ```
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
///
/// ```no_run
/// # async fn example(client: client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use client::Side;
/// if let Err(error) = client.get("web".parse()?).await {
///     match error.side() {
///         Side::Caller => println!("change the request: {error}"),
///         Side::Network => println!("check the network: {error}; {}", error.advice()),
///         _ => println!("{error}\n{}", error.detail()),
///     }
/// }
/// # Ok(())
/// # }
/// ```
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
    /// An operation on files in the VM was refused.
    #[error(transparent)]
    File(Box<FileError>),
    /// The connection to the appliance ended while the request was under way. The next request
    /// makes a new one.
    #[error("the connection to the appliance was lost: {reason}")]
    Lost {
        /// How it ended.
        reason: String,
        /// The request may be sent again: nothing is done twice. Without it, it may have been
        /// carried out or not.
        safe: bool,
    },
    /// The stream into the VM ended before the operation did.
    #[error("the stream into the VM ended early: the VM stopped or its agent died")]
    AgentGone,
    /// A file in the VM is not the one any more that it was.
    #[error("{path} changed while it was read: {what}")]
    Changed {
        /// Which one.
        path: String,
        /// What is different.
        what: String,
    },
    /// What arrived has another checksum than what was sent.
    #[error("{path} did not arrive as it was sent: its BLAKE3 checksum differs")]
    Damaged {
        /// Which one.
        path: String,
    },
    /// There is more than the caller wanted to take.
    #[error("{what} is longer than {limit}")]
    TooLong {
        /// What it was.
        what: String,
        /// The caller's limit.
        limit: u64,
    },
    /// What was to be sent could not be read.
    #[error("cannot read what is to be sent: {0}")]
    Source(io::Error),
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Broken(String),
    /// The request cannot be sent as it is.
    #[error("the request cannot be sent: {0}")]
    Unsendable(String),
    /// The system gave no random numbers.
    #[error("no random numbers from the system: {0}")]
    Random(getrandom::Error),
    /// The blocking face was used where blocking is not allowed, or had no thread.
    #[error("the blocking client cannot work here: {0}")]
    Blocking(String),
}

impl ClientError {
    /// Who has to change something.
    pub fn side(&self) -> Side {
        match self {
            Self::NoCa { .. }
            | Self::Unsendable(_)
            | Self::Random(_)
            | Self::TooLong { .. }
            | Self::Source(_)
            | Self::Blocking(_) => Side::Caller,
            Self::Connect { .. }
            | Self::TooSlow { .. }
            | Self::Tls { .. }
            | Self::Lost { .. }
            | Self::Damaged { .. } => Side::Network,
            Self::AgentGone | Self::Changed { .. } => Side::Guest,
            Self::Broken(_) => Side::Host,
            Self::Refused(error) => side(error.fault),
            Self::File(error) => side(error.body().fault),
        }
    }

    /// Whether the same request may be sent again: as the appliance or the agent says, and for a
    /// lost connection as the kind of the request allows.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Lost { safe: true, .. } | Self::Damaged { .. } => Retry::Safe,
            // Nothing was asked yet.
            Self::Connect { .. } | Self::TooSlow { .. } => Retry::Safe,
            _ => self.body().map_or(Retry::No, |body| body.retry),
        }
    }

    /// The appliance's or the agent's error number.
    pub fn code(&self) -> Option<ErrorCode> {
        self.body().map(|body| body.code)
    }

    /// More lines, such as the end of a VM's console; empty when there are none.
    pub fn detail(&self) -> &str {
        self.body().map_or("", |body| &body.detail)
    }

    /// What the appliance or the agent answered, if they did.
    pub fn body(&self) -> Option<&ErrorBody> {
        match self {
            Self::Refused(body) => Some(body),
            Self::File(error) => Some(error.body()),
            _ => None,
        }
    }

    /// The error of the file system in the VM, if it is one.
    pub fn file(&self) -> Option<&FileError> {
        match self {
            Self::File(error) => Some(error),
            _ => None,
        }
    }

    /// An error frame's content.
    pub(crate) fn refused(body: ErrorBody) -> Self {
        match FileError::new(body) {
            Ok(error) => Self::File(Box::new(error)),
            Err(body) => Self::Refused(body),
        }
    }

    /// What a source said, which may be one of ours.
    pub(crate) fn unwrapped(self) -> Self {
        match self {
            Self::Source(error) => error.into(),
            other => other,
        }
    }

    /// The connection is gone; whether the request may be repeated is not known here.
    pub(crate) fn lost(reason: impl ToString) -> Self {
        Self::Lost {
            reason: reason.to_string(),
            safe: false,
        }
    }

    /// The same error of a request that does nothing twice.
    pub(crate) fn repeatable(self) -> Self {
        match self {
            Self::Lost { reason, .. } => Self::Lost { reason, safe: true },
            other => other,
        }
    }

    /// What a person can do about it; empty when the message says so itself.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Connect { .. } | Self::TooSlow { .. } => {
                "check that the appliance runs and that SUP_ENDPOINT names it"
            }
            Self::Tls { .. } => "check that SUP_CA is this appliance's CA certificate",
            Self::Lost { safe: true, .. } | Self::Damaged { .. } | Self::Changed { .. } => {
                "try again"
            }
            Self::Lost { .. } => "look whether it was done before you try again",
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
            MessageError::Refused(body) => Self::refused(body),
            other => Self::Broken(other.to_string()),
        }
    }
}

impl From<FrameError> for ClientError {
    fn from(error: FrameError) -> Self {
        Self::Broken(error.to_string())
    }
}

fn side(fault: Fault) -> Side {
    match fault {
        Fault::Caller => Side::Caller,
        Fault::Guest => Side::Guest,
        _ => Side::Host,
    }
}

/// For what reads and writes as `std` and tokio do. The error itself is inside.
impl From<ClientError> for io::Error {
    fn from(error: ClientError) -> Self {
        let kind = match &error {
            ClientError::Lost { .. } => io::ErrorKind::ConnectionReset,
            ClientError::AgentGone | ClientError::Changed { .. } => io::ErrorKind::UnexpectedEof,
            ClientError::Broken(_) | ClientError::Damaged { .. } => io::ErrorKind::InvalidData,
            ClientError::File(error) => error.kind(),
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// The other way: one of ours comes out again, any other is one of the caller's own.
impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        error.downcast().unwrap_or_else(Self::Source)
    }
}
