//! A client on the stream of a start or an attach: output one way, input, signals and terminal sizes
//! the other, both with back-pressure and neither able to hold up the other. The last frame follows
//! the last byte by construction: it is queued only when the reader has come to the end. When the
//! client goes, the process stays.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use protocol::message::decode_body;
use protocol::process::{ResizeTerminal, SignalProcess};
use protocol::processes::OutputReplayed;
use protocol::{ErrorBody, ErrorCode, Frame, Kind};

use super::input::{MAX_INPUT, Typing};
use super::life::Process;
use super::pump::Pump;
use super::reader::{Progress, Reader};
use super::requests::was_refused;
use super::terminal;
use super::watcher::Watcher;
use crate::agent::poll::{self, Interest};
use crate::agent::stream::{Stream, StreamError};
use crate::agent::{Agent, contain, lock, unsupported};

/// Nothing more is read from the client while so many answers wait for it.
const MAX_ANSWERS: usize = 256 << 10;

/// See the module.
pub(crate) struct Client {
    agent: Arc<Agent>,
    process: Arc<Process>,
    stream: Stream,
    reader: Reader,
    typing: Typing,
    frames: Vec<Frame>,
    /// The end of the client's half is the end of the input.
    end_closes_input: bool,
    /// The client's half has ended.
    ended: bool,
    /// While nothing is read from the client, its leaving is looked for once.
    end_seen: bool,
    /// It was listened to when the interest was made.
    listening: bool,
}

impl Client {
    /// `early` are frames that came right behind the request.
    pub(crate) fn new(
        agent: &Arc<Agent>,
        process: &Arc<Process>,
        stream: Stream,
        reader: Reader,
        early: Vec<Frame>,
        end_closes_input: bool,
    ) -> Self {
        Self {
            agent: Arc::clone(agent),
            process: Arc::clone(process),
            stream,
            reader,
            typing: Typing::default(),
            frames: early,
            end_closes_input,
            ended: false,
            end_seen: false,
            listening: true,
        }
    }

    /// Serves the client of an attach to its end.
    pub(crate) fn serve(mut self) -> Result<(), StreamError> {
        let watcher = Watcher::new().map_err(StreamError::Gone)?;
        self.reader.watch(&watcher);
        loop {
            let progress = self.work()?;
            if progress == Progress::Done {
                return self.finish();
            }
            let descriptor = self.typing.descriptor(&self.process);
            let mut interests = [
                self.interest(),
                Typing::interest(descriptor.as_ref()),
                Interest::new(watcher.event().as_fd(), true, false),
            ];
            poll::wait(&mut interests, at_once_if(progress)).map_err(StreamError::Gone)?;
            let [client, _, news] = interests;
            if news.readable() {
                watcher.rest();
            }
            self.react(client)?;
        }
    }

    /// Moves what can be moved now.
    fn work(&mut self) -> Result<Progress, StreamError> {
        for frame in std::mem::take(&mut self.frames) {
            self.take(frame)?;
        }
        self.typing.write(&self.process);
        self.stream.flush()?;
        self.reader.pull(&mut self.stream)
    }

    fn interest(&mut self) -> Interest {
        self.listening =
            !self.ended && self.typing.waiting() < MAX_INPUT && self.stream.pending() < MAX_ANSWERS;
        let client = self.stream.interest(self.listening);
        if self.listening || self.ended || self.end_seen {
            client
        } else {
            client.and_end()
        }
    }

    fn react(&mut self, client: Interest) -> Result<(), StreamError> {
        if client.has_input() && self.listening {
            match self.stream.read(&mut self.frames) {
                Ok(_) => {}
                // The client may have closed its half only and still listen. Of one that has
                // gone, vsock says nothing else: its process keeps its input.
                Err(StreamError::Ended) if self.stream.is_heard() => {
                    self.ended = true;
                    if self.end_closes_input {
                        self.typing.end(&self.process);
                    }
                }
                Err(error) => return Err(error),
            }
        } else if client.hung_up() {
            return Err(StreamError::Gone(Errno::EPIPE));
        } else if client.ended() {
            self.end_seen = true;
            if !self.stream.is_heard() {
                return Err(StreamError::Gone(Errno::EPIPE));
            }
        }
        Ok(())
    }

    /// Sends the last frame.
    fn finish(self) -> Result<(), StreamError> {
        let Self {
            process,
            stream,
            reader,
            ..
        } = self;
        let offset = reader.offset();
        // Whoever holds the process back does so no longer.
        drop(reader);
        let head = lock(&process.output).head();
        if process.is_refused() {
            return stream.refuse(&was_refused(&process));
        }
        match process.ended() {
            Some(ended) if offset >= head => stream.finish(&ended),
            _ => stream.finish(&OutputReplayed { offset }),
        }
    }

    /// Does what a client's frame says.
    fn take(&mut self, frame: Frame) -> Result<(), StreamError> {
        match frame.kind {
            Kind::STDIN => self.typing.add(&frame.body),
            Kind::STDIN_END => self.typing.end(&self.process),
            Kind::SIGNAL_PROCESS => {
                let SignalProcess { signal } = decode_body(&frame.body)?;
                match check_signal(signal) {
                    // One that has ended needs no signal any more.
                    Ok(()) => drop(self.process.signal(&self.agent.reaper, signal)),
                    Err(error) => self.stream.queue(&error)?,
                }
            }
            Kind::RESIZE_TERMINAL => {
                let ResizeTerminal { size } = decode_body(&frame.body)?;
                if let Some(master) = self.process.terminal() {
                    // A terminal that has hung up has no size any more.
                    let _ = terminal::resize(master.as_fd(), size);
                }
            }
            kind => self.stream.queue::<ErrorBody>(&unsupported(kind))?,
        }
        Ok(())
    }
}

/// Refuses what is no signal's number.
pub(crate) fn check_signal(signal: u8) -> Result<(), ErrorBody> {
    if (1..=64).contains(&signal) {
        return Ok(());
    }
    let message = format!("signal {signal} is not one of 1 to 64");
    Err(ErrorBody::caller(ErrorCode::InvalidArgument, message))
}

/// Runs the pump to its end, and serves the client that asked for the start beside it as long as
/// that stays.
pub(crate) fn own(mut pump: Pump, process: &Process, mut client: Option<Client>) {
    while !pump.is_over() {
        let mut progress = Progress::Waiting;
        apart(&mut client, |client| {
            progress = client.work()?;
            Ok(())
        });
        let typing = client.as_ref().map(|client| &client.typing);
        let descriptor = typing.and_then(|typing| typing.descriptor(process));
        let input = Typing::interest(descriptor.as_ref());
        let stream = client.as_mut().map_or(Interest::NONE, Client::interest);
        let [stdout, stderr, exit, wake] = pump.interests();
        let mut interests = [stream, input, stdout, stderr, exit, wake];
        let deadline = at_once_if(progress).or(pump.deadline());
        let waited = poll::wait(&mut interests, deadline);
        if waited.is_err() {
            // Out of memory: the next round may have some.
            std::thread::sleep(std::time::Duration::from_millis(100));
            continue;
        }
        let [stream, _, stdout, stderr, exit, wake] = interests;
        apart(&mut client, |client| client.react(stream));
        pump.step([stdout, stderr, exit, wake]);
    }
    pump.conclude();
    // Before a client that may never read to the end: what goes on writing must not wait for it.
    pump.bury();
    if let Some(client) = client {
        contain(|| client.hear_out());
    }
}

/// Nothing is waited for while there is more to send.
fn at_once_if(progress: Progress) -> Option<Instant> {
    (progress == Progress::More).then(Instant::now)
}

/// What goes wrong with a client ends that client only.
fn apart(client: &mut Option<Client>, serve: impl FnOnce(&mut Client) -> Result<(), StreamError>) {
    let Some(served) = client else { return };
    let mut lost = true;
    contain(|| {
        serve(served)?;
        lost = false;
        Ok(())
    });
    if lost {
        *client = None;
    }
}

impl Client {
    /// Sends what is left of a process that has ended, and its end.
    fn hear_out(mut self) -> Result<(), StreamError> {
        loop {
            let progress = self.reader.pull(&mut self.stream)?;
            if progress == Progress::Done {
                return self.finish();
            }
            let mut interests = [self.interest()];
            poll::wait(&mut interests, at_once_if(progress)).map_err(StreamError::Gone)?;
            let [client] = interests;
            self.react(client)?;
            // The process takes no input any more; questions get no answer behind its end.
            self.frames.clear();
            self.stream.flush()?;
        }
    }
}
