//! The parts around proxy, played by the test over real sockets: a control, and clients that speak
//! bare yamux so that they can also misbehave.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::future::poll_fn;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::task::Poll;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use protocol::hello::{GENERATION, HelloOk, Limits};
use protocol::host::channel::Packet;
use protocol::host::proxy::{ApiAbandoned, ApiReply, ApiRequest, Serve, Serving};
use protocol::vm::Opened;
use protocol::{ErrorBody, ErrorCode, Frame, FrameReader, Kind, Message};
use proxy::channel::Channel;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

/// A wait that is longer than this is a failure, not a hang.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

/// A proxy that serves, and where.
pub(crate) struct Proxy {
    pub(crate) dir: tempfile::TempDir,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let control = seqpacket(&dir.path().join("control"));
        let api = std::os::unix::net::UnixListener::bind(dir.path().join("api")).unwrap();
        let task = tokio::spawn(async move {
            proxy::serve(control, api.into()).await.unwrap();
        });
        Self { dir, task }
    }

    pub(crate) fn api(&self) -> PathBuf {
        self.dir.path().join("api")
    }

    pub(crate) fn control(&self) -> Control {
        Control::new(Channel::connect(&self.dir.path().join("control")).unwrap())
    }

    pub(crate) async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.api()).await.unwrap()
    }
}

pub(crate) fn seqpacket(path: &std::path::Path) -> OwnedFd {
    let socket = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&socket, Backlog::new(8).unwrap()).unwrap();
    socket
}

/// A control that does what the test says.
pub(crate) struct Control(Channel);

impl Control {
    pub(crate) fn new(channel: Channel) -> Self {
        Self(channel)
    }

    pub(crate) async fn packet(&self) -> Packet {
        let received = timeout(PATIENCE, self.0.receive()).await;
        let received = received.expect("proxy sent control nothing");
        received.unwrap().expect("proxy closed")
    }

    /// The next packet, however long it takes; none when proxy has closed.
    pub(crate) async fn next(&self) -> Option<Packet> {
        self.0.receive().await.unwrap()
    }

    pub(crate) async fn send<M: Message>(
        &self,
        message: &M,
        descriptors: &[std::os::fd::BorrowedFd<'_>],
    ) {
        self.0.send(message, descriptors).await.unwrap();
    }

    pub(crate) async fn request(&self) -> ApiRequest {
        protocol::decode(&self.packet().await.frame).unwrap()
    }

    pub(crate) async fn abandoned(&self) -> ApiAbandoned {
        protocol::decode(&self.packet().await.frame).unwrap()
    }

    pub(crate) async fn reply<M: Message>(&self, request: &ApiRequest, message: &M) {
        self.reply_with(request, message, None).await;
    }

    pub(crate) async fn reply_with<M: Message>(
        &self,
        request: &ApiRequest,
        message: &M,
        stream: Option<OwnedFd>,
    ) {
        let reply = ApiReply {
            ticket: request.ticket,
            kind: M::KIND.0,
            body: protocol::message::encode_body(message).unwrap(),
        };
        let descriptors: Vec<_> = stream.iter().map(AsFd::as_fd).collect();
        self.0.send(&reply, &descriptors).await.unwrap();
    }

    /// Opens what was asked for; gives the agent's end.
    pub(crate) async fn open(&self, request: &ApiRequest) -> UnixStream {
        assert_eq!(Kind(request.kind), Kind::OPEN_VM);
        let (agent, proxys) = std::os::unix::net::UnixStream::pair().unwrap();
        let opened = Opened {
            id: "vm-00000000".parse().unwrap(),
            generation: 1,
        };
        self.reply_with(request, &opened, Some(proxys.into())).await;
        agent.set_nonblocking(true).unwrap();
        UnixStream::from_std(agent).unwrap()
    }

    /// Accepts the `Hello` that comes next.
    pub(crate) async fn welcome(&self) {
        let request = self.request().await;
        assert_eq!(Kind(request.kind), Kind::HELLO);
        self.reply(&request, &hello_ok()).await;
    }

    pub(crate) async fn limits(&self, max_streams: u32, max_connections: u32) {
        let serve = Serve {
            api_address: String::new(),
            certificates: Vec::new(),
            key: Vec::new(),
            max_streams,
            max_connections,
            edge: protocol::host::proxy::ServeEdge::default(),
            gateway: protocol::host::proxy::ServeGateway::default(),
        };
        self.0.send(&serve, &[]).await.unwrap();
        let serving: Serving = protocol::decode(&self.packet().await.frame).unwrap();
        assert_eq!(serving.message, "");
    }

    pub(crate) async fn serve(&self, serve: &Serve) -> Serving {
        self.0.send(serve, &[]).await.unwrap();
        protocol::decode(&self.packet().await.frame).unwrap()
    }
}

pub(crate) fn hello_ok() -> HelloOk {
    HelloOk {
        generation: GENERATION,
        limits: Limits {
            max_streams: 64,
            max_body: 1 << 20,
            max_cpus: 2,
            max_memory_mib: 1024,
            max_disk_mib: 10240,
        },
    }
}

pub(crate) fn hello() -> protocol::hello::Hello {
    protocol::hello::Hello {
        generation: GENERATION,
        token: "secret".into(),
    }
}

/// A client's connection: streams on demand.
pub(crate) struct Client {
    open: mpsc::Sender<oneshot::Sender<yamux::Stream>>,
    /// Ends when the connection has.
    pub(crate) ended: tokio::task::JoinHandle<()>,
}

impl Client {
    pub(crate) fn new(socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let config = yamux::Config::default();
        let mut connection = yamux::Connection::new(socket.compat(), config, yamux::Mode::Client);
        let (open, mut wanted) = mpsc::channel::<oneshot::Sender<yamux::Stream>>(8);
        let ended = tokio::spawn(async move {
            poll_fn(|cx| {
                loop {
                    match wanted.poll_recv(cx) {
                        Poll::Ready(Some(reply)) => {
                            let Poll::Ready(Ok(stream)) = connection.poll_new_outbound(cx) else {
                                return Poll::Ready(());
                            };
                            let _ = reply.send(stream);
                            continue;
                        }
                        Poll::Ready(None) => return Poll::Ready(()),
                        Poll::Pending => {}
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
        Self { open, ended }
    }

    /// A connection that control has welcomed.
    pub(crate) async fn welcomed(proxy: &Proxy, control: &Control) -> Self {
        let client = Self::new(proxy.connect().await);
        let mut stream = client.stream().await;
        stream.send(&hello()).await;
        control.welcome().await;
        assert_eq!(stream.frame().await.unwrap().kind, Kind::HELLO_OK);
        client
    }

    pub(crate) async fn stream(&self) -> Stream {
        let (reply, stream) = oneshot::channel();
        self.open.send(reply).await.unwrap();
        Stream {
            inner: stream.await.unwrap().compat(),
            reader: FrameReader::new(),
            rest: Vec::new(),
        }
    }

    /// A stream to an agent that control opened.
    pub(crate) async fn opened(&self, control: &Control) -> (Stream, UnixStream) {
        let mut stream = self.stream().await;
        stream.send(&open_vm()).await;
        let agent = control.open(&control.request().await).await;
        assert_eq!(stream.frame().await.unwrap().kind, Kind::OPENED);
        (stream, agent)
    }
}

pub(crate) fn open_vm() -> protocol::vm::OpenVm {
    protocol::vm::OpenVm {
        vm: "vm-00000000".parse().unwrap(),
    }
}

pub(crate) fn get_vm() -> protocol::vm::GetVm {
    protocol::vm::GetVm {
        vm: "vm-00000000".parse().unwrap(),
    }
}

/// One stream of a client.
pub(crate) struct Stream {
    pub(crate) inner: Compat<yamux::Stream>,
    reader: FrameReader,
    rest: Vec<u8>,
}

impl Stream {
    pub(crate) async fn send<M: Message>(&mut self, message: &M) {
        self.send_bytes(&protocol::encode(message).unwrap()).await;
    }

    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        self.inner.write_all(bytes).await.unwrap();
        self.inner.flush().await.unwrap();
    }

    /// The next frame, or none at the stream's end.
    pub(crate) async fn frame(&mut self) -> Option<Frame> {
        loop {
            let mut rest = &self.rest[..];
            let frame = self.reader.push(&mut rest).unwrap();
            self.rest = rest.to_vec();
            if frame.is_some() {
                return frame;
            }
            let mut buffer = vec![0; 4096];
            let read = timeout(PATIENCE, self.inner.read(&mut buffer)).await;
            let count = read.expect("proxy sent the client nothing").unwrap();
            if count == 0 {
                return None;
            }
            self.rest.extend_from_slice(&buffer[..count]);
        }
    }

    /// The error that the stream ends with.
    pub(crate) async fn error(&mut self) -> ErrorBody {
        let frame = self.frame().await.expect("no answer");
        assert_eq!(frame.kind, Kind::ERROR);
        let error = protocol::message::decode_body(&frame.body).unwrap();
        assert!(self.frame().await.is_none(), "the stream goes on");
        error
    }
}

pub(crate) fn refusal() -> ErrorBody {
    ErrorBody::caller(ErrorCode::VmNotFound, "no such VM")
}

/// A certificate authority and a server certificate for `localhost`.
pub(crate) fn certificates() -> (CertificateDer<'static>, Vec<Vec<u8>>, Vec<u8>) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_der = ca.self_signed(&ca_key).unwrap().der().clone();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    let chain = vec![leaf.der().to_vec(), ca_der.to_vec()];
    (ca_der, chain, key.serialize_der())
}

/// A TLS client that trusts `ca` and offers the names given.
pub(crate) async fn tls(
    address: &str,
    ca: &CertificateDer<'static>,
    alpn: &[&[u8]],
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let socket = TcpStream::connect(address).await?;
    tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect("localhost".try_into().unwrap(), socket)
        .await
}
