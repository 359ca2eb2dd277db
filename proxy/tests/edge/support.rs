//! An edge on loopback, VMs that are local servers, and visitors. Servers and visitors speak through
//! hyper where it helps and write bytes themselves where they misbehave.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use protocol::host::proxy::{AdmitLink, ServeEdge};
use protocol::id::Subdomain;
use protocol::network::{LINK_QUERY, Publication};
use proxy::edge::Edge;
use proxy::edge::guests::{ConnectError, Guest, Guests, Refusal};
use proxy::edge::limits::Limits;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub(crate) const DOMAIN: &str = "vm.test";

/// A wait that is longer than this is a failure, not a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited too long: {what}"),
    }
}

/// The VMs.
#[derive(Debug, Default)]
pub(crate) struct Local {
    vms: Mutex<HashMap<Subdomain, Vm>>,
    pub(crate) connections: AtomicUsize,
    /// How often a VM was asked for, which starts one that is stopped.
    pub(crate) found: AtomicUsize,
}

#[derive(Debug)]
struct Vm {
    guest: Guest,
    refusal: Option<Refusal>,
    panics: bool,
    ports: HashMap<u16, Result<SocketAddr, ConnectError>>,
    generation: watch::Sender<u64>,
}

impl Guests for Local {
    type Stream = TcpStream;

    async fn publication(&self, subdomain: &Subdomain) -> Result<Publication, Refusal> {
        let vms = self.vms.lock().unwrap();
        let vm = vms.get(subdomain).ok_or(Refusal::Unknown)?;
        Ok(vm.guest.publication.clone())
    }

    async fn find(&self, subdomain: &Subdomain) -> Result<Guest, Refusal> {
        self.found.fetch_add(1, Ordering::SeqCst);
        let (guest, refusal, panics) = {
            let vms = self.vms.lock().unwrap();
            let vm = vms.get(subdomain).ok_or(Refusal::Unknown)?;
            (vm.guest.clone(), vm.refusal.clone(), vm.panics)
        };
        assert!(!panics, "injected");
        refusal.map_or(Ok(guest), Err)
    }

    async fn connect(&self, guest: &Guest, port: u16) -> Result<TcpStream, ConnectError> {
        let address = {
            let vms = self.vms.lock().unwrap();
            let vm = vms.values().find(|vm| vm.guest.vm == guest.vm).unwrap();
            *vm.ports.get(&port).ok_or(ConnectError::Refused)?
        }?;
        self.connections.fetch_add(1, Ordering::SeqCst);
        TcpStream::connect(address)
            .await
            .map_err(|_| ConnectError::Refused)
    }

    async fn ended(&self, guest: &Guest) {
        let mut generation = {
            let vms = self.vms.lock().unwrap();
            let vm = vms.values().find(|vm| vm.guest.vm == guest.vm).unwrap();
            vm.generation.subscribe()
        };
        let _ = generation.wait_for(|now| *now != guest.generation).await;
    }
}

/// All of it.
pub(crate) struct World {
    pub(crate) edge: Edge<Local>,
    pub(crate) guests: Arc<Local>,
    pub(crate) https: SocketAddr,
    pub(crate) http: SocketAddr,
    root: CertificateDer<'static>,
}

/// A VM's name in the world.
#[derive(Clone, Debug)]
pub(crate) struct Name(Subdomain);

impl Name {
    /// The host name for port 3000.
    pub(crate) fn host(&self) -> String {
        format!("{}.{DOMAIN}", self.0)
    }

    pub(crate) fn at(&self, port: u16) -> String {
        format!("{port}-{}.{DOMAIN}", self.0)
    }
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = Limits::default();
        change(&mut limits);
        let guests = Arc::new(Local::default());
        let edge = Edge::new(Arc::clone(&guests), limits);
        let (config, root) = certificate();
        edge.set_tls(config);
        let applied = edge.apply(&serve()).await;
        assert_eq!(applied.message, "");
        Self {
            edge,
            guests,
            https: applied.https_address.parse().unwrap(),
            http: applied.http_address.parse().unwrap(),
            root,
        }
    }

    /// Visitors trust this root from now on.
    pub(crate) fn trust(&mut self, root: CertificateDer<'static>) {
        self.root = root;
    }

    /// A VM with nothing in it.
    pub(crate) fn vm(&self) -> Name {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let mut random = [0; 20];
        random[..8].copy_from_slice(&number.to_le_bytes());
        let bits: [u8; 8] = std::array::from_fn(|n| (number >> (5 * n)) as u8 & 31);
        random[8..16].copy_from_slice(&bits);
        let subdomain = Subdomain::from_random(random);
        let guest = Guest {
            vm: protocol::id::VmId::from_random(bits),
            generation: 1,
            publication: Publication::default(),
            requests: Arc::default(),
        };
        let vm = Vm {
            guest,
            refusal: None,
            panics: false,
            ports: HashMap::new(),
            generation: watch::Sender::new(1),
        };
        let old = self
            .guests
            .vms
            .lock()
            .unwrap()
            .insert(subdomain.clone(), vm);
        assert!(old.is_none());
        Name(subdomain)
    }

    fn change<T>(&self, name: &Name, change: impl FnOnce(&mut Vm) -> T) -> T {
        change(self.guests.vms.lock().unwrap().get_mut(&name.0).unwrap())
    }

    pub(crate) fn refuse(&self, name: &Name, refusal: Refusal) {
        self.change(name, |vm| vm.refusal = Some(refusal));
    }

    pub(crate) fn panic_at(&self, name: &Name) {
        self.change(name, |vm| vm.panics = true);
    }

    pub(crate) fn token(&self, name: &Name, token: &str) {
        let hash = *blake3::hash(token.as_bytes()).as_bytes();
        self.change(name, |vm| vm.guest.publication.token = Some(hash));
    }

    /// A path that lets one visitor in whose VM has this token.
    pub(crate) fn link(&self, name: &Name, token: &str) -> String {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let secret = format!("once-{}", NEXT.fetch_add(1, Ordering::SeqCst));
        self.edge.admit(&AdmitLink {
            subdomain: name.0.clone(),
            secret: *blake3::hash(secret.as_bytes()).as_bytes(),
            token: *blake3::hash(token.as_bytes()).as_bytes(),
            lifetime_s: 60,
        });
        format!("{LINK_QUERY}={secret}")
    }

    pub(crate) fn listens(&self, name: &Name, port: u16, to: SocketAddr) {
        self.change(name, |vm| vm.ports.insert(port, Ok(to)));
    }

    pub(crate) fn closed(&self, name: &Name, port: u16, error: ConnectError) {
        self.change(name, |vm| vm.ports.insert(port, Err(error)));
    }

    pub(crate) fn id(&self, name: &Name) -> protocol::id::VmId {
        self.change(name, |vm| vm.guest.vm.clone())
    }

    /// Requests counted for the VM.
    pub(crate) fn requests(&self, name: &Name) -> u64 {
        self.change(name, |vm| vm.guest.requests.load(Ordering::SeqCst))
    }

    /// The VM ends and starts again.
    pub(crate) fn restart(&self, name: &Name) {
        self.change(name, |vm| {
            vm.guest.generation += 1;
            vm.generation.send_replace(vm.guest.generation);
        });
    }

    /// A VM with a server on port 3000 that answers each request with `answer`.
    pub(crate) async fn vm_with<F, A>(&self, answer: F) -> Name
    where
        F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Response<Body>> + Send + 'static,
    {
        let name = self.vm();
        self.listens(&name, 3000, hyper_server(answer).await);
        name
    }

    /// A VM with a server that tells what it was asked.
    pub(crate) async fn vm_that_tells(&self) -> Name {
        self.vm_with(tell).await
    }

    pub(crate) async fn tls(&self, name: &str, alpn: &str) -> TlsStream<TcpStream> {
        self.tls_from(None, name, alpn).await.unwrap()
    }

    pub(crate) async fn tls_from(
        &self,
        from: Option<IpAddr>,
        name: &str,
        alpn: &str,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let socket = TcpSocket::new_v4()?;
        if let Some(from) = from {
            socket.bind(SocketAddr::new(from, 0))?;
        }
        let socket = socket.connect(self.https).await?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let name = ServerName::try_from(name.to_owned()).unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, socket)
            .await
    }

    pub(crate) async fn http1(&self, host: &str) -> http1::SendRequest<Body> {
        let stream = TokioIo::new(self.tls(host, "http/1.1").await);
        let (sender, connection) = http1::handshake(stream).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender
    }

    pub(crate) async fn http2(&self, host: &str) -> http2::SendRequest<Body> {
        let stream = TokioIo::new(self.tls(host, "h2").await);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), stream)
            .await
            .unwrap();
        tokio::spawn(connection);
        sender
    }

    /// One request by HTTP/1.1 on a connection of its own.
    pub(crate) async fn get(&self, host: &str, fields: &[(&str, &str)]) -> Got {
        let mut request = Request::builder().uri("/").header("host", host);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let mut sender = self.http1(host).await;
        let answer = sender.send_request(request.body(empty()).unwrap());
        Got::of(soon("an answer", answer).await.unwrap()).await
    }

    /// Writes bytes to the edge and reads until it closes.
    pub(crate) async fn raw(&self, host: &str, bytes: &[u8]) -> String {
        let mut stream = self.tls(host, "http/1.1").await;
        stream.write_all(bytes).await.unwrap();
        stream.flush().await.unwrap();
        let mut answer = Vec::new();
        let read = soon("the end", stream.read_to_end(&mut answer)).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(read.is_ok(), "{read:?} after {answer}");
        answer
    }
}

pub(crate) fn serve() -> ServeEdge {
    ServeEdge {
        https_address: "127.0.0.1:0".into(),
        http_address: "127.0.0.1:0".into(),
        domain: DOMAIN.into(),
        public_port: 443,
        ..ServeEdge::default()
    }
}

/// A certificate of its own for the domain and all below it.
pub(crate) fn certificate() -> (Arc<rustls::ServerConfig>, CertificateDer<'static>) {
    certificate_for(&[DOMAIN, &format!("*.{DOMAIN}")])
}

/// A certificate of its own for these names.
pub(crate) fn certificate_for(
    names: &[&str],
) -> (Arc<rustls::ServerConfig>, CertificateDer<'static>) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = ca.self_signed(&ca_key).unwrap().der().clone();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let leaf = rcgen::CertificateParams::new(names).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key.into())
        .unwrap();
    (Arc::new(config), root)
}

/// A body of tests.
pub(crate) type Body = BoxBody<Bytes, Infallible>;

pub(crate) fn empty() -> Body {
    full("")
}

pub(crate) fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed()
}

/// A body that the test sends frame by frame.
pub(crate) fn channel() -> (mpsc::Sender<Frame<Bytes>>, Body) {
    let (sender, mut receiver) = mpsc::channel::<Frame<Bytes>>(1);
    let frames = futures::stream::poll_fn(move |cx| {
        receiver
            .poll_recv(cx)
            .map(|frame| frame.map(Ok::<_, Infallible>))
    });
    (sender, BodyExt::boxed(StreamBody::new(frames)))
}

/// An answer, wholly read.
#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
    pub(crate) trailers: Option<HeaderMap>,
}

impl Got {
    pub(crate) async fn of(response: Response<Incoming>) -> Self {
        let (head, body) = response.into_parts();
        let body = soon("a body", body.collect()).await.unwrap();
        let trailers = body.trailers().cloned();
        Self {
            status: head.status,
            headers: head.headers,
            body: String::from_utf8_lossy(&body.to_bytes()).into_owned(),
            trailers,
        }
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// Tells method, target, fields and body of a request.
pub(crate) async fn tell(request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let mut text = format!("{} {} {:?}\n", head.method, head.uri, head.version);
    for (name, value) in &head.headers {
        text += &format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes()));
    }
    text += "\n";
    match body.collect().await {
        Ok(body) => {
            let trailers = body.trailers().cloned();
            text += &String::from_utf8_lossy(&body.to_bytes());
            for (name, value) in &trailers.unwrap_or_default() {
                text += &format!("\ntrailer {name}: {}", value.to_str().unwrap());
            }
        }
        Err(error) => text += &format!("error {error}"),
    }
    Response::new(full(text))
}

/// A server for HTTP/1.1 on loopback, for as long as the test runs.
pub(crate) async fn hyper_server<F, A>(answer: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Response<Body>> + Send + 'static,
{
    raw_server(move |stream| {
        let answer = answer.clone();
        async move {
            let service = hyper::service::service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
                .await;
        }
    })
    .await
}

/// A server that does with each connection what it is told.
pub(crate) async fn raw_server<F, A>(serve: F) -> SocketAddr
where
    F: Fn(TcpStream) -> A + Send + 'static,
    A: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    address
}

/// Reads a head, byte by byte.
pub(crate) async fn read_head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match soon("a head", stream.read_u8()).await {
            Ok(byte) => head.push(byte),
            Err(_) => return None,
        }
    }
    Some(String::from_utf8(head).unwrap())
}
