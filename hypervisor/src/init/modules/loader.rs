//! Loads modules beside PID 1, which must not wait for a driver that probes its hardware: what disks,
//! network and VMs need first, whatever else there is after that, then what devices that appear ask
//! for. One thread for devices, one for what has no device.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};

use super::{Modules, of_all, of_buses};

/// File systems come before the disks that hold them: a mount asks once.
const FILE_SYSTEMS: &[&str] = &["xfs", "squashfs"];

/// What no device asks for and no service waits for.
const OTHERS: &[&str] = &["evdev", "button", "loop"];

enum Request {
    Device(String),
    Everything,
}

/// The threads, which live as long as the machine.
#[derive(Debug)]
pub(in crate::init) struct Loader {
    requests: Sender<Request>,
    /// Counts what was waited for and has come.
    done: Arc<EventFd>,
    arrived: u64,
}

/// What is waited for: the file systems, and what VMs need.
const AWAITED: u64 = 2;

impl Loader {
    /// Begins. Packet sockets work when this returns, because net opens one at once.
    pub(in crate::init) fn start(mut modules: Modules, started: Instant) -> nix::Result<Self> {
        for module in ["af_packet", "ipv6"] {
            modules.load(module);
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let done = Arc::new(EventFd::from_flags(flags)?);
        let (requests, receiver) = channel();
        // Signals are PID 1's own thread's business.
        let mut before = SigSet::empty();
        pthread_sigmask(
            SigmaskHow::SIG_SETMASK,
            Some(&SigSet::all()),
            Some(&mut before),
        )?;
        let (other, told) = (modules.clone(), Done(done.clone()));
        spawn("kvm", move || virtual_machines(other, told, started));
        let told = Done(done.clone());
        spawn("devices", move || {
            devices(modules, &receiver, told, started);
        });
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
        Ok(Self {
            requests,
            done,
            arrived: 0,
        })
    }

    /// Loads what a device asks for, some time.
    pub(in crate::init) fn serve(&self, modalias: String) {
        self.ask(Request::Device(modalias));
    }

    /// Looks for devices that nobody told of, some time.
    pub(in crate::init) fn look_at_everything(&self) {
        self.ask(Request::Everything);
    }

    fn ask(&self, request: Request) {
        if self.requests.send(request).is_err() {
            tracing::error!("modules are not loaded any more: their thread has ended");
        }
    }

    /// Becomes readable when something that is waited for has been loaded.
    pub(in crate::init) fn descriptor(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }

    /// Whether what services and VMs need has been loaded, or cannot be.
    pub(in crate::init) fn is_ready(&mut self) -> bool {
        self.arrived = self.arrived.saturating_add(self.done.read().unwrap_or(0));
        self.arrived >= AWAITED
    }
}

/// Tells on its drop, so that a thread that panics holds up nothing.
struct Done(Arc<EventFd>);

impl Drop for Done {
    fn drop(&mut self) {
        let _ = self.0.write(1);
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    let builder = std::thread::Builder::new().name(format!("supvm-{name}"));
    // What was moved into the work is dropped if it is never done.
    if let Err(error) = builder.spawn(work) {
        tracing::error!(%error, "modules cannot be loaded");
    }
}

fn virtual_machines(mut modules: Modules, told: Done, started: Instant) {
    modules.load("kvm");
    if let Some(module) = super::super::kvm_module() {
        modules.load(module);
    }
    told_after(started, "what VMs need is loaded");
    drop(told);
    OTHERS.iter().for_each(|module| modules.load(module));
}

fn devices(mut modules: Modules, requests: &Receiver<Request>, told: Done, started: Instant) {
    FILE_SYSTEMS.iter().for_each(|module| modules.load(module));
    drop(told);
    modules.coldplug(of_buses, is_urgent);
    told_after(started, "disks and network served");
    modules.coldplug(of_all, |_| true);
    told_after(started, "all devices served");
    while let Ok(request) = requests.recv() {
        match request {
            Request::Device(modalias) => modules.serve(&modalias),
            Request::Everything => modules.coldplug(of_all, |_| true),
        }
    }
}

fn told_after(started: Instant, what: &str) {
    let after_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(after_ms, "{what}");
}

/// Whether a device may carry our disks or our network.
fn is_urgent(modalias: &str) -> bool {
    modalias.starts_with("virtio:")
        || (modalias.starts_with("pci:")
            && ["bc01sc", "bc02sc"]
                .iter()
                .any(|class| modalias.contains(class)))
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    #[test]
    fn disks_and_network_come_first() {
        for urgent in [
            "virtio:d00000002v00001AF4",
            "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01",
            "pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00",
        ] {
            assert!(is_urgent(urgent), "{urgent}");
        }
        for later in [
            "pci:v00008086d00002918sv00001AF4sd00001100bc06sc01i00",
            "acpi:PNP0C0C:",
            "usb:v0627p0001d0000dc00dsc00dp00ic03isc00ip00in00",
        ] {
            assert!(!is_urgent(later), "{later}");
        }
    }

    #[test]
    fn it_tells_when_what_vms_need_has_been_tried_even_by_a_panic() {
        let mut loader = Loader::start(Modules::default(), Instant::now()).unwrap();
        while !loader.is_ready() {
            let mut descriptors = [PollFd::new(loader.descriptor(), PollFlags::POLLIN)];
            let heard = poll(&mut descriptors, PollTimeout::from(30_000_u16));
            assert_eq!(heard, Ok(1), "it never told");
        }
        assert!(loader.is_ready(), "it stays ready");
        let flags = EfdFlags::EFD_NONBLOCK;
        let done = Arc::new(EventFd::from_flags(flags).unwrap());
        let told = Done(done.clone());
        let thread = std::thread::spawn(move || {
            let _told = told;
            panic!("injected");
        });
        assert!(thread.join().is_err());
        assert_eq!(done.read(), Ok(1));
    }
}
