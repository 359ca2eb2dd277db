//! The buffers of a VM's connections: slices of one mapping, which takes address space at once and
//! memory only where bytes lie. A slice goes back to the kernel when its connection ends or has
//! been idle; two mappings for each connection would reach the kernel's limit of mappings.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;

/// Bytes that may be under way in each direction of a connection.
pub(super) const WINDOW: usize = 256 << 10;

/// Both directions.
const SLOT: usize = 2 * WINDOW;

/// The mapping.
#[derive(Debug)]
pub(super) struct Arena {
    base: NonNull<u8>,
    slots: usize,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    returned: Vec<usize>,
    /// Slots from here on were never used.
    fresh: usize,
}

// SAFETY: the pointer is to a mapping that only this value unmaps; slices of it are handed out to
// one `Slot` at a time, under the lock.
unsafe impl Send for Arena {}
// SAFETY: as above; all that a shared reference can do goes through the lock.
unsafe impl Sync for Arena {}

impl Arena {
    pub(super) fn new(slots: usize) -> io::Result<Arc<Self>> {
        let size = slots
            .checked_mul(SLOT)
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
        let base = unsafe { mmap_anonymous(None, size, protection, flags) }?;
        // Without huge pages, or the first byte of a connection would take 2 MiB. Kernels without
        // them refuse the advice, which is as good.
        // SAFETY: the range was just mapped.
        let _ = unsafe { madvise(base, size.get(), MmapAdvise::MADV_NOHUGEPAGE) };
        Ok(Arc::new(Self {
            base: base.cast(),
            slots,
            free: Mutex::default(),
        }))
    }

    fn take(self: &Arc<Self>) -> Option<Slot> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let number = match free.returned.pop() {
            Some(number) => number,
            None if free.fresh < self.slots => {
                let number = free.fresh;
                free.fresh = number.saturating_add(1);
                number
            }
            None => return None,
        };
        drop(free);
        Some(Slot {
            arena: Arc::clone(self),
            number,
        })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: every slot holds the arena, so none is left.
        let _ = unsafe { munmap(self.base.cast(), self.slots.saturating_mul(SLOT)) };
    }
}

/// Two slices of the arena, one holder at a time.
#[derive(Debug)]
struct Slot {
    arena: Arc<Arena>,
    number: usize,
}

impl Slot {
    fn half(&self, second: bool) -> NonNull<u8> {
        let offset =
            self.number
                .saturating_mul(SLOT)
                .saturating_add(if second { WINDOW } else { 0 });
        // SAFETY: numbers are below `slots`, so the offset is within the mapping.
        unsafe { self.arena.base.add(offset) }
    }

    /// Gives the memory of both halves back to the kernel; they read as zeros.
    fn release(&self) {
        // SAFETY: the range is this slot's alone. The advice changes its bytes to zeros, which
        // nobody relies on: either nobody holds the slices, or both buffers are empty.
        let _ = unsafe { madvise(self.half(false).cast(), SLOT, MmapAdvise::MADV_DONTNEED) };
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.release();
        let mut free = self
            .arena
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        free.returned.push(self.number);
    }
}

/// One TCP socket of smoltcp's in a set of its own. smoltcp looks at every socket of a set for
/// each packet; the stack knows which one is meant.
pub(super) struct GuestSocket {
    // Before the slot: fields are dropped in this order, and the set holds slices of the slot.
    set: SocketSet<'static>,
    handle: SocketHandle,
    slot: Slot,
}

impl GuestSocket {
    /// None when all slots are taken.
    pub(super) fn new(arena: &Arc<Arena>) -> Option<Self> {
        let slot = arena.take()?;
        let slice = |second| {
            // SAFETY: the half is mapped, readable, writable, initialised to zeros, and nobody
            // else's until the slot is dropped. The lifetime is longer than that, but the slice
            // stays within `set`, which is private and dropped before the slot.
            unsafe { std::slice::from_raw_parts_mut(slot.half(second).as_ptr(), WINDOW) }
        };
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(slice(false)),
            tcp::SocketBuffer::new(slice(true)),
        );
        socket.set_nagle_enabled(false);
        // Acknowledged once per turn of the stack, however many segments that was.
        socket.set_ack_delay(None);
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(socket);
        Some(Self { set, handle, slot })
    }

    pub(super) fn tcp(&mut self) -> &mut tcp::Socket<'static> {
        self.set.get_mut(self.handle)
    }

    pub(super) fn set(&mut self) -> &mut SocketSet<'static> {
        &mut self.set
    }

    /// Gives memory back when nothing is buffered. The caller knows that no segment is kept that
    /// arrived before its predecessor: those lie in the empty part.
    pub(super) fn trim(&mut self) {
        let socket = self.tcp();
        if socket.send_queue() == 0 && socket.recv_queue() == 0 {
            self.slot.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_handed_out_once_and_come_back_empty() {
        let arena = Arena::new(2).unwrap();
        let first = arena.take().unwrap();
        let second = arena.take().unwrap();
        assert!(arena.take().is_none());
        assert_ne!(first.half(false), second.half(false));
        let number = first.number;
        // SAFETY: the slot is this test's.
        unsafe { first.half(true).write(9) };
        drop(first);
        let again = arena.take().unwrap();
        assert_eq!(again.number, number);
        // SAFETY: the slot is this test's.
        assert_eq!(unsafe { again.half(true).read() }, 0);
    }

    #[test]
    fn ten_thousand_idle_connections_are_one_mapping() {
        let arena = Arena::new(10_000).unwrap();
        let maps = || {
            std::fs::read_to_string("/proc/self/maps")
                .unwrap()
                .lines()
                .count()
        };
        let before = maps();
        let sockets: Vec<_> = (0..10_000)
            .map(|_| GuestSocket::new(&arena).unwrap())
            .collect();
        // The heap may have grown by a few.
        assert!(maps() < before + 20);
        drop(sockets);
    }
}
