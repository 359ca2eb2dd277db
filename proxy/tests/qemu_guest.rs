//! A guest of QEMU's, attached to the gateway by its own `-netdev stream`: the framing of the frame
//! channel is QEMU's, and a machine with Debian's kernel that knows nothing of us is online with it. It
//! needs what image-builder makes, the emulator among it; `make test` runs it after that.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod net;
#[allow(dead_code)]
#[path = "browsers/programs.rs"]
mod programs;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use net::{WORLD_V4, WORLD_V6, settings, world_on};
use programs::{Program, tool};
use protocol::network::Egress;
use proxy::gateway::{Checksums, Common, Stack, StackSettings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// Emulation of a whole machine, on one that may be busy.
const LIMIT: Duration = Duration::from_secs(120);

/// What the guest does: it fetches a page by each protocol and asks for its own name, and then serves
/// what it got.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
exec >/dev/console 2>&1
mount -t proc proc /proc
for module in failover net_failover virtio_net; do
    insmod /$module.ko
done
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
ip link set lo up
ip link set eth0 up
ip address add 10.213.0.2/24 dev eth0
ip -6 address add fd73:7570::2/64 dev eth0
ip route add default via 10.213.0.1
ip -6 route add default via fd73:7570::1
mkdir /www
wget -O /www/v4 http://WORLD_V4:8080/ || echo FAILED
wget -O /www/v6 http://[WORLD_V6]:8080/ || echo FAILED
nslookup supvm-1234 10.213.0.1 >/www/name || echo FAILED
ping -c 3 10.213.0.1 || echo FAILED
httpd -f -p 3000 -h /www
";

/// A page that is larger than the windows on its way.
fn page() -> Vec<u8> {
    let mut bytes = vec![0; 2 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

fn image(name: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
        PathBuf::from,
    );
    let path = target.join("image").join(name);
    assert!(
        path.exists(),
        "{} is not there: run `make images`",
        path.display()
    );
    path.canonicalize().unwrap()
}

/// The guest's first root, with nothing but a shell and its script.
fn initramfs(directory: &Path) -> PathBuf {
    let root = directory.join("root");
    for name in ["bin", "dev", "proc"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    std::fs::copy(tool("busybox"), root.join("bin/busybox")).unwrap();
    let init = INIT
        .replace("WORLD_V4", WORLD_V4)
        .replace("WORLD_V6", WORLD_V6);
    std::fs::write(root.join("init"), init).unwrap();
    // The modules lie beside the kernel in image-builder's cache.
    let modules = image("vmlinuz").with_file_name("host-modules.cpio");
    let line = "set -e
        for name in kernel/net/core/failover kernel/drivers/net/net_failover \\
            kernel/drivers/net/virtio_net; do
            cpio -i --quiet --to-stdout \"lib/modules/*/$name.ko.xz\" <\"$1\" | xz -d >${name##*/}.ko
            test -s ${name##*/}.ko
        done
        chmod 755 init
        find . | cpio -o -H newc --quiet >../initramfs.cpio";
    let made = Command::new("bash")
        .args(["-c", line, "bash", modules.to_str().unwrap()])
        .current_dir(&root)
        .status();
    assert!(made.unwrap().success());
    directory.join("initramfs.cpio")
}

/// A server that answers every request with the page.
async fn serve(address: &str) {
    let listener = TcpListener::bind((address, 8080)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let page = page();
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                page.len()
            );
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(&[head.as_bytes(), &page].concat()).await;
                let _ = stream.shutdown().await;
                // Its end of the connection is the last.
                let _ = stream.read_to_end(&mut Vec::new()).await;
            });
        }
    });
}

/// What the guest's server gives for a path.
async fn get(stack: &Stack, path: &str) -> Vec<u8> {
    let mut stream = loop {
        // It listens once it has fetched everything.
        match stack.connect(3000).await {
            Ok(stream) => break stream,
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    };
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = b"\r\n\r\n";
    let head = answer.windows(4).position(|bytes| bytes == end).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200 "), "{path} is missing");
    answer.split_off(head + end.len())
}

#[test]
#[ignore = "needs parts of the images; `make test` runs it once they are made"]
fn a_guest_of_qemu_is_online_by_its_stream_socket() {
    world_on(
        tokio::runtime::Builder::new_multi_thread(),
        LIMIT,
        || async {
            let directory = tempfile::tempdir().unwrap();
            let directory = directory.path();
            serve(WORLD_V4).await;
            serve(WORLD_V6).await;
            let listener = UnixListener::bind(directory.join("frames")).unwrap();
            let emulator = image("emulator/qemu-system-x86_64");
            let kernel = image("vmlinuz");
            let initramfs = initramfs(directory);
            let words = [
                emulator.to_str().unwrap(),
                "-M",
                "q35",
                "-accel",
                "tcg",
                "-cpu",
                "max",
                "-m",
                "256",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
                "-kernel",
                kernel.to_str().unwrap(),
                "-initrd",
                initramfs.to_str().unwrap(),
                "-append",
                "console=ttyS0 quiet panic=-1",
                "-netdev",
                "stream,id=net,server=off,addr.type=unix,addr.path=frames",
                "-device",
                "virtio-net-pci,netdev=net,romfile=",
            ];
            let command = programs::command(None, directory, &words);
            let _qemu = Program::start(command, "the guest", directory.join("console"));
            let (channel, _) = tokio::task::spawn_blocking(move || listener.accept())
                .await
                .unwrap()
                .unwrap();
            let settings = StackSettings {
                checksums: Checksums::Real,
                ..settings(Egress::default())
            };
            let stack = Stack::start(settings, channel.into(), Common::new()).unwrap();
            let page = page();
            assert!(get(&stack, "/v4").await == page);
            assert!(get(&stack, "/v6").await == page);
            let name = String::from_utf8(get(&stack, "/name").await).unwrap();
            assert!(name.contains("10.213.0.2"), "{name}");
            let console = std::fs::read_to_string(directory.join("console")).unwrap();
            assert!(!console.contains("FAILED"), "{console}");
            assert!(console.contains("3 packets received"), "{console}");
        },
    );
}
