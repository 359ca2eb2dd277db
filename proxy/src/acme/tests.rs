use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};
use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use ring::hmac;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

use protocol::host::proxy::ServeEdge;
use protocol::id::Subdomain;
use protocol::network::Publication;

use super::*;
use crate::api::tls::edge_config;
use crate::edge::Edge;
use crate::edge::guests::{ConnectError, Guest, Guests, Refusal};
use crate::edge::limits::Limits;

const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";

/// TXT records by name; the largest number of values that one had at a time.
type Records = Arc<Mutex<(HashMap<String, Vec<String>>, usize)>>;

/// A name server for everything: updates over TCP with the key above, TXT records over UDP.
async fn name_server() -> (SocketAddr, Records) {
    let records = Records::default();
    let address = own_address();
    let udp = UdpSocket::bind(address).await.unwrap();
    let tcp = TcpListener::bind(address).await.unwrap();
    let shown = Arc::clone(&records);
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
            let answer = answered(&shown, &Message::from_vec(&buffer[..length]).unwrap());
            udp.send_to(&answer, from).await.unwrap();
        }
    });
    let changed = Arc::clone(&records);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let length = stream.read_u16().await.unwrap();
            let mut bytes = vec![0; length.into()];
            stream.read_exact(&mut bytes).await.unwrap();
            let message = Message::from_vec(&bytes).unwrap();
            let answer = if message.metadata.op_code == OpCode::Update {
                updated(&changed, &bytes, &message)
            } else {
                answered(&changed, &message)
            };
            stream.write_u16(answer.len() as u16).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        }
    });
    (address, records)
}

fn answered(records: &Records, query: &Message) -> Vec<u8> {
    let mut message = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
    message.metadata.authoritative = true;
    let asked = query.queries[0].clone();
    if asked.query_type() == RecordType::TXT {
        let name = asked.name().to_lowercase().to_ascii();
        for value in records.lock().unwrap().0.get(&name).into_iter().flatten() {
            let data = RData::TXT(hickory_proto::rr::rdata::TXT::new(vec![value.clone()]));
            message.add_answer(Record::from_rdata(asked.name().clone(), 1, data));
        }
    }
    if asked.query_type() == RecordType::A {
        let data = RData::A(Ipv4Addr::LOCALHOST.into());
        message.add_answer(Record::from_rdata(asked.name().clone(), 1, data));
    }
    message.add_query(asked);
    message.to_vec().unwrap()
}

/// Checks the signature by its definition in RFC 8945, with the record taken from the end.
fn updated(records: &Records, bytes: &[u8], message: &Message) -> Vec<u8> {
    let code = if signed(bytes) {
        let mut records = records.lock().unwrap();
        for record in &message.authorities {
            assert_eq!(record.record_type(), RecordType::TXT);
            let name = record.name.to_lowercase().to_ascii();
            match (&record.data, record.dns_class) {
                (_, DNSClass::ANY) => drop(records.0.remove(&name)),
                (RData::TXT(text), DNSClass::IN) => {
                    let values = records.0.entry(name).or_default();
                    values.push(text.to_string());
                    let count = values.len();
                    records.1 = records.1.max(count);
                }
                other => panic!("{other:?}"),
            }
        }
        ResponseCode::NoError
    } else {
        ResponseCode::NotAuth
    };
    let mut answer = Message::new(message.metadata.id, MessageType::Response, OpCode::Update);
    answer.metadata.response_code = code;
    answer.to_vec().unwrap()
}

fn signed(bytes: &[u8]) -> bool {
    let key_name = b"\x03key\x07example\0";
    let algorithm = b"\x0bhmac-sha256\0";
    // Name, type, class, TTL, length; algorithm, time, fudge, size, MAC, id, error, other.
    let data = algorithm.len() + 6 + 2 + 2 + 32 + 2 + 2 + 2;
    let (body, record) = bytes.split_at(bytes.len() - (key_name.len() + 10 + data));
    let (head, data) = record.split_at(key_name.len() + 10);
    assert_eq!(&head[..key_name.len()], key_name);
    assert_eq!(&head[key_name.len()..][..8], [0, 250, 0, 255, 0, 0, 0, 0]);
    let (before_mac, rest) = data.split_at(algorithm.len() + 8);
    let (time, fudge) = before_mac[algorithm.len()..].split_at(6);
    assert_eq!(&rest[..2], [0, 32]);
    assert_eq!(&rest[34..], [bytes[0], bytes[1], 0, 0, 0, 0]);
    let mut seconds = [0; 8];
    seconds[2..].copy_from_slice(time);
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(now.abs_diff(u64::from_be_bytes(seconds)) < 300);
    let mut without = body.to_vec();
    assert_eq!(without[11], 1);
    without[11] = 0;
    let mut text = without;
    text.extend_from_slice(key_name);
    text.extend_from_slice(&[0, 255, 0, 0, 0, 0]);
    text.extend_from_slice(algorithm);
    text.extend_from_slice(time);
    text.extend_from_slice(fudge);
    text.extend_from_slice(&[0, 0, 0, 0]);
    let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET);
    hmac::verify(&key, &text, &rest[2..34]).is_ok()
}

fn zone(server: SocketAddr, secret: &[u8]) -> Zone {
    Zone::new(server, "example.org", "Key.Example.", secret).unwrap()
}

#[tokio::test]
async fn txt_records_are_set_and_removed_with_a_signature_that_the_server_accepts() {
    let (server, records) = name_server().await;
    let at = "_acme-challenge.vms.example.org";
    let values = ["one".to_owned(), "two".to_owned()];
    zone(server, SECRET).set_txt(at, &values).await.unwrap();
    let held = |records: &Records| records.lock().unwrap().0.get(&format!("{at}.")).cloned();
    assert_eq!(held(&records).as_deref(), Some(&values[..]));
    zone(server, SECRET)
        .set_txt(at, &values[1..])
        .await
        .unwrap();
    assert_eq!(held(&records).as_deref(), Some(&values[1..]));
    let refused = zone(server, b"another key").set_txt(at, &[]).await;
    assert!(matches!(
        refused,
        Err(UpdateError::Refused {
            code: ResponseCode::NotAuth,
            ..
        })
    ));
    zone(server, SECRET).set_txt(at, &[]).await.unwrap();
    assert_eq!(held(&records), None);
}

#[tokio::test]
async fn a_name_server_that_is_gone_or_answers_nonsense_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let length = stream.read_u16().await.unwrap();
        stream
            .read_exact(&mut vec![0; length.into()])
            .await
            .unwrap();
        stream.write_all(&[0, 12, 1, 2, 3]).await.unwrap();
    });
    let error = zone(server, SECRET)
        .set_txt("a.example.org", &[])
        .await
        .unwrap_err();
    assert!(
        matches!(error, UpdateError::Senseless(who) if who == server),
        "{error}"
    );
    let error = zone(server, SECRET)
        .set_txt("a.example.org", &[])
        .await
        .unwrap_err();
    assert!(matches!(error, UpdateError::Unreachable { .. }), "{error}");
}

/// Where nobody else comes to listen: every process has an address of its own in the loopback
/// network, and who takes any port gets one above these.
fn own_address() -> SocketAddr {
    static PORT: AtomicU16 = AtomicU16::new(25_000);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let address = Ipv4Addr::new(127, 64 | high, middle, low);
    (address, PORT.fetch_add(1, Ordering::Relaxed)).into()
}

/// Ends pebble with the test, and shows what it said when that fails.
struct Pebble {
    child: Child,
    log: PathBuf,
}

impl Drop for Pebble {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

/// Debian's pebble with the name server above. Gives its directory and its root certificate.
/// It looks for proofs in TLS at `tls_port`.
async fn pebble(
    name_server: SocketAddr,
    directory: &std::path::Path,
    tls_port: u16,
) -> (Pebble, String, Vec<u8>) {
    let issuer = CertifiedIssuer::self_signed(
        {
            let mut parameters = CertificateParams::default();
            parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            parameters
        },
        KeyPair::generate().unwrap(),
    )
    .unwrap();
    let key = KeyPair::generate().unwrap();
    let listen = own_address();
    let leaf = CertificateParams::new(vec![listen.ip().to_string()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    std::fs::write(path("cert.pem"), leaf.pem()).unwrap();
    std::fs::write(path("key.pem"), key.serialize_pem()).unwrap();
    let config = serde_json::json!({ "pebble": {
        "listenAddress": listen.to_string(),
        "certificate": path("cert.pem"),
        "privateKey": path("key.pem"),
        "httpPort": 5002,
        "tlsPort": tls_port,
    }});
    std::fs::write(path("config.json"), config.to_string()).unwrap();
    let log = std::fs::File::create(directory.join("log")).unwrap();
    let child = Command::new("pebble")
        .args([
            "-config",
            &path("config.json"),
            "-dnsserver",
            &name_server.to_string(),
        ])
        .args(["-strict"])
        .env("PEBBLE_VA_NOSLEEP", "1")
        .env("PEBBLE_AUTHZREUSE", "0")
        // In percent, 5 where nothing is said. The third refusal in a row fails an order, and there
        // are many requests.
        .env("PEBBLE_WFE_NONCEREJECT", "1")
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("pebble is not installed: apt-get install pebble");
    let mut pebble = Pebble {
        child,
        log: directory.join("log"),
    };
    while tokio::net::TcpStream::connect(listen).await.is_err() {
        assert_eq!(pebble.child.try_wait().unwrap(), None, "pebble ended");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (
        pebble,
        format!("https://{listen}/dir"),
        issuer.der().to_vec(),
    )
}

fn an_order(
    directory: String,
    root: Vec<u8>,
    server: SocketAddr,
    key: &KeyPair,
) -> OrderCertificate {
    let names = vec!["vms.example.org".to_owned(), "*.vms.example.org".to_owned()];
    let request = CertificateParams::new(names.clone())
        .unwrap()
        .serialize_request(key)
        .unwrap();
    OrderCertificate {
        ticket: 1,
        directory,
        contact: "mailto:admin@example.org".into(),
        account_key: KeyPair::generate().unwrap().serialize_der(),
        names,
        request: request.der().to_vec(),
        update_server: server.to_string(),
        zone: "example.org".into(),
        key_name: "key.example".into(),
        key_secret: SECRET.to_vec(),
        propagation_s: 0,
        name_servers: vec![],
        roots: vec![root],
    }
}

#[tokio::test]
async fn pebble_gives_a_certificate_for_the_domain_and_all_names_below_it() {
    use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
    let (server, records) = name_server().await;
    let directory = tempfile::tempdir().unwrap();
    let (_pebble, url, root) = pebble(server, directory.path(), 5001).await;
    let here = Here {
        challenges: Arc::default(),
        domain: "vms.example.org".into(),
    };
    // An order that was cut has left this.
    let left = ["left".to_owned()];
    let at = "_acme-challenge.vms.example.org";
    zone(server, SECRET).set_txt(at, &left).await.unwrap();
    let key = KeyPair::generate().unwrap();
    let wanted = an_order(url, root, server, &key);
    // The second time with the account of the first.
    for _ in 0..2 {
        let chain = order(&wanted, &here).await.unwrap();
        let leaf = CertificateDer::from_pem_slice(chain.as_bytes()).unwrap();
        assert!(CertificateDer::pem_slice_iter(chain.as_bytes()).count() > 1);
        let parsed = rustls::server::ParsedCertificate::try_from(&leaf).unwrap();
        for name in ["vms.example.org", "any.vms.example.org"] {
            let name = ServerName::try_from(name).unwrap();
            rustls::client::verify_server_name(&parsed, &name).unwrap();
        }
        let records = records.lock().unwrap();
        assert_eq!(records.1, 2, "both proofs at the same time");
        assert!(records.0.is_empty(), "left behind: {:?}", records.0);
    }
    // Proof that cannot be seen: the authority says no, and nothing stays behind.
    let (elsewhere, hidden) = name_server().await;
    let mut unseen = wanted.clone();
    unseen.update_server = elsewhere.to_string();
    unseen.names = vec!["other.example.org".into()];
    let error = order(&unseen, &here).await.unwrap_err();
    assert!(matches!(error, AcmeError::NotAccepted { .. }), "{error}");
    assert!(hidden.lock().unwrap().0.is_empty());
    // An authority that is not the one it says it is.
    let mut strange = wanted;
    strange.roots = vec![];
    let error = order(&strange, &here).await.unwrap_err();
    assert!(matches!(error, AcmeError::Authority(_)), "{error}");
}

/// There are no VMs.
struct Nobody;

impl Guests for Nobody {
    type Stream = tokio::io::DuplexStream;

    async fn publication(&self, _: &Subdomain) -> Result<Publication, Refusal> {
        Err(Refusal::Unknown)
    }

    async fn find(&self, _: &Subdomain) -> Result<Guest, Refusal> {
        Err(Refusal::Unknown)
    }

    async fn connect(&self, _: &Guest, _: u16) -> Result<Self::Stream, ConnectError> {
        Err(ConnectError::Gone)
    }

    async fn ended(&self, _: &Guest) {}
}

/// An edge for `vms.example.org` and where it listens.
async fn edge() -> (Edge<Nobody>, SocketAddr) {
    let edge = Edge::new(Arc::new(Nobody), Limits::default());
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["vms.example.org".to_owned()])
        .unwrap()
        .self_signed(&key)
        .unwrap();
    let config = edge_config(&[certificate.der().to_vec()], &key.serialize_der(), &[]);
    edge.set_tls(config.unwrap());
    let applied = edge
        .apply(&ServeEdge {
            https_address: "127.0.0.1:0".into(),
            domain: "vms.example.org".into(),
            ..ServeEdge::default()
        })
        .await;
    assert_eq!(applied.message, "");
    let address = applied.https_address.parse().unwrap();
    (edge, address)
}

#[tokio::test]
async fn pebble_gives_a_certificate_for_a_single_name_proved_by_the_edge() {
    use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
    let (edge, listens) = edge().await;
    let (server, records) = name_server().await;
    let directory = tempfile::tempdir().unwrap();
    let (_pebble, url, root) = pebble(server, directory.path(), listens.port()).await;
    let here = Here {
        challenges: edge.challenges(),
        domain: edge.domain(),
    };
    let key = KeyPair::generate().unwrap();
    let an_order_for = |name: &str| {
        let request = CertificateParams::new(vec![name.to_owned()])
            .unwrap()
            .serialize_request(&key)
            .unwrap();
        OrderCertificate {
            names: vec![name.to_owned()],
            request: request.der().to_vec(),
            update_server: String::new(),
            ..an_order(url.clone(), root.clone(), server, &key)
        }
    };
    for name in ["vms.example.org", "app.example.com"] {
        let chain = order(&an_order_for(name), &here).await.unwrap();
        let leaf = CertificateDer::from_pem_slice(chain.as_bytes()).unwrap();
        let parsed = rustls::server::ParsedCertificate::try_from(&leaf).unwrap();
        let named = ServerName::try_from(name).unwrap();
        rustls::client::verify_server_name(&parsed, &named).unwrap();
    }
    assert_eq!(
        records.lock().unwrap().1,
        0,
        "DNS has nothing to do with it"
    );
    // A VM's name is its secret; the wildcard cannot be proved this way.
    let secret = "abcdefghijklmnopqrst.VMS.example.org";
    let error = order(&an_order_for(secret), &here).await.unwrap_err();
    assert!(matches!(error, AcmeError::Secret(_)), "{error}");
    let error = order(&an_order_for("*.vms.example.org"), &here).await;
    assert!(matches!(error, Err(AcmeError::Wildcard(_))), "{error:?}");
    // Nothing is proved any more.
    let error = look(listens, "vms.example.org", &["acme-tls/1"]).await;
    assert!(error.is_err(), "{error:?}");
}

/// The protocol that was chosen and the leaf that was shown.
async fn look(
    to: SocketAddr,
    name: &str,
    offered: &[&str],
) -> std::io::Result<(Option<Vec<u8>>, Vec<u8>)> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anything))
        .with_no_client_auth();
    config.alpn_protocols = offered
        .iter()
        .map(|name| name.as_bytes().to_vec())
        .collect();
    let socket = tokio::net::TcpStream::connect(to).await?;
    let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, socket)
        .await?;
    let session = stream.get_ref().1;
    let leaf = session.peer_certificates().unwrap()[0].to_vec();
    Ok((session.alpn_protocol().map(<[u8]>::to_vec), leaf))
}

/// Takes every certificate: what it is, the test looks at.
#[derive(Debug)]
struct Anything;

impl rustls::client::danger::ServerCertVerifier for Anything {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[tokio::test]
async fn a_proof_is_shown_to_who_asks_for_it_and_for_nothing_else() {
    let (edge, listens) = edge().await;
    let domain = "vms.example.org";
    let (_, ordinary) = look(listens, domain, &["h2"]).await.unwrap();
    let challenges = edge.challenges();
    let proving = challenges.prove(domain, tls::config(domain, &[7; 32]).unwrap());
    let (chosen, proof) = look(listens, "VMS.example.org", &["acme-tls/1"])
        .await
        .unwrap();
    assert_eq!(chosen.as_deref(), Some(&b"acme-tls/1"[..]));
    assert_ne!(proof, ordinary);
    // The digest is in it, as RFC 8737 section 3 has it.
    let identifier = [&[4, 34, 4, 32][..], &[7; 32]].concat();
    assert!(
        proof
            .windows(identifier.len())
            .any(|bytes| bytes == identifier)
    );
    for offered in [
        &["h2"][..],
        &["acme-tls/1", "h2"],
        &["h2", "acme-tls/1"],
        &[],
    ] {
        let (chosen, shown) = look(listens, domain, offered).await.unwrap();
        assert_eq!(shown, ordinary, "{offered:?}");
        assert_ne!(chosen.as_deref(), Some(&b"acme-tls/1"[..]));
    }
    assert!(
        look(listens, "other.example.org", &["acme-tls/1"])
            .await
            .is_err()
    );
    // A newer order for the same name outlives the older one.
    let newer = challenges.prove(domain, tls::config(domain, &[8; 32]).unwrap());
    drop(proving);
    assert!(look(listens, domain, &["acme-tls/1"]).await.is_ok());
    drop(newer);
    assert!(look(listens, domain, &["acme-tls/1"]).await.is_err());
}
