"""What containers, databases and browsers ask of a kernel, asked without their programs: each check
does the thing itself and looks at what came of it. Prints a line for each; ends with 1 if one failed.
Needs root, and to be run in namespaces of its own (unshare --net --mount --ipc)."""

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import subprocess
import tempfile
import threading

libc = ctypes.CDLL(None, use_errno=True)


def call(number, *arguments):
    """A system call of x86-64; arguments are numbers or buffers."""
    given = [
        ctypes.c_long(one) if isinstance(one, int) else one for one in arguments
    ]
    libc.syscall.restype = ctypes.c_long
    answer = libc.syscall(ctypes.c_long(number), *given)
    if answer < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"system call {number}: {os.strerror(errno)}")
    return answer


def run(line):
    subprocess.run(["sh", "-ec", line], check=True)


# --- nf_tables, as iptables-nft speaks to it --------------------------------------------------------

NFT, COMPAT = 10, 11
TABLE, CHAIN, RULE = 0, 3, 6
REQUEST, ACK, CREATE, APPEND = 1, 4, 0x400, 0x800
IPV4 = 2


def attribute(kind, content):
    if isinstance(content, str):
        content = content.encode() + b"\0"
    elif isinstance(content, int):
        content = struct.pack(">I", content)
    elif isinstance(content, list):
        kind, content = kind | 0x8000, b"".join(content)
    length = 4 + len(content)
    return struct.pack("=HH", length, kind) + content + b"\0" * (-length % 4)


def message(subsystem, kind, flags, number, body, family=IPV4, resource=0):
    body = struct.pack(">BBH", family, 0, resource) + body
    return struct.pack("=IHHII", 16 + len(body), subsystem << 8 | kind, flags, number, 0) + body


def netfilter(*messages):
    """Sends messages as one batch, or one alone, and gives the errors of all that were to be
    acknowledged."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as peer:
        peer.settimeout(20)
        peer.sendto(b"".join(messages), (0, 0))
        wanted, errors = sum(struct.unpack_from("=H", one, 6)[0] & ACK != 0 for one in messages), []
        while len(errors) < wanted:
            answer = peer.recv(1 << 16)
            while answer:
                length, kind = struct.unpack_from("=IH", answer)
                if kind == 2:
                    errors.append(-struct.unpack_from("=i", answer, 16)[0])
                answer = answer[(length + 3) & ~3 :]
        return errors


def commit(*made):
    begin = struct.pack("=IHHII", 20, 16, REQUEST, 0, 0) + struct.pack(">BBH", 0, 0, NFT)
    end = struct.pack("=IHHII", 20, 17, REQUEST, 99, 0) + struct.pack(">BBH", 0, 0, NFT)
    errors = netfilter(begin, *made, end)
    assert not any(errors), [os.strerror(one) for one in errors]


def expression(name, *attributes):
    return attribute(1, [attribute(1, name), attribute(2, list(attributes))])


def compare(value, unequal=0):
    return expression(
        "cmp", attribute(1, 1), attribute(2, unequal), attribute(3, [attribute(1, value)])
    )


def nat_with_connection_tracking():
    """A connection to port 80 is led to another one, as a published port of a container is."""
    flags = REQUEST | ACK | CREATE
    table, chain = attribute(1, "nat"), attribute(1, "nat")
    hook = attribute(4, [attribute(1, 3), attribute(2, struct.pack(">i", -100))])
    chain += attribute(3, "output") + hook + attribute(7, "nat")
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    to_port_80 = [
        expression("meta", attribute(1, 1), attribute(2, 16)),
        compare(b"\6"),
        expression("payload", attribute(1, 1), attribute(2, 2), attribute(3, 2), attribute(4, 2)),
        compare(struct.pack(">H", 80)),
        # ct state new
        expression("ct", attribute(1, 1), attribute(2, 0)),
        expression(
            "bitwise",
            attribute(1, 1),
            attribute(2, 1),
            attribute(3, 4),
            attribute(4, [attribute(1, struct.pack("=I", 8))]),
            attribute(5, [attribute(1, b"\0\0\0\0")]),
        ),
        compare(struct.pack("=I", 8)),
        expression("immediate", attribute(1, 1), attribute(2, [attribute(1, struct.pack(">H", port))])),
        expression("redir", attribute(1, 1)),
    ]
    # Behind NAT on the way out, as a container's network is, but not on loopback.
    behind_nat = [
        expression("meta", attribute(1, 1), attribute(2, 5)),
        compare(struct.pack("=I", 1), 1),
        expression("masq"),
    ]
    post = attribute(1, "nat") + attribute(3, "post")
    post += attribute(4, [attribute(1, 4), attribute(2, struct.pack(">i", 100))]) + attribute(7, "nat")
    rule = lambda name, body: attribute(1, "nat") + attribute(2, name) + attribute(4, body)
    commit(
        message(NFT, TABLE, flags, 1, table),
        message(NFT, CHAIN, flags, 2, chain),
        message(NFT, CHAIN, flags, 3, post),
        message(NFT, RULE, flags | APPEND, 4, rule("output", to_port_80)),
        message(NFT, RULE, flags | APPEND, 5, rule("post", behind_nat)),
    )
    client = socket.create_connection(("127.0.0.1", 80), 20)
    served, _ = server.accept()
    served.sendall(b"led here")
    assert client.recv(100) == b"led here"
    with open("/proc/sys/net/netfilter/nf_conntrack_count") as count:
        assert int(count.read()) > 0, "nothing is tracked"


def what_iptables_asks_for():
    """iptables-nft asks the kernel for each of its own matches and targets by name."""
    names = [
        ("conntrack", 3, 0),
        ("addrtype", 1, 0),
        ("comment", 0, 0),
        ("multiport", 1, 0),
        ("MASQUERADE", 0, 1),
        ("DNAT", 2, 1),
    ]
    for name, revision, target in names:
        body = attribute(1, name) + attribute(2, revision) + attribute(3, target)
        errors = netfilter(message(COMPAT, 0, REQUEST | ACK, 1, body))
        assert errors == [0], f"{name}: {os.strerror(errors[0])}"


# --- Networks, file systems ----------------------------------------------------------------------


def two_namespaces_on_a_bridge():
    """Nobody listens over there, and the kernel over there says so."""
    other = subprocess.Popen(["unshare", "--net", "sleep", "600"])
    try:
        apart = f"test $(readlink /proc/{other.pid}/ns/net) != $(readlink /proc/self/ns/net)"
        run(
            f"until {apart}; do sleep 0.1; done; "
            "ip link add br0 type bridge; ip addr add 10.9.0.1/24 dev br0; ip link set br0 up; "
            f"ip link add out type veth peer name in netns {other.pid}; "
            "ip link set out master br0 up; "
            f"nsenter -t {other.pid} -n sh -ec 'ip addr add 10.9.0.2/24 dev in; ip link set in up'"
        )
        try:
            socket.create_connection(("10.9.0.2", 9), 30)
            raise AssertionError("somebody listens")
        except ConnectionRefusedError:
            pass
    finally:
        other.kill()
        other.wait()


def a_tun_device():
    with open("/dev/net/tun", "r+b", buffering=0) as tun:
        request = struct.pack("16sH22x", b"tun9", 0x1001)  # IFF_TUN | IFF_NO_PI
        fcntl.ioctl(tun, 0x400454CA, request)
        run("ip addr add 10.8.0.1/24 dev tun9; ip link set tun9 up")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.sendto(b"through the tunnel", ("10.8.0.2", 9))
        while True:
            packet = os.read(tun.fileno(), 2000)
            if packet[0] >> 4 == 4 and packet.endswith(b"through the tunnel"):
                return


def an_overlay():
    with tempfile.TemporaryDirectory() as place:
        # An overlay on an overlay is refused; a disk or memory below is not.
        run(
            f"cd {place}; mount -t tmpfs none .; cd {place}; mkdir low up work all; echo old > low/file; "
            "mount -t overlay overlay -o lowerdir=low,upperdir=up,workdir=work all; "
            "echo new > all/file; test $(cat low/file) = old; test $(cat up/file) = new; "
            f"umount all; cd /; umount {place}"
        )


# --- Databases and browsers ------------------------------------------------------------------------


def io_uring():
    parameters = ctypes.create_string_buffer(120)
    ring = call(425, 4, parameters)
    numbers = struct.unpack_from("=10I", parameters.raw)
    features = numbers[5]
    assert features & 1, "the rings cannot be mapped at once"
    queue = struct.unpack_from("=10I", parameters.raw, 40)
    done = struct.unpack_from("=10I", parameters.raw, 80)
    size = max(queue[6] + 4 * numbers[0], done[5] + 16 * numbers[1])
    rings = mmap.mmap(ring, size, offset=0)
    entries = mmap.mmap(ring, 64 * numbers[0], offset=0x10000000)
    # One NOP with a mark of ours.
    entries[0:64] = struct.pack("=BBHiQQIIQ", 0, 0, 0, -1, 0, 0, 0, 0, 4711).ljust(64, b"\0")
    rings[queue[6] : queue[6] + 4] = struct.pack("=I", 0)
    rings[queue[1] : queue[1] + 4] = struct.pack("=I", 1)
    assert call(426, ring, 1, 1, 1, 0, 0) == 1
    mark, result = struct.unpack_from("=Qi", rings, done[5])
    assert (mark, result) == (4711, 0), (mark, result)
    os.close(ring)


def a_bpf_map():
    def bpf(command, content):
        content = ctypes.create_string_buffer(content.ljust(128, b"\0"), 128)
        return call(321, command, content, 128)

    table = bpf(0, struct.pack("=IIIII", 1, 4, 8, 16, 0))
    key = ctypes.create_string_buffer(struct.pack("=I", 7), 4)
    value = ctypes.create_string_buffer(struct.pack("=Q", 4711), 8)
    found = ctypes.create_string_buffer(8)
    where = ctypes.addressof
    bpf(2, struct.pack("=I4xQQQ", table, where(key), where(value), 0))
    bpf(1, struct.pack("=I4xQQQ", table, where(key), where(found), 0))
    assert struct.unpack("=Q", found.raw) == (4711,)
    os.close(table)


def a_seccomp_filter():
    """A browser's renderer: what the filter does not let through is refused."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # Loads the number; getppid is refused with EPERM, the rest goes through.
            steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 110), (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)]
            program = b"".join(struct.pack("=HBBI", *step) for step in steps)
            program = ctypes.create_string_buffer(program, len(program))
            filter = struct.pack("=H6xQ", len(steps), ctypes.addressof(program))
            filter = ctypes.create_string_buffer(filter, len(filter))
            assert libc.prctl(38, 1, 0, 0, 0) == 0
            call(317, 1, 0, filter)
            try:
                call(110)
            except OSError as error:
                code = 0 if error.errno == 1 else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def direct_and_asynchronous_input_and_output():
    directory = "/var/tmp"
    file = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    page = mmap.mmap(-1, 4096)
    page.write(b"d" * 4096)
    os.posix_fallocate(file, 0, 1 << 20)
    assert os.pwrite(file, page, 4096) == 4096
    os.fdatasync(file)
    context = ctypes.c_ulong(0)
    call(206, 8, ctypes.byref(context))
    where = ctypes.addressof(ctypes.c_char.from_buffer(page))
    control = ctypes.create_string_buffer(
        struct.pack("=QIIHhIQQqQII", 4711, 0, 0, 0, 0, file, where, 4096, 4096, 0, 0, 0), 64
    )
    page[:4] = b"\0\0\0\0"
    controls = (ctypes.c_void_p * 1)(ctypes.addressof(control))
    assert call(209, context.value, 1, controls) == 1
    events = ctypes.create_string_buffer(32)
    assert call(208, context.value, 1, 1, events, 0) == 1
    assert struct.unpack_from("=QQq", events.raw)[2] == 4096 and page[:4] == b"dddd"
    call(207, context.value)


def shared_memory_and_locks():
    identifier = libc.shmget(0, 1 << 20, 0o1600)
    assert identifier >= 0, "no System V shared memory"
    libc.shmat.restype = ctypes.c_void_p
    place = libc.shmat(identifier, None, 0)
    assert place not in (None, ctypes.c_void_p(-1).value)
    ctypes.memset(place, 7, 1 << 20)
    libc.shmctl(identifier, 0, None)
    memory = os.memfd_create("renderer", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 4096)
    fcntl.fcntl(memory, 1033, 2)  # F_ADD_SEALS, F_SEAL_SHRINK
    try:
        os.ftruncate(memory, 0)
        raise AssertionError("a seal did not hold")
    except PermissionError:
        pass


def one(check):
    try:
        check()
    except Exception as error:  # whatever it was: the next check is played as well
        print(f"FAILED {check.__name__}: {type(error).__name__}: {error}", flush=True)
        return False
    print(f"ok {check.__name__}", flush=True)
    return True


def main():
    run("ip link set lo up")
    checks = [
        nat_with_connection_tracking,
        what_iptables_asks_for,
        two_namespaces_on_a_bridge,
        a_tun_device,
        an_overlay,
        io_uring,
        a_bpf_map,
        a_seccomp_filter,
        direct_and_asynchronous_input_and_output,
        shared_memory_and_locks,
    ]
    # None may hang the whole.
    watchdog = threading.Timer(120, lambda: os._exit(2))
    watchdog.daemon = True
    watchdog.start()
    failed = [check for check in checks if not one(check)]
    os._exit(1 if failed else 0)


main()
