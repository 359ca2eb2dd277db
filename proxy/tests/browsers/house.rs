//! A proxy with one VM attached, told by a control that the test plays. The world is a network
//! namespace in which the edge has its usual ports, the VM is another.

use std::future::Future;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use protocol::host::proxy::{AttachVm, DetachVm, Serve, ServeEdge, ServeGateway};
use protocol::network::{Egress, Publication};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::agent;
use crate::common::{Control, Proxy};
use crate::net::{Guest, world_on};
use crate::offload;
use crate::programs::{self, Program};

pub(crate) const DOMAIN: &str = "vm.test";
const SUBDOMAIN: &str = "abcdefghijklmnopqrst";

/// How long a test may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(180);

/// Runs a test in a world of its own, on the runtime that proxy has.
pub(crate) fn world<F: Future<Output = ()>>(test: impl FnOnce(House) -> F + Send + 'static) {
    world_on(
        tokio::runtime::Builder::new_multi_thread(),
        LIMIT,
        || async { test(House::open().await).await },
    );
}

pub(crate) struct House {
    dir: tempfile::TempDir,
    /// The key of the edge's certificate, as Chromium wants to be told of it.
    pub(crate) key: String,
    answers: JoinHandle<()>,
    control: Arc<Control>,
    running: watch::Sender<Option<(u64, Arc<Guest>)>>,
    generation: u64,
    guest: Arc<Guest>,
    place: Arc<OwnedFd>,
    _proxy: Proxy,
}

impl Drop for House {
    fn drop(&mut self) {
        self.answers.abort();
    }
}

impl House {
    async fn open() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let certificate = certificate();
        std::fs::write(dir.path().join("root.pem"), certificate.root).unwrap();
        let modules = dir.path().join("node_modules");
        std::os::unix::fs::symlink(programs::node_modules(), modules).unwrap();
        let proxy = Proxy::start();
        let control = proxy.control();
        let serving = control
            .serve(&Serve {
                api_address: String::new(),
                certificates: certificate.chain,
                key: certificate.key,
                max_streams: 64,
                max_connections: 64,
                edge: ServeEdge {
                    https_address: "127.0.0.1:443".into(),
                    http_address: "127.0.0.1:80".into(),
                    domain: DOMAIN.into(),
                    public_port: 443,
                    ..ServeEdge::default()
                },
                gateway: ServeGateway::default(),
            })
            .await;
        assert_eq!(serving.message, "");
        let (guest, channel) = Guest::with_relay(libc::IFF_VNET_HDR, offload::relay);
        let (running, told) = watch::channel(None);
        let control = Arc::new(control);
        let mut house = Self {
            dir,
            key: certificate.spki,
            answers: tokio::spawn(agent::serve(Arc::clone(&control), told)),
            control,
            place: Arc::new(guest.namespace().try_clone().unwrap()),
            guest: Arc::new(guest),
            generation: 0,
            running,
            _proxy: proxy,
        };
        house.attach(channel).await;
        house
    }

    /// The VM is up: it is reached from now on.
    pub(crate) async fn attach(&mut self, channel: OwnedFd) {
        self.generation += 1;
        let attach = AttachVm {
            vm: "vm-1234abcd".parse().unwrap(),
            generation: self.generation,
            hostname: "supvm-1234".into(),
            subdomain: SUBDOMAIN.parse().unwrap(),
            egress: Egress::default(),
            publication: Publication::default(),
        };
        self.control.send(&attach, &[channel.as_fd()]).await;
        let guest = Arc::clone(&self.guest);
        self.running.send_replace(Some((self.generation, guest)));
    }

    /// The VM ends, with its servers, and another start of it begins: it is reached once the channel
    /// is attached.
    pub(crate) async fn stop(&mut self, servers: Program) -> OwnedFd {
        let vm = "vm-1234abcd".parse().unwrap();
        let generation = self.generation;
        self.running.send_replace(None);
        self.control.send(&DetachVm { vm, generation }, &[]).await;
        drop(servers);
        let (guest, channel) = Guest::with_relay(libc::IFF_VNET_HDR, offload::relay);
        self.place = Arc::new(guest.namespace().try_clone().unwrap());
        self.guest = Arc::new(guest);
        channel
    }

    /// A directory of the test's own.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The root of the edge's certificate.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir().join("root.pem")
    }

    /// The name at which port 3000 is reached.
    pub(crate) fn name() -> String {
        format!("{SUBDOMAIN}.{DOMAIN}")
    }

    /// An address at port 3000.
    pub(crate) fn url(path: &str) -> String {
        format!("https://{}{path}", Self::name())
    }

    /// The command for a server in the VM.
    pub(crate) fn inside(&self, words: &[&str]) -> Command {
        programs::command(Some(Arc::clone(&self.place)), self.dir(), words)
    }

    /// The command for a client.
    pub(crate) fn outside(&self, words: &[&str]) -> Command {
        programs::command(None, self.dir(), words)
    }

    /// The words for a script of this test, which lies beside the packages that it imports.
    pub(crate) fn node(&self, words: &[&str]) -> Node {
        let script = self.dir().join(words[0]);
        std::fs::copy(programs::script(words[0]), &script).unwrap();
        let mut all = vec!["node".to_owned(), script.to_str().unwrap().to_owned()];
        all.extend(words[1..].iter().map(|word| (*word).to_owned()));
        Node(all)
    }

    /// Starts a server in the VM and waits until it listens on a port.
    pub(crate) async fn serve(&self, port: u16, command: Command, name: &str) -> Program {
        let output = self.dir().join(format!("{name}.log"));
        let program = Program::start(command, name, output);
        let listens = move || {
            // On any address, or on one of loopback's alone.
            let addresses = ["10.213.0.2", "127.0.0.1", "::1"];
            let begun = Instant::now();
            while begun.elapsed() < programs::PATIENCE {
                for address in addresses {
                    if TcpStream::connect((address, port)).is_ok() {
                        return true;
                    }
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            false
        };
        assert!(self.guest.run(listens).await, "{name} does not listen");
        program
    }

    /// What curl has to be told always.
    pub(crate) fn curl_command(&self, words: &[&str]) -> Command {
        let root = self.root();
        let root = root.to_str().unwrap();
        let first = ["curl", "-sS", "--cacert", root];
        let mut all = first.to_vec();
        all.extend([
            "--resolve",
            "*:443:127.0.0.1",
            "--resolve",
            "*:80:127.0.0.1",
        ]);
        all.extend(words);
        self.outside(&all)
    }

    /// Runs curl to a good end.
    pub(crate) async fn curl(&self, words: &[&str]) -> String {
        let output = programs::run(self.curl_command(words)).await;
        String::from_utf8(output).unwrap()
    }
}

/// See [`House::node`].
pub(crate) struct Node(Vec<String>);

impl Node {
    pub(crate) fn words(&self) -> Vec<&str> {
        self.0.iter().map(String::as_str).collect()
    }
}

struct Certificate {
    root: String,
    chain: Vec<Vec<u8>>,
    key: Vec<u8>,
    spki: String,
}

/// A root, and below it a certificate for the domain and all its names.
fn certificate() -> Certificate {
    use rcgen::PublicKeyData;
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    // With the same name as the leaf's it would be taken for that.
    let name = rcgen::DnType::CommonName;
    ca.distinguished_name.push(name, "the root of this test");
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names = vec![DOMAIN.to_owned(), format!("*.{DOMAIN}")];
    let leaf = rcgen::CertificateParams::new(names).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    let spki = ring::digest::digest(&ring::digest::SHA256, &key.subject_public_key_info());
    Certificate {
        root: root.pem(),
        chain: vec![leaf.der().to_vec(), root.der().to_vec()],
        key: key.serialize_der(),
        spki: BASE64.encode(spki.as_ref()),
    }
}
