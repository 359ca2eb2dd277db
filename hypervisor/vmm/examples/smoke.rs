//! Boots one guest under the monitor and says what happened: for whoever works on the monitor and
//! wants an answer in seconds. One static binary plays every part. As PID 1 of an emulated server
//! it loads KVM, plays control and starts itself as the monitor; as PID 1 of the guest it looks
//! around, sends frames, answers on vsock and ends the machine in the way that was asked for.
//!
//! `examples/smoke.sh [poweroff|reboot|panic|triple|hang]` puts the initramfs together and
//! runs QEMU.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, VsockAddr, accept, bind, connect, listen,
    socket, socketpair,
};
use protocol::host::channel;
use protocol::host::supervisor::Run;
use protocol::host::vmm::{
    AttachFrames, Connect, Connected, Ending, Identify, Identity, SwitchOff, VmmConfig, descriptor,
};
use protocol::host::{DESCRIPTORS_VARIABLE, FIRST_DESCRIPTOR};
use protocol::message::decode;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const AGENT_PORT: u32 = 1024;
const HOST_CID: u32 = 2;
const GATEWAY: [u8; 4] = [10, 213, 0, 1];
const GATEWAY_HARDWARE: [u8; 6] = [2, 0x73, 0x75, 0x70, 0, 1];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|role| role == "vmm") {
        tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            .init();
        // SAFETY: this process has just been started and has opened nothing.
        let descriptors = unsafe { vmm::Descriptors::from_environment() };
        let ending = match descriptors {
            Ok(descriptors) => vmm::run_with(descriptors, arguments.get(2).map(String::as_str)),
            Err(error) => {
                eprintln!("{error}");
                Ending::Failed
            }
        };
        std::process::exit(i32::from(ending.to_wire()));
    }
    let part = prepare().and_then(|cmdline| {
        if cmdline.contains("smoke.guest") {
            guest(&cmdline)
        } else {
            server(&cmdline)
        }
    });
    if let Err(error) = part {
        println!("smoke: {error}");
    }
    let _ = std::io::stdout().flush();
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

/// What PID 1 does on either side.
fn prepare() -> Result<String> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let _ = fs::create_dir(target);
        let none: Option<&str> = None;
        // The kernel may have mounted /dev itself.
        let _ = mount(Some(kind), target, Some(kind), MsFlags::empty(), none);
    }
    Ok(fs::read_to_string("/proc/cmdline")?)
}

fn value<'a>(cmdline: &'a str, key: &str) -> Option<&'a str> {
    cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

// The server.

fn server(cmdline: &str) -> Result<()> {
    let mut modules: Vec<_> = fs::read_dir("/modules")?
        .flatten()
        .map(|e| e.path())
        .collect();
    modules.sort();
    for module in modules {
        const COMPRESSED: libc::c_int = 4; // MODULE_INIT_COMPRESSED_FILE
        let file = File::open(&module)?;
        // SAFETY: the descriptor is open and the parameters are an empty C string.
        let loaded = unsafe {
            libc::syscall(
                libc::SYS_finit_module,
                file.as_raw_fd(),
                c"".as_ptr(),
                COMPRESSED,
            )
        };
        if loaded != 0 {
            println!("smoke: {module:?}: {}", std::io::Error::last_os_error());
        }
    }
    let what = value(cmdline, "smoke.do").unwrap_or("poweroff");
    let cpus: u16 = value(cmdline, "smoke.cpus").unwrap_or("2").parse()?;
    let memory_mib: u32 = value(cmdline, "smoke.memory").unwrap_or("256").parse()?;
    let extra = value(cmdline, "smoke.append")
        .unwrap_or("")
        .replace('+', " ");
    let run = Run {
        vm: "vm-smoke000".parse()?,
        generation: 1,
    };
    let config = VmmConfig {
        run: run.clone(),
        model: 1,
        cpus,
        memory_mib,
    };

    let listen_fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let address = UnixAddr::new("/vmm.sock")?;
    bind(listen_fd.as_raw_fd(), &address)?;
    listen(&listen_fd, Backlog::new(8)?)?;
    let config_file = memory_file(&postcard::to_allocvec(&config)?)?;
    let memory = memory_file(&[])?;
    memory.set_len(u64::from(memory_mib) << 20)?;
    let disk = memory_file(&[])?;
    disk.set_len(64 << 20)?;
    let log = memory_file(&[])?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let kernel = File::open("/vmlinux")?;
    let initramfs = File::open("/guest.cpio")?;
    let handed: [(&str, BorrowedFd<'_>); 8] = [
        (descriptor::LISTEN, listen_fd.as_fd()),
        (descriptor::CONFIG, config_file.as_fd()),
        (descriptor::KVM, kvm.as_fd()),
        (descriptor::MEMORY, memory.as_fd()),
        (descriptor::DISK, disk.as_fd()),
        (descriptor::KERNEL, kernel.as_fd()),
        (descriptor::INITRAMFS, initramfs.as_fd()),
        (descriptor::LOG, log.as_fd()),
    ];
    let guest_cmdline = format!(
        "{} {extra} smoke.guest smoke.do={what}",
        vmm::model::CMDLINE
    );
    let start = Instant::now();
    let mut child = spawn(&handed, &guest_cmdline)?;
    let since = || start.elapsed().as_millis();

    let control = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    connect(control.as_raw_fd(), &address)?;
    channel::send(control.as_fd(), &Identify {}, &[])?;
    if let Some(packet) = channel::receive(control.as_fd())? {
        println!(
            "smoke: {:?} after {} ms",
            decode::<Identity>(&packet.frame)?,
            since()
        );
    }
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let (frames, theirs_too) = UnixStream::pair()?;
    channel::send(control.as_fd(), &AttachFrames {}, &[theirs_too.as_fd()])?;
    drop(theirs_too);
    std::thread::spawn(move || {
        if let Err(error) = respond(frames) {
            println!("smoke: frame channel: {error}");
        }
    });
    let attempt = Connect {
        ticket: 7,
        port: AGENT_PORT,
        wait_for_agent: true,
    };
    channel::send(control.as_fd(), &attempt, &[theirs.as_fd()])?;
    drop(theirs);
    if let Some(packet) = channel::receive(control.as_fd())? {
        println!(
            "smoke: {:?} after {} ms",
            decode::<Connected>(&packet.frame),
            since()
        );
        let mut stream = File::from(ours);
        for round in 0..5 {
            let asked = Instant::now();
            stream.write_all(b"echo")?;
            let mut answer = [0; 4];
            stream.read_exact(&mut answer)?;
            println!(
                "smoke: echo {round} took {} us",
                asked.elapsed().as_micros()
            );
        }
        println!("smoke: monitor memory: {}", private_memory(child.id()));
        stream.write_all(b"quit")?;
    }
    if what == "hang" {
        std::thread::sleep(Duration::from_secs(1));
        channel::send(control.as_fd(), &SwitchOff {}, &[])?;
    }
    let status = child.wait()?;
    println!("smoke: {status} after {} ms", since());
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    println!("smoke: ending {:?}", code.map(Ending::from_wire));
    let mut text = Vec::new();
    let mut log = log;
    std::io::Seek::rewind(&mut log)?;
    log.read_to_end(&mut text)?;
    println!("smoke: console log:\n{}", String::from_utf8_lossy(&text));
    Ok(())
}

/// A network of one: answers ARP, pings and datagrams for the gateway's address. As on the real
/// channel, nobody makes checksums of UDP.
fn respond(mut channel: UnixStream) -> Result<()> {
    let mut known = false;
    loop {
        let mut length = [0; 4];
        channel.read_exact(&mut length)?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        channel.read_exact(&mut frame)?;
        if !known {
            println!("smoke: first frame: {:02x?}", &frame[..frame.len().min(42)]);
            known = true;
        }
        let Some(answer) = answer(&frame) else {
            continue;
        };
        channel.write_all(&(answer.len() as u32).to_be_bytes())?;
        channel.write_all(&answer)?;
    }
}

fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    let mut answer = frame.to_vec();
    answer[..6].copy_from_slice(&frame[6..12]);
    answer[6..12].copy_from_slice(&GATEWAY_HARDWARE);
    match frame.get(12..14)? {
        // ARP: who has the gateway's address?
        [8, 6] if frame.get(38..42)? == GATEWAY => {
            answer[21] = 2;
            answer[32..42].copy_from_slice(&frame[22..32]);
            answer[22..28].copy_from_slice(&GATEWAY_HARDWARE);
            answer[28..32].copy_from_slice(&GATEWAY);
        }
        // IPv4: the header's checksum stays right when the addresses change places.
        [8, 0] if frame.get(30..34)? == GATEWAY => {
            answer[26..30].copy_from_slice(&GATEWAY);
            answer[30..34].copy_from_slice(&frame[26..30]);
            match (frame[23], frame.get(34)?) {
                (1, 8) => {
                    let sum = u16::from_be_bytes([frame[36], frame[37]]);
                    let (sum, carry) = sum.overflowing_add(0x0800);
                    answer[34] = 0;
                    answer[36..38].copy_from_slice(&(sum + u16::from(carry)).to_be_bytes());
                }
                (17, _) => {
                    answer[34..36].copy_from_slice(&frame[36..38]);
                    answer[36..38].copy_from_slice(&frame[34..36]);
                    answer[40..42].copy_from_slice(&[0xba, 0xad]);
                }
                _ => return None,
            }
        }
        _ => return None,
    }
    Some(answer)
}

fn memory_file(content: &[u8]) -> Result<File> {
    let mut file = File::from(memfd_create(c"smoke", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    Ok(file)
}

fn spawn(handed: &[(&str, BorrowedFd<'_>)], cmdline: &str) -> Result<std::process::Child> {
    let names: Vec<&str> = handed.iter().map(|(name, _)| *name).collect();
    let numbers: Vec<i32> = handed.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["vmm", cmdline])
        .env_clear()
        .env(DESCRIPTORS_VARIABLE, names.join(","))
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let move_descriptors = move || {
        // First out of the way of each other, then into place.
        let mut high = Vec::new();
        for &number in &numbers {
            // SAFETY: the parent's descriptors are open in the child until it runs the program.
            let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 100) };
            high.push(fd);
        }
        for (target, fd) in (FIRST_DESCRIPTOR..).zip(high) {
            // SAFETY: as above.
            if unsafe { libc::dup2(fd, target) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only; its one allocation is
    // harmless in a process with one thread.
    unsafe { command.pre_exec(move_descriptors) };
    Ok(command.spawn()?)
}

/// Anonymous and private memory; guest pages are shared file memory and are listed apart.
fn private_memory(pid: u32) -> String {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    rollup
        .lines()
        .chain(status.lines())
        .filter(|line| {
            [
                "Rss:",
                "Anonymous:",
                "RssAnon",
                "RssFile",
                "RssShmem",
                "Seccomp:",
                "NoNewPrivs",
            ]
            .iter()
            .any(|key| line.starts_with(key))
        })
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join(", ")
}

// The guest.

fn guest(cmdline: &str) -> Result<()> {
    println!("guest: init after {} s", uptime());
    let read = |path: &str| fs::read_to_string(path).unwrap_or_else(|error| error.to_string());
    println!(
        "guest: cpus online {}",
        read("/sys/devices/system/cpu/online").trim()
    );
    println!(
        "guest: clocksource {}",
        read("/sys/devices/system/clocksource/clocksource0/current_clocksource").trim()
    );
    let mut devices: Vec<String> = fs::read_dir("/sys/bus/virtio/devices")?
        .flatten()
        .map(|entry| {
            let driver = fs::read_link(entry.path().join("driver")).unwrap_or_default();
            let driver = driver
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            format!("{} {driver}", entry.file_name().to_string_lossy())
        })
        .collect();
    devices.sort();
    println!("guest: virtio {devices:?}");
    println!(
        "guest: disk {} sectors, rng {}, vmgenid {}, pvpanic {}",
        read("/sys/block/vda/size").trim(),
        read("/sys/class/misc/hw_random/rng_current").trim(),
        fs::exists("/sys/bus/platform/drivers/vmgenid/VMGENCTR:00")?
            || fs::exists("/sys/bus/acpi/drivers/vmgenid/VMGENCTR:00")?,
        fs::exists("/sys/bus/platform/drivers/pvpanic-mmio/QEMU0001:00")?,
    );
    if cmdline.contains("smoke.dmesg") {
        let mut log = vec![0; 1 << 18];
        const READ_ALL: libc::c_int = 3;
        // SAFETY: the buffer is as long as said.
        let length = unsafe { libc::klogctl(READ_ALL, log.as_mut_ptr().cast(), 1 << 18) };
        log.truncate(usize::try_from(length).unwrap_or(0));
        println!("{}", String::from_utf8_lossy(&log));
    }
    if let Err(error) = network() {
        println!("guest: network: {error}");
    }
    if let Err(error) = agent() {
        println!("guest: vsock: {error}");
    }
    let _ = std::io::stdout().flush();
    match value(cmdline, "smoke.do").unwrap_or_default() {
        "reboot" => {
            let _ = reboot(RebootMode::RB_AUTOBOOT);
        }
        "panic" => fs::write("/proc/sysrq-trigger", "c")?,
        "triple" => triple_fault()?,
        "hang" => std::thread::sleep(Duration::from_secs(3600)),
        _ => {}
    }
    Ok(())
}

fn uptime() -> String {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Gives eth0 its address and talks to the gateway.
fn network() -> Result<()> {
    let read = |name: &str| {
        fs::read_to_string(format!("/sys/class/net/eth0/{name}"))
            .unwrap_or_else(|error| error.to_string())
    };
    interface_up([10, 213, 0, 2])?;
    println!(
        "guest: eth0 {} mtu {} {}",
        read("address").trim(),
        read("mtu").trim(),
        read("operstate").trim()
    );
    let pinger = socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        nix::sys::socket::SockProtocol::Icmp,
    )?;
    let [a, b, c, d] = GATEWAY;
    connect(
        pinger.as_raw_fd(),
        &nix::sys::socket::SockaddrIn::new(a, b, c, d, 0),
    )?;
    let limit = nix::sys::time::TimeVal::new(10, 0);
    nix::sys::socket::setsockopt(&pinger, nix::sys::socket::sockopt::ReceiveTimeout, &limit)?;
    let mut pinger = File::from(pinger);
    for round in 0..5_u8 {
        let asked = Instant::now();
        // Type, code, checksum, identifier, number: the sum of all words is all ones.
        let sum = !(0x0800_u16 + 0x77 + u16::from(round));
        let [high, low] = sum.to_be_bytes();
        pinger.write_all(&[8, 0, high, low, 0, 0x77, 0, round])?;
        let mut bytes = [0; 100];
        let count = pinger.read(&mut bytes)?;
        println!(
            "guest: ping {round}: {:?} after {} us",
            &bytes[20..count],
            asked.elapsed().as_micros()
        );
    }
    let echo = UdpSocket::bind("10.213.0.2:0")?;
    echo.connect("10.213.0.1:7")?;
    echo.set_read_timeout(Some(Duration::from_secs(10)))?;
    for length in [1, 100, 1472, 9000, 65_492, 65_492] {
        let data: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
        let asked = Instant::now();
        echo.send(&data)?;
        let mut back = vec![0; 70_000];
        let count = echo.recv(&mut back)?;
        println!(
            "guest: {length} bytes by UDP and back: {} after {} us",
            if back[..count] == data {
                "same"
            } else {
                "DIFFERENT"
            },
            asked.elapsed().as_micros()
        );
    }
    let snmp = fs::read_to_string("/proc/net/snmp")?;
    for line in snmp.lines().filter(|line| line.starts_with("Udp:")) {
        println!("guest: {line}");
    }
    Ok(())
}

fn interface_up(address: [u8; 4]) -> Result<()> {
    let any = UdpSocket::bind("0.0.0.0:0")?;
    let ask = |request: libc::c_ulong, fill: &dyn Fn(&mut libc::ifreq)| {
        // SAFETY: all zeros is a valid request.
        let mut wanted: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in wanted.ifr_name.iter_mut().zip(*b"eth0") {
            *to = from.cast_signed();
        }
        fill(&mut wanted);
        // SAFETY: the request lives across the call.
        let done = unsafe { libc::ioctl(any.as_raw_fd(), request as _, &raw const wanted) };
        nix::errno::Errno::result(done).map(drop)
    };
    let internet = |bytes: [u8; 4]| {
        move |request: &mut libc::ifreq| {
            let mut address = request_address();
            let port = 2;
            for (to, from) in address.sa_data.iter_mut().skip(port).zip(bytes) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_addr = address;
        }
    };
    ask(libc::SIOCSIFADDR, &internet(address))?;
    ask(libc::SIOCSIFNETMASK, &internet([255, 255, 255, 0]))?;
    ask(libc::SIOCSIFFLAGS, &|request| {
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    })?;
    Ok(())
}

fn request_address() -> libc::sockaddr {
    // SAFETY: all zeros is a valid address.
    let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
    address.sa_family = libc::AF_INET as libc::sa_family_t;
    address
}

/// Listens, rings the doorbell, answers one connection until it is told to quit.
fn agent() -> Result<()> {
    let any = u32::MAX; // VMADDR_CID_ANY
    let listening = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(listening.as_raw_fd(), &VsockAddr::new(any, AGENT_PORT))?;
    listen(&listening, Backlog::new(1)?)?;
    let bell = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let rung = connect(bell.as_raw_fd(), &VsockAddr::new(HOST_CID, AGENT_PORT));
    println!("guest: rang after {} s: {rung:?}", uptime());
    let accepted = accept(listening.as_raw_fd())?;
    // SAFETY: the kernel just made it for us.
    let mut stream = File::from(unsafe { OwnedFd::from_raw_fd(accepted) });
    loop {
        let mut word = [0; 4];
        stream.read_exact(&mut word)?;
        if &word == b"quit" {
            return Ok(());
        }
        stream.write_all(&word)?;
    }
}

/// Linux can restart a machine by a triple fault: it loads an empty interrupt table and raises an
/// exception.
fn triple_fault() -> Result<()> {
    fs::write("/sys/kernel/reboot/type", "triple")?;
    reboot(RebootMode::RB_AUTOBOOT)?;
    Ok(())
}
