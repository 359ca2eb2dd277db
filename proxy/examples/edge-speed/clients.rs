//! Who visits: nghttp2's h2load for requests, and visitors of our own for handshakes and WebSockets.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const REQUESTS: &str = "20000";
const CLIENTS: &str = "50";
/// Visitors that shake hands at the same time, and for how long.
const SHAKING: usize = 8;
const SHAKEN: Duration = Duration::from_secs(4);
/// Visitors with WebSockets have so many addresses: one address has a limit.
const ADDRESSES: usize = 40;
/// WebSockets that are opened at the same time.
const OPENING: usize = 32;

/// Whom to visit.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pub(crate) name: String,
}

/// Requests per second, and the 99th percentile in milliseconds.
pub(crate) async fn h2load(directory: &Path, target: &Target, http1: bool) -> (f64, f64) {
    let log = directory.join("h2load.log");
    let _ = std::fs::remove_file(&log);
    let mut command = tokio::process::Command::new("h2load");
    if http1 {
        command.arg("--h1");
    }
    let connect = format!("--connect-to={}", target.address);
    command
        .args(["-n", REQUESTS, "-c", CLIENTS, "-t", "1"])
        .args([&connect, &format!("--log-file={}", log.display())])
        .arg(format!("https://{}/", target.name))
        .stdin(Stdio::null());
    let output = command.output().await;
    let output = output.unwrap_or_else(|error| panic!("h2load: {error}; run ./setup.sh bench"));
    let said = String::from_utf8_lossy(&output.stdout);
    let good = format!("{REQUESTS} succeeded, 0 failed, 0 errored");
    assert!(said.contains(&good), "{said}");
    let finished = said.lines().find(|line| line.starts_with("finished in"));
    let rate = finished.unwrap().split(", ").nth(1).unwrap();
    let rate = rate.strip_suffix(" req/s").unwrap().parse().unwrap();
    // When it began, the status, how long it took, all in microseconds.
    let log = std::fs::read_to_string(&log).unwrap();
    let took = |line: &str| line.split('\t').nth(2).unwrap().parse::<f64>().unwrap();
    let mut times: Vec<f64> = log.lines().map(took).collect();
    times.sort_by(f64::total_cmp);
    (rate, times[times.len() * 99 / 100] / 1000.0)
}

/// New connections per second, with whole handshakes.
pub(crate) async fn handshakes(target: &Target) -> f64 {
    let config = config();
    let done = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let mut visitors = JoinSet::new();
    for _ in 0..SHAKING {
        let (config, target, done) = (Arc::clone(&config), target.clone(), Arc::clone(&done));
        visitors.spawn(async move {
            while begun.elapsed() < SHAKEN {
                let socket = TcpStream::connect(target.address).await.unwrap();
                // What is not waited for in front of the port of another connection.
                socket.set_zero_linger().unwrap();
                let name = ServerName::try_from(target.name.clone()).unwrap();
                let connector = TlsConnector::from(Arc::clone(&config));
                connector.connect(name, socket).await.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    visitors.join_all().await;
    done.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64()
}

/// Opens so many WebSockets to each name.
pub(crate) async fn websockets(
    to: SocketAddr,
    names: &[String],
    each: usize,
) -> Vec<TlsStream<TcpStream>> {
    let config = config();
    let mut wanted = Vec::new();
    for _ in 0..each {
        wanted.extend(names.iter().cloned());
    }
    let wanted = Arc::new(std::sync::Mutex::new(wanted));
    let mut opening = JoinSet::new();
    for visitor in 0..OPENING {
        let (config, wanted) = (Arc::clone(&config), Arc::clone(&wanted));
        opening.spawn(async move {
            let mut open = Vec::new();
            loop {
                let next = wanted.lock().unwrap().pop();
                let Some(name) = next else {
                    return open;
                };
                let address = (open.len() * OPENING + visitor) % ADDRESSES + 1;
                let from = Ipv4Addr::new(127, 0, 1, u8::try_from(address).unwrap());
                let websocket = websocket(&config, to, from.into(), &name);
                let limit = Duration::from_secs(60);
                let opened = tokio::time::timeout(limit, websocket).await;
                open.push(opened.expect("a WebSocket takes too long"));
            }
        });
    }
    opening.join_all().await.into_iter().flatten().collect()
}

async fn websocket(
    config: &Arc<ClientConfig>,
    to: SocketAddr,
    from: IpAddr,
    name: &str,
) -> TlsStream<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(from, 0)).unwrap();
    let socket = socket.connect(to).await.unwrap();
    let server = ServerName::try_from(name.to_owned()).unwrap();
    let connector = TlsConnector::from(Arc::clone(config));
    let mut stream = connector.connect(server, socket).await.unwrap();
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {name}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let said = String::from_utf8_lossy(&head).into_owned();
        assert!(stream.read_buf(&mut head).await.unwrap() > 0, "{said}");
    }
    let said = String::from_utf8_lossy(&head);
    assert!(said.starts_with("HTTP/1.1 101"), "{said}");
    stream
}

/// Each says something and hears it again.
pub(crate) async fn echo(sockets: &mut [TlsStream<TcpStream>]) {
    for (number, socket) in sockets.iter_mut().enumerate() {
        let text = format!("{number:05}");
        // A text message of five bytes, masked with zeros.
        let mut message = vec![0x81, 0x85, 0, 0, 0, 0];
        message.extend(text.as_bytes());
        socket.write_all(&message).await.unwrap();
        let mut answer = [0; 7];
        socket.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer[2..], *text.as_bytes());
    }
}

fn config() -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anything))
        .with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

/// Whose certificate it is does not matter here, and checking it would cost the same everywhere.
#[derive(Debug)]
struct Anything;

impl ServerCertVerifier for Anything {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
