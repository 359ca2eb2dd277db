//! The way to an appliance, connection after connection: the next request after a loss connects
//! again. Attempts are bounded and spaced; what was under way on the old connection is not repeated
//! here, because only whoever asked knows whether that is safe.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use protocol::hello::Limits;
use protocol::{Fault, Retry};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::connection::{Connection, Stream};
use crate::endpoint::Endpoint;
use crate::error::ClientError;
use crate::trust::Trust;

/// How often a lost connection is tried to be made again for one request.
const ATTEMPTS: u32 = 8;

/// No attempt begins later than this.
const PATIENCE: Duration = Duration::from_secs(30);

/// The first pause between attempts; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// See the module.
pub(crate) struct Link {
    endpoint: Endpoint,
    token: String,
    trust: Trust,
    current: Mutex<Arc<Connection>>,
    limits: StdMutex<Option<Limits>>,
    closed: AtomicBool,
    /// How often all attempts have failed.
    failures: AtomicU64,
}

impl fmt::Debug for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The token is a secret.
        formatter
            .debug_struct("Link")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl Link {
    /// Connects, in one attempt: whoever names a wrong endpoint should hear of it at once.
    pub(crate) async fn new(
        endpoint: Endpoint,
        token: String,
        trust: Trust,
    ) -> Result<Self, ClientError> {
        let connection = Connection::new(&endpoint, &token, &trust).await?;
        Ok(Self {
            endpoint,
            token,
            trust,
            limits: StdMutex::new(connection.limits().copied()),
            current: Mutex::new(connection),
            closed: AtomicBool::new(false),
            failures: AtomicU64::new(0),
        })
    }

    /// What the appliance allowed when it was connected to last.
    pub(crate) fn limits(&self) -> Option<Limits> {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream, on a new connection if the old one is gone. Nothing was sent on it yet.
    pub(crate) async fn stream(&self) -> Result<Stream, ClientError> {
        let first = self.connection().await?;
        match first.stream().await {
            // It broke just now; nothing was asked on it.
            Err(ClientError::Lost { .. }) => {
                let stream = self.connection().await?.stream().await;
                stream.map_err(ClientError::repeatable)
            }
            other => other,
        }
    }

    /// Says goodbye, and connects never again.
    pub(crate) async fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        let current = Arc::clone(&*self.current.lock().await);
        current.close().await;
    }

    async fn connection(&self) -> Result<Arc<Connection>, ClientError> {
        let failures = self.failures.load(Ordering::Relaxed);
        let mut current = self.current.lock().await;
        if self.closed.load(Ordering::Relaxed) {
            return Err(ClientError::lost("it was closed").repeatable());
        }
        if !current.has_ended() {
            return Ok(Arc::clone(&current));
        }
        if self.failures.load(Ordering::Relaxed) != failures {
            // Somebody has tried for a while just now, while we waited for our turn.
            return Err(ClientError::Connect {
                endpoint: self.endpoint.clone(),
                cause: io::Error::other("others have just tried and given up"),
            });
        }
        let connected = self.connect_again().await;
        match &connected {
            Ok(connection) => {
                *self.limits.lock().unwrap_or_else(PoisonError::into_inner) =
                    connection.limits().copied();
                *current = Arc::clone(connection);
            }
            Err(_) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
            }
        }
        connected
    }

    async fn connect_again(&self) -> Result<Arc<Connection>, ClientError> {
        let begin = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut left = ATTEMPTS;
        loop {
            left = left.saturating_sub(1);
            match Connection::new(&self.endpoint, &self.token, &self.trust).await {
                Ok(connection) => return Ok(connection),
                Err(error) => {
                    let over = left == 0
                        || begin.elapsed() > PATIENCE
                        || self.closed.load(Ordering::Relaxed);
                    if over || !may_pass(&error) {
                        return Err(error.repeatable());
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = pause.saturating_mul(2);
        }
    }
}

/// Whether another attempt may end better.
fn may_pass(error: &ClientError) -> bool {
    match error {
        ClientError::Connect { .. } | ClientError::TooSlow { .. } | ClientError::Lost { .. } => {
            true
        }
        // A proxy that was ended in the middle of it.
        ClientError::Tls { cause, .. } => matches!(
            cause.kind(),
            io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe
        ),
        ClientError::Refused(body) => body.fault == Fault::Host && body.retry != Retry::No,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use protocol::{ErrorBody, ErrorCode};

    use super::*;

    #[test]
    fn a_wrong_token_is_tried_once_and_a_restarting_appliance_again() {
        let refused = |body| ClientError::Refused(body);
        let token = ErrorBody::caller(ErrorCode::Unauthenticated, "x");
        assert!(!may_pass(&refused(token)));
        let restarting = ErrorBody::host(ErrorCode::Unavailable, "x").retryable();
        assert!(may_pass(&refused(restarting)));
        assert!(may_pass(&ClientError::lost("x")));
        assert!(!may_pass(&ClientError::Broken("x".into())));
    }
}
