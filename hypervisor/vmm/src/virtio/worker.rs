//! A device's own thread. It owns the device, sleeps in epoll until a queue is kicked, one of the
//! device's descriptors stirs or the transport asks for something, and hands each event to the
//! device. All I/O of a device happens here, never on a vCPU thread. A panic of the device ends the
//! device, not the process. It must never take a lock that a vCPU thread holds while it waits here.
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

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::fault::{Broken, DeviceKind};
use super::interrupt::Interrupt;
use super::ring::Ring;
use super::transport::DeviceState;
use crate::ending::panic_message;

/// Token of the transport's requests. Queues have the tokens of their indexes.
const CONTROL: u64 = 1 << 63;
/// Tokens from here on belong to the device.
pub(super) const DEVICE_TOKENS: u64 = 1 << 32;
const EVENTS_PER_WAKE_UP: usize = 64;

/// The queues of a live device; a queue that the driver did not hand over is missing.
pub(super) type Rings = Vec<Option<Ring>>;

/// What a device does, called on its worker's thread only. `start` comes before any other call that
/// takes rings, `stop` after the last one; then `start` may come again. `finish` comes last.
pub(super) trait Device: Send + 'static {
    /// The bits of the device's own features, without the transport's.
    fn features(&self) -> u64;

    /// The device's configuration space, fixed for its life.
    fn config(&self) -> Vec<u8>;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];

    /// The device may add descriptors of its own to `epoll`, with tokens from [`DEVICE_TOKENS`] on.
    fn attach(&mut self, epoll: &Arc<Epoll>) -> io::Result<()> {
        let _ = epoll;
        Ok(())
    }

    /// What the driver chose of the features, before each `start`.
    fn negotiated(&mut self, features: u64) {
        let _ = features;
    }

    /// The driver is ready. Afterwards each queue is treated as kicked.
    fn start(&mut self, rings: &mut Rings) -> Result<(), Broken> {
        let _ = rings;
        Ok(())
    }

    /// A queue was kicked.
    fn kicked(&mut self, queue: usize, rings: &mut Rings) -> Result<(), Broken>;

    /// One of the device's own descriptors stirred. `rings` is empty while the device is not live.
    fn stirred(&mut self, token: u64, events: EventSet, rings: &mut Rings) -> Result<(), Broken> {
        let _ = (token, events, rings);
        Ok(())
    }

    /// The driver reset the device or took a queue back; `reset` says which.
    fn stop(&mut self, reset: bool) {
        let _ = reset;
    }

    /// The device asks to be reset; it is not called for its queues until then.
    fn broke(&mut self) {}

    /// The machine ends: what was accepted is made durable.
    fn finish(&mut self) {}

    /// The device's state, between `stop` and `start`.
    fn save(&self) -> DeviceState;

    /// Back to a saved state, before the first `start`; false when it is another device's.
    fn restore(&mut self, state: &DeviceState) -> bool;
}

enum Request {
    Start {
        features: u64,
        rings: Rings,
        answer: SyncSender<()>,
    },
    /// Answered with each queue's progress.
    Stop {
        reset: bool,
        answer: SyncSender<Vec<Option<(u16, u16)>>>,
    },
    Save(SyncSender<DeviceState>),
    Restore(DeviceState, SyncSender<bool>),
    Finish,
}

struct Mailbox {
    /// None once the thread takes no more of them.
    requests: Mutex<Option<VecDeque<Request>>>,
    event: EventFd,
}

impl Mailbox {
    /// A request that is not taken is dropped, and with it its answer's sender.
    fn push(&self, request: Request) {
        if let Some(queue) = &mut *self.requests.lock().unwrap_or_else(PoisonError::into_inner) {
            queue.push_back(request);
        }
        let _ = self.event.write(1);
    }

    fn pop(&self) -> Option<Request> {
        self.requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut()?
            .pop_front()
    }

    fn close(&self) {
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The transport's end of a worker.
pub(super) struct Worker {
    mailbox: Arc<Mailbox>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Worker {
    /// Starts the thread of `device`. `kicks` are the notifiers of its queues.
    pub(super) fn spawn(
        kind: DeviceKind,
        mut device: Box<dyn Device>,
        kicks: Arc<[EventFd]>,
        interrupt: Arc<Interrupt>,
    ) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        let mailbox = Arc::new(Mailbox {
            requests: Mutex::new(Some(VecDeque::new())),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let add = |descriptor, token| {
            epoll.ctl(
                ControlOperation::Add,
                descriptor,
                EpollEvent::new(EventSet::IN, token),
            )
        };
        add(mailbox.event.as_raw_fd(), CONTROL)?;
        for (token, kick) in (0..).zip(kicks.iter()) {
            add(kick.as_raw_fd(), token)?;
        }
        device.attach(&epoll)?;
        let mut thread = Thread {
            epoll,
            mailbox: Arc::clone(&mailbox),
            kicks,
            interrupt,
            device: Some(device),
            rings: Vec::new(),
            live: false,
        };
        let handle = std::thread::Builder::new()
            .name(kind.to_string())
            .stack_size(256 * 1024)
            .spawn(move || thread.run())?;
        Ok(Self {
            mailbox,
            thread: Mutex::new(Some(handle)),
        })
    }

    fn ask<T>(&self, request: impl FnOnce(SyncSender<T>) -> Request) -> Option<T> {
        let (sender, receiver) = sync_channel(1);
        self.mailbox.push(request(sender));
        receiver.recv().ok()
    }

    /// Hands the queues over and returns once the worker has them.
    pub(super) fn start(&self, features: u64, rings: Rings) {
        let _ = self.ask(|answer| Request::Start {
            features,
            rings,
            answer,
        });
    }

    /// Takes the queues back once the I/O in flight is done.
    pub(super) fn stop(&self, reset: bool) -> Vec<Option<(u16, u16)>> {
        self.ask(|answer| Request::Stop { reset, answer })
            .unwrap_or_default()
    }

    pub(super) fn save(&self) -> Option<DeviceState> {
        self.ask(Request::Save)
    }

    pub(super) fn restore(&self, state: DeviceState) -> bool {
        self.ask(|answer| Request::Restore(state, answer))
            .unwrap_or(false)
    }

    /// Finishes the I/O in flight, makes it durable and ends the thread.
    pub(super) fn finish(&self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            self.mailbox.push(Request::Finish);
            let _ = thread.join();
        }
    }
}

struct Thread {
    epoll: Arc<Epoll>,
    mailbox: Arc<Mailbox>,
    kicks: Arc<[EventFd]>,
    interrupt: Arc<Interrupt>,
    /// None once it has panicked.
    device: Option<Box<dyn Device>>,
    rings: Rings,
    live: bool,
}

impl Thread {
    fn run(&mut self) {
        let turned = catch_unwind(AssertUnwindSafe(|| self.turn_until_finished()));
        if let Err(panic) = turned {
            self.interrupt.break_device(Broken::Panicked {
                message: panic_message(panic.as_ref()),
            });
        }
        // Whoever asks from now on must not wait for ever.
        self.mailbox.close();
        self.rings.clear();
    }

    fn turn_until_finished(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS_PER_WAKE_UP];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    self.interrupt.break_device(Broken::Host {
                        what: "wait for events of a device",
                        reason: e.to_string(),
                    });
                    return;
                }
            };
            for event in events.iter().take(count) {
                match event.data() {
                    CONTROL => {
                        if self.serve_transport() {
                            return;
                        }
                    }
                    token if token >= DEVICE_TOKENS => {
                        self.stirred(token, event.event_set());
                    }
                    token => self.kicked(usize::try_from(token).unwrap_or(usize::MAX)),
                }
            }
        }
    }

    fn kicked(&mut self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            // Non-blocking: an error means that nobody kicked after all.
            let _ = kick.read();
        }
        if self.live && !self.interrupt.needs_reset() {
            self.run_device(|device, rings| device.kicked(queue, rings));
        }
    }

    fn stirred(&mut self, token: u64, events: EventSet) {
        if self.live && !self.interrupt.needs_reset() {
            self.run_device(|device, rings| device.stirred(token, events, rings));
        } else {
            self.run_device(|device, _| device.stirred(token, events, &mut Rings::new()));
        }
    }

    /// True when the thread is to end.
    fn serve_transport(&mut self) -> bool {
        let _ = self.mailbox.event.read();
        loop {
            match self.mailbox.pop() {
                None => return false,
                Some(Request::Start {
                    features,
                    rings,
                    answer,
                }) => {
                    self.rings = rings;
                    self.live = true;
                    self.run_device(|device, rings| {
                        device.negotiated(features);
                        device.start(rings)
                    });
                    for kick in self.kicks.iter() {
                        let _ = kick.write(1);
                    }
                    let _ = answer.send(());
                }
                Some(Request::Stop { reset, answer }) => {
                    self.live = false;
                    self.run_device(|device, _| {
                        device.stop(reset);
                        Ok(())
                    });
                    let rings = std::mem::take(&mut self.rings);
                    let progress = rings
                        .iter()
                        .map(|ring| ring.as_ref().map(Ring::progress))
                        .collect();
                    let _ = answer.send(progress);
                }
                Some(Request::Save(answer)) => {
                    // Without a device the answer's sender is dropped, and that is the answer.
                    self.run_device(|device, _| {
                        let _ = answer.send(device.save());
                        Ok(())
                    });
                }
                Some(Request::Restore(state, answer)) => {
                    self.run_device(|device, _| {
                        let _ = answer.send(device.restore(&state));
                        Ok(())
                    });
                }
                Some(Request::Finish) => {
                    self.live = false;
                    self.run_device(|device, _| {
                        device.stop(false);
                        device.finish();
                        Ok(())
                    });
                    return true;
                }
            }
        }
    }

    fn run_device(&mut self, work: impl FnOnce(&mut dyn Device, &mut Rings) -> Result<(), Broken>) {
        let Some(device) = self.device.as_mut() else {
            return;
        };
        let rings = &mut self.rings;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let result = work(device.as_mut(), rings);
            let signalled = rings.iter_mut().flatten().try_for_each(Ring::signal);
            result.and(signalled)
        }));
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(broken)) => self.break_device(broken),
            Err(panic) => {
                // Its state is unknown: it is not called again, not even to be dropped twice.
                let device = self.device.take();
                let _ = catch_unwind(AssertUnwindSafe(|| drop(device)));
                self.break_device(Broken::Panicked {
                    message: panic_message(panic.as_ref()),
                });
            }
        }
    }

    fn break_device(&mut self, reason: Broken) {
        // A device that is broken already can still die, and then the machine has to hear of it.
        if self.interrupt.needs_reset() && !reason.is_fatal() {
            return;
        }
        self.interrupt.break_device(reason);
        let Some(device) = self.device.as_mut() else {
            return;
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| device.broke())) {
            self.device = None;
            self.interrupt.break_device(Broken::Panicked {
                message: panic_message(panic.as_ref()),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::virtio::fault::{DeviceFault, FaultSink};
    use crate::virtio::rng::RngState;

    /// Breaks at the first kick and panics where `panics` says.
    struct Odd {
        panics: &'static str,
    }

    impl Odd {
        fn step(&self, name: &str) {
            if self.panics == name {
                panic!("injected in {name}");
            }
        }
    }

    impl Device for Odd {
        fn features(&self) -> u64 {
            0
        }

        fn config(&self) -> Vec<u8> {
            Vec::new()
        }

        fn queue_sizes(&self) -> &'static [u16] {
            &[8]
        }

        fn kicked(&mut self, queue: usize, _: &mut Rings) -> Result<(), Broken> {
            Err(Broken::EndlessChain { queue, head: 0 })
        }

        fn stop(&mut self, _: bool) {
            self.step("stop");
        }

        fn broke(&mut self) {
            self.step("broke");
        }

        fn save(&self) -> DeviceState {
            DeviceState::Rng(RngState {})
        }

        fn restore(&mut self, _: &DeviceState) -> bool {
            true
        }
    }

    /// The first fault that the machine hears of.
    fn fault_of(panics: &'static str) -> DeviceFault {
        let (sender, faults) = mpsc::channel();
        let sink = FaultSink::new(move |fault: DeviceFault| {
            if fault.reason.is_fatal() {
                sender.send(fault).unwrap();
            }
        });
        let interrupt = Arc::new(Interrupt::new(DeviceKind::Block, sink).unwrap());
        let kicks: Arc<[EventFd]> = [EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap()].into();
        let device = Box::new(Odd { panics });
        let worker = Worker::spawn(DeviceKind::Block, device, kicks, Arc::clone(&interrupt));
        let worker = worker.unwrap();
        worker.start(0, vec![None]);
        let mut polled = libc::pollfd {
            fd: interrupt.event().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(&raw mut polled, 1, 20_000) }, 1);
        assert!(interrupt.needs_reset(), "the device broke");
        worker.stop(true);
        worker.finish();
        faults.try_recv().expect("the machine hears of it")
    }

    #[test]
    fn a_panic_of_a_device_that_its_driver_broke_before_still_ends_the_machine() {
        for step in ["broke", "stop"] {
            let fault = fault_of(step);
            assert!(fault.to_string().contains(step), "{fault}");
        }
    }
}
