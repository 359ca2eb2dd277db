//! The control socket: who the machine is, streams into the guest, its frame channel, switching off. Control may die
//! at any moment, in the middle of a message too, and its successor must get in: a new connection
//! replaces the old one, and nothing that comes over it can end the machine but `SwitchOff`.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{SockFlag, SockType, accept4, getsockopt, sockopt};
use protocol::error::{ErrorBody, ErrorCode};
use protocol::frame::Kind;
use protocol::host::channel::{self, ChannelError, Packet};
use protocol::host::supervisor::Run;
use protocol::host::vmm::{
    AttachFrames, Connect, Connected, Identify, Identity, MachineState, NotConnected, SwitchOff,
};
use protocol::message::{Message, MessageError, decode};

use crate::virtio::net::NetHost;
use crate::virtio::vsock::{VsockEvent, VsockHost};

/// Packets that are read per wake-up, so that a busy control cannot keep other events waiting.
const PACKETS_PER_WAKE_UP: usize = 16;

/// What the main thread has to do after a wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Wait for the next event.
    Wait,
    /// End the machine.
    SwitchOff,
}

/// The machine's ends of what control hands over.
pub(crate) trait Streams {
    /// Joins `stream` to the guest's `port`; the outcome comes as an event.
    fn connect(&self, ticket: u64, port: u32, wait_for_agent: bool, stream: UnixStream);

    /// Makes `channel` the one that the guest's frames go over.
    fn attach_frames(&self, channel: UnixStream);
}

/// The devices that take them.
pub(crate) struct HostEnds {
    pub(crate) vsock: VsockHost,
    pub(crate) net: NetHost,
}

impl Streams for HostEnds {
    fn connect(&self, ticket: u64, port: u32, wait_for_agent: bool, stream: UnixStream) {
        self.vsock.connect(ticket, port, wait_for_agent, stream);
    }

    fn attach_frames(&self, channel: UnixStream) {
        self.net.attach(channel);
    }
}

/// The socket and the connection, if there is one.
pub(crate) struct Control<S> {
    listen: OwnedFd,
    connection: Option<OwnedFd>,
    /// A descriptor to give up when there are no more, so that control can still get in.
    spare: Option<OwnedFd>,
    run: Run,
    model: u32,
    agent_rang: bool,
    streams: S,
}

impl<S: Streams> Control<S> {
    /// Serves a listening socket, which is made non-blocking.
    pub(crate) fn new(listen: OwnedFd, run: Run, model: u32, streams: S) -> io::Result<Self> {
        set_nonblocking(listen.as_fd())?;
        Ok(Self {
            spare: Some(listen.try_clone()?),
            listen,
            connection: None,
            run,
            model,
            agent_rang: false,
            streams,
        })
    }

    /// Readable when a control wants to get in.
    pub(crate) fn listen(&self) -> BorrowedFd<'_> {
        self.listen.as_fd()
    }

    /// Takes the next control in. True if the connection changed: then it must be waited for anew.
    pub(crate) fn accept(&mut self) -> bool {
        let mut accepted = self.try_accept();
        if matches!(accepted, Err(nix::Error::EMFILE | nix::Error::ENFILE)) {
            // The old connection makes room for its successor: otherwise the listening socket would
            // stay readable and nobody could ever get in.
            self.connection = None;
            self.spare = None;
            accepted = self.try_accept();
        }
        match accepted {
            Ok(connection) => {
                // An older connection is closed here, and leaves every epoll by that.
                self.connection = Some(connection);
                if self.spare.is_none() {
                    self.spare = self.listen.try_clone().ok();
                }
                tracing::info!("control connected");
                true
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR | nix::Error::ECONNABORTED) => false,
            Err(error) => {
                tracing::warn!(%error, "control could not be accepted");
                false
            }
        }
    }

    fn try_accept(&self) -> nix::Result<OwnedFd> {
        let number = accept4(
            self.listen.as_raw_fd(),
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        )?;
        // SAFETY: the kernel just made it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// The connection, readable when control says something.
    pub(crate) fn connection(&self) -> Option<BorrowedFd<'_>> {
        self.connection.as_ref().map(AsFd::as_fd)
    }

    /// Answers what control said.
    pub(crate) fn serve(&mut self) -> Next {
        for _ in 0..PACKETS_PER_WAKE_UP {
            let Some(connection) = &self.connection else {
                return Next::Wait;
            };
            match channel::receive(connection.as_fd()) {
                Ok(Some(packet)) => {
                    if self.handle(packet) == Next::SwitchOff {
                        return Next::SwitchOff;
                    }
                }
                Ok(None) => {
                    tracing::info!("control went away");
                    self.connection = None;
                }
                Err(error) if error.would_block() => return Next::Wait,
                Err(error) => {
                    tracing::warn!(%error, "control connection closed");
                    self.connection = None;
                }
            }
        }
        Next::Wait
    }

    fn handle(&mut self, packet: Packet) -> Next {
        let Packet { frame, descriptors } = packet;
        let result = match frame.kind {
            Kind::IDENTIFY => decode::<Identify>(&frame).map(|Identify {}| {
                let identity = Identity {
                    run: self.run.clone(),
                    model: self.model,
                    state: self.state(),
                };
                self.answer(&identity);
            }),
            Kind::CONNECT => {
                decode::<Connect>(&frame).map(|connect| self.connect(&connect, descriptors))
            }
            Kind::ATTACH_FRAMES => decode::<AttachFrames>(&frame)
                .map(|AttachFrames {}| self.attach_frames(descriptors)),
            Kind::SWITCH_OFF => match decode::<SwitchOff>(&frame) {
                Ok(SwitchOff {}) => return Next::SwitchOff,
                Err(error) => Err(error),
            },
            kind => {
                self.answer(&ErrorBody::caller(
                    ErrorCode::Unsupported,
                    format!("a monitor knows no message of kind {kind}"),
                ));
                Ok(())
            }
        };
        if let Err(error) = result {
            self.refuse(error);
        }
        Next::Wait
    }

    fn refuse(&mut self, error: MessageError) {
        tracing::warn!(%error, "message of control refused");
        self.answer(&ErrorBody::from(error));
    }

    fn connect(&mut self, connect: &Connect, descriptors: Vec<OwnedFd>) {
        let ticket = connect.ticket;
        let stream = match stream_socket(descriptors) {
            Ok(stream) => stream,
            Err(error) => {
                let message = error.to_string();
                self.answer(&NotConnected { ticket, message });
                return;
            }
        };
        self.streams
            .connect(ticket, connect.port, connect.wait_for_agent, stream);
    }

    /// The one before stays in use when this one cannot be used.
    fn attach_frames(&mut self, descriptors: Vec<OwnedFd>) {
        match stream_socket(descriptors) {
            Ok(channel) => self.streams.attach_frames(channel),
            Err(error) => {
                tracing::warn!(%error, "frame channel refused");
                let message = format!("the frame channel cannot be used: {error}");
                self.answer(&ErrorBody::caller(ErrorCode::Malformed, message));
            }
        }
    }

    /// Passes on what became of a stream.
    pub(crate) fn vsock(&mut self, event: VsockEvent) {
        match event {
            VsockEvent::AgentRang => {
                if !self.agent_rang {
                    tracing::info!("agent is up");
                }
                self.agent_rang = true;
            }
            VsockEvent::Connected { ticket } => self.answer(&Connected { ticket }),
            VsockEvent::NotConnected { ticket, message } => {
                self.answer(&NotConnected { ticket, message });
            }
        }
    }

    /// What the machine is doing.
    pub(crate) fn state(&self) -> MachineState {
        if self.agent_rang {
            MachineState::Running
        } else {
            MachineState::Booting
        }
    }

    /// A control that does not read its answers is dropped: the next one asks again.
    fn answer<M: Message>(&mut self, message: &M) {
        let Some(connection) = &self.connection else {
            return;
        };
        match channel::send(connection.as_fd(), message, &[]) {
            Ok(()) => {}
            Err(ChannelError::Message(error)) => tracing::warn!(%error, "answer not sent"),
            Err(error) => {
                tracing::warn!(%error, "control takes no answers; connection closed");
                self.connection = None;
            }
        }
    }
}

/// What is attached is not one stream socket.
#[derive(Debug, thiserror::Error)]
enum NoStream {
    #[error("{0} descriptors attached instead of 1")]
    Count(usize),
    #[error("what is attached is no stream socket: {0}")]
    Unusable(io::Error),
}

fn stream_socket(descriptors: Vec<OwnedFd>) -> Result<UnixStream, NoStream> {
    let [stream] = <[OwnedFd; 1]>::try_from(descriptors)
        .map_err(|descriptors| NoStream::Count(descriptors.len()))?;
    let stream = UnixStream::from(stream);
    match getsockopt(&stream, sockopt::SockType) {
        Ok(SockType::Stream) => stream.set_nonblocking(true).map_err(NoStream::Unusable)?,
        Ok(_) => return Err(NoStream::Unusable(io::ErrorKind::InvalidInput.into())),
        Err(error) => return Err(NoStream::Unusable(error.into())),
    }
    Ok(stream)
}

fn set_nonblocking(socket: BorrowedFd<'_>) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Serves packets, each with so many descriptors, as control's on one connection after the other,
/// for a fuzz target. Gives how many streams and frame channels came, and whether the machine was to end.
#[cfg(fuzzing)]
pub fn fuzz(packets: &[(&[u8], Vec<BorrowedFd<'_>>)]) -> io::Result<(usize, bool)> {
    use std::cell::Cell;
    use std::rc::Rc;

    struct Counted(Rc<Cell<usize>>);

    impl Streams for Counted {
        fn connect(&self, _: u64, _: u32, _: bool, _: UnixStream) {
            self.0.set(self.0.get().saturating_add(1));
        }

        fn attach_frames(&self, _: UnixStream) {
            self.0.set(self.0.get().saturating_add(1));
        }
    }

    let pair = || {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let family = nix::sys::socket::AddressFamily::Unix;
        nix::sys::socket::socketpair(family, SockType::SeqPacket, None, flags)
    };
    let (listen, _) = pair()?;
    let vm = "vm-00000000".parse().map_err(io::Error::other)?;
    let run = Run { vm, generation: 1 };
    let count = Rc::new(Cell::new(0));
    let mut control = Control::new(listen, run, 1, Counted(Rc::clone(&count)))?;
    let mut ours = None;
    for (bytes, attached) in packets {
        if control.connection.is_none() {
            let (mine, theirs) = pair()?;
            control.connection = Some(theirs);
            ours = Some(mine);
        }
        let Some(peer) = &ours else { break };
        channel::send_bytes(peer.as_fd(), bytes, attached).map_err(io::Error::other)?;
        if control.serve() == Next::SwitchOff {
            return Ok((count.get(), true));
        }
        // What is answered is a packet of ours.
        while let Ok(Some(answer)) = channel::receive(peer.as_fd()) {
            assert!(answer.descriptors.is_empty());
        }
    }
    Ok((count.get(), false))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use nix::sys::socket::{AddressFamily, Backlog, UnixAddr, bind, listen, setsockopt, socket};
    use nix::sys::time::TimeVal;
    use protocol::frame;

    use super::*;

    type Opened = Rc<RefCell<Vec<(u64, u32, bool)>>>;

    #[derive(Clone, Default)]
    struct Ends {
        opened: Opened,
        attached: Rc<RefCell<Vec<UnixStream>>>,
    }

    impl Streams for Ends {
        fn connect(&self, ticket: u64, port: u32, wait_for_agent: bool, _: UnixStream) {
            self.opened
                .borrow_mut()
                .push((ticket, port, wait_for_agent));
        }

        fn attach_frames(&self, channel: UnixStream) {
            self.attached.borrow_mut().push(channel);
        }
    }

    struct Host {
        control: Control<Ends>,
        ends: Ends,
        path: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            let path = tempfile::tempdir().unwrap();
            let listening = packet_socket();
            bind(listening.as_raw_fd(), &address(&path)).unwrap();
            listen(&listening, Backlog::new(8).unwrap()).unwrap();
            let run = Run {
                vm: "vm-00000000".parse().unwrap(),
                generation: 3,
            };
            let ends = Ends::default();
            Self {
                control: Control::new(listening, run, 1, ends.clone()).unwrap(),
                ends,
                path,
            }
        }

        fn connect(&mut self) -> OwnedFd {
            let client = packet_socket();
            nix::sys::socket::connect(client.as_raw_fd(), &address(&self.path)).unwrap();
            assert!(self.control.accept());
            // An answer that does not come is a failure, not a hang.
            setsockopt(&client, sockopt::ReceiveTimeout, &TimeVal::new(10, 0)).unwrap();
            client
        }
    }

    fn packet_socket() -> OwnedFd {
        socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap()
    }

    fn address(path: &tempfile::TempDir) -> UnixAddr {
        UnixAddr::new(&path.path().join("s")).unwrap()
    }

    fn say<M: Message>(client: &OwnedFd, message: &M) {
        channel::send(client.as_fd(), message, &[]).unwrap();
    }

    fn hear<M: Message>(client: &OwnedFd) -> M {
        let packet = channel::receive(client.as_fd()).unwrap().unwrap();
        decode(&packet.frame).unwrap()
    }

    fn works(host: &mut Host, client: &OwnedFd) {
        say(client, &Identify {});
        assert_eq!(host.control.serve(), Next::Wait);
        assert_eq!(hear::<Identity>(client).run.generation, 3);
    }

    #[test]
    fn a_new_control_replaces_the_old_one() {
        let mut host = Host::new();
        let first = host.connect();
        let second = host.connect();
        assert!(channel::receive(first.as_fd()).unwrap().is_none());
        works(&mut host, &second);
    }

    #[test]
    fn a_control_that_vanished_with_answers_unread_harms_nothing() {
        let mut host = Host::new();
        let first = host.connect();
        say(&first, &Identify {});
        say(&first, &Identify {});
        drop(first);
        assert_eq!(host.control.serve(), Next::Wait);
        assert!(host.control.connection().is_none());
        host.control.vsock(VsockEvent::Connected { ticket: 1 });
        let second = host.connect();
        works(&mut host, &second);
    }

    #[test]
    fn garbage_closes_the_connection_and_nothing_else() {
        let mut host = Host::new();
        let first = host.connect();
        channel::send_bytes(first.as_fd(), b"garbage", &[]).unwrap();
        assert_eq!(host.control.serve(), Next::Wait);
        assert!(host.control.connection().is_none());
        let second = host.connect();
        works(&mut host, &second);
    }

    #[test]
    fn unknown_kinds_and_malformed_bodies_are_answered() {
        let mut host = Host::new();
        let client = host.connect();
        for (kind, body, code) in [
            (Kind(0x7777), &b"?"[..], ErrorCode::Unsupported),
            (Kind::CONNECT, b"", ErrorCode::Malformed),
            (Kind::SWITCH_OFF, b"too much", ErrorCode::Malformed),
        ] {
            let mut bytes = Vec::new();
            frame::append(&mut bytes, kind, body).unwrap();
            channel::send_bytes(client.as_fd(), &bytes, &[]).unwrap();
            assert_eq!(host.control.serve(), Next::Wait);
            assert_eq!(hear::<ErrorBody>(&client).code, code, "{kind}");
        }
        works(&mut host, &client);
    }

    #[test]
    fn a_stream_without_its_socket_is_refused_by_name() {
        let mut host = Host::new();
        let client = host.connect();
        let connect = Connect {
            ticket: 9,
            port: 1024,
            wait_for_agent: true,
        };
        say(&client, &connect);
        let file = tempfile::tempfile().unwrap();
        channel::send(client.as_fd(), &connect, &[file.as_fd()]).unwrap();
        host.control.serve();
        for _ in 0..2 {
            assert_eq!(hear::<NotConnected>(&client).ticket, 9);
        }
        assert!(host.ends.opened.borrow().is_empty());

        let (stream, _other) = UnixStream::pair().unwrap();
        channel::send(client.as_fd(), &connect, &[stream.as_fd()]).unwrap();
        host.control.serve();
        assert_eq!(*host.ends.opened.borrow(), [(9, 1024, true)]);
        host.control.vsock(VsockEvent::Connected { ticket: 9 });
        assert_eq!(hear::<Connected>(&client).ticket, 9);
    }

    #[test]
    fn a_frame_channel_is_passed_on_and_anything_else_refused() {
        use std::io::Write as _;

        let mut host = Host::new();
        let client = host.connect();
        let (mut ours, channel) = UnixStream::pair().unwrap();
        channel::send(client.as_fd(), &AttachFrames {}, &[channel.as_fd()]).unwrap();
        host.control.serve();
        assert_eq!(host.ends.attached.borrow().len(), 1);
        ours.write_all(b"frame").unwrap();
        let mut bytes = [0; 5];
        io::Read::read_exact(&mut host.ends.attached.borrow_mut()[0], &mut bytes).unwrap();
        assert_eq!(&bytes, b"frame");

        let file = tempfile::tempfile().unwrap();
        let packets = packet_socket();
        let (one, two) = UnixStream::pair().unwrap();
        for wrong in [
            &[][..],
            &[file.as_fd()],
            &[packets.as_fd()],
            &[one.as_fd(), two.as_fd()],
        ] {
            channel::send(client.as_fd(), &AttachFrames {}, wrong).unwrap();
            host.control.serve();
            assert_eq!(hear::<ErrorBody>(&client).code, ErrorCode::Malformed);
        }
        assert_eq!(host.ends.attached.borrow().len(), 1);
        works(&mut host, &client);
    }

    #[test]
    fn the_doorbell_turns_booting_into_running() {
        let mut host = Host::new();
        let client = host.connect();
        assert_eq!(host.control.state(), MachineState::Booting);
        host.control.vsock(VsockEvent::AgentRang);
        say(&client, &Identify {});
        host.control.serve();
        assert_eq!(hear::<Identity>(&client).state, MachineState::Running);
    }

    #[test]
    fn switching_off_ends_the_machine() {
        let mut host = Host::new();
        let client = host.connect();
        say(&client, &SwitchOff {});
        assert_eq!(host.control.serve(), Next::SwitchOff);
    }

    #[test]
    fn a_control_that_reads_nothing_is_dropped_not_waited_for() {
        let mut host = Host::new();
        let _client = host.connect();
        for ticket in 0..100_000 {
            host.control.vsock(VsockEvent::Connected { ticket });
        }
        assert!(host.control.connection().is_none());
    }
}
