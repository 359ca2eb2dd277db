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
use protocol::host::proxy::{
    ApiAbandoned, ApiReply, ApiRequest, AttachVm, Attached, Count, Counted, DetachVm, EdgeRequest,
    ListAttached, Serve, Serving, UpdateVm,
};
use protocol::host::supervisor::{
    ForgetVmm, KillVmm, Run, ShutDown, SpawnVmm, VmmEnded, VmmListed, VmmSpawned, VmmsListed,
};
use protocol::host::vmm::Ending;
use protocol::id::{IdempotencyKey, VmId};
use protocol::message::{decode_body, encode_body};
use protocol::network::{Egress, NetworkCounters, Publication};
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

/// The test as proxy.
pub(super) struct Proxy {
    channel: Arc<Channel>,
    waiting: Arc<Mutex<Waiting>>,
    pub(super) serve: tokio::sync::watch::Receiver<Serve>,
    reader: AbortHandle,
}

pub(super) type Answered = (ApiReply, Option<OwnedFd>);

#[derive(Default)]
struct Waiting {
    last: u64,
    tickets: HashMap<u64, oneshot::Sender<Answered>>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Proxy {
    async fn new(channel: Channel, has: Has) -> Self {
        let channel = Arc::new(channel);
        let packet = channel.receive().await.unwrap().unwrap();
        let serve: Serve = decode(&packet.frame).unwrap();
        let serving = Serving {
            api_address: serve.api_address.clone(),
            ..Serving::default()
        };
        channel.send(&serving, &[]).await.unwrap();
        let (told, serve) = tokio::sync::watch::channel(serve);
        let waiting = Arc::<Mutex<Waiting>>::default();
        let (from, to) = (channel.clone(), waiting.clone());
        let reader = tokio::spawn(async move {
            while let Ok(Some(mut packet)) = from.receive().await {
                if packet.frame.kind == Serve::KIND {
                    told.send_replace(decode(&packet.frame).unwrap());
                    continue;
                }
                if packet.frame.kind != ApiReply::KIND {
                    has.take(packet, &from).await;
                    continue;
                }
                let reply: ApiReply = decode(&packet.frame).unwrap();
                let waiter = to.lock().unwrap().tickets.remove(&reply.ticket);
                let _ = waiter.unwrap().send((reply, packet.descriptors.pop()));
            }
            to.lock().unwrap().tickets.clear();
        });
        Self {
            channel,
            waiting,
            serve,
            reader: reader.abort_handle(),
        }
    }

    fn ticket(&self) -> (u64, oneshot::Receiver<Answered>) {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap();
        waiting.last += 1;
        let ticket = waiting.last;
        waiting.tickets.insert(ticket, sender);
        (ticket, receiver)
    }

    /// Sends a request of the edge; the answer comes later.
    pub(super) async fn begin_edge<Q: Message>(&self, question: &Q) -> oneshot::Receiver<Answered> {
        let (ticket, receiver) = self.ticket();
        let request = EdgeRequest {
            ticket,
            kind: Q::KIND.0,
            body: encode_body(question).unwrap(),
        };
        self.channel.send(&request, &[]).await.unwrap();
        receiver
    }

    /// The edge asks.
    pub(super) async fn ask_edge<Q: Message, A: Message>(
        &self,
        question: &Q,
    ) -> Result<(A, Option<OwnedFd>), ErrorBody> {
        read(self.begin_edge(question).await).await
    }

    /// Says something that is not answered.
    pub(super) async fn say<M: Message>(&self, message: &M) {
        self.channel.send(message, &[]).await.unwrap();
    }

    /// Sends a request; the answer comes later.
    pub(super) async fn begin(
        &self,
        token: &str,
        kind: u16,
        body: Vec<u8>,
    ) -> (u64, oneshot::Receiver<Answered>) {
        let (ticket, receiver) = self.ticket();
        let request = ApiRequest {
            ticket,
            token: token.into(),
            kind,
            body,
        };
        self.channel.send(&request, &[]).await.unwrap();
        (ticket, receiver)
    }

    pub(super) async fn abandon(&self, ticket: u64) {
        self.waiting.lock().unwrap().tickets.remove(&ticket);
        let message = ApiAbandoned { ticket };
        self.channel.send(&message, &[]).await.unwrap();
    }

    pub(super) async fn ask<Q: Message, A: Message>(
        &self,
        token: &str,
        question: &Q,
    ) -> Result<(A, Option<OwnedFd>), ErrorBody> {
        self.raw(token, Q::KIND.0, encode_body(question).unwrap())
            .await
    }

    pub(super) async fn raw<A: Message>(
        &self,
        token: &str,
        kind: u16,
        body: Vec<u8>,
    ) -> Result<(A, Option<OwnedFd>), ErrorBody> {
        let (_, receiver) = self.begin(token, kind, body).await;
        read(receiver).await
    }
}

/// What proxy was given.
#[derive(Clone, Default)]
pub(super) struct Has(Arc<Mutex<HasState>>);

#[derive(Default)]
pub(super) struct HasState {
    /// With proxy's end of the frame channel.
    pub(super) vms: BTreeMap<VmId, (AttachVm, OwnedFd)>,
    pub(super) attaches: usize,
    pub(super) updates: usize,
    /// What it has counted; none when it says nothing.
    pub(super) requests: Option<u64>,
}

impl Has {
    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, HasState> {
        self.0.lock().unwrap()
    }

    async fn take(&self, mut packet: protocol::host::channel::Packet, to: &Channel) {
        let frame = &packet.frame;
        match frame.kind {
            Kind::ATTACH_VM => {
                let attach: AttachVm = decode(frame).unwrap();
                let end = packet.descriptors.pop().unwrap();
                let mut state = self.state();
                state.attaches += 1;
                state.vms.insert(attach.vm.clone(), (attach, end));
            }
            Kind::UPDATE_VM => {
                let update: UpdateVm = decode(frame).unwrap();
                let mut state = self.state();
                state.updates += 1;
                if let Some((vm, _)) = state.vms.get_mut(&update.vm) {
                    vm.egress = update.egress;
                    vm.publication = update.publication;
                }
            }
            Kind::DETACH_VM => {
                let detach: DetachVm = decode(frame).unwrap();
                let mut state = self.state();
                let (vm, _) = state.vms.get(&detach.vm).expect("proxy does not have it");
                assert_eq!(vm.generation, detach.generation);
                state.vms.remove(&detach.vm);
            }
            Kind::LIST_ATTACHED => {
                let ListAttached { after } = decode(frame).unwrap();
                // A page of one, so that there are some.
                let page = {
                    let state = self.state();
                    let mut vms = state
                        .vms
                        .values()
                        .map(|(vm, _)| (vm.vm.clone(), vm.generation));
                    let vm = vms.find(|(vm, _)| after.as_ref().is_none_or(|after| vm > after));
                    Attached {
                        vms: vm.into_iter().collect(),
                        more: vms.next().is_some(),
                    }
                };
                to.send(&page, &[]).await.unwrap();
            }
            Kind::COUNT => {
                let Count { ticket, vm } = decode(frame).unwrap();
                let counted = {
                    let state = self.state();
                    let Some(requests) = state.requests else {
                        return;
                    };
                    let counters = state.vms.contains_key(&vm).then(|| NetworkCounters {
                        requests,
                        ..NetworkCounters::default()
                    });
                    Counted { ticket, counters }
                };
                to.send(&counted, &[]).await.unwrap();
            }
            kind => panic!("control sent {kind} to proxy"),
        }
    }
}

/// Waits for an answer.
pub(super) async fn read<A: Message>(
    receiver: oneshot::Receiver<Answered>,
) -> Result<(A, Option<OwnedFd>), ErrorBody> {
    let (reply, stream) = tokio::time::timeout(HANG, receiver)
        .await
        .expect("no answer")
        .expect("control has gone");
    if reply.kind == Kind::ERROR.0 {
        return Err(decode_body(&reply.body).unwrap());
    }
    assert_eq!(reply.kind, A::KIND.0);
    Ok((decode_body(&reply.body).unwrap(), stream))
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
