//! The line to proxy: control connects, says what to serve, and answers the requests that come. A
//! proxy that dies is connected to again; requests whose client has gone are no longer waited for.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use protocol::host::channel::ChannelError;
use protocol::host::proxy::{
    ApiAbandoned, ApiReply, ApiRequest, EdgeRequest, Serve, ServeEdge, Serving,
};
use protocol::{ErrorBody, ErrorCode, Frame, Kind, decode};
use proxy::channel::Channel;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use super::addresses::{AddressNews, host_addresses};
use super::certificates::Certificates;
use super::clock;
use super::frames::LineGuard;
use super::keys::KeyError;
use super::name_servers::{NameServers, RESOLV_CONF};
use super::requests::{Answer, Requests};
use super::vm::internal;

/// Requests that may be answered at once.
const MAX_REQUESTS: usize = 1024;

/// The same of the edge. They have room of their own, so that a flood there leaves the API its own.
const MAX_EDGE_REQUESTS: usize = 256;

/// A clock that was set back by more than this was wrong before.
const CLOCK: Duration = Duration::from_secs(24 * 60 * 60);

/// Shortest and longest wait before connecting again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The line to proxy.
pub(crate) struct Api {
    pub(crate) socket: PathBuf,
    pub(crate) certificates: Arc<Certificates>,
    pub(crate) requests: Arc<Requests>,
}

#[derive(Debug, thiserror::Error)]
enum LineError {
    #[error("cannot connect to proxy: {0}")]
    Connect(std::io::Error),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("cannot follow the host's addresses: {0}")]
    Addresses(std::io::Error),
    #[error("cannot follow the host's name servers: {0}")]
    NameServers(std::io::Error),
}

/// For how long certificates are shown.
struct Showing {
    since: SystemTime,
    until: SystemTime,
}

impl Showing {
    fn from(certificates: &Certificates) -> Self {
        let since = SystemTime::now();
        Self {
            since,
            until: certificates.until(since),
        }
    }

    /// Waits until others have to be made: these are old, or were made while the clock was far ahead.
    async fn over(&self) {
        while !self.is_over(SystemTime::now()) {
            clock::until(self.until).await;
        }
    }

    fn is_over(&self, now: SystemTime) -> bool {
        now >= self.until || now.checked_add(CLOCK).is_none_or(|now| now < self.since)
    }
}

/// Requests being answered, by proxy's ticket; those of the edge apart.
#[derive(Default)]
struct Answering {
    api: HashMap<u64, AbortHandle>,
    edge: HashMap<u64, AbortHandle>,
}

impl Answering {
    /// Those of the same kind, and how many of them there may be.
    fn of(&mut self, asked: &Asked) -> (&mut HashMap<u64, AbortHandle>, usize) {
        match asked {
            Asked::Api(_) => (&mut self.api, MAX_REQUESTS),
            Asked::Edge(_) => (&mut self.edge, MAX_EDGE_REQUESTS),
        }
    }

    fn remove(&mut self, ticket: u64) -> Option<AbortHandle> {
        let api = self.api.remove(&ticket);
        api.or_else(|| self.edge.remove(&ticket))
    }
}

/// A request of a client or of the edge.
enum Asked {
    Api(ApiRequest),
    Edge(EdgeRequest),
}

impl Asked {
    fn ticket(&self) -> u64 {
        match self {
            Self::Api(request) => request.ticket,
            Self::Edge(request) => request.ticket,
        }
    }
}

type Tasks = Arc<Mutex<Answering>>;

fn lock(tasks: &Tasks) -> MutexGuard<'_, Answering> {
    tasks.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Api {
    /// Serves for ever.
    pub(crate) async fn run(&self) {
        let mut wait = BACK_OFF.0;
        loop {
            let begun = Instant::now();
            match self.line().await {
                Ok(()) => tracing::warn!("proxy has gone; connecting again"),
                Err(error) => tracing::error!(%error, "the line to proxy failed; connecting again"),
            }
            if begun.elapsed() > BACK_OFF.1 {
                wait = BACK_OFF.0;
            }
            sleep(wait).await;
            wait = wait.saturating_mul(2).min(BACK_OFF.1);
        }
    }

    /// One connection to proxy, until proxy closes it.
    async fn line(&self) -> Result<(), LineError> {
        let channel = Arc::new(Channel::connect(&self.socket).map_err(LineError::Connect)?);
        let tasks = Tasks::default();
        let _abort = AbortAll(tasks.clone());
        let news = AddressNews::listen().map_err(LineError::Addresses)?;
        let named = NameServers::follow(Path::new(RESOLV_CONF));
        let mut name_servers = named.now();
        let mut addresses = host_addresses();
        let mut shown = self.certificates.changes();
        self.certificates.begin();
        let mut showing = self.serve(&channel, &addresses, &name_servers).await?;
        let frames = self.requests.host.frames.begin(&channel).await?;
        let syncing = frames.sync(&channel);
        tokio::pin!(syncing);
        loop {
            let packet = tokio::select! {
                packet = channel.receive() => packet?,
                () = showing.over() => {
                    showing = self.serve(&channel, &addresses, &name_servers).await?;
                    continue;
                }
                which = self.certificates.due() => {
                    if let Some(order) = self.certificates.order(which, &name_servers) {
                        channel.send(&order, &[]).await?;
                    }
                    continue;
                }
                Ok(()) = shown.changed() => {
                    showing = self.serve(&channel, &addresses, &name_servers).await?;
                    continue;
                }
                heard = news.wait() => {
                    heard.map_err(LineError::Addresses)?;
                    let now = host_addresses();
                    if now != addresses {
                        // A client that comes by an address finds it in the certificate.
                        tracing::info!(addresses = now.len(), "addresses changed; a new certificate");
                        addresses = now;
                        showing = self.serve(&channel, &addresses, &name_servers).await?;
                    }
                    continue;
                }
                heard = named.changed() => {
                    heard.map_err(LineError::NameServers)?;
                    let now = named.now();
                    if now != name_servers {
                        tracing::info!(name_servers = ?now, "the host's name servers changed");
                        name_servers = now;
                        showing = self.serve(&channel, &addresses, &name_servers).await?;
                    }
                    continue;
                }
                error = &mut syncing => return Err(error.into()),
            };
            let Some(packet) = packet else {
                return Ok(());
            };
            if let Err(error) = self.take(&packet.frame, &channel, &frames, &tasks).await {
                tracing::warn!(kind = %packet.frame.kind, %error, "message from proxy ignored");
            }
        }
    }

    async fn serve(
        &self,
        channel: &Channel,
        addresses: &[IpAddr],
        name_servers: &[SocketAddr],
    ) -> Result<Showing, LineError> {
        let settings = &self.requests.host.settings;
        let showing = Showing::from(&self.certificates);
        let beside = self.certificates.beside();
        let leaf = self.certificates.leaf(addresses)?;
        let address = settings.api.listen;
        let serve = Serve {
            api_address: address.map_or_else(String::new, |address| address.to_string()),
            certificates: leaf.chain,
            key: leaf.key,
            max_streams: settings.api.max_streams,
            max_connections: settings.api.max_connections,
            edge: ServeEdge {
                authority: beside.authority,
                named: beside.named,
                ..settings.serve_edge()
            },
            gateway: settings.gateway.serve(name_servers),
        };
        channel.send(&serve, &[]).await?;
        Ok(showing)
    }

    async fn take(
        &self,
        frame: &Frame,
        channel: &Arc<Channel>,
        frames: &LineGuard,
        tasks: &Tasks,
    ) -> Result<(), ChannelError> {
        match frame.kind {
            Kind::SERVING => {
                let serving: Serving = decode(frame)?;
                if serving.message.is_empty() {
                    tracing::info!(
                        address = serving.api_address,
                        https = serving.https_address,
                        http = serving.http_address,
                        "the API is served"
                    );
                } else {
                    tracing::error!(
                        message = serving.message,
                        address = serving.api_address,
                        https = serving.https_address,
                        http = serving.http_address,
                        "not everything is served"
                    );
                }
            }
            Kind::API_REQUEST => {
                self.begin(Asked::Api(decode(frame)?), channel, tasks);
            }
            Kind::EDGE_REQUEST => self.begin(Asked::Edge(decode(frame)?), channel, tasks),
            Kind::CERTIFICATE_ORDERED => self.certificates.ordered(&decode(frame)?),
            Kind::ATTACHED => frames.listed(decode(frame)?).await?,
            Kind::COUNTED => frames.counted(decode(frame)?),
            Kind::FRAMES_LOST => frames.lost(decode(frame)?),
            Kind::API_ABANDONED => {
                let ApiAbandoned { ticket } = decode(frame)?;
                if let Some(task) = lock(tasks).remove(ticket) {
                    task.abort();
                }
            }
            kind => tracing::warn!(%kind, "kind from proxy is not known"),
        }
        Ok(())
    }

    /// Answers a request in a task of its own; a panic there is this request's alone.
    fn begin(&self, asked: Asked, channel: &Arc<Channel>, tasks: &Tasks) {
        let ticket = asked.ticket();
        let mut guard = lock(tasks);
        let (same, most) = guard.of(&asked);
        let full = same.len() >= most;
        let requests = self.requests.clone();
        let answer = tokio::spawn(async move {
            if full {
                let error = ErrorBody::host(
                    ErrorCode::Unavailable,
                    format!("{most} requests are being answered; try again"),
                );
                return Answer::error(&error.retryable_after_ms(500));
            }
            match &asked {
                Asked::Api(request) => requests.answer(request).await,
                Asked::Edge(request) => requests.answer_edge(request).await,
            }
        });
        if !full {
            same.insert(ticket, answer.abort_handle());
        }
        drop(guard);
        let (channel, tasks) = (channel.clone(), tasks.clone());
        tokio::spawn(async move {
            let answer = match answer.await {
                Ok(answer) => answer,
                Err(error) if error.is_cancelled() => return,
                Err(_) => {
                    tracing::error!(ticket, "answering a request panicked");
                    Answer::error(&internal(
                        "answering this request failed; see the appliance's log",
                    ))
                }
            };
            if !full {
                lock(&tasks).remove(ticket);
            }
            send(&channel, ticket, answer).await;
        });
    }
}

async fn send(channel: &Channel, ticket: u64, answer: Answer) {
    let reply = ApiReply {
        ticket,
        kind: answer.kind.0,
        body: answer.body,
    };
    let stream = answer.stream.as_ref().map(AsFd::as_fd);
    let sent = channel.send(&reply, stream.as_slice()).await;
    if let Err(ChannelError::TooLong(length)) = sent {
        tracing::error!(ticket, length, "answer is too long for proxy");
        let answer = Answer::error(&internal(format!(
            "the answer has {length} bytes, which is too long"
        )));
        let reply = ApiReply {
            ticket,
            kind: answer.kind.0,
            body: answer.body,
        };
        let _ = channel.send(&reply, &[]).await;
    } else if let Err(error) = sent {
        tracing::debug!(ticket, %error, "answer not sent; proxy has gone");
    }
}

/// Ends the waiting of every request of a line that broke.
struct AbortAll(Tasks);

impl Drop for AbortAll {
    fn drop(&mut self) {
        let mut tasks = lock(&self.0);
        let Answering { api, edge } = &mut *tasks;
        for (_, task) in api.drain().chain(edge.drain()) {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_made_anew_when_it_is_old_or_the_clock_was_wrong() {
        let at = |days: u64| SystemTime::UNIX_EPOCH + CLOCK * u32::try_from(days).unwrap();
        // Made by a clock that was not set: 1970, and valid as if it were 2025.
        let showing = Showing {
            since: at(1),
            until: at(31),
        };
        assert!(!showing.is_over(at(2)));
        assert!(showing.is_over(at(31)));
        assert!(showing.is_over(at(20_000)), "the clock was set");
        // Made by a clock that was a year ahead.
        let showing = Showing {
            since: at(20_365),
            until: at(20_395),
        };
        assert!(showing.is_over(at(20_000)));
        assert!(!showing.is_over(at(20_364)));
    }
}
