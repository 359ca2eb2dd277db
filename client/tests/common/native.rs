//! The whole appliance, natively: the real supervisor, control and proxy of this checkout, and the
//! real agent of each VM as a process in namespaces of its own (`hypervisor/examples/native`). The
//! one thing that is missing is the machine monitor. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak, mpsc};
use std::time::{Duration, Instant};

use client::blocking;
use client::{Client, Trust};

pub(crate) const TOKEN: &str = "native-secret";
/// A limit that only a hang reaches.
const PATIENCE: Duration = Duration::from_secs(60);

/// An appliance that runs as long as this does.
pub(crate) struct Appliance {
    child: Child,
    directory: PathBuf,
    /// Of the API over TLS.
    address: String,
}

impl Appliance {
    /// The one that all tests of a program share; each makes a VM of its own. It ends with the last
    /// test that holds it.
    pub(crate) fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Appliance>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let appliance = Arc::new(Self::start());
            *shared = Arc::downgrade(&appliance);
            appliance
        })
    }

    /// One that may be mistreated.
    pub(crate) fn start() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests need root");
        let (native, guest_init) = programs();
        let directory = tempfile::tempdir().unwrap().keep();
        let log = std::fs::File::create(directory.join("log")).unwrap();
        let mut command = Command::new(native);
        command
            .arg("serve")
            .arg("--state")
            .arg(directory.join("state"))
            .arg("--guest-init")
            .arg(guest_init)
            .args(["--token", TOKEN])
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(log);
        let child = spawn_for_life(command);
        let mut appliance = Self {
            child,
            directory,
            address: String::new(),
        };
        let begin = Instant::now();
        while appliance.address.is_empty() {
            let ended = appliance.child.try_wait().unwrap();
            assert!(
                ended.is_none() && begin.elapsed() < PATIENCE,
                "no appliance: {}",
                appliance.log()
            );
            std::thread::sleep(Duration::from_millis(5));
            let log = appliance.log();
            if let Some((_, rest)) = log.split_once("the API is served address=\"") {
                appliance.address = rest.split('"').next().unwrap().to_owned();
            }
        }
        appliance
    }

    /// The supervisor's process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the appliance has said so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// The endpoint on a Unix socket.
    pub(crate) fn unix(&self) -> String {
        format!("unix:{}", self.state().join("run/api.sock").display())
    }

    /// The endpoint over TLS, by a name that only the client itself can resolve.
    pub(crate) fn tls(&self) -> String {
        let port = self.address.rsplit_once(':').unwrap().1;
        format!("https://supvm.localhost:{port}")
    }

    /// The certificate authority, as a file.
    pub(crate) async fn ca(&self) -> PathBuf {
        let fetched = client::fetch_ca(&self.tls().parse().unwrap())
            .await
            .unwrap();
        let path = self.directory.join("ca.pem");
        std::fs::write(&path, fetched.pem).unwrap();
        path
    }

    /// A client on the Unix socket.
    pub(crate) async fn client(&self) -> Client {
        Client::connect(self.unix().parse().unwrap(), TOKEN.into(), Trust::none())
            .await
            .unwrap()
    }

    /// The same for code that blocks.
    pub(crate) fn blocking(&self) -> blocking::Client {
        blocking::Client::connect(self.unix().parse().unwrap(), TOKEN.into(), Trust::none())
            .unwrap()
    }

    /// A client over TLS.
    pub(crate) async fn tls_client(&self) -> Client {
        let trust = Trust::from_pem_file(&self.ca().await).unwrap();
        Client::connect(self.tls().parse().unwrap(), TOKEN.into(), trust)
            .await
            .unwrap()
    }

    /// Where the VMs' public addresses are served, after the last of these that were logged.
    pub(crate) fn edge(&self) -> String {
        let log = self.log();
        let (_, rest) = log.rsplit_once("serving VMs https=\"").expect("no edge");
        rest.split('"').next().unwrap().to_owned()
    }

    /// A service, by the name that it has in the process table.
    fn service(&self, name: &str) -> Option<i32> {
        let of = |pid: i32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let (begin, end) = stat.rsplit_once(')')?;
            let its: u32 = end.split_whitespace().nth(1)?.parse().ok()?;
            (begin.ends_with(name) && its == self.pid()).then_some(pid)
        };
        std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
            .find_map(of)
    }

    /// Ends a service as a crash would, and waits for the next one.
    pub(crate) fn crash(&self, name: &str) {
        let pid = self.service(name).unwrap();
        let gone = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(gone, nix::sys::signal::Signal::SIGKILL).unwrap();
        let begin = Instant::now();
        while self.service(name).is_none_or(|now| now == pid) {
            assert!(begin.elapsed() < PATIENCE, "{name} does not come back");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the files of a VM are called on this machine.
    pub(crate) fn root_of(&self, vm: &str) -> PathBuf {
        self.state().join("vms").join(vm).join("root")
    }

    /// Ends everything at once, as a power cut would.
    fn end(&mut self) {
        // All others die with their parents.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        self.end();
        // The last to die may still be writing.
        let begin = Instant::now();
        while std::fs::remove_dir_all(&self.directory).is_err()
            && self.directory.exists()
            && begin.elapsed() < Duration::from_secs(5)
        {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Starts a program that ends with this process, however that ends. The parent of whoever asks for
/// that is a thread, so the thread has to stay.
fn spawn_for_life(mut command: Command) -> Child {
    // SAFETY: prctl(2) is a system call on numbers; nothing is allocated between fork and exec.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            Ok(())
        });
    }
    type Order = (Command, mpsc::Sender<Child>);
    static KEEPER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (sender, orders) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in orders {
                answer.send(command.spawn().unwrap()).unwrap();
            }
        });
        sender
    });
    let (answer, child) = mpsc::channel();
    keeper.send((command, answer)).unwrap();
    child.recv().unwrap()
}

/// The appliance and the agent of this checkout. Cargo builds no programs of other packages for a
/// test, so it is asked to.
fn programs() -> &'static (PathBuf, PathBuf) {
    static PROGRAMS: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        // target/debug/deps/a_test-0123
        let own = std::env::current_exe().unwrap();
        let directory = own.parent().and_then(Path::parent).unwrap();
        for wanted in [
            ["--package", "hypervisor", "--example", "native"].as_slice(),
            &["--package", "guest-init"],
        ] {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--quiet"]).args(wanted);
            // What cargo told this test of its own package would make it build dependencies anew.
            for (name, _) in std::env::vars_os() {
                let text = name.to_string_lossy();
                if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                    build.env_remove(&name);
                }
            }
            build.arg("--target-dir").arg(directory.parent().unwrap());
            if directory.ends_with("release") {
                build.arg("--release");
            }
            assert!(build.status().unwrap().success(), "{wanted:?} not built");
        }
        (
            directory.join("examples/native"),
            directory.join("guest-init"),
        )
    })
}

/// Ends in a failure, not in a hang.
pub(crate) async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("a hang")
}
