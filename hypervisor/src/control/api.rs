//! The line to proxy: control connects, says what to serve, and answers the requests that come. A
//! proxy that dies is connected to again; requests whose client has gone are no longer waited for.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::host::channel::ChannelError;
use protocol::host::proxy::{ApiAbandoned, ApiReply, ApiRequest, Serve, Serving};
use protocol::{ErrorBody, ErrorCode, Frame, Kind, decode};
use proxy::channel::Channel;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};

use super::addresses::{AddressNews, host_addresses};
use super::keys::{Authority, KeyError, LEAF_RENEWAL};
use super::requests::{Answer, Requests};
use super::vm::internal;

/// Requests that may be answered at once.
const MAX_REQUESTS: usize = 1024;

/// Shortest and longest wait before connecting again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The line to proxy.
pub(crate) struct Api {
    pub(crate) socket: PathBuf,
    pub(crate) authority: Authority,
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
}

/// Requests being answered, by proxy's ticket.
type Tasks = Arc<Mutex<HashMap<u64, AbortHandle>>>;

fn lock(tasks: &Tasks) -> MutexGuard<'_, HashMap<u64, AbortHandle>> {
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
        let mut addresses = host_addresses();
        self.serve(&channel, &addresses).await?;
        let mut renewal = Instant::now() + LEAF_RENEWAL;
        loop {
            let packet = tokio::select! {
                packet = channel.receive() => packet?,
                () = sleep_until(renewal) => {
                    self.serve(&channel, &addresses).await?;
                    renewal = Instant::now() + LEAF_RENEWAL;
                    continue;
                }
                heard = news.wait() => {
                    heard.map_err(LineError::Addresses)?;
                    let now = host_addresses();
                    if now != addresses {
                        // A client that comes by an address finds it in the certificate.
                        tracing::info!(addresses = now.len(), "addresses changed; a new certificate");
                        addresses = now;
                        self.serve(&channel, &addresses).await?;
                    }
                    continue;
                }
            };
            let Some(packet) = packet else {
                return Ok(());
            };
            if let Err(error) = self.take(&packet.frame, &channel, &tasks).await {
                tracing::warn!(kind = %packet.frame.kind, %error, "message from proxy ignored");
            }
        }
    }

    async fn serve(&self, channel: &Channel, addresses: &[IpAddr]) -> Result<(), LineError> {
        let settings = &self.requests.host.settings;
        let leaf = self.authority.leaf(&settings.domain, addresses)?;
        let address = settings.api.listen;
        let serve = Serve {
            api_address: address.map_or_else(String::new, |address| address.to_string()),
            certificates: leaf.chain,
            key: leaf.key,
            max_streams: settings.api.max_streams,
            max_connections: settings.api.max_connections,
            edge: protocol::host::proxy::ServeEdge::default(),
            gateway: protocol::host::proxy::ServeGateway::default(),
        };
        channel.send(&serve, &[]).await?;
        Ok(())
    }

    async fn take(
        &self,
        frame: &Frame,
        channel: &Arc<Channel>,
        tasks: &Tasks,
    ) -> Result<(), protocol::message::MessageError> {
        match frame.kind {
            Kind::SERVING => {
                let serving: Serving = decode(frame)?;
                if serving.message.is_empty() {
                    tracing::info!(address = serving.api_address, "the API is served");
                } else {
                    tracing::error!(message = serving.message, "the API is not served over TLS");
                }
            }
            Kind::API_REQUEST => {
                let request: ApiRequest = decode(frame)?;
                self.begin(request, channel, tasks);
            }
            Kind::API_ABANDONED => {
                let ApiAbandoned { ticket } = decode(frame)?;
                if let Some(task) = lock(tasks).remove(&ticket) {
                    task.abort();
                }
            }
            kind => tracing::warn!(%kind, "kind from proxy is not known"),
        }
        Ok(())
    }

    /// Answers a request in a task of its own; a panic there is this request's alone.
    fn begin(&self, request: ApiRequest, channel: &Arc<Channel>, tasks: &Tasks) {
        let ticket = request.ticket;
        let mut guard = lock(tasks);
        let full = guard.len() >= MAX_REQUESTS;
        let requests = self.requests.clone();
        let answer = tokio::spawn(async move {
            if full {
                let error = ErrorBody::host(
                    ErrorCode::Unavailable,
                    format!("{MAX_REQUESTS} requests are being answered; try again"),
                );
                return Answer::error(&error.retryable_after_ms(500));
            }
            requests.answer(&request).await
        });
        if !full {
            guard.insert(ticket, answer.abort_handle());
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
                lock(&tasks).remove(&ticket);
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
        for (_, task) in lock(&self.0).drain() {
            task.abort();
        }
    }
}
