//! One connection: yamux driven by a task of its own, streams on demand, never more at once than
//! the appliance allows. It ends when the last stream and the last handle on it are gone.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use protocol::frame::MAX_DATA;
use protocol::hello::{GENERATION, Hello, HelloOk, Limits};
use tokio::io::BufWriter;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

use crate::endpoint::Endpoint;
use crate::error::ClientError;
use crate::frames::{self, Frames};
use crate::transport::{self, Socket};
use crate::trust::Trust;

/// How long the appliance may take to accept the token. Its proxy waits for control for 15 s.
const HELLO: Duration = Duration::from_secs(30);

/// How long a connection that nobody uses any more may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(2);

/// The most streams we open at once: yamux waits for acknowledgements beyond 256.
const MOST_STREAMS: u32 = 256;

/// The longest yamux frame: the protocol's longest data frame fits with its header. Yamux flushes
/// after each of its frames.
const YAMUX_FRAME: usize = MAX_DATA + 4096;

/// A yamux frame and its header are one write, and records of TLS are full.
const WRITES: usize = YAMUX_FRAME + 4096;

/// What the windows of a connection's streams may grow by, all together.
const SPARE_WINDOW: usize = 4 << 20;

/// A stream of bytes and its place among those that may be open.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) io: Compat<yamux::Stream>,
    pub(crate) place: Place,
}

/// Held for as long as its stream is open.
#[derive(Debug)]
pub(crate) struct Place {
    _seat: OwnedSemaphorePermit,
    // Keeps the driver going while the stream is in use.
    connection: Arc<Connection>,
}

impl Place {
    /// Why a stream ended that should not have: with its connection, or `otherwise`.
    pub(crate) async fn why(&self, otherwise: ClientError) -> ClientError {
        self.connection.why(otherwise).await
    }
}

/// What the driver is asked for.
#[derive(Debug)]
enum Wanted {
    Stream(oneshot::Sender<yamux::Stream>),
    /// Word that the connection is still there, from behind everything that has arrived.
    Word(oneshot::Sender<()>),
    /// The end of the connection, and word of it.
    Close(oneshot::Sender<()>),
}

/// How a connection ended.
enum End {
    /// The peer or the way there ended it.
    Broken(String),
    /// We did; somebody may wait for it.
    Ours(Option<oneshot::Sender<()>>),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Connection {
    open: mpsc::Sender<Wanted>,
    seats: Arc<Semaphore>,
    limits: OnceLock<Limits>,
    /// Why it ended.
    end: Arc<OnceLock<String>>,
}

impl Connection {
    /// Connects and says `Hello`.
    pub(crate) async fn new(
        endpoint: &Endpoint,
        token: &str,
        trust: &Trust,
    ) -> Result<Arc<Self>, ClientError> {
        let socket = transport::connect(endpoint, trust).await?;
        let (open, wanted) = mpsc::channel(16);
        let end = Arc::new(OnceLock::new());
        tokio::spawn(drive(socket, wanted, Arc::clone(&end)));
        let connection = Arc::new(Self {
            open,
            seats: Arc::new(Semaphore::new(1)),
            limits: OnceLock::new(),
            end,
        });
        let limits = tokio::time::timeout(HELLO, connection.hello(token))
            .await
            .map_err(|_| ClientError::TooSlow {
                endpoint: endpoint.clone(),
                seconds: HELLO.as_secs(),
            })??;
        let seats = limits.max_streams.clamp(1, MOST_STREAMS) as usize;
        connection.seats.add_permits(seats.saturating_sub(1));
        let _ = connection.limits.set(limits);
        Ok(connection)
    }

    async fn hello(self: &Arc<Self>, token: &str) -> Result<Limits, ClientError> {
        let mut stream = self.stream().await?;
        let hello = Hello {
            generation: GENERATION,
            token: token.to_owned(),
        };
        frames::write(&mut stream.io, &hello).await?;
        let frame = match Frames::new(&mut stream.io).next().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Err(self.why(self.lost()).await),
            Err(error) => return Err(self.why(error).await),
        };
        let answer: HelloOk = protocol::decode(&frame)?;
        if answer.generation == 0 || answer.generation > GENERATION {
            return Err(ClientError::Broken(format!(
                "the appliance chose generation {}; we offered {GENERATION}",
                answer.generation
            )));
        }
        Ok(answer.limits)
    }

    /// What the appliance allows.
    pub(crate) fn limits(&self) -> Option<&Limits> {
        self.limits.get()
    }

    /// Opens a stream, waiting while as many are open as may be.
    pub(crate) async fn stream(self: &Arc<Self>) -> Result<Stream, ClientError> {
        // Those who hold the seats may never look at their streams again, be the connection gone.
        let seat = tokio::select! {
            biased;
            () = self.open.closed() => return Err(self.lost()),
            seat = Arc::clone(&self.seats).acquire_owned() => seat.map_err(|_| self.lost())?,
        };
        let (reply, stream) = oneshot::channel();
        let stream = self.want(Wanted::Stream(reply), stream).await;
        let stream = stream.ok_or_else(|| self.lost())?;
        Ok(Stream {
            io: stream.compat(),
            place: Place {
                _seat: seat,
                connection: Arc::clone(self),
            },
        })
    }

    /// Says goodbye; whatever is still under way on the connection ends.
    pub(crate) async fn close(&self) {
        let (reply, closed) = oneshot::channel();
        // The driver has a deadline of its own.
        let _: Option<()> = self.want(Wanted::Close(reply), closed).await;
    }

    /// Asks the driver; none when it has ended.
    async fn want<T>(&self, wanted: Wanted, reply: oneshot::Receiver<T>) -> Option<T> {
        self.open.send(wanted).await.ok()?;
        // What is sent in the moment in which the driver ends stays in the channel, unread, for as
        // long as the channel has a sender, which is us.
        tokio::select! {
            biased;
            reply = reply => reply.ok(),
            () = self.open.closed() => None,
        }
    }

    /// The error for a connection that is gone, with the reason when it is known.
    pub(crate) fn lost(&self) -> ClientError {
        ClientError::lost(self.end.get().map_or("it was closed", String::as_str))
    }

    /// Whether it is of no use any more.
    pub(crate) fn has_ended(&self) -> bool {
        self.end.get().is_some() || self.open.is_closed()
    }

    /// Why a stream on it ended: a lost connection ends all of them, and a stream's own words say
    /// less than the connection's.
    pub(crate) async fn why(&self, otherwise: ClientError) -> ClientError {
        let (reply, word) = oneshot::channel();
        match self.want(Wanted::Word(reply), word).await {
            Some(()) => otherwise,
            None => self.lost(),
        }
    }
}

/// Moves bytes until the peer ends the connection or nobody wants a stream any more.
async fn drive(
    socket: Box<dyn Socket>,
    mut wanted: mpsc::Receiver<Wanted>,
    end: Arc<OnceLock<String>>,
) {
    // The windows of so many streams and what they may grow by, however the peer behaves.
    let mut config = yamux::Config::default();
    let streams = MOST_STREAMS as usize;
    config.set_max_num_streams(streams);
    config.set_split_send_size(YAMUX_FRAME);
    config.set_max_connection_receive_window(Some(
        streams
            .saturating_mul(yamux::DEFAULT_CREDIT as usize)
            .saturating_add(SPARE_WINDOW),
    ));
    let socket = BufWriter::with_capacity(WRITES, socket);
    let mut connection = yamux::Connection::new(socket.compat(), config, yamux::Mode::Client);
    let mut asked: VecDeque<oneshot::Sender<yamux::Stream>> = VecDeque::new();
    let mut words = Vec::new();
    let broken = |reason: &str| Poll::Ready(End::Broken(reason.to_owned()));
    let reason = poll_fn(|cx| {
        loop {
            if asked.len() >= MOST_STREAMS as usize {
                // Whoever has given up has given back their seat, too: the rest are fewer.
                asked.retain(|reply| !reply.is_closed());
            }
            if asked.len() < MOST_STREAMS as usize {
                match wanted.poll_recv(cx) {
                    Poll::Ready(Some(Wanted::Stream(reply))) => asked.push_back(reply),
                    Poll::Ready(Some(Wanted::Word(reply))) => {
                        words.push(reply);
                        continue;
                    }
                    Poll::Ready(Some(Wanted::Close(reply))) => {
                        return Poll::Ready(End::Ours(Some(reply)));
                    }
                    Poll::Ready(None) => return Poll::Ready(End::Ours(None)),
                    Poll::Pending => {}
                }
            }
            if !asked.is_empty() {
                match connection.poll_new_outbound(cx) {
                    Poll::Ready(Ok(stream)) => {
                        if let Some(reply) = asked.pop_front() {
                            // Whoever asked may have given up; the stream then never existed.
                            let _ = reply.send(stream);
                        }
                        continue;
                    }
                    Poll::Ready(Err(error)) => return broken(&error.to_string()),
                    Poll::Pending => {}
                }
            }
            match connection.poll_next_inbound(cx) {
                // An appliance opens no streams; one that does is reset by the drop.
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => return broken(&error.to_string()),
                Poll::Ready(None) => return broken("the appliance closed it"),
                Poll::Pending => {
                    for word in words.drain(..) {
                        let _ = oneshot::Sender::send(word, ());
                    }
                    return Poll::Pending;
                }
            }
        }
    })
    .await;
    match reason {
        End::Broken(reason) => {
            let _ = end.set(reason);
        }
        End::Ours(waiting) => {
            let _ = end.set("we closed it".into());
            let goodbye = poll_fn(|cx| connection.poll_close(cx));
            let _ = tokio::time::timeout(GOODBYE, goodbye).await;
            if let Some(waiting) = waiting {
                let _ = waiting.send(());
            }
        }
    }
}
