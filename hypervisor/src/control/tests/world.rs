//! The stand-ins: a supervisor that outlives control as the real one does, and the test itself as
//! proxy.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use protocol::agent::Configure;
use protocol::host::supervisor::{
    ForgetVmm, KillVmm, Run, ShutDown, SpawnVmm, VmmEnded, VmmListed, VmmSpawned, VmmsListed,
};
use protocol::host::vmm::Ending;
use protocol::id::{IdempotencyKey, VmId};
use protocol::message::encode_body;
use protocol::network::{Egress, Publication};
use protocol::vm::{CreateVm, DeleteVm, Deleted, GetVm, ListVms, VmInfo, VmPage, VmRef, VmState};
use protocol::{ErrorBody, Frame, Kind, Message, decode, frame};
use proxy::channel::{Channel, ChannelListener};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, oneshot};
use tokio::task::{AbortHandle, JoinHandle};

use super::super::{ControlError, serve};
use super::guests::{monitor_of, next_frame};
pub(super) use super::proxy::*;
use crate::role::ControlArgs;
use crate::settings::Settings;

/// How a guest behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// As it should.
    Good,
    /// Its agent never comes up.
    NeverRings,
    /// Its monitor ends at once.
    Dies(Ending),
    /// It says that it powers off and does not.
    StaysOn,
    /// Its agent answers with garbage.
    Garbage,
}

/// A limit that only a hang reaches.
pub(super) const HANG: Duration = Duration::from_secs(30);

pub(super) struct World {
    directory: tempfile::TempDir,
    settings: Settings,
    pub(super) supervisor: Supervisor,
    listener: ChannelListener,
    pub(super) proxy: Option<Proxy>,
    /// What proxy has; it outlives control.
    pub(super) has: Has,
    control: Option<(Runtime, JoinHandle<Result<(), ControlError>>)>,
}

impl World {
    pub(super) async fn new() -> Self {
        Self::with("").await
    }

    /// A world with more lines in its settings; control runs.
    pub(super) async fn with(more: &str) -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let root = directory.path();
        let template = root.join("templates/debian@13");
        fs::create_dir_all(&template).unwrap();
        let disk = fs::File::create(template.join("disk.img")).unwrap();
        disk.set_len(2 << 20).unwrap();
        disk.write_all_at(b"root", 0).unwrap();
        fs::write(
            template.join("template.toml"),
            "name = \"debian\"\nversion = \"13\"\ndisk_bytes = 2097152\ndescription = \"\"\n",
        )
        .unwrap();
        for file in ["kernel", "initramfs"] {
            fs::write(root.join(file), file).unwrap();
        }
        let hash = |token: &str| blake3::hash(token.as_bytes()).to_hex();
        let text = format!(
            "guest = {{ kernel = {:?}, initramfs = {:?}, kvm = \"/dev/null\" }}\n\
             tokens = [{{ owner = \"me\", blake3 = \"{}\" }}, {{ owner = \"you\", blake3 = \"{}\" }}]\n{more}",
            root.join("kernel"),
            root.join("initramfs"),
            hash("mine"),
            hash("yours"),
        );
        let settings = Settings::parse(&text, &root.join("supvm.toml")).unwrap();
        let listener = listening(&root.join("proxy.sock"));
        let mut world = Self {
            supervisor: Supervisor::default(),
            listener,
            settings,
            proxy: None,
            has: Has::default(),
            control: None,
            directory,
        };
        world.start().await;
        world
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The names in a directory of the state.
    pub(super) fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Starts control and waits until it has said what proxy shall serve.
    pub(super) async fn start(&mut self) {
        let (ours, theirs) = nix::sys::socket::socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        self.supervisor.attach(ours);
        let arguments = ControlArgs {
            state: self.directory.path().to_owned(),
            run: self.directory.path().to_owned(),
            system: None,
            config: None,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let control = runtime.spawn(serve(theirs, arguments, self.settings.clone()));
        self.control = Some((runtime, control));
        self.accept().await;
    }

    /// Waits for control to connect as to a new proxy.
    pub(super) async fn accept(&mut self) {
        let channel = tokio::time::timeout(HANG, self.listener.accept())
            .await
            .expect("control does not connect to proxy")
            .unwrap();
        self.proxy = Some(Proxy::new(channel, self.has.clone()).await);
    }

    /// Ends proxy as `kill -9` would, and starts another.
    pub(super) async fn restart_proxy(&mut self) {
        self.has = Has::default();
        self.proxy = None;
        self.accept().await;
    }

    /// Ends control as `kill -9` would: nothing of it runs on, nothing is said.
    pub(super) async fn kill(&mut self) {
        let (runtime, _) = self.control.take().unwrap();
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(HANG))
            .await
            .unwrap();
        self.proxy = None;
    }

    pub(super) async fn restart(&mut self) {
        self.kill().await;
        self.start().await;
    }

    /// Waits for control to end by itself.
    pub(super) async fn ended(&mut self) -> Result<(), ControlError> {
        let (runtime, control) = self.control.take().unwrap();
        let result = tokio::time::timeout(HANG, control).await.unwrap().unwrap();
        runtime.shutdown_background();
        result
    }

    pub(super) fn api(&self) -> &Proxy {
        self.proxy.as_ref().unwrap()
    }

    /// Asks with the token of `me`.
    pub(super) async fn ask<Q: Message, A: Message>(&self, question: &Q) -> Result<A, ErrorBody> {
        self.api()
            .ask("mine", question)
            .await
            .map(|(answer, _)| answer)
    }

    pub(super) async fn create(&self, create: &CreateVm) -> Result<VmInfo, ErrorBody> {
        self.ask(create).await
    }

    pub(super) async fn list(&self) -> Vec<VmInfo> {
        let question = ListVms {
            after: None,
            limit: 0,
        };
        self.ask::<_, VmPage>(&question).await.unwrap().vms
    }

    pub(super) async fn delete(&self, vm: &VmInfo) {
        let question = DeleteVm { vm: by_id(vm) };
        self.ask::<_, Deleted>(&question).await.unwrap();
    }

    /// Sends a create; the answer comes later.
    pub(super) async fn begin_create(&self, key: u8) -> (u64, oneshot::Receiver<Answered>) {
        let body = encode_body(&create(key)).unwrap();
        self.api().begin("mine", Kind::CREATE_VM.0, body).await
    }

    /// Asks for a VM until it is in a state.
    pub(super) async fn until(&self, vm: &VmInfo, state: VmState) -> VmInfo {
        let question = GetVm { vm: by_id(vm) };
        let waiting = async {
            loop {
                let info: VmInfo = self.ask(&question).await.unwrap();
                if info.state == state {
                    return info;
                }
            }
        };
        tokio::time::timeout(HANG, waiting)
            .await
            .expect("it never came to that state")
    }

    /// Asks for a VM until it runs for the `generation`th time.
    pub(super) async fn until_generation(&self, vm: &VmInfo, generation: u64) {
        let waiting =
            async { while self.until(vm, VmState::Running).await.generation < generation {} };
        let waited = tokio::time::timeout(HANG, waiting).await;
        waited.expect("it was never started again");
    }

    /// Nothing of any VM is left: no disk, no process, no entry, no socket, no memory taken.
    pub(super) async fn assert_nothing_left(&self) {
        assert_eq!(self.names("vms"), [""; 0]);
        assert_eq!(self.names("staging"), [""; 0]);
        assert_eq!(self.names("vmm"), [""; 0]);
        assert!(self.list().await.is_empty());
        let state = self.supervisor.state();
        assert!(state.running.is_empty(), "{:?}", state.running.keys());
        assert!(state.ended.is_empty(), "{:?}", state.ended);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some((runtime, _)) = self.control.take() {
            runtime.shutdown_background();
        }
    }
}

/// Waits until something holds.
pub(super) async fn eventually(holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(HANG, waiting)
        .await
        .expect("it never came to that");
}

pub(super) fn by_id(vm: &VmInfo) -> VmRef {
    VmRef::Id(vm.id.clone())
}

pub(super) fn create(key: u8) -> CreateVm {
    CreateVm {
        key: IdempotencyKey([key; 16]),
        template: None,
        name: None,
        cpus: Some(1),
        memory_mib: Some(256),
        disk_mib: Some(4),
        labels: Vec::new(),
        env: vec![("COLOUR".into(), "blue".into())],
        egress: Egress::default(),
        publication: Publication::default(),
    }
}

fn listening(path: &std::path::Path) -> ChannelListener {
    let socket = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&socket, Backlog::new(8).unwrap()).unwrap();
    ChannelListener::new(socket).unwrap()
}

/// The stand-in for init.
#[derive(Clone)]
pub(super) struct Supervisor(Arc<Mutex<State>>);

pub(super) struct State {
    pub(super) guest: Guest,
    pub(super) running: BTreeMap<Run, AbortHandle>,
    pub(super) ended: BTreeMap<Run, (Option<u8>, Option<u8>)>,
    pub(super) spawned: Vec<SpawnVmm>,
    pub(super) configured: Vec<Configure>,
    /// The monitors' ends of the frame channels.
    pub(super) frames: BTreeMap<VmId, OwnedFd>,
    pub(super) dropped: Arc<Notify>,
    channel: Option<Arc<Channel>>,
    reader: Option<AbortHandle>,
}

impl Default for Supervisor {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            guest: Guest::Good,
            running: BTreeMap::new(),
            ended: BTreeMap::new(),
            spawned: Vec::new(),
            configured: Vec::new(),
            frames: BTreeMap::new(),
            dropped: Arc::default(),
            channel: None,
            reader: None,
        })))
    }
}

impl Supervisor {
    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn guests_are(&self, guest: Guest) {
        self.state().guest = guest;
    }

    fn attach(&self, socket: OwnedFd) {
        let channel = Arc::new(Channel::new(socket).unwrap());
        self.state().channel = Some(channel.clone());
        let supervisor = self.clone();
        let reader = tokio::spawn(async move {
            while let Ok(Some(packet)) = channel.receive().await {
                supervisor
                    .take(packet.frame, packet.descriptors, &channel)
                    .await;
            }
        });
        self.state().reader = Some(reader.abort_handle());
    }

    async fn take(&self, frame: Frame, descriptors: Vec<OwnedFd>, channel: &Channel) {
        match frame.kind {
            Kind::SPAWN_VMM => {
                let spawn: SpawnVmm = decode(&frame).unwrap();
                assert_eq!(spawn.descriptors.len(), descriptors.len());
                let run = spawn.run.clone();
                let mut files: HashMap<String, OwnedFd> = HashMap::new();
                for (name, file) in spawn.descriptors.iter().zip(descriptors) {
                    files.insert(name.to_string(), file);
                }
                let answer = VmmSpawned {
                    run: run.clone(),
                    pid: 4711,
                };
                channel.send(&answer, &[]).await.unwrap();
                let guest = {
                    let mut state = self.state();
                    state.spawned.push(spawn);
                    state.guest
                };
                let supervisor = self.clone();
                let (go, gone) = oneshot::channel::<()>();
                let (vm, monitor) = (run.clone(), self.clone());
                let task = tokio::spawn(async move {
                    let _ = gone.await;
                    let ending = monitor_of(&vm, guest, files, monitor.clone()).await;
                    tokio::spawn(async move {
                        supervisor.end(&vm, Some(ending.to_wire()), None).await;
                    });
                });
                self.state().running.insert(run, task.abort_handle());
                let _ = go.send(());
            }
            Kind::KILL_VMM => {
                let KillVmm { run } = decode(&frame).unwrap();
                self.end(&run, None, Some(9)).await;
            }
            Kind::FORGET_VMM => {
                let ForgetVmm { run } = decode(&frame).unwrap();
                self.state().ended.remove(&run);
            }
            Kind::LIST_VMMS => {
                let (running, ended) = {
                    let state = self.state();
                    let running: Vec<Run> = state.running.keys().cloned().collect();
                    (running, state.ended.clone())
                };
                for (run, (exit_code, signal)) in ended {
                    let message = VmmEnded {
                        run,
                        exit_code,
                        signal,
                    };
                    channel.send(&message, &[]).await.unwrap();
                }
                for run in running {
                    channel
                        .send(&VmmListed { run, pid: 4711 }, &[])
                        .await
                        .unwrap();
                }
                channel.send(&VmmsListed {}, &[]).await.unwrap();
            }
            kind => panic!("control sent {kind} to the supervisor"),
        }
    }

    /// A monitor's process ends.
    pub(super) async fn end(&self, run: &Run, exit_code: Option<u8>, signal: Option<u8>) {
        let channel = {
            let mut state = self.state();
            let Some(task) = state.running.remove(run) else {
                return;
            };
            task.abort();
            state.ended.insert(run.clone(), (exit_code, signal));
            state.channel.clone()
        };
        let message = VmmEnded {
            run: run.clone(),
            exit_code,
            signal,
        };
        // While no control is there nobody is told.
        let _ = channel.unwrap().send(&message, &[]).await;
    }

    /// The power of the whole host goes: monitors and what init knew of them.
    pub(super) fn power_cut(&self) {
        let mut state = self.state();
        for (_, task) in std::mem::take(&mut state.running) {
            task.abort();
        }
        state.ended.clear();
    }

    /// Every monitor closes its connection to control, and takes the next.
    pub(super) fn drop_control(&self) {
        self.state().dropped.notify_waiters();
    }

    /// Closes the socket to control.
    pub(super) fn hang_up(&self) {
        let mut state = self.state();
        state.channel = None;
        state.reader.take().unwrap().abort();
    }

    pub(super) async fn shut_down(&self) {
        let channel = self.state().channel.clone().unwrap();
        let message = ShutDown { deadline_ms: 5000 };
        channel.send(&message, &[]).await.unwrap();
    }

    pub(super) fn runs(&self) -> Vec<Run> {
        self.state().running.keys().cloned().collect()
    }
}

/// Sends a line through a stream to an agent and expects it back.
pub(super) async fn echo(stream: &mut UnixStream, text: &str) {
    let mut bytes = Vec::new();
    frame::append(&mut bytes, Kind::STDIN, text.as_bytes()).unwrap();
    stream.write_all(&bytes).await.unwrap();
    let answer = tokio::time::timeout(HANG, next_frame(stream))
        .await
        .unwrap();
    assert_eq!(answer.expect("the stream was closed").body, text.as_bytes());
}

pub(super) fn stream(descriptor: Option<OwnedFd>) -> UnixStream {
    let stream = std::os::unix::net::UnixStream::from(descriptor.expect("no stream came"));
    stream.set_nonblocking(true).unwrap();
    UnixStream::from_std(stream).unwrap()
}
