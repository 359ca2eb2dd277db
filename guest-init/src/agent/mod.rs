//! The agent: answers control and clients on streams, one operation each. A stream is a thread; a
//! panic in it ends that stream only. Bytes from a stream are taken for an attacker's.

#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]
#![cfg_attr(
    test,
    allow(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]

mod clock;
mod configure;
mod dial;
mod file;
#[cfg(fuzzing)]
pub(crate) mod fuzz;
mod health;
mod listen;
mod poll;
mod power;
mod process;
mod room;
mod stream;

#[cfg(fuzzing)]
pub(crate) use file::fuzz_archive;
pub(crate) use listen::{UnixOptions, serve_unix, serve_vsock};
pub(crate) use power::power_off;
#[cfg(fuzzing)]
pub(crate) use process::fuzz_users;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use protocol::agent::{Configure, Dial, Health, PowerOff, SetTime};
use protocol::message::decode_body;
use protocol::{ErrorBody, ErrorCode, Frame, Kind};

use crate::cgroup::Cgroups;
use crate::log;
use crate::reaper::Reaper;
use configure::Configuration;
use process::{Drain, Registry, Terminals};
use stream::{Stream, StreamError};

/// Where commands start when they do not say otherwise.
pub(crate) const WORKSPACE: &str = "/workspace";
/// Where the output of processes is kept.
pub(crate) const LOGS: &str = "/var/lib/supvm/processes";
/// Streams that are served at once.
const MAX_STREAMS: usize = 512;
/// A stream's stack. Nothing on a stream's way recurses.
const STACK: usize = 256 << 10;

/// What the agent is the agent of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machine {
    /// A virtual machine of its own: identity, clock and power are the agent's to set.
    Own,
    /// Somebody's machine: the agent runs commands and leaves everything else as it is.
    Borrowed,
}

/// What all streams share.
pub(crate) struct Agent {
    machine: Machine,
    workspace: PathBuf,
    reaper: Reaper,
    cgroups: Option<Cgroups>,
    drain: Drain,
    dev_null: OwnedFd,
    proc: OwnedFd,
    configuration: Mutex<Configuration>,
    registry: Registry,
    terminals: Terminals,
    uploads: Arc<file::Uploads>,
    streams: AtomicUsize,
    powering_off: AtomicBool,
}

impl Agent {
    /// Environment variables for every process.
    fn settings(&self) -> Vec<(String, String)> {
        match &*lock(&self.configuration) {
            Configuration::Done { env } => env.clone(),
            Configuration::Awaited => Vec::new(),
        }
    }

    fn is_configured(&self) -> bool {
        matches!(&*lock(&self.configuration), Configuration::Done { .. })
    }

    /// Why the machine cannot be worked in now, if so.
    fn unready(&self) -> Option<ErrorBody> {
        if !self.is_configured() {
            return Some(not_configured());
        }
        let message = "the VM is powering off";
        self.powering_off
            .load(Ordering::Acquire)
            .then(|| ErrorBody::caller(ErrorCode::VmStopped, message))
    }

    fn keep_house(
        &self,
        frame: &Frame,
        stream: Stream,
        early: &[Frame],
    ) -> Result<(), StreamError> {
        match frame.kind {
            Kind::HEALTH => match decode_body::<Health>(&frame.body) {
                Ok(Health {}) => stream.finish(&health::report(self)),
                Err(error) => stream.refuse(&error.into()),
            },
            Kind::SET_TIME => match decode_body::<SetTime>(&frame.body) {
                Ok(request) => match configure::set_time(self, &request) {
                    Ok(answer) => stream.finish(&answer),
                    Err(error) => stream.refuse(&error),
                },
                Err(error) => stream.refuse(&error.into()),
            },
            Kind::DIAL => match decode_body::<Dial>(&frame.body) {
                Ok(request) => dial::serve(&request, stream, early),
                Err(error) => stream.refuse(&error.into()),
            },
            kind => stream.refuse(&unsupported(kind)),
        }
    }

    /// Serves a new connection on a thread of its own, or refuses it.
    fn accept(self: &Arc<Self>, socket: OwnedFd) {
        let mut stream = Stream::new(socket);
        let Some(place) = Place::take(self) else {
            log::warn(format_args!(
                "event=stream_refused reason=\"{MAX_STREAMS} streams are open\""
            ));
            let message = format!(
                "the agent serves {MAX_STREAMS} operations at once; let one end and try again"
            );
            let error =
                ErrorBody::guest(ErrorCode::TooManyStreams, message).retryable_after_ms(1000);
            refuse_now(stream, &error);
            return;
        };
        stream.keep(Box::new(place));
        let agent = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("stream".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                contain(|| agent.serve(stream));
            });
        if let Err(error) = spawned {
            // The stream went down with the thread that was to be.
            log::warn(format_args!("event=stream_refused error={error}"));
        }
    }

    fn serve(self: &Arc<Self>, mut stream: Stream) -> Result<(), StreamError> {
        let mut frames = Vec::new();
        loop {
            let frame = stream.next(&mut frames)?;
            match frame.kind {
                Kind::CONFIGURE => {
                    return match decode_body::<Configure>(&frame.body) {
                        Ok(request) => match configure::configure(self, request) {
                            Ok(answer) => stream.finish(&answer),
                            Err(error) => stream.refuse(&error),
                        },
                        Err(error) => stream.refuse(&error.into()),
                    };
                }
                kind if (process::is_request(kind) || kind == Kind::POWER_OFF)
                    && !self.is_configured() =>
                {
                    return stream.refuse(&not_configured());
                }
                kind if process::is_request(kind) => {
                    return process::serve(self, frame, stream, frames);
                }
                Kind::POWER_OFF => {
                    return match decode_body::<PowerOff>(&frame.body) {
                        Ok(request) => power::answer(self, &request, stream),
                        Err(error) => stream.refuse(&error.into()),
                    };
                }
                kind if is_housekeeping(kind) => {
                    return match self.unready() {
                        Some(error) => stream.refuse(&error),
                        None => self.keep_house(&frame, stream, &frames),
                    };
                }
                kind if file::is_request(kind) => {
                    return match self.unready() {
                        Some(error) => stream.refuse(&error),
                        None => file::serve(self, &frame, stream, frames),
                    };
                }
                kind => stream.queue(&unsupported(kind))?,
            }
        }
    }
}

/// Whether a stream that begins with this kind asks for a small service of the machine as a whole.
fn is_housekeeping(kind: Kind) -> bool {
    matches!(kind, Kind::HEALTH | Kind::SET_TIME | Kind::DIAL)
}

/// The answer to whatever comes before the configuration.
fn not_configured() -> ErrorBody {
    let message = "the agent waits for its configuration; try again once the VM is ready";
    ErrorBody::host(ErrorCode::NotConfigured, message).retryable_after_ms(100)
}

/// The answer to a frame that means nothing here.
fn unsupported(kind: Kind) -> ErrorBody {
    ErrorBody::caller(
        ErrorCode::Unsupported,
        format!("kind {kind} is not known to this agent, or not at this point"),
    )
}

/// Sends a refusal if the connection takes it at once; a new one always does.
fn refuse_now(mut stream: Stream, error: &ErrorBody) {
    let refused = stream.queue(error).and_then(|()| stream.flush());
    if let Err(error) = refused {
        log::info(format_args!("event=stream_ended error=\"{error}\""));
    }
}

/// Runs one stream. Its errors and panics are its own.
fn contain(serve: impl FnOnce() -> Result<(), StreamError>) -> bool {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(serve)) {
        Ok(Ok(()) | Err(StreamError::Ended)) => true,
        Ok(Err(error)) => {
            log::info(format_args!("event=stream_ended error=\"{error}\""));
            true
        }
        Err(_) => {
            log::error(format_args!("event=stream_panicked"));
            false
        }
    }
}

/// Starts one of the agent's own threads.
fn start_thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), Errno> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(run)
        .map(drop)
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)))
}

/// One of the places for streams.
struct Place(Arc<Agent>);

impl Place {
    fn take(agent: &Arc<Agent>) -> Option<Self> {
        let add = |count: usize| count.checked_add(1).filter(|count| *count <= MAX_STREAMS);
        agent
            .streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, add)
            .ok()
            .map(|_| Self(Arc::clone(agent)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A panic while a lock was held ended one stream; what the lock protects is still whole, because
/// every holder changes it in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_its_own_stream_only() {
        assert!(!contain(|| panic!("injected")));
        assert!(contain(|| Err(StreamError::Ended)));
    }
}
