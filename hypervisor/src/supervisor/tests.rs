//! The supervisor with real children: /bin/sh as monitor and proxy, and as control this test program
//! itself, started again to hand the socket that it was given back to the test.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::thread::JoinHandle;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, accept4, connect, socket};
use nix::unistd::Pid;
use protocol::host::channel::{receive, send, send_bytes};
use protocol::host::supervisor::VmmEnded;

use super::duties::NoDuties;
use super::service::Rights;
use super::spawn::{Child, End, Spawn};
use super::*;

/// A limit that only a hang reaches.
const HANG: u16 = 30_000;

const BACK: &str = "SUPVM_TEST_BACK";

/// Not a test of its own: what the supervisor starts as control.
#[test]
#[ignore = "started by the other tests"]
fn stand_in_for_control() {
    let Ok(path) = std::env::var(BACK) else {
        return;
    };
    let mut descriptors = crate::descriptors::Descriptors::take_from_environment().unwrap();
    let supervisor = descriptors.take(SUPERVISOR).unwrap();
    let kind = SockType::SeqPacket;
    let back = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(back.as_raw_fd(), &UnixAddr::new(Path::new(&path)).unwrap()).unwrap();
    send_bytes(back.as_fd(), b"here", &[supervisor.as_fd()]).unwrap();
    drop(supervisor);
    // Until the test lets go.
    let _ = receive(back.as_fd());
}

/// Demands a stop for a byte, and again and again once its other end is closed.
#[derive(Debug)]
struct UntilClosed(OwnedFd);

impl Duties for UntilClosed {
    fn watched(&self) -> Vec<(usize, std::os::fd::BorrowedFd<'_>)> {
        vec![(0, self.0.as_fd())]
    }
    fn ready(&mut self, _: usize) -> Option<Demand> {
        if nix::unistd::read(&self.0, &mut [0]) == Ok(0) {
            self.0 = pipe().0;
        }
        Some(Demand::ShutDown(Outcome::PowerOff))
    }
    fn deadline(&self) -> Option<Instant> {
        NoDuties.deadline()
    }
    fn elapsed(&mut self) -> Option<Demand> {
        None
    }
    fn lease(&mut self, _: Lease) {}
    fn reaps_orphans(&self) -> bool {
        false
    }
}

struct House {
    _directory: tempfile::TempDir,
    back: OwnedFd,
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<Outcome>>,
    proxy_starts: std::fs::File,
}

/// One incarnation of control: its socket to the supervisor, and the one that keeps it alive.
struct Control {
    supervisor: OwnedFd,
    _alive: OwnedFd,
}

impl House {
    fn new(vmm_script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().to_owned();
        let path = run.join("back.sock");
        let back = sockets::listen_at(&path, SockType::SeqPacket).unwrap();
        nix::fcntl::fcntl(
            &back,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
        )
        .unwrap();
        let (theirs, stop) = pipe();
        let fifo = run.join("starts");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // Open for writing as well, so that no writer ever waits and no reader meets an end.
        let mut both = std::fs::File::options();
        let proxy_starts = both.read(true).write(true).open(&fifo).unwrap();
        let script = format!("echo >> {}; exit 3", fifo.display());
        let vmm_script = vmm_script.to_owned();
        let thread = std::thread::spawn(move || {
            let own = std::env::current_exe().unwrap();
            let stand_in = [
                "control",
                "--ignored",
                "--exact",
                "supervisor::tests::stand_in_for_control",
            ];
            let control = Program::open(&own, &stand_in).unwrap();
            let proxy = shell(&script);
            let services = vec![
                Service::new(Kind::Control, control, Rights::default()),
                Service::new(Kind::Proxy, proxy, Rights::default()),
            ];
            let environment = vec![(BACK.to_owned(), path.display().to_string())];
            let (prison, vmm) = (Prison::default(), shell(&vmm_script));
            let duties = UntilClosed(theirs);
            let supervisor = Supervisor::new(&run, prison, vmm, services, environment, duties);
            supervisor.unwrap().run().unwrap().0
        });
        Self {
            _directory: directory,
            back,
            stop: Some(stop),
            thread: Some(thread),
            proxy_starts,
        }
    }

    /// The next control that the supervisor starts.
    fn control(&self) -> Control {
        Control::accept(&self.back)
    }

    /// Waits until proxy was started so many times.
    fn wait_for_starts(&self, count: usize) {
        for _ in 0..count {
            let mut descriptors = [PollFd::new(self.proxy_starts.as_fd(), PollFlags::POLLIN)];
            let heard = poll(&mut descriptors, HANG);
            assert_eq!(heard, Ok(1), "it was not started again");
            (&self.proxy_starts).read_exact(&mut [0]).unwrap();
        }
    }

    fn stop(mut self) -> Outcome {
        self.stop.take();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Control {
    /// The next one that the supervisor starts.
    fn accept(back: &OwnedFd) -> Self {
        let mut connections = [PollFd::new(back.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut connections, HANG), Ok(1), "it was not started");
        let number = accept4(back.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
        // SAFETY: accept4 just made it.
        let alive = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(number) };
        let mut buffer = [0; 16];
        let mut slices = [io::IoSliceMut::new(&mut buffer)];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
        let received = nix::sys::socket::recvmsg::<()>(
            alive.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            nix::sys::socket::MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .unwrap();
        let rights = received.cmsgs().unwrap().next().unwrap();
        let nix::sys::socket::ControlMessageOwned::ScmRights(numbers) = rights else {
            panic!("no descriptor");
        };
        // SAFETY: the kernel just made it.
        let supervisor = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(numbers[0]) };
        Self {
            supervisor,
            _alive: alive,
        }
    }

    fn send<M: Message>(&self, message: &M, descriptors: &[&OwnedFd]) {
        let descriptors: Vec<_> = descriptors.iter().map(|fd| fd.as_fd()).collect();
        send(self.supervisor.as_fd(), message, &descriptors).unwrap();
    }

    fn receive<M: Message>(&self) -> M {
        let packet = receive(self.supervisor.as_fd()).unwrap().unwrap();
        decode(&packet.frame).unwrap()
    }

    fn spawn(&self, run: &Run, name: &str, descriptor: &OwnedFd) {
        let descriptors = vec![heapless::String::try_from(name).unwrap()];
        let request = SpawnVmm {
            run: run.clone(),
            uid: 0,
            memory_max: 0,
            descriptors,
        };
        self.send(&request, &[descriptor]);
    }
}

fn shell(script: &str) -> Program {
    Program::open(Path::new("/bin/sh"), &["sh", "-c", script]).unwrap()
}

fn run_of(generation: u64) -> Run {
    Run {
        vm: "vm-1234abcd".parse().unwrap(),
        generation,
    }
}

#[test]
fn a_monitor_gets_its_descriptors_by_name_and_its_end_outlives_control() {
    let house = House::new("read code <&3; test \"$SUPVM_DESCRIPTORS\" = log && exit $code");
    let control = house.control();
    let (theirs, ours) = pipe();
    control.spawn(&run_of(1), "log", &theirs);
    let spawned: VmmSpawned = control.receive();
    assert_eq!(spawned.run, run_of(1));
    assert!(Path::new(&format!("/proc/{}", spawned.pid)).exists());
    // A second monitor for the same VM is refused.
    control.spawn(&run_of(2), "log", &theirs);
    let refused: VmmNotSpawned = control.receive();
    assert_eq!(refused.run, run_of(2));
    assert!(
        refused.message.contains("vm-1234abcd"),
        "{}",
        refused.message
    );
    // Control dies, the monitor goes on, and ends while nobody is there to be told.
    drop(control);
    drop(theirs);
    std::fs::File::from(ours).write_all(b"13\n").unwrap();
    for _ in 0..2 {
        let control = house.control();
        let ended: VmmEnded = loop {
            control.send(&ListVmms {}, &[]);
            let packet = receive(control.supervisor.as_fd()).unwrap().unwrap();
            if packet.frame.kind == FrameKind::VMM_ENDED {
                break decode(&packet.frame).unwrap();
            }
        };
        assert_eq!((ended.exit_code, ended.signal), (Some(13), None));
    }
    let control = house.control();
    control.send(&ForgetVmm { run: run_of(1) }, &[]);
    control.send(&ListVmms {}, &[]);
    let VmmsListed {} = control.receive();
    drop(control);
    assert_eq!(house.stop(), Outcome::PowerOff);
}

#[test]
fn a_monitor_is_killed_on_demand_and_at_the_end() {
    let house = House::new("exec sleep 1000");
    let control = house.control();
    let (theirs, _ours) = pipe();
    control.spawn(&run_of(1), "x", &theirs);
    let VmmSpawned { .. } = control.receive();
    control.send(&KillVmm { run: run_of(1) }, &[]);
    let ended: VmmEnded = control.receive();
    assert_eq!(ended.signal, Some(libc::SIGKILL as u8));
    control.spawn(&run_of(2), "x", &theirs);
    let second: VmmSpawned = control.receive();
    let stopping = std::thread::spawn(move || house.stop());
    let ShutDown { deadline_ms } = control.receive();
    assert!(deadline_ms > 0);
    drop(control);
    stopping.join().unwrap();
    assert!(!Path::new(&format!("/proc/{}", second.pid)).exists());
}

#[test]
fn a_control_that_waits_for_its_next_start_is_started_to_stop_the_vms() {
    let house = House::new("exec sleep 1000");
    let (theirs, _ours) = pipe();
    let control = house.control();
    control.spawn(&run_of(1), "x", &theirs);
    let VmmSpawned { .. } = control.receive();
    drop(control);
    // After so many ends the next start is 3.2 s away, and the last one is known by then.
    for _ in 0..5 {
        drop(house.control());
    }
    std::thread::sleep(Duration::from_secs(1));
    nix::unistd::write(house.stop.as_ref().unwrap(), &[1]).unwrap();
    let control = house.control();
    let ShutDown { .. } = control.receive();
    drop(control);
    house.stop();
}

#[test]
fn a_bad_message_is_answered_and_harms_nothing() {
    let house = House::new("exit 0");
    let control = house.control();
    send_bytes(control.supervisor.as_fd(), b"nonsense", &[]).unwrap();
    let error: ErrorBody = control.receive();
    assert_eq!(error.code, ErrorCode::Malformed);
    control.send(&VmmsListed {}, &[]);
    let error: ErrorBody = control.receive();
    assert_eq!(error.code, ErrorCode::Unsupported);
    let (theirs, _ours) = pipe();
    let request = SpawnVmm {
        run: run_of(1),
        uid: 0,
        memory_max: 0,
        descriptors: Vec::new(),
    };
    control.send(&request, &[&theirs]);
    let refused: VmmNotSpawned = control.receive();
    assert!(
        refused.message.contains("0 descriptor names"),
        "{}",
        refused.message
    );
    control.send(&SpawnVmm { uid: 1, ..request }, &[]);
    let refused: VmmNotSpawned = control.receive();
    assert!(refused.message.contains("user id 1"), "{}", refused.message);
    drop(control);
    house.stop();
}

#[test]
fn a_service_that_ends_is_started_again() {
    let house = House::new("exit 0");
    let first = house.control();
    drop(first);
    let control = house.control();
    // Proxy ends at once each time.
    house.wait_for_starts(3);
    drop(control);
    house.stop();
}

#[test]
fn a_control_that_stops_reading_is_started_again_and_nothing_is_lost() {
    let house = House::new("exit 13");
    let control = house.control();
    let (theirs, _ours) = pipe();
    control.spawn(&run_of(1), "x", &theirs);
    // It asks and asks and reads no answer, until the supervisor has had enough of it.
    let list = protocol::encode(&ListVmms {}).unwrap();
    let refused = (0..100_000)
        .map(|_| send_bytes(control.supervisor.as_fd(), &list, &[]))
        .find_map(Result::err);
    assert!(refused.is_some(), "it was never ended");
    let next = house.control();
    let ended: VmmEnded = loop {
        next.send(&ListVmms {}, &[]);
        let packet = receive(next.supervisor.as_fd()).unwrap().unwrap();
        if packet.frame.kind == FrameKind::VMM_ENDED {
            break decode(&packet.frame).unwrap();
        }
    };
    assert_eq!((ended.run, ended.exit_code), (run_of(1), Some(13)));
    drop((control, next));
    house.stop();
}

/// Not a test of its own: a supervisor whose process gets orphans, as PID 1 does. A process of its
/// own, because it waits for every child there is.
#[test]
#[ignore = "started by another test"]
fn stand_in_for_init() {
    struct ReapsOrphans(NoDuties);
    impl Duties for ReapsOrphans {
        fn watched(&self) -> Vec<(usize, std::os::fd::BorrowedFd<'_>)> {
            self.0.watched()
        }
        fn ready(&mut self, number: usize) -> Option<Demand> {
            self.0.ready(number)
        }
        fn deadline(&self) -> Option<Instant> {
            self.0.deadline()
        }
        fn elapsed(&mut self) -> Option<Demand> {
            self.0.elapsed()
        }
        fn lease(&mut self, _: Lease) {}
        fn reaps_orphans(&self) -> bool {
            true
        }
    }
    let Ok(directory) = std::env::var(BACK) else {
        return;
    };
    let run = Path::new(&directory);
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let (fifo, end) = (run.join("orphan"), run.join("end"));
    // The orphan's parent is gone before the orphan is.
    let script = format!(
        "(sh -c 'read nothing < {}; exit 9' & echo $! > {}); exec sleep 1000",
        end.display(),
        fifo.display()
    );
    let proxy = Service::new(Kind::Proxy, shell(&script), Rights::default());
    let environment = vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
    let supervisor = Supervisor::new(
        run,
        Prison::default(),
        shell("exit 0"),
        vec![proxy],
        environment,
        ReapsOrphans(NoDuties),
    );
    supervisor.unwrap().run().unwrap();
}

#[test]
fn an_orphan_is_waited_for_and_no_service_is_mistaken_for_one() {
    let directory = tempfile::tempdir().unwrap();
    let [fifo, end] = ["orphan", "end"].map(|name| directory.path().join(name));
    for path in [&fifo, &end] {
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    let mut init = std::process::Command::new(std::env::current_exe().unwrap());
    init.args([
        "--ignored",
        "--exact",
        "supervisor::tests::stand_in_for_init",
    ]);
    // Blocked on every thread that it will have, so that none but the supervisor's takes it.
    let block = || {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.add(Signal::SIGTERM);
        Ok(mask.thread_block()?)
    };
    // SAFETY: between fork and exec it only makes a system call.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut init, block) };
    let init = init
        .env(BACK, directory.path())
        .stdout(std::process::Stdio::null())
        .spawn();
    let mut init = KilledOnDrop(init.unwrap());
    let mut pid = [0; 16];
    let length = std::fs::File::open(&fifo).unwrap().read(&mut pid).unwrap();
    let pid = String::from_utf8_lossy(&pid[..length]);
    let orphan = format!("/proc/{}", pid.trim());
    let parent = || {
        let status = std::fs::read_to_string(format!("{orphan}/status")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        parent.map(|pid| pid.trim().to_owned())
    };
    let own = Some(init.0.id().to_string());
    eventually("it is no orphan of init's", || parent() == own);
    std::fs::write(&end, "\n").unwrap();
    eventually("nobody waited for the orphan", || parent().is_none());
    let pid = Pid::from_raw(i32::try_from(init.0.id()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    assert!(init.0.wait().unwrap().success());
}

/// A process that does not outlive a test that fails.
struct KilledOnDrop(std::process::Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pipe that no process inherits which another test starts meanwhile.
fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap()
}

fn eventually(otherwise: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        let waited = began.elapsed().as_millis();
        assert!(waited < u128::from(HANG), "{otherwise}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_child_has_only_the_descriptors_it_was_handed() {
    let (reader, writer) = pipe();
    let _leaky = std::fs::File::open("/dev/null").unwrap();
    let program = shell("ls /proc/self/fd >&3; echo $SUPVM_DESCRIPTORS >&3; exit 7");
    let child = start(&program, &[("out", writer.as_fd())]);
    drop(writer);
    let mut text = String::new();
    std::fs::File::from(reader)
        .read_to_string(&mut text)
        .unwrap();
    // The last number is the directory that `ls` has open.
    assert_eq!(text, "0\n1\n2\n3\n4\nout\n");
    assert_eq!(wait(&child), End::Exited(7));
}

#[test]
fn a_program_that_cannot_be_executed_is_an_error_that_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("no-program");
    std::fs::write(&path, "just text").unwrap();
    let program = Program::open(&path, &["x"]).unwrap();
    let error = Spawn {
        program: &program,
        descriptors: &[],
        environment: &[],
        confinement: confinement::Confinement::default(),
        terminal: None,
    }
    .start()
    .unwrap_err();
    assert!(error.to_string().contains("could not execute"), "{error}");
}

#[test]
fn a_confined_child_has_no_rights_and_no_network() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "run this test as root: it gives a child another user and a network namespace"
    );
    let (reader, writer) = pipe();
    let network = confinement::empty_network().unwrap();
    let program = shell(
        "grep -E '^(Uid|CapEff|CapAmb|NoNewPrivs)' /proc/self/status >&3; tail -n +3 /proc/net/dev >&3",
    );
    let child = Spawn {
        program: &program,
        descriptors: &[("out", writer.as_fd())],
        environment: &[("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
        confinement: confinement::Confinement {
            uid: 200_000,
            capability: Some(confinement::Capability::NET_RAW),
            network: Some(network.as_fd()),
            max_descriptors: 64,
            no_new_privileges: true,
            ..confinement::Confinement::default()
        },
        terminal: None,
    }
    .start()
    .unwrap();
    drop(writer);
    let mut text = String::new();
    std::fs::File::from(reader)
        .read_to_string(&mut text)
        .unwrap();
    assert!(
        text.contains("Uid:\t200000\t200000\t200000\t200000"),
        "{text}"
    );
    assert!(text.contains("CapEff:\t0000000000002000"), "{text}");
    assert!(text.contains("NoNewPrivs:\t1"), "{text}");
    let interfaces: Vec<&str> = text
        .lines()
        .filter(|line| line.contains(": ") && line.contains(" 0 "))
        .collect();
    assert!(
        interfaces
            .iter()
            .all(|line| line.trim_start().starts_with("lo:")),
        "{text}"
    );
    wait(&child);
}

fn start(program: &Program, descriptors: &[(&str, std::os::fd::BorrowedFd<'_>)]) -> Child {
    Spawn {
        program,
        descriptors,
        environment: &[("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
        confinement: confinement::Confinement::default(),
        terminal: None,
    }
    .start()
    .unwrap()
}

fn wait(child: &Child) -> End {
    let mut descriptors = [PollFd::new(child.pidfd(), PollFlags::POLLIN)];
    poll(&mut descriptors, PollTimeout::NONE).unwrap();
    child.ended().unwrap()
}
