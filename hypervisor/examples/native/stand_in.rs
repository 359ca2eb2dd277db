//! The monitor's part towards control: the same socket, the same messages, the same answers in the
//! same cases as the real one; behind it a process instead of a machine. A new control replaces the
//! old one; how the guest ended is the exit code.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use hypervisor::descriptors::Descriptors;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockFlag, accept4};
use protocol::agent::AGENT_PORT;
use protocol::host::channel::{self, Packet};
use protocol::host::vmm::{
    AttachFrames, Connect, Connected, Ending, Identify, Identity, MachineState, NotConnected,
    SwitchOff, VmmConfig, descriptor,
};
use protocol::{ErrorBody, ErrorCode, Kind, Message, decode};

use crate::guest;

type Problem = Box<dyn std::error::Error>;

/// How often a guest that comes up is asked whether its agent listens: a file cannot ring.
const KNOCK: Duration = Duration::from_millis(2);

/// Runs the guest to its end; the result is the exit code.
pub(crate) fn main(descriptors: Descriptors, agent: &Path) -> u8 {
    let ending = run(descriptors, agent).unwrap_or_else(|error| {
        tracing::error!(%error, "guest cannot run");
        Ending::Failed
    });
    tracing::info!(?ending, "guest ended");
    ending.to_wire()
}

fn run(mut descriptors: Descriptors, agent: &Path) -> Result<Ending, Problem> {
    let mut body = Vec::new();
    File::from(descriptors.take(descriptor::CONFIG)?).read_to_end(&mut body)?;
    let config: VmmConfig = postcard::from_bytes(&body)?;
    for name in [
        descriptor::KVM,
        descriptor::MEMORY,
        descriptor::KERNEL,
        descriptor::INITRAMFS,
    ] {
        descriptors.take(name)?;
    }
    let disk = File::from(descriptors.take(descriptor::DISK)?);
    let console = descriptors.take(descriptor::LOG)?;
    let listen = descriptors.take(descriptor::LISTEN)?;
    let hostname = config.run.vm.hostname();
    let mut guest = guest::start(&disk, console, &hostname, agent)?;
    let machine = Arc::new(Machine {
        config,
        agent: Mutex::new(MachineState::Booting),
        rang: Condvar::new(),
        frames: Mutex::new(None),
    });
    let (waiting, serving) = (Arc::clone(&machine), Arc::clone(&machine));
    std::thread::spawn(move || waiting.wait_for_agent());
    std::thread::spawn(move || {
        let error = accept(&listen, &serving);
        tracing::error!(%error, "control cannot get in any more");
    });
    // Here, because the guest dies with the thread that started it.
    let status = guest.child.wait()?;
    let came_up = machine.state() == MachineState::Running;
    Ok(guest::ending(status, came_up))
}

struct Machine {
    config: VmmConfig,
    agent: Mutex<MachineState>,
    rang: Condvar,
    frames: Mutex<Option<OwnedFd>>,
}

/// Control, as long as it is there.
type Peer = Arc<OwnedFd>;

fn accept(listen: &OwnedFd, machine: &Arc<Machine>) -> io::Error {
    let mut last: Option<Peer> = None;
    loop {
        let number = match accept4(listen.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(number) => number,
            Err(nix::Error::EINTR | nix::Error::ECONNABORTED) => continue,
            Err(nix::Error::EAGAIN) => {
                let mut readable = [PollFd::new(listen.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut readable, PollTimeout::NONE);
                continue;
            }
            Err(error) => return error.into(),
        };
        // SAFETY: the kernel just made this descriptor for us.
        let peer = Arc::new(unsafe { OwnedFd::from_raw_fd(number) });
        if let Some(before) = last.replace(Arc::clone(&peer)) {
            let _ =
                nix::sys::socket::shutdown(before.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
        let machine = Arc::clone(machine);
        std::thread::spawn(move || machine.serve(&peer));
    }
}

impl Machine {
    fn state(&self) -> MachineState {
        *self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_agent(&self) {
        while guest::connect().is_err() {
            std::thread::sleep(KNOCK);
        }
        *self.agent.lock().unwrap_or_else(PoisonError::into_inner) = MachineState::Running;
        self.rang.notify_all();
    }

    fn serve(self: &Arc<Self>, peer: &Peer) {
        tracing::info!("control connected");
        loop {
            match channel::receive(peer.as_fd()) {
                Ok(Some(packet)) => self.handle(peer, packet),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "control connection closed");
                    break;
                }
            }
        }
    }

    fn handle(self: &Arc<Self>, peer: &Peer, packet: Packet) {
        let Packet { frame, descriptors } = packet;
        let done = match frame.kind {
            Kind::IDENTIFY => decode::<Identify>(&frame).map(|Identify {}| {
                let identity = Identity {
                    run: self.config.run.clone(),
                    model: self.config.model,
                    state: self.state(),
                };
                answer(peer, &identity);
            }),
            Kind::CONNECT => decode::<Connect>(&frame).map(|connect| {
                let (machine, peer) = (Arc::clone(self), Arc::clone(peer));
                std::thread::spawn(move || machine.connect(&peer, &connect, descriptors));
            }),
            Kind::ATTACH_FRAMES => decode::<AttachFrames>(&frame).map(|AttachFrames {}| {
                // The guest has no network device: nobody speaks here, but the channel is open.
                let end = descriptors.into_iter().next();
                *self.frames.lock().unwrap_or_else(PoisonError::into_inner) = end;
            }),
            Kind::SWITCH_OFF => decode::<SwitchOff>(&frame).map(|SwitchOff {}| {
                // The guest goes with this process, as with its power.
                std::process::exit(Ending::SwitchedOff.to_wire().into());
            }),
            kind => {
                let message = format!("a monitor knows no message of kind {kind}");
                answer(peer, &ErrorBody::caller(ErrorCode::Unsupported, message));
                Ok(())
            }
        };
        if let Err(error) = done {
            answer(peer, &ErrorBody::from(error));
        }
    }

    fn connect(&self, peer: &Peer, connect: &Connect, descriptors: Vec<OwnedFd>) {
        let ticket = connect.ticket;
        let opened = <[OwnedFd; 1]>::try_from(descriptors)
            .map_err(|all| format!("{} descriptors attached instead of 1", all.len()))
            .and_then(|[stream]| {
                let stream = UnixStream::from(stream);
                // A socket may come as one that does not block; that belongs to the other end.
                stream
                    .set_nonblocking(false)
                    .map_err(|error| error.to_string())?;
                Ok((stream, self.open(connect)?))
            });
        match opened {
            Ok((stream, guest)) => {
                answer(peer, &Connected { ticket });
                join(stream, guest);
            }
            Err(message) => answer(peer, &NotConnected { ticket, message }),
        }
    }

    /// A stream to the agent.
    fn open(&self, connect: &Connect) -> Result<UnixStream, String> {
        if connect.port != AGENT_PORT {
            return Err(format!("the guest refused port {}", connect.port));
        }
        let mut state = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        while connect.wait_for_agent && *state == MachineState::Booting {
            state = self
                .rang
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let has_rung = *state == MachineState::Running;
        drop(state);
        loop {
            match guest::connect() {
                // An agent that listened and does not any more is gone, and soon its machine is:
                // until then nobody answers there, not even with a refusal.
                Err(_) if has_rung => std::thread::sleep(KNOCK),
                opened => return opened.map_err(|error| format!("the guest refused: {error}")),
            }
        }
    }
}

/// A control that is gone is told nothing; the next one asks again.
fn answer<M: Message>(peer: &Peer, message: &M) {
    if let Err(error) = channel::send(peer.as_fd(), message, &[]) {
        tracing::warn!(%error, "answer not sent");
    }
}

/// Passes on what either says, until both have closed or one is gone altogether.
fn join(host: UnixStream, guest: UnixStream) {
    let copies = host
        .try_clone()
        .and_then(|host| Ok((host, guest.try_clone()?)));
    let Ok((host_too, guest_too)) = copies else {
        return;
    };
    std::thread::spawn(move || pass_on(host_too, guest_too));
    pass_on(guest, host);
}

fn pass_on(mut from: UnixStream, mut to: UnixStream) {
    if copy(&mut from, &mut to) {
        let _ = to.shutdown(Shutdown::Write);
    } else {
        // The other way goes on: one that takes no more may still have something to say.
        let _ = from.shutdown(Shutdown::Read);
    }
    // Nothing more goes this way; is anybody still listening there?
    let mut gone = [PollFd::new(from.as_fd(), PollFlags::empty())];
    while poll(&mut gone, PollTimeout::NONE) == Err(nix::Error::EINTR) {}
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// Until there is nothing more to read; false when it is not taken any more before that.
fn copy(from: &mut UnixStream, to: &mut UnixStream) -> bool {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return true,
            Ok(count) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                if to.write_all(bytes).is_err() {
                    return false;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return true,
        }
    }
}
