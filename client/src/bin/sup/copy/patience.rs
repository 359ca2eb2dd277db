//! How long a broken connection is put up with: attempts in a row that came no further, with pauses
//! that grow. Each attempt connects again, for which the library has a patience of its own.

use std::time::Duration;

use client::ClientError;
use client::protocol::{Fault, Retry};

const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// What is left of it.
#[derive(Debug)]
pub(super) struct Patience {
    left: u32,
    pause: Duration,
    farthest: u64,
}

impl Patience {
    pub(super) fn new() -> Self {
        Self {
            left: ATTEMPTS,
            pause: FIRST_PAUSE,
            farthest: 0,
        }
    }

    /// Waits before another attempt, `at` being how far things are; gives the error back when there
    /// is to be none.
    pub(super) async fn take(&mut self, error: ClientError, at: u64) -> Result<(), ClientError> {
        if at > self.farthest {
            *self = Self {
                farthest: at,
                ..Self::new()
            };
        }
        self.left = self.left.saturating_sub(1);
        if self.left == 0 || !may_go_on(&error) {
            return Err(error);
        }
        tokio::time::sleep(self.pause).await;
        self.pause = self.pause.saturating_mul(2);
        Ok(())
    }
}

/// Asks until there is an answer.
pub(super) async fn again<T, F: Future<Output = Result<T, ClientError>>>(
    ask: impl Fn() -> F,
) -> Result<T, ClientError> {
    let mut patience = Patience::new();
    loop {
        match ask().await {
            Err(error) => patience.take(error, 0).await?,
            answer => return answer,
        }
    }
}

/// Whether it was the connection or a part of the appliance, and not what was asked.
fn may_go_on(error: &ClientError) -> bool {
    match error {
        ClientError::Lost { .. } | ClientError::AgentGone => true,
        _ => error
            .body()
            .is_some_and(|body| body.fault == Fault::Host && body.retry != Retry::No),
    }
}
