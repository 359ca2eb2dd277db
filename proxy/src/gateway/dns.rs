//! Names for a VM. Without name servers every question is answered with a failure.

use std::sync::Arc;

use super::policy::Policy;

/// How a question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// On a stream.
    Tcp,
}

/// Resolves for one VM.
#[derive(Debug)]
pub struct Resolver {
    _policy: Arc<Policy>,
}

impl Resolver {
    /// For a VM that calls itself `hostname`.
    pub fn new(policy: Arc<Policy>, _hostname: &str) -> Self {
        Self { _policy: policy }
    }

    /// The answer to a query; none for one that deserves no answer.
    pub async fn answer(&self, mut query: Vec<u8>, _over: Transport) -> Option<Vec<u8>> {
        let [_, _, flags, code, ..] = query.as_mut_slice() else {
            return None;
        };
        if *flags & 0x80 != 0 {
            return None;
        }
        *flags |= 0x80;
        // SERVFAIL.
        *code = 2;
        Some(query)
    }
}
