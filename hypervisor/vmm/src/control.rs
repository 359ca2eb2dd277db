//! The control socket: who the machine is, streams into the guest, switching off. Control may die
//! at any moment, in the middle of a message too, and its successor must get in: a new connection
//! replaces the old one, and nothing that comes over it can end the machine but `SwitchOff`.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::{io, mem};

use nix::sys::socket::{SockFlag, accept4};
use protocol::error::{ErrorBody, ErrorCode};
use protocol::frame::Kind;
use protocol::host::channel::{self, ChannelError, Packet};
use protocol::host::supervisor::Run;
use protocol::host::vmm::{
    Connect, Connected, Identify, Identity, MachineState, NotConnected, SwitchOff,
};
use protocol::message::{Message, MessageError, decode};

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

/// Opens streams into the guest.
pub(crate) trait Streams {
    /// Joins `stream` to the guest's `port`; the outcome comes as an event.
    fn connect(&self, ticket: u64, port: u32, wait_for_agent: bool, stream: UnixStream);
}

impl Streams for VsockHost {
    fn connect(&self, ticket: u64, port: u32, wait_for_agent: bool, stream: UnixStream) {
        VsockHost::connect(self, ticket, port, wait_for_agent, stream);
    }
}

/// The socket and the connection, if there is one.
pub(crate) struct Control<S> {
    listen: OwnedFd,
    connection: Option<OwnedFd>,
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
        match accept4(
            self.listen.as_raw_fd(),
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        ) {
            Ok(number) => {
                // SAFETY: the kernel just made it for us.
                let connection = unsafe { OwnedFd::from_raw_fd(number) };
                // An older connection is closed here, and leaves every epoll by that.
                drop(mem::replace(&mut self.connection, Some(connection)));
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
        let stream = match <[OwnedFd; 1]>::try_from(descriptors) {
            Ok([stream]) => UnixStream::from(stream),
            Err(descriptors) => {
                self.answer(&NotConnected {
                    ticket,
                    message: format!("{} descriptors attached instead of 1", descriptors.len()),
                });
                return;
            }
        };
        if let Err(error) = stream.set_nonblocking(true) {
            self.answer(&NotConnected {
                ticket,
                message: format!("what is attached is no socket: {error}"),
            });
            return;
        }
        self.streams
            .connect(ticket, connect.port, connect.wait_for_agent, stream);
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

fn set_nonblocking(socket: BorrowedFd<'_>) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
