//! `supvm serve` as it is run on an ordinary host: the real program, its real children, a client by
//! its Unix socket. Where this machine's /dev/kvm cannot run a guest, and it is given none here that
//! could run, a create must end in an error with a name and leave nothing behind.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use client::protocol::vm::VmRef;
use client::protocol::{ErrorCode, Fault};
use client::{Client, Endpoint, Trust, new_vm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

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
            "guest = {{ kernel = {0:?}, initramfs = {0:?} }}\napi = {{ listen = \"\" }}\n\
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
