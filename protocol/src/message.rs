//! Messages: typed bodies with a kind of their own. The encoding is postcard, which is positional:
//! a changed body is a new kind, never a longer old one.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{ErrorBody, ErrorCode};
use crate::frame::{self, Frame, Kind};

/// A body that travels in frames of one kind.
pub trait Message: Serialize + DeserializeOwned {
    /// The kind of the frames that carry it.
    const KIND: Kind;
}

macro_rules! messages {
    ($($kind:ident => $type:ty,)*) => {
        $(impl $crate::message::Message for $type {
            const KIND: $crate::frame::Kind = $crate::frame::Kind::$kind;
        })*
    };
}
pub(crate) use messages;

/// Why a body could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The body is no value of the type that its kind stands for.
    #[error("malformed body of kind {kind}: {cause}")]
    Malformed {
        /// The frame's kind.
        kind: Kind,
        /// What postcard found.
        cause: postcard::Error,
    },
    /// The frame has another kind than the one expected here.
    #[error("expected kind {expected}, got {got}")]
    Unexpected {
        /// The kind that was due.
        expected: Kind,
        /// The kind that came.
        got: Kind,
    },
    /// The peer answered with an error.
    #[error(transparent)]
    Refused(#[from] ErrorBody),
    /// The value is too long for a frame.
    #[error(transparent)]
    Frame(#[from] frame::FrameError),
}

/// The whole frame, header and body, that carries `message`.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, MessageError> {
    let body = encode_body(message)?;
    let mut out = Vec::with_capacity(body.len().saturating_add(frame::HEADER_LEN));
    frame::append(&mut out, M::KIND, &body)?;
    Ok(out)
}

/// The body alone.
pub fn encode_body<M: Message>(message: &M) -> Result<Vec<u8>, MessageError> {
    postcard::to_allocvec(message).map_err(|cause| MessageError::Malformed {
        kind: M::KIND,
        cause,
    })
}

/// Reads a body of kind `M::KIND`. Bytes left over are an error.
pub fn decode_body<M: Message>(body: &[u8]) -> Result<M, MessageError> {
    let malformed = |cause| MessageError::Malformed {
        kind: M::KIND,
        cause,
    };
    let (message, rest) = postcard::take_from_bytes(body).map_err(malformed)?;
    if rest.is_empty() {
        Ok(message)
    } else {
        Err(malformed(postcard::Error::DeserializeBadEncoding))
    }
}

/// Reads the frame as an `M`; an error frame becomes [`MessageError::Refused`].
pub fn decode<M: Message>(frame: &Frame) -> Result<M, MessageError> {
    if frame.kind == M::KIND {
        decode_body(&frame.body)
    } else if frame.kind == Kind::ERROR {
        Err(MessageError::Refused(decode_body::<ErrorBody>(
            &frame.body,
        )?))
    } else {
        Err(MessageError::Unexpected {
            expected: M::KIND,
            got: frame.kind,
        })
    }
}

impl From<MessageError> for ErrorBody {
    /// What the sender of a message that could not be read is told.
    fn from(error: MessageError) -> Self {
        match error {
            MessageError::Refused(body) => body,
            MessageError::Unexpected { .. } => {
                Self::caller(ErrorCode::Unsupported, error.to_string())
            }
            MessageError::Frame(_) => Self::caller(ErrorCode::FrameTooLarge, error.to_string()),
            MessageError::Malformed { .. } => Self::caller(ErrorCode::Malformed, error.to_string()),
        }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! What the tests of all messages share.

    use std::fmt::Debug;

    use super::{Message, decode_body, encode};
    use crate::frame::HEADER_LEN;

    /// The frame is these bytes, and these bytes are the message.
    #[track_caller]
    pub(crate) fn golden<M: Message + PartialEq + Debug>(message: &M, bytes: &[u8]) {
        assert_eq!(encode(message).unwrap(), bytes);
        assert_eq!(&decode_body::<M>(&bytes[HEADER_LEN..]).unwrap(), message);
    }
}
