//! The disk: what is read, written, flushed, discarded, zeroed and declined.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_memory::VolatileSlice;
use vmm::virtio::block::{BlockBackend, FileBackend, block};

use crate::rig::{DATA, Faults, MEMORY_SIZE, NEEDS_RESET, Rig, STATUS, memory};

/// A wait that fails its test; no healthy run comes near.
const GIVE_UP_AFTER: Duration = Duration::from_secs(20);

const SIZE: u64 = 8 << 20;
const SECTORS: u64 = SIZE / 512;
const HEADER: u64 = DATA;
const ANSWER: u64 = DATA + 0x100;
const BODY: u64 = DATA + 0x1000;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

pub(crate) fn file_disk(faults: &Faults) -> (Rig, std::fs::File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    let memory = memory();
    let backend = FileBackend::new(file.try_clone().unwrap());
    let device = block(memory.clone(), Box::new(backend), faults.sink()).unwrap();
    (Rig::live(device, memory, &[256]), file)
}

/// Runs one request with its data in one buffer at BODY: the status byte and the length written.
fn request(rig: &mut Rig, kind: u32, sector: u64, body: Option<(u32, bool)>) -> (u8, u32) {
    let mut header = Vec::new();
    header.extend(kind.to_le_bytes());
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    rig.put(HEADER, &header);
    rig.put(ANSWER, &[0xee]);
    let mut buffers = vec![(HEADER, 16, false)];
    buffers.extend(body.map(|(length, write)| (BODY, length, write)));
    buffers.push((ANSWER, 1, true));
    rig.chain(0, 0, &buffers);
    rig.offer(0, 0);
    rig.kick(0);
    let (head, written) = rig.used(0);
    assert_eq!(head, 0);
    (rig.bytes(ANSWER, 1)[0], written)
}

fn ranges(rig: &Rig, ranges: &[(u64, u32, u32)]) -> u32 {
    let mut bytes = Vec::new();
    for (sector, count, flags) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    rig.put(BODY, &bytes);
    bytes.len() as u32
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    use std::os::unix::fs::FileExt as _;
    let (mut rig, file) = file_disk(&Faults::default());
    let data: Vec<u8> = (0..4096_u32).map(|i| (i % 251) as u8).collect();
    rig.put(BODY, &data);
    assert_eq!(request(&mut rig, OUT, 16, Some((4096, false))), (0, 1));
    let mut in_file = vec![0; 4096];
    file.read_exact_at(&mut in_file, 16 * 512).unwrap();
    assert_eq!(in_file, data);
    rig.put(BODY, &[0; 4096]);
    assert_eq!(request(&mut rig, IN, 16, Some((4096, true))), (0, 4097));
    assert_eq!(rig.bytes(BODY, 4096), data);
}

#[test]
fn a_request_in_many_pieces_is_one_request() {
    let (mut rig, _) = file_disk(&Faults::default());
    rig.put(
        HEADER,
        &[OUT as u8, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
    );
    rig.put(BODY, &[7; 1024]);
    let pieces = [
        (HEADER, 3, false),
        (HEADER + 3, 13, false),
        (BODY, 1, false),
        (BODY, 0, false),
        (BODY + 1, 511, false),
        (BODY + 512, 512, false),
        (ANSWER, 1, true),
    ];
    rig.chain(0, 0, &pieces);
    rig.offer(0, 0);
    rig.kick(0);
    assert_eq!(rig.used(0), (0, 1));
    assert_eq!(rig.bytes(ANSWER, 1), [0]);
    rig.put(BODY, &[0; 1024]);
    request(&mut rig, IN, 3, Some((1024, true)));
    assert_eq!(rig.bytes(BODY, 1024), [7; 1024]);
}

#[test]
fn an_indirect_table_is_followed() {
    let (mut rig, _) = file_disk(&Faults::default());
    let table = DATA + 0x8000;
    rig.put(HEADER, &[0; 16]);
    rig.put(ANSWER, &[0xee]);
    rig.descriptor_at(table, 0, (HEADER, 16, crate::rig::NEXT, 1));
    rig.descriptor_at(
        table,
        1,
        (BODY, 512, crate::rig::NEXT | crate::rig::WRITE, 2),
    );
    rig.descriptor_at(table, 2, (ANSWER, 1, crate::rig::WRITE, 0));
    rig.descriptor(0, 5, (table, 48, crate::rig::INDIRECT, 0));
    rig.offer(0, 5);
    rig.kick(0);
    assert_eq!(rig.used(0), (5, 513));
    assert_eq!(rig.bytes(ANSWER, 1), [0]);
}

#[test]
fn the_disk_has_a_name() {
    let (mut rig, _) = file_disk(&Faults::default());
    assert_eq!(request(&mut rig, GET_ID, 0, Some((20, true))), (0, 21));
    assert_eq!(rig.bytes(BODY, 20), b"supvm-root\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn the_configuration_says_what_the_disk_can_do() {
    let (rig, _) = file_disk(&Faults::default());
    let mut sectors = [0; 8];
    rig.device.read(0x100, &mut sectors);
    assert_eq!(u64::from_le_bytes(sectors), SECTORS);
    assert_eq!(rig.get(0x100 + 12), 126, "seg_max");
    assert_eq!(rig.get(0x100 + 20), 512, "blk_size");
    assert_ne!(rig.get(0x100 + 36), 0, "max_discard_sectors");
    assert_eq!(rig.get(0x100 + 60), 0, "nothing after it");
    for bit in [2, 6, 9, 13, 14] {
        assert_ne!(rig.features() & (1 << bit), 0, "feature {bit}");
    }
    assert_eq!(rig.features() & (1 << 11), 0, "CONFIG_WCE");
}

#[test]
fn discard_and_unmapped_zeroes_give_space_back_to_the_host() {
    let (mut rig, file) = file_disk(&Faults::default());
    for kind in [DISCARD, WRITE_ZEROES] {
        rig.put(BODY, &[1; 1 << 20]);
        assert_eq!(request(&mut rig, OUT, 0, Some((1 << 20, false))).0, 0);
        file.sync_all().unwrap();
        let full = file.metadata().unwrap().blocks();
        assert!(full >= 2048, "{full}");
        let flags = u32::from(kind == WRITE_ZEROES);
        let length = ranges(&rig, &[(0, 1024, flags), (1024, 1024, flags)]);
        assert_eq!(request(&mut rig, kind, 0, Some((length, false))), (0, 1));
        let after = file.metadata().unwrap().blocks();
        assert!(after + 2000 <= full, "{full} -> {after}");
        assert_eq!(request(&mut rig, IN, 0, Some((4096, true))).0, 0);
        assert_eq!(rig.bytes(BODY, 4096), [0; 4096]);
        assert_eq!(
            file.metadata().unwrap().len(),
            SIZE,
            "the disk keeps its size"
        );
    }
}

#[test]
fn zeroes_that_keep_their_space_read_as_zeroes() {
    let (mut rig, _) = file_disk(&Faults::default());
    rig.put(BODY, &[1; 4096]);
    request(&mut rig, OUT, 8, Some((4096, false)));
    let length = ranges(&rig, &[(8, 4, 0)]);
    assert_eq!(
        request(&mut rig, WRITE_ZEROES, 0, Some((length, false))).0,
        0
    );
    request(&mut rig, IN, 8, Some((4096, true)));
    let bytes = rig.bytes(BODY, 4096);
    assert!(bytes[..2048].iter().all(|b| *b == 0));
    assert!(bytes[2048..].iter().all(|b| *b == 1));
}

#[test]
fn requests_beyond_the_end_are_io_errors() {
    let (mut rig, _) = file_disk(&Faults::default());
    for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(
            request(&mut rig, IN, sector, Some((1024, true))).0,
            1,
            "{sector}"
        );
        assert_eq!(
            request(&mut rig, OUT, sector, Some((1024, false))).0,
            1,
            "{sector}"
        );
        let length = ranges(&rig, &[(sector, 2, 0)]);
        assert_eq!(
            request(&mut rig, DISCARD, 0, Some((length, false))).0,
            1,
            "{sector}"
        );
    }
    assert_eq!(
        rig.get(STATUS) & NEEDS_RESET,
        0,
        "a wrong request is not a broken device"
    );
}

#[test]
fn unaligned_lengths_and_wrong_directions_are_io_errors() {
    let (mut rig, _) = file_disk(&Faults::default());
    assert_eq!(request(&mut rig, OUT, 0, Some((511, false))).0, 1);
    assert_eq!(request(&mut rig, IN, 0, Some((513, true))).0, 1);
    assert_eq!(request(&mut rig, IN, 0, Some((512, false))).0, 1);
    assert_eq!(request(&mut rig, OUT, 0, Some((512, true))).0, 1);
    assert_eq!(
        request(&mut rig, IN, 0, None).0,
        0,
        "nothing at all is fine"
    );
}

#[test]
fn lists_of_ranges_are_bounded_and_whole() {
    let (mut rig, _) = file_disk(&Faults::default());
    let many = vec![(0, 1, 0); 33];
    for list in [&many[..], &[]] {
        let length = ranges(&rig, list);
        let body = if length == 0 {
            None
        } else {
            Some((length, false))
        };
        assert_eq!(request(&mut rig, DISCARD, 0, body).0, 1);
    }
    assert_eq!(request(&mut rig, DISCARD, 0, Some((17, false))).0, 1);
    let length = ranges(&rig, &[(0, 1, 1)]);
    assert_eq!(
        request(&mut rig, DISCARD, 0, Some((length, false))).0,
        2,
        "DISCARD has no unmap"
    );
    let length = ranges(&rig, &[(0, 1, 2)]);
    assert_eq!(
        request(&mut rig, WRITE_ZEROES, 0, Some((length, false))).0,
        2
    );
    let length = ranges(&rig, &many[..32]);
    assert_eq!(request(&mut rig, DISCARD, 0, Some((length, false))).0, 0);
}

#[test]
fn unknown_requests_are_unsupported() {
    let (mut rig, _) = file_disk(&Faults::default());
    for kind in [2, 3, 5, 10, 14, u32::MAX] {
        assert_eq!(request(&mut rig, kind, 0, Some((512, true))).0, 2, "{kind}");
    }
}

#[test]
fn a_giant_request_is_declined_and_a_large_one_served() {
    let (mut rig, _) = file_disk(&Faults::default());
    assert_eq!(request(&mut rig, IN, 0, Some((40 << 20, true))).0, 1);
    assert_eq!(
        request(&mut rig, IN, 0, Some((SIZE as u32, true))),
        (0, SIZE as u32 + 1)
    );
}

#[test]
fn more_requests_than_one_turn_takes_are_all_answered() {
    let (mut rig, _) = file_disk(&Faults::default());
    rig.put(HEADER, &[0; 16]);
    for head in (0..255).step_by(3) {
        rig.chain(
            0,
            head,
            &[(HEADER, 16, false), (BODY, 512, true), (ANSWER, 1, true)],
        );
    }
    for _ in 0..4 {
        for head in (0..255).step_by(3) {
            rig.offer(0, head);
        }
        rig.kick(0);
        for head in (0..255).step_by(3) {
            assert_eq!(rig.used(0), (head, 513));
        }
    }
}

#[test]
fn a_disk_that_fails_answers_io_errors_and_lives_on() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = std::fs::File::open(path).unwrap();
    let memory = memory();
    let faults = Faults::default();
    let backend = Box::new(FileBackend::new(read_only));
    let device = block(memory.clone(), backend, faults.sink()).unwrap();
    let mut rig = Rig::live(device, memory, &[256]);
    assert_eq!(request(&mut rig, OUT, 0, Some((512, false))).0, 1);
    assert_eq!(request(&mut rig, IN, 0, Some((512, true))).0, 0);
    // The file shrinks beneath the disk: no endless loop at its end.
    file.set_len(4096).unwrap();
    assert_eq!(request(&mut rig, IN, 0, Some((8192, true))).0, 1);
    assert!(faults.all().is_empty());
}

#[test]
fn requests_without_header_or_status_break_the_device() {
    for buffers in [
        &[(HEADER, 15, false), (ANSWER, 1, true)][..],
        &[(HEADER, 16, false)],
        &[(HEADER, 16, false), (ANSWER, 0, true)],
        &[(ANSWER, 1, true)],
    ] {
        let faults = Faults::default();
        let (mut rig, _) = file_disk(&faults);
        rig.chain(0, 0, buffers);
        rig.offer(0, 0);
        rig.kick(0);
        assert!(
            rig.broken().contains("too short"),
            "{buffers:?}: {}",
            rig.reason()
        );
        assert!(
            faults.all().is_empty(),
            "the machine is not told: a reset helps"
        );
    }
}

/// What a back-end was asked, in order; `sync` waits until the test lets it return.
struct Recorder {
    calls: Arc<Mutex<Vec<&'static str>>>,
    in_sync: Sender<()>,
    may_return: Receiver<()>,
}

impl BlockBackend for Recorder {
    fn capacity(&self) -> io::Result<u64> {
        Ok(SIZE)
    }

    fn read(&mut self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Other.into())
    }

    fn write(&mut self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<()> {
        self.calls.lock().unwrap().push("write");
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.calls.lock().unwrap().push("sync");
        self.in_sync.send(()).unwrap();
        // An error means that the test is over.
        let _ = self.may_return.recv_timeout(GIVE_UP_AFTER);
        Ok(())
    }

    fn punch_hole(&mut self, _: u64, _: u64) -> io::Result<()> {
        panic!("injected");
    }

    fn zero(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

struct Recorded {
    rig: Rig,
    faults: Faults,
    calls: Arc<Mutex<Vec<&'static str>>>,
    in_sync: Receiver<()>,
    let_return: Sender<()>,
}

fn recorded() -> Recorded {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let (in_sync_sender, in_sync) = channel();
    let (let_return, may_return) = channel();
    let backend = Recorder {
        calls: Arc::clone(&calls),
        in_sync: in_sync_sender,
        may_return,
    };
    let memory = memory();
    let faults = Faults::default();
    let device = block(memory.clone(), Box::new(backend), faults.sink()).unwrap();
    Recorded {
        rig: Rig::live(device, memory, &[256]),
        faults,
        calls,
        in_sync,
        let_return,
    }
}

fn offer_flush(rig: &mut Rig) {
    rig.put(
        HEADER,
        &[FLUSH as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    rig.put(ANSWER, &[0xee]);
    rig.chain(0, 0, &[(HEADER, 16, false), (ANSWER, 1, true)]);
    rig.offer(0, 0);
    rig.kick(0);
}

#[test]
fn a_flush_is_answered_only_after_the_data_is_on_stable_storage() {
    let mut r = recorded();
    assert_eq!(request(&mut r.rig, OUT, 0, Some((512, false))).0, 0);
    offer_flush(&mut r.rig);
    r.in_sync.recv_timeout(GIVE_UP_AFTER).unwrap();
    assert!(r.rig.used_now(0).is_none(), "not answered while it syncs");
    assert_eq!(r.rig.bytes(ANSWER, 1), [0xee]);
    r.let_return.send(()).unwrap();
    assert_eq!(r.rig.used(0), (0, 1));
    assert_eq!(r.rig.bytes(ANSWER, 1), [0]);
    assert_eq!(*r.calls.lock().unwrap(), ["write", "sync"]);
    drop(r.let_return);
}

#[test]
fn a_reset_waits_for_the_io_in_flight() {
    let mut r = recorded();
    offer_flush(&mut r.rig);
    r.in_sync.recv_timeout(GIVE_UP_AFTER).unwrap();
    let device = &r.rig.device;
    let (reset_done, done) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            device.write(STATUS, &0_u32.to_le_bytes());
            reset_done.send(()).unwrap();
        });
        assert!(done.try_recv().is_err());
        r.let_return.send(()).unwrap();
        done.recv_timeout(GIVE_UP_AFTER).unwrap();
    });
    // The buffers were still the device's when the I/O ended, and it was answered into them.
    assert_eq!(r.rig.bytes(ANSWER, 1), [0]);
    assert_eq!(r.rig.get(STATUS), 0);
    drop(r.let_return);
}

#[test]
fn the_end_of_the_machine_syncs_the_disk() {
    let mut r = recorded();
    assert_eq!(request(&mut r.rig, OUT, 0, Some((512, false))).0, 0);
    drop(r.let_return);
    r.rig.device.shut_down();
    assert_eq!(*r.calls.lock().unwrap(), ["write", "sync"]);
}

#[test]
fn a_panic_of_the_device_is_a_fault_of_the_machine_and_not_of_the_process() {
    let mut r = recorded();
    let length = ranges(&r.rig, &[(0, 1, 0)]);
    r.rig.put(
        HEADER,
        &[DISCARD as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    r.rig.chain(
        0,
        0,
        &[
            (HEADER, 16, false),
            (BODY, length, false),
            (ANSWER, 1, true),
        ],
    );
    r.rig.offer(0, 0);
    r.rig.kick(0);
    assert!(
        r.rig.broken().contains("panicked: injected"),
        "{}",
        r.rig.reason()
    );
    let faults = r.faults.all();
    assert_eq!(faults.len(), 1);
    assert!(faults[0].to_string().contains("injected"));
    // Reset, shut-down and save of what is left neither hang nor panic.
    r.rig.set(STATUS, 0);
    assert!(r.rig.device.save().is_none());
    r.rig.device.shut_down();
}

#[test]
fn a_buffer_outside_memory_breaks_the_device() {
    for address in [MEMORY_SIZE, MEMORY_SIZE - 511, u64::MAX - 100, 1 << 40] {
        let (mut rig, _) = file_disk(&Faults::default());
        rig.put(HEADER, &[0; 16]);
        rig.chain(
            0,
            0,
            &[(HEADER, 16, false), (address, 512, true), (ANSWER, 1, true)],
        );
        rig.offer(0, 0);
        rig.kick(0);
        assert!(
            rig.broken().contains("outside guest memory"),
            "{address:#x}: {}",
            rig.reason()
        );
    }
}
