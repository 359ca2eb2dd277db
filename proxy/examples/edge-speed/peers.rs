//! What is measured: the edge alone in front of the server, the whole of proxy in front of VMs, and
//! nginx. Each is a process of its own.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use protocol::host::proxy::{AttachVm, Serve, ServeEdge, ServeGateway};
use protocol::id::{Subdomain, VmId};
use protocol::network::{Egress, Publication};
use proxy::edge::Edge;
use proxy::edge::guests::{ConnectError, Guest, Guests, Refusal};
use proxy::edge::limits::Limits;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;

use crate::clients::Target;
use crate::{VMS, common, net, offload, servers};

const DOMAIN: &str = "vm.test";

/// The name of the one VM where there is one.
pub(crate) const NAME: &str = "aaaaaaaaaaaaaaaaaaaa.vm.test";

/// Ends a process with the measurement.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // So that nginx ends its workers, too.
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Self(child.unwrap_or_else(|error| panic!("{command:?}: {error}; run ./setup.sh bench")))
    }

    /// What it and its children have of memory (Pss), in MiB.
    fn memory(&self) -> f64 {
        let own = self.0.id();
        let children = format!("/proc/{own}/task/{own}/children");
        let children = std::fs::read_to_string(children).unwrap();
        let own = own.to_string();
        let all = children.split_ascii_whitespace().chain([own.as_str()]);
        let kib = all.map(|pid| {
            let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
            let line = rollup.lines().find(|line| line.starts_with("Pss:"));
            let number = line.unwrap().split_ascii_whitespace().nth(1);
            number.unwrap().parse::<f64>().unwrap()
        });
        kib.sum::<f64>() / 1024.0
    }
}

/// The servers behind, in a process with descriptors of its own.
pub(crate) struct Servers(#[allow(dead_code)] Process);

impl Servers {
    /// One in this namespace, and its address.
    pub(crate) fn here() -> (Self, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (Self::start(vec![listener]), address)
    }

    fn start(listeners: Vec<TcpListener>) -> Self {
        use nix::fcntl::{FcntlArg, FdFlag, fcntl};
        for listener in &listeners {
            fcntl(listener, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        }
        let numbers = listeners.iter().map(|one| one.as_raw_fd().to_string());
        let numbers: Vec<String> = numbers.collect();
        let mut command = own_program();
        Self(Process::start(command.arg("serve").arg(numbers.join(","))))
    }
}

/// A certificate for the domain and all below it.
pub(crate) fn certificate(directory: &Path) {
    let key = rcgen::KeyPair::generate().unwrap();
    let names = vec![DOMAIN.to_owned(), format!("*.{DOMAIN}")];
    let certificate = rcgen::CertificateParams::new(names)
        .unwrap()
        .self_signed(&key)
        .unwrap();
    std::fs::write(directory.join("cert.pem"), certificate.pem()).unwrap();
    std::fs::write(directory.join("key.pem"), key.serialize_pem()).unwrap();
}

fn pair(directory: &Path) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
    let certificate = CertificateDer::from_pem_file(directory.join("cert.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(directory.join("key.pem")).unwrap();
    (certificate, key)
}

/// An address that was free a moment ago.
fn free() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

async fn listens(address: SocketAddr) {
    let begun = Instant::now();
    while TcpStream::connect(address).await.is_err() {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "nothing listens at {address}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn own_program() -> Command {
    Command::new(std::env::current_exe().unwrap())
}

/// Where `./setup.sh` has put it.
fn nginx() -> std::path::PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(std::path::PathBuf::from);
    let home = || Some(Path::new(&std::env::var_os("HOME")?).join(".cache"));
    let base = base.or_else(home);
    let base = base.expect("neither XDG_CACHE_HOME nor HOME is set; set one of them");
    base.join("supvm/programs/nginx")
}

/// Debian's nginx.
pub(crate) struct Nginx {
    process: Process,
    pub(crate) address: SocketAddr,
}

impl Nginx {
    pub(crate) async fn start(directory: &Path, backend: SocketAddr) -> Self {
        let address = free();
        let at = directory.display();
        let configuration = format!(
            "daemon off; worker_processes 2; pid {at}/nginx.pid;\n\
             error_log {at}/nginx.log;\n\
             events {{ worker_connections 40000; }}\n\
             http {{ access_log off; client_body_temp_path {at}/body; proxy_temp_path {at}/temp;\n\
             fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
             keepalive_requests 10000000; ssl_session_cache off; ssl_session_tickets off;\n\
             map $http_upgrade $upgrade {{ default upgrade; '' ''; }}\n\
             upstream behind {{ server {backend}; keepalive 64; keepalive_requests 10000000; }}\n\
             server {{ listen {address} ssl http2 backlog=4096; ssl_certificate {at}/cert.pem;\n\
             ssl_certificate_key {at}/key.pem; http2_max_concurrent_streams 128;\n\
             location / {{ proxy_pass http://behind; proxy_http_version 1.1;\n\
             proxy_set_header Host $host; proxy_set_header Upgrade $http_upgrade;\n\
             proxy_set_header Connection $upgrade; proxy_set_header X-Forwarded-For $remote_addr;\n\
             proxy_set_header X-Forwarded-Proto https; proxy_set_header X-Forwarded-Host $host;\n\
             proxy_read_timeout 1h; }} }} }}\n"
        );
        std::fs::write(directory.join("nginx.conf"), configuration).unwrap();
        let configuration = directory.join("nginx.conf");
        let mut command = Command::new(nginx());
        command
            .arg("-p")
            .arg(directory)
            .arg("-c")
            .arg(configuration);
        let process = Process::start(&mut command);
        listens(address).await;
        Self { process, address }
    }

    pub(crate) fn target(&self) -> Target {
        Target {
            address: self.address,
            name: NAME.into(),
        }
    }

    pub(crate) fn memory(&self) -> f64 {
        self.process.memory()
    }
}

/// The edge alone, whose one VM is the server.
pub(crate) struct Alone {
    _process: Process,
    address: SocketAddr,
}

impl Alone {
    pub(crate) async fn start(directory: &Path, backend: SocketAddr) -> Self {
        let address = free();
        let mut command = own_program();
        command.arg("alone").arg(directory);
        command.args([address.to_string(), backend.to_string()]);
        let process = Process::start(&mut command);
        listens(address).await;
        Self {
            _process: process,
            address,
        }
    }

    pub(crate) fn target(&self) -> Target {
        Target {
            address: self.address,
            name: NAME.into(),
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap()
}

/// One VM: the backend.
struct Backend {
    guest: Guest,
    address: SocketAddr,
}

impl Guests for Backend {
    type Stream = TcpStream;

    async fn publication(&self, _: &Subdomain) -> Result<Publication, Refusal> {
        Ok(self.guest.publication.clone())
    }

    async fn find(&self, _: &Subdomain) -> Result<Guest, Refusal> {
        Ok(self.guest.clone())
    }

    async fn connect(&self, _: &Guest, _: u16) -> Result<TcpStream, ConnectError> {
        let stream = TcpStream::connect(self.address).await;
        let stream = stream.map_err(|_| ConnectError::Refused)?;
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    async fn ended(&self, _: &Guest) {
        std::future::pending().await
    }
}

/// The process of [`Alone`].
pub(crate) fn alone(directory: &str, address: &str, backend: &str) {
    let (certificate, key) = pair(Path::new(directory));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let guests = Backend {
        guest: Guest {
            vm: VmId::from_random([0; 8]),
            generation: 1,
            publication: Publication::default(),
            requests: Arc::default(),
        },
        address: backend.parse().unwrap(),
    };
    // All visitors come from one address.
    let limits = Limits {
        connections_per_network: u32::MAX,
        requests_per_network: u32::MAX,
        requests_per_vm: u32::MAX,
        ..Limits::default()
    };
    let serve = ServeEdge {
        https_address: address.into(),
        domain: DOMAIN.into(),
        ..ServeEdge::default()
    };
    runtime().block_on(async {
        let edge = Edge::new(Arc::new(guests), limits);
        edge.set_tls(Arc::new(config));
        let applied = edge.apply(&serve).await;
        assert_eq!(applied.message, "");
        std::future::pending::<()>().await;
    });
}

/// The whole of proxy, with VMs that are network namespaces.
pub(crate) struct Whole {
    // Before the VMs: their channels end first.
    process: Process,
    pub(crate) address: SocketAddr,
    /// The VMs' names.
    pub(crate) names: Vec<String>,
    _control: common::Control,
    guests: Vec<net::Guest>,
    _servers: Servers,
}

impl Whole {
    pub(crate) async fn start(directory: &Path) -> Self {
        let address = free();
        let mut command = own_program();
        let process = Process::start(command.arg("whole").arg(directory));
        let socket = directory.join("control");
        let begun = Instant::now();
        let control = loop {
            match proxy::channel::Channel::connect(&socket) {
                Ok(channel) => break common::Control::new(channel),
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(30), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let (certificate, key) = pair(directory);
        let serve = Serve {
            api_address: String::new(),
            certificates: vec![certificate.to_vec()],
            key: key.secret_der().to_vec(),
            max_streams: 64,
            max_connections: 64,
            edge: ServeEdge {
                https_address: address.to_string(),
                domain: DOMAIN.into(),
                public_port: 443,
                ..ServeEdge::default()
            },
            gateway: ServeGateway::default(),
        };
        assert_eq!(control.serve(&serve).await.message, "");
        let (mut names, mut guests) = (Vec::new(), Vec::new());
        let mut listeners = Vec::new();
        for number in 0..VMS {
            let (guest, channel) = net::Guest::with_relay(libc::IFF_VNET_HDR, offload::relay);
            let listener = guest.run(|| TcpListener::bind("0.0.0.0:3000").unwrap());
            listeners.push(listener.await);
            let number = u8::try_from(number).unwrap();
            let subdomain = Subdomain::from_random([number; 20]);
            names.push(format!("{subdomain}.{DOMAIN}"));
            let attach = AttachVm {
                vm: VmId::from_random([number; 8]),
                generation: 1,
                hostname: "guest".into(),
                subdomain,
                egress: Egress::default(),
                publication: Publication::default(),
            };
            control.send(&attach, &[channel.as_fd()]).await;
            guests.push(guest);
        }
        Self {
            process,
            address,
            names,
            _control: control,
            guests,
            _servers: Servers::start(listeners),
        }
    }

    /// Connects this namespace to a VM's by a pair of devices; gives its server's address there.
    pub(crate) async fn plug(&self, vm: usize) -> SocketAddr {
        let namespace = self.guests[vm].namespace();
        let namespace = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
        for line in [
            &format!("ip link add plug0 type veth peer name plug1 netns {namespace}"),
            "ip address add 10.214.0.1/24 dev plug0",
            "ip link set plug0 mtu 65520 up",
        ] {
            net::run(line);
        }
        let there = || {
            net::run("ip address add 10.214.0.2/24 dev plug1");
            net::run("ip link set plug1 mtu 65520 up");
        };
        self.guests[vm].run(there).await;
        SocketAddr::from(([10, 214, 0, 2], 3000))
    }

    pub(crate) fn memory(&self) -> f64 {
        self.process.memory()
    }

    pub(crate) fn target(&self, vm: usize) -> Target {
        Target {
            address: self.address,
            name: self.names[vm].clone(),
        }
    }

    /// The first VM sends datagrams and opens connections to all the world, until this is dropped.
    pub(crate) fn flood(&self) -> Flood {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let namespace = self.guests[0].namespace().try_clone().unwrap();
        std::thread::spawn(move || {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            // Its own work is a guest's, which has its own processors: only what it makes proxy do
            // is to be felt.
            // SAFETY: the call takes numbers; 0 is the calling thread.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
            let datagrams = std::net::UdpSocket::bind("10.213.0.2:0").unwrap();
            let mut number = 1_u32;
            while !stopped.load(Ordering::Relaxed) {
                number = number.wrapping_mul(0x9e37_79b1).wrapping_add(1);
                let to = std::net::Ipv4Addr::from(number | 0x0800_0000);
                // What cannot be sent is not sent.
                let _ = datagrams.send_to(&[7; 600], (to, 9));
                if number.is_multiple_of(8) {
                    servers::syn(SocketAddr::from((to, 80)));
                }
            }
        });
        Flood(stop)
    }
}

/// Ends the flood.
pub(crate) struct Flood(Arc<AtomicBool>);

impl Drop for Flood {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The process of [`Whole`].
pub(crate) fn whole(directory: &str) {
    let socket = |name| {
        let path = Path::new(directory).join(name);
        // One before this may have left its own.
        let _ = std::fs::remove_file(&path);
        path
    };
    let control = common::seqpacket(&socket("control"));
    let api = std::os::unix::net::UnixListener::bind(socket("api")).unwrap();
    runtime()
        .block_on(proxy::serve(control, api.into()))
        .unwrap();
}
