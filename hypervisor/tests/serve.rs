//! `supvm serve` as it is run on an ordinary host: the real program, its real children, a client by
//! its Unix socket. Where this machine's /dev/kvm cannot run a guest, and it is given none here that
//! could run, a create must end in an error with a name and leave nothing behind.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use client::protocol::vm::VmRef;
use client::protocol::{ErrorCode, Fault};
use client::{Client, Endpoint, Trust, new_vm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// A limit that only a hang reaches.
const HANG: Duration = Duration::from_secs(60);

struct Served {
    directory: tempfile::TempDir,
    process: Child,
}

impl Drop for Served {
    fn drop(&mut self) {
        // Its children go with it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn serve(state: &Path, config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_supvm"));
    command.args(["serve", "--state"]).arg(state);
    command.arg("--config").arg(config);
    command.env_remove("SUPVM_LOG");
    command
}

impl Served {
    /// Starts it with one template and a kernel that is none.
    fn new() -> Self {
        Self::with("")
    }

    /// The same with more settings.
    fn with(more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let template = path("state/templates/debian@13");
        fs::create_dir_all(&template).unwrap();
        let disk = fs::File::create(template.join("disk.img")).unwrap();
        disk.set_len(2 << 20).unwrap();
        fs::write(
            template.join("template.toml"),
            "name = \"debian\"\nversion = \"13\"\ndisk_bytes = 2097152\ndescription = \"\"\n",
        )
        .unwrap();
        fs::write(path("kernel"), "no kernel").unwrap();
        let hash = blake3::hash(b"secret").to_hex();
        let settings = format!(
            "{more}guest = {{ kernel = {0:?}, initramfs = {0:?} }}\napi = {{ listen = \"\" }}\n\
             tokens = [{{ owner = \"me\", blake3 = \"{hash}\" }}]\n",
            path("kernel")
        );
        fs::write(path("supvm.toml"), settings).unwrap();
        let process = serve(&path("state"), &path("supvm.toml"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut served = Self { directory, process };
        let mut log = BufReader::new(served.process.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("serving; Ctrl-C") {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "it did not start");
        }
        // Whatever else it says is shown when a test fails.
        std::thread::spawn(move || {
            log.lines()
                .map_while(Result::ok)
                .for_each(|l| eprintln!("{l}"))
        });
        served
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn client(&self) -> Client {
        let api = self.path("state/run/api.sock");
        let endpoint: Endpoint = format!("unix:{}", api.display()).parse().unwrap();
        let connecting = Client::connect(endpoint, "secret".into(), Trust::none());
        tokio::time::timeout(HANG, connecting)
            .await
            .expect("no answer")
            .unwrap()
    }

    /// Its children of this name.
    fn children(&self, name: &str) -> Vec<Pid> {
        let own = self.process.id();
        let tasks = format!("/proc/{own}/task/{own}/children");
        let children = fs::read_to_string(tasks).unwrap();
        let children = children.split_ascii_whitespace();
        let named = children.filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
        });
        named
            .map(|pid| Pid::from_raw(pid.parse().unwrap()))
            .collect()
    }

    /// Ends a service as `kill -9` does.
    fn kill(&self, name: &str) -> Pid {
        let [pid] = self.children(name)[..] else {
            panic!("there is not one {name}");
        };
        kill(pid, Signal::SIGKILL).unwrap();
        pid
    }

    fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

async fn list(client: &Client) -> usize {
    let listed = tokio::time::timeout(HANG, client.list()).await;
    listed.expect("no answer").unwrap().len()
}

#[tokio::test]
async fn a_vm_that_cannot_run_here_is_refused_by_name_and_leaves_nothing() {
    let served = Served::new();
    let client = served.client().await;
    assert!(client.limits().unwrap().max_streams > 1);
    let making = client.create(new_vm().unwrap());
    let error = tokio::time::timeout(HANG, making)
        .await
        .expect("no answer")
        .unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::BootFailed), "{error}");
    let client::ClientError::Refused(body) = &error else {
        panic!("{error}");
    };
    assert_eq!(body.fault, Fault::Host);
    assert_eq!(list(&client).await, 0);
    for directory in ["state/vms", "state/staging", "state/run/vmm"] {
        assert_eq!(served.names(directory), [""; 0], "{directory}");
    }
    assert_eq!(served.children("supvm-vmm"), []);
    let unknown = VmRef::Name("nobody".parse().unwrap());
    let error = client.get(unknown).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::VmNotFound));
}

#[tokio::test]
async fn control_and_proxy_may_be_killed_and_ctrl_c_leaves_no_process() {
    let mut served = Served::new();
    let client = served.client().await;
    assert_eq!(list(&client).await, 0);
    let control = served.kill("supvm-control");
    // The same connection: the request waits for the next control.
    assert_eq!(list(&client).await, 0);
    assert_ne!(served.children("supvm-control"), [control]);
    let proxy = served.kill("supvm-proxy");
    let client = served.client().await;
    assert_eq!(list(&client).await, 0);
    assert_ne!(served.children("supvm-proxy"), [proxy]);
    let all = ["supvm-control", "supvm-proxy"].map(|name| served.children(name));
    let own = Pid::from_raw(i32::try_from(served.process.id()).unwrap());
    kill(own, Signal::SIGINT).unwrap();
    let ended = tokio::task::spawn_blocking(move || served.process.wait().map(|end| (end, served)));
    let (end, served) = tokio::time::timeout(HANG, ended)
        .await
        .expect("it does not end")
        .unwrap()
        .unwrap();
    assert!(end.success(), "{end}");
    for pid in all.iter().flatten() {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid}");
    }
    drop(served);
}

#[test]
fn a_state_directory_has_one_supervisor_and_settings_are_checked_first() {
    let served = Served::new();
    let said = |mut command: Command| {
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let second = said(serve(&served.path("state"), &served.path("supvm.toml")));
    assert!(second.contains("in use by another"), "{second}");
    let missing = said(serve(&served.path("other"), &served.path("supvm.tolm")));
    assert!(missing.contains("supvm.tolm"), "{missing}");
    fs::write(served.path("bad.toml"), "domain = 7").unwrap();
    let bad = said(serve(&served.path("other"), &served.path("bad.toml")));
    assert!(bad.contains("bad.toml") && bad.contains("line 1"), "{bad}");
    assert!(!served.path("other").exists());
}

/// Where nobody else comes to listen: every process has an address of its own in the loopback
/// network, and who takes any port gets one above 32,767.
fn own_address(port: u16) -> SocketAddr {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    (Ipv4Addr::new(127, 64 | high, middle, low), port).into()
}

/// Ends a program with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn program(name: &str, arguments: &[&str]) -> Program {
    let child = Command::new(name)
        .args(arguments)
        .env("PEBBLE_VA_NOSLEEP", "1")
        .env("PEBBLE_AUTHZREUSE", "0")
        // In percent, 5 where nothing is said. The third refusal in a row fails an order, and there
        // are many requests.
        .env("PEBBLE_WFE_NONCEREJECT", "1")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Program(child.unwrap_or_else(|error| panic!("{name}: {error}; apt-get install pebble")))
}

/// Debian's pebble, whose certificates are valid for `life` seconds, with a name server for which
/// every name is this machine. It looks for proofs at `edge`.
fn pebble(directory: &Path, edge: SocketAddr, life: u64) -> (Program, Program, String) {
    let authority = CertifiedIssuer::self_signed(
        {
            let mut parameters = CertificateParams::default();
            parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            parameters
        },
        KeyPair::generate().unwrap(),
    )
    .unwrap();
    let (listen, names) = (own_address(25_000), own_address(25_053).to_string());
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec![listen.ip().to_string()])
        .unwrap()
        .signed_by(&key, &authority)
        .unwrap();
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    fs::write(path("root.pem"), authority.pem()).unwrap();
    fs::write(path("cert.pem"), leaf.pem()).unwrap();
    fs::write(path("key.pem"), key.serialize_pem()).unwrap();
    let config = format!(
        r#"{{"pebble": {{"listenAddress": "{listen}", "certificate": "{}",
            "privateKey": "{}", "httpPort": 1, "tlsPort": {},
            "certificateValidityPeriod": {life}}}}}"#,
        path("cert.pem"),
        path("key.pem"),
        edge.port()
    );
    fs::write(path("pebble.json"), config).unwrap();
    let here = edge.ip().to_string();
    let servers = program(
        "pebble-challtestsrv",
        &[
            "-dns01",
            &names,
            "-defaultIPv4",
            &here,
            "-defaultIPv6",
            "",
            "-http01",
            "",
            "-https01",
            "",
            "-tlsalpn01",
            "",
            "-management",
            "127.0.0.1:0",
        ],
    );
    let authority = program(
        "pebble",
        &[
            "-strict",
            "-config",
            &path("pebble.json"),
            "-dnsserver",
            &names,
        ],
    );
    eventually("pebble listens", || {
        std::net::TcpStream::connect(listen).ok()
    });
    let acme = format!(
        "acme = {{ directory = \"https://{listen}/dir\", roots = {:?} }}\n",
        path("root.pem")
    );
    (servers, authority, acme)
}

/// The certificate that is shown for a name, and who issued it.
fn shown(edge: SocketAddr, name: &str) -> Option<(Vec<u8>, String)> {
    let output = Command::new("openssl")
        .args([
            "s_client",
            "-connect",
            &edge.to_string(),
            "-servername",
            name,
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let der = CertificateDer::from_pem_slice(&output.stdout).ok()?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
    let issuer = parsed.issuer().to_string();
    Some((der.to_vec(), issuer))
}

/// Asks until the answer is a good one.
fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + HANG;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Sends a request on a connection that stays open, and gives the status line.
fn ask(stream: &mut (impl Read + Write), host: &str) -> String {
    let request = format!("HEAD / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.extend(byte);
    }
    String::from_utf8(head)
        .unwrap()
        .lines()
        .next()
        .unwrap()
        .to_owned()
}

#[test]
fn the_domains_certificate_is_ordered_shown_renewed_and_kept_and_no_connection_ends_by_it() {
    const DOMAIN: &str = "vms.example.org";
    const SECRET: &str = "abcdefghijklmnopqrst.vms.example.org";
    let files = tempfile::tempdir().unwrap();
    let edge = own_address(25_443);
    let (_servers, _authority, acme) = pebble(files.path(), edge, 20);
    let served = Served::with(&format!(
        "domain = \"{DOMAIN}\"\nedge = {{ listen = \"{edge}\", http = \"\" }}\n{acme}"
    ));
    let by_pebble = || shown(edge, DOMAIN).filter(|(_, issuer)| issuer.contains("Pebble"));
    let (first, _) = eventually("pebble's certificate is shown", by_pebble);
    // Whoever visits a VM sees one of the built-in authority, and trusts that.
    let (_, issuer) = shown(edge, SECRET).unwrap();
    assert!(issuer.contains("supvm certificate authority"), "{issuer}");
    let mut roots = rustls::RootCertStore::empty();
    let root = fs::read(served.path("state/keys/authority.der")).unwrap();
    roots.add(root.into()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let session = rustls::ClientConnection::new(config.into(), SECRET.try_into().unwrap());
    let socket = std::net::TcpStream::connect(edge).unwrap();
    let mut stream = rustls::StreamOwned::new(session.unwrap(), socket);
    assert_eq!(ask(&mut stream, SECRET), "HTTP/1.1 404 Not Found");
    let (second, _) = eventually("it is renewed", || {
        by_pebble().filter(|(leaf, _)| *leaf != first)
    });
    assert_ne!(first, second);
    assert_eq!(ask(&mut stream, SECRET), "HTTP/1.1 404 Not Found");
    // The next control shows it at once.
    served.kill("supvm-control");
    eventually("there is a new control", || {
        (served.children("supvm-control").len() == 1).then_some(())
    });
    eventually("pebble's certificate is shown again", by_pebble);
    assert_eq!(ask(&mut stream, SECRET), "HTTP/1.1 404 Not Found");
}
