//! The protocol spoken by hand, for what the client library never sends: TLS with any ALPN, yamux
//! streams, frames of any kind and length.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use protocol::hello::{GENERATION, Hello};
use protocol::{Frame, FrameReader, Kind, Message};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

use super::Failure;
use crate::appliance::Appliance;

/// How long an answer may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A TLS connection that offers `alpn`.
pub(crate) async fn tls(
    appliance: &Appliance,
    alpn: &[&[u8]],
) -> Result<TlsStream<TcpStream>, Failure> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(appliance.home().join("ca.pem"))?;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        roots.add(certificate?)?;
    }
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let socket = TcpStream::connect(("127.0.0.1", appliance.port())).await?;
    let name = ServerName::try_from("127.0.0.1")?;
    Ok(TlsConnector::from(Arc::new(config))
        .connect(name, socket)
        .await?)
}

type Opened = oneshot::Sender<Result<yamux::Stream, yamux::ConnectionError>>;

/// A connection whose streams carry whatever the scenario wants.
pub(crate) struct Wire {
    open: mpsc::Sender<Opened>,
    driver: tokio::task::JoinHandle<()>,
    /// The stream of `Hello`, which stays open and counts.
    first: Option<WireStream>,
}

/// One of its streams.
pub(crate) struct WireStream {
    io: Compat<yamux::Stream>,
    reader: FrameReader,
    pending: Vec<u8>,
}

impl Wire {
    /// Connects without saying `Hello`.
    pub(crate) async fn connect(appliance: &Appliance) -> Result<Self, Failure> {
        let stream = tls(appliance, &[protocol::hello::ALPN]).await?;
        let mut config = yamux::Config::default();
        config.set_max_num_streams(512);
        let mut connection = yamux::Connection::new(stream.compat(), config, yamux::Mode::Client);
        let (open, mut wanted) = mpsc::channel::<Opened>(16);
        let driver = tokio::spawn(async move {
            let mut next: Option<Opened> = None;
            poll_fn(|cx| {
                loop {
                    if next.is_none() {
                        match wanted.poll_recv(cx) {
                            Poll::Ready(Some(asked)) => next = Some(asked),
                            Poll::Ready(None) => return Poll::Ready(()),
                            Poll::Pending => {}
                        }
                    }
                    if next.is_some()
                        && let Poll::Ready(stream) = connection.poll_new_outbound(cx)
                    {
                        if let Some(asked) = next.take() {
                            // Whoever asked may have given up meanwhile.
                            let _ = asked.send(stream);
                        }
                        continue;
                    }
                    match connection.poll_next_inbound(cx) {
                        Poll::Ready(Some(Ok(_))) => {}
                        Poll::Ready(_) => return Poll::Ready(()),
                        Poll::Pending => return Poll::Pending,
                    }
                }
            })
            .await;
        });
        Ok(Self {
            open,
            driver,
            first: None,
        })
    }

    /// Connects and is let in.
    pub(crate) async fn let_in(appliance: &Appliance) -> Result<Self, Failure> {
        let mut wire = Self::connect(appliance).await?;
        let mut first = wire.stream().await?;
        let hello = Hello {
            generation: GENERATION,
            token: appliance.token().to_owned(),
        };
        first.send(&hello).await?;
        let answer = first.frame().await?;
        match answer {
            Some(frame) if frame.kind == Kind::HELLO_OK => {
                wire.first = Some(first);
                Ok(wire)
            }
            other => Err(Failure::new(format!("not let in: {other:?}"))),
        }
    }

    /// Opens a stream.
    pub(crate) async fn stream(&self) -> Result<WireStream, Failure> {
        let (asked, opened) = oneshot::channel();
        self.open
            .send(asked)
            .await
            .map_err(|_| Failure::new("the connection is gone"))?;
        let stream = timeout(PATIENCE, opened).await???;
        Ok(WireStream {
            io: stream.compat(),
            reader: FrameReader::new(),
            pending: Vec::new(),
        })
    }

    /// Vanishes without a word.
    pub(crate) fn vanish(self) {
        self.driver.abort();
        drop(self.first);
    }
}

impl WireStream {
    /// Sends a message.
    pub(crate) async fn send<M: Message>(&mut self, message: &M) -> Result<(), Failure> {
        self.send_bytes(&protocol::encode(message)?).await
    }

    /// Sends any bytes.
    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.io.write_all(bytes).await?;
        Ok(self.io.flush().await?)
    }

    /// Sends a frame of raw bytes.
    pub(crate) async fn send_raw(&mut self, kind: Kind, body: &[u8]) -> Result<(), Failure> {
        let mut bytes = Vec::new();
        protocol::frame::append(&mut bytes, kind, body)?;
        self.send_bytes(&bytes).await
    }

    /// Says that nothing more will be sent; what comes is still read.
    pub(crate) async fn end(&mut self) -> Result<(), Failure> {
        Ok(self.io.shutdown().await?)
    }

    /// Everything behind the frames that were read, to the stream's end.
    pub(crate) async fn rest(&mut self) -> Result<Vec<u8>, Failure> {
        let mut bytes = std::mem::take(&mut self.pending);
        timeout(PATIENCE, self.io.read_to_end(&mut bytes)).await??;
        Ok(bytes)
    }

    /// The message that must come next.
    pub(crate) async fn message<M: Message>(&mut self) -> Result<M, Failure> {
        let frame = self.frame().await?;
        let frame = frame.ok_or_else(|| Failure::new("the stream ended before its answer"))?;
        Ok(protocol::decode(&frame)?)
    }

    /// The next frame; none at the stream's end.
    pub(crate) async fn frame(&mut self) -> Result<Option<Frame>, Failure> {
        timeout(PATIENCE, self.next_frame()).await?
    }

    async fn next_frame(&mut self) -> Result<Option<Frame>, Failure> {
        loop {
            let mut rest = self.pending.as_slice();
            let frame = self.reader.push(&mut rest)?;
            self.pending = rest.to_vec();
            if frame.is_some() {
                return Ok(frame);
            }
            let mut chunk = vec![0; 64 << 10];
            match self.io.read(&mut chunk).await {
                Ok(0) => return Ok(None),
                Ok(read) => self
                    .pending
                    .extend_from_slice(chunk.get(..read).unwrap_or_default()),
                // A reset stream has ended, too.
                Err(_) => return Ok(None),
            }
        }
    }

    /// The code of the error that must come next.
    pub(crate) async fn error(&mut self) -> Result<protocol::ErrorBody, Failure> {
        let frame = self.frame().await?;
        match frame {
            Some(frame) if frame.kind == Kind::ERROR => {
                Ok(protocol::message::decode_body(&frame.body)?)
            }
            other => Err(Failure::new(format!("expected an error, got {other:?}"))),
        }
    }
}
