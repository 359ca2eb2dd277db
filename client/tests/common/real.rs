//! A real agent behind the real proxy. Control alone is played by the test: it answers an `OpenVm`
//! with a connection to the agent's socket, as it would with one to a VM's.

use std::io::Write;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use client::protocol::agent::{Configure, Configured};
use client::protocol::message::decode_body;
use client::protocol::network::{Egress, NetworkCounters, NetworkInfo, Publication, SetNetwork};
use client::protocol::{Kind, Message, encode};
use client::{Client, Trust, Vm};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use super::{Appliance, Reply, TOKEN, VM, info};

/// A limit that only a hang reaches.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A machine: an agent, the proxy before it, and between proxy and client a wire that can be cut.
pub(crate) struct Machine {
    pub(crate) appliance: Appliance,
    agent: Agent,
    wire: Wire,
}

impl Machine {
    pub(crate) async fn start() -> Self {
        let agent = Agent::start();
        let socket = agent.path("s");
        let network = Mutex::new((Egress::default(), Publication::default()));
        let appliance = Appliance::start(32, move |request| match Kind(request.kind) {
            Kind::OPEN_VM => match StdStream::connect(&socket) {
                Ok(stream) => Reply::Stream(stream.into()),
                Err(error) => panic!("no agent: {error}"),
            },
            Kind::GET_NETWORK | Kind::SET_NETWORK => {
                let mut network = network.lock().unwrap();
                let (egress, publication) = &mut *network;
                if Kind(request.kind) == Kind::SET_NETWORK {
                    let set: SetNetwork = decode_body(&request.body).unwrap();
                    *egress = set.egress.unwrap_or_else(|| egress.clone());
                    *publication = set.publication.unwrap_or_else(|| publication.clone());
                }
                Reply::message(&NetworkInfo {
                    egress: egress.clone(),
                    publication: publication.clone(),
                    counters: NetworkCounters {
                        bytes_out: 4711,
                        ..NetworkCounters::default()
                    },
                })
            }
            _ => Reply::message(&info(VM)),
        })
        .await;
        let api = appliance.dir.path().join("api");
        let wire = Wire::new(appliance.dir.path().join("wire"), api);
        Self {
            appliance,
            agent,
            wire,
        }
    }

    /// A client on the wire.
    pub(crate) async fn client(&self) -> Client {
        let endpoint = format!("unix:{}", self.wire.path.display());
        let endpoint = endpoint.parse().unwrap();
        Client::connect(endpoint, TOKEN.into(), Trust::none())
            .await
            .unwrap()
    }

    pub(crate) async fn vm(&self) -> Vm {
        self.client().await.vm(VM.parse().unwrap())
    }

    pub(crate) fn endpoint(&self) -> client::Endpoint {
        format!("unix:{}", self.wire.path.display())
            .parse()
            .unwrap()
    }

    /// Where relative paths begin, as this machine sees it.
    pub(crate) fn workspace(&self) -> PathBuf {
        self.agent.path("workspace")
    }

    /// Where the agent itself listens.
    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.agent.path("s")
    }

    /// Breaks every connection of clients, as a network would.
    pub(crate) fn cut(&self) {
        self.wire.cut();
    }

    /// Lets nobody connect until the guard is gone.
    pub(crate) fn take_away(&self) {
        self.cut();
        std::fs::rename(&self.wire.path, self.wire.path.with_extension("away")).unwrap();
    }

    pub(crate) fn give_back(&self) {
        std::fs::rename(self.wire.path.with_extension("away"), &self.wire.path).unwrap();
    }

    /// Ends the agent as a crash of the VM would.
    pub(crate) fn kill_agent(&mut self) {
        self.agent.child.kill().unwrap();
        self.agent.child.wait().unwrap();
    }
}

struct Agent {
    child: Child,
    directory: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        std::fs::create_dir(path("workspace")).unwrap();
        // In a PID namespace of its own: what its commands left running goes with it.
        let child = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"])
            .args(["sh", "-c", "\"$@\" & wait", "sh"])
            .arg(program())
            .args(["agent", "--socket"])
            .arg(path("s"))
            .arg("--workspace")
            .arg(path("workspace"))
            .arg("--logs")
            .arg(path("logs"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let agent = Self { child, directory };
        let begin = Instant::now();
        let mut control = loop {
            match StdStream::connect(agent.path("s")) {
                Ok(stream) => break stream,
                Err(error) => assert!(begin.elapsed() < PATIENCE, "no agent: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let configure = Configure {
            vm: VM.to_owned(),
            generation: 1,
            hostname: "supvm-test".to_owned(),
            machine_id: [7; 16],
            unix_ns: 1,
            entropy: [9; 32],
            dns: vec!["10.213.0.1".to_owned()],
            env: vec![("FROM_VM".to_owned(), "yes".to_owned())],
            grow_disk: true,
        };
        control.write_all(&encode(&configure).unwrap()).unwrap();
        let mut answer = [0; 7];
        std::io::Read::read_exact(&mut control, &mut answer).unwrap();
        let kind = u16::from_le_bytes([answer[4], answer[5]]);
        assert_eq!(Kind(kind), Configured::KIND, "the agent was not configured");
        agent
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// The agent of this checkout. Cargo builds no programs of other packages for a test, so it is
/// asked to.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        // target/debug/deps/a_test-0123
        let own = std::env::current_exe().unwrap();
        let directory = own.parent().unwrap().parent().unwrap();
        let mut build = Command::new(env!("CARGO"));
        build
            .args([
                "build",
                "--quiet",
                "--package",
                "guest-init",
                "--target-dir",
            ])
            .arg(directory.parent().unwrap());
        if directory.ends_with("release") {
            build.arg("--release");
        }
        assert!(
            build.status().unwrap().success(),
            "guest-init was not built"
        );
        directory.join("guest-init")
    })
}

/// Passes bytes on between clients and the proxy.
struct Wire {
    path: PathBuf,
    accepting: JoinHandle<()>,
    connections: std::sync::Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl Wire {
    fn new(path: PathBuf, api: PathBuf) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        let connections = std::sync::Arc::new(Mutex::new(Vec::new()));
        let made = std::sync::Arc::clone(&connections);
        let accepting = tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut far = UnixStream::connect(&api).await.unwrap();
                let passing = tokio::spawn(async move {
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
                made.lock().unwrap().push(passing);
            }
        });
        Self {
            path,
            accepting,
            connections,
        }
    }

    fn cut(&self) {
        self.connections
            .lock()
            .unwrap()
            .drain(..)
            .for_each(|passing| passing.abort());
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

/// Ends in a failure, not in a hang.
pub(crate) async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("a hang")
}
