//! The name servers that all VMs share: which of them to ask and when to ask the next one, what
//! they answered before or could not, and questions that are under way already. It sees no VM and no
//! rule.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{Semaphore, watch};
use tokio::time::sleep;

use super::answer::{Answer, Ask};
use super::cache::Cache;
use super::exchange::{ExchangeError, exchange};
use super::failures::Failures;

/// More name servers than that are not asked.
pub const MAX_SERVERS: usize = 8;

/// A server that was silent for this long has company: the next one is asked, and the first good
/// answer counts.
const SLOT: Duration = Duration::from_secs(1);

/// All servers together; a guest's own resolver asks again after five seconds.
const PATIENCE: Duration = Duration::from_secs(6);

/// A server that failed is asked last for this long, doubled with each failure.
const SHORTEST_ILLNESS: Duration = Duration::from_secs(2);
const LONGEST_ILLNESS: Duration = Duration::from_secs(64);

/// Questions under way, over all VMs.
const MAX_UNDER_WAY: usize = 1024;

/// Sockets at the same time, over all VMs.
const MAX_SOCKETS: usize = 1024;

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// There is nobody to ask.
    NoServers,
    /// Too many questions at the same time.
    Busy,
    /// No server knows, or none answers.
    Unanswered,
}

impl Failure {
    /// What the guest is told.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::NoServers => "the host has no name servers",
            Self::Busy => "too many names are being looked up",
            Self::Unanswered => "no name server gave an answer",
        }
    }
}

type Outcome = Result<Arc<Answer>, Failure>;

/// The name servers, with what they answered.
#[derive(Default)]
pub struct Upstreams {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    servers: Arc<Servers>,
    cache: Cache,
    failures: Failures,
    under_way: HashMap<Ask, watch::Receiver<Option<Outcome>>>,
}

/// One set of servers. A new set has a new memory of their health.
struct Servers {
    list: Vec<Server>,
    sockets: Semaphore,
}

struct Server {
    address: SocketAddr,
    health: Mutex<Health>,
}

#[derive(Clone, Copy, Default)]
struct Health {
    failures: u32,
    ill_until: Option<Instant>,
}

impl std::fmt::Debug for Upstreams {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let servers = Arc::clone(&self.state().servers);
        let addresses = servers.list.iter().map(|server| server.address);
        formatter.debug_list().entries(addresses).finish()
    }
}

impl Default for Servers {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl Upstreams {
    /// These servers, in the order of preference.
    pub fn new(servers: Vec<SocketAddr>) -> Arc<Self> {
        let upstreams = Self::default();
        upstreams.set(servers);
        Arc::new(upstreams)
    }

    /// Replaces the servers. What the old ones answered is forgotten; questions that are under way
    /// at them end by themselves. The same servers again change nothing.
    pub fn set(&self, servers: Vec<SocketAddr>) {
        let servers = Servers::new(servers);
        let mut state = self.state();
        let addresses = |servers: &Servers| -> Vec<_> {
            servers.list.iter().map(|server| server.address).collect()
        };
        if addresses(&state.servers) == addresses(&servers) {
            return;
        }
        state.servers = Arc::new(servers);
        state.cache = Cache::default();
        state.failures = Failures::default();
        state.under_way.clear();
    }

    /// The answer, and how old it is.
    pub(super) async fn resolve(
        self: &Arc<Self>,
        ask: Ask,
    ) -> Result<(Arc<Answer>, Duration), Failure> {
        let mut outcome = {
            let mut state = self.state();
            if let Some(kept) = state.cache.get(&ask, Instant::now()) {
                return Ok(kept);
            }
            if state.servers.list.is_empty() {
                return Err(Failure::NoServers);
            }
            if state.failures.contains(&ask, Instant::now()) {
                return Err(Failure::Unanswered);
            }
            match state.under_way.get(&ask) {
                Some(outcome) => outcome.clone(),
                None if state.under_way.len() >= MAX_UNDER_WAY => return Err(Failure::Busy),
                None => {
                    let (sender, outcome) = watch::channel(None);
                    state.under_way.insert(ask.clone(), outcome.clone());
                    let servers = Arc::clone(&state.servers);
                    let task = Task {
                        upstreams: Arc::clone(self),
                        servers: Arc::clone(&servers),
                        ask,
                    };
                    // A task of its own: who asked first may go away, and a panic in it is an
                    // answer that never comes, not one in each VM that waits.
                    tokio::spawn(async move {
                        let outcome = servers.ask(&task.ask).await;
                        task.end(&outcome);
                        sender.send_replace(Some(outcome));
                    });
                    outcome
                }
            }
        };
        let outcome = outcome.wait_for(Option::is_some).await;
        let outcome = outcome.map_err(|_| Failure::Unanswered)?;
        let answer = outcome.clone().unwrap_or(Err(Failure::Unanswered))?;
        Ok((answer, Duration::ZERO))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A question under way; however it ends, it is then no longer under way.
struct Task {
    upstreams: Arc<Upstreams>,
    servers: Arc<Servers>,
    ask: Ask,
}

impl Task {
    /// Notes the answer, or that there is none, if it is one of the servers of now.
    fn end(&self, outcome: &Outcome) {
        let mut state = self.upstreams.state();
        if !Arc::ptr_eq(&state.servers, &self.servers) {
            return;
        }
        let (ask, now) = (self.ask.clone(), Instant::now());
        match outcome {
            Ok(answer) => state.cache.insert(ask, Arc::clone(answer), now),
            Err(_) => state.failures.insert(ask, now),
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let mut state = self.upstreams.state();
        // Another set of servers may have been asked the same since.
        if Arc::ptr_eq(&state.servers, &self.servers) {
            state.under_way.remove(&self.ask);
        }
    }
}

impl Servers {
    fn new(addresses: Vec<SocketAddr>) -> Self {
        let mut list: Vec<Server> = Vec::new();
        for address in addresses {
            if list.len() < MAX_SERVERS && list.iter().all(|known| known.address != address) {
                let health = Mutex::default();
                list.push(Server { address, health });
            }
        }
        Self {
            list,
            sockets: Semaphore::new(MAX_SOCKETS),
        }
    }

    /// Asks one after the other, the well ones first, each at least once and a lonely one again:
    /// packets get lost.
    async fn ask(&self, ask: &Ask) -> Outcome {
        let now = Instant::now();
        let mut order: Vec<&Server> = self.list.iter().collect();
        order.sort_by_key(|server| server.health().ill_until.filter(|until| *until > now));
        let attempts = order.len().max(3);
        let mut next = order.into_iter().cycle().take(attempts);
        // Who answered or cannot be reached is not asked again for this.
        let mut done = Vec::new();
        let mut running = FuturesUnordered::new();
        let deadline = sleep(PATIENCE);
        tokio::pin!(deadline);
        loop {
            let slot = match next.find(|server| !done.contains(&server.address)) {
                Some(server) => {
                    running.push(self.attempt(server, ask));
                    SLOT
                }
                None if running.is_empty() => return Err(Failure::Unanswered),
                None => PATIENCE,
            };
            tokio::select! {
                result = running.next() => match result {
                    Some((_, Some(answer))) => return Ok(Arc::new(answer)),
                    // The next one at once.
                    Some((address, None)) => done.push(address),
                    None => {}
                },
                () = sleep(slot) => {}
                () = &mut deadline => return Err(Failure::Unanswered),
            }
        }
    }

    async fn attempt(&self, server: &Server, ask: &Ask) -> (SocketAddr, Option<Answer>) {
        let Ok(_socket) = self.sockets.acquire().await else {
            return (server.address, None);
        };
        let exchange = exchange(server.address, ask);
        tokio::pin!(exchange);
        // Silence counts when the next one is asked, not when nobody listens any more.
        let result = tokio::select! {
            result = &mut exchange => {
                match &result {
                    Ok(_) => server.well(),
                    Err(error) if error.is_servers() => server.ill(error),
                    Err(_) => {}
                }
                result
            }
            () = sleep(SLOT) => {
                server.ill(&ExchangeError::Silent);
                exchange.await
            }
        };
        match result {
            Ok(answer) => (server.address, Some(*answer)),
            Err(error) => {
                tracing::debug!(server = %server.address, %error, "no answer");
                (server.address, None)
            }
        }
    }
}

impl Server {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn well(&self) {
        let mut health = self.health();
        if health.failures > 0 {
            tracing::info!(server = %self.address, "the name server answers again");
        }
        *health = Health::default();
    }

    fn ill(&self, error: &ExchangeError) {
        let now = Instant::now();
        let mut health = self.health();
        // Questions that were under way together fail together: that is one failure.
        if health.ill_until.is_some_and(|until| until > now) {
            return;
        }
        if health.failures == 0 {
            tracing::warn!(server = %self.address, %error, "the name server fails; others first");
        }
        let factor = 2_u32.saturating_pow(health.failures.min(16));
        let illness = SHORTEST_ILLNESS.saturating_mul(factor).min(LONGEST_ILLNESS);
        health.failures = health.failures.saturating_add(1);
        health.ill_until = now.checked_add(illness);
    }
}
