//! However much goes through, memory stays bounded. Alone in its program, because it looks at all
//! of the program's memory, which is the proxy's, too.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use client::file::FileWrite;
use client::{Command, Output};
use common::real::{Machine, soon};
use tokio::io::AsyncReadExt;

const LENGTH: u64 = 200 << 20;

fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.unwrap().split_ascii_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() >> 10
}

#[tokio::test]
async fn large_files_and_outputs_are_never_held() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let before = peak_mib();
    let source = tokio::io::repeat(7).take(LENGTH);
    let to = FileWrite::new("large").size(LENGTH);
    assert_eq!(soon(vm.upload(to, source)).await.unwrap().size, LENGTH);
    let mut file = vm.download("large").await.unwrap();
    let mut nowhere = tokio::io::sink();
    let copied = soon(tokio::io::copy(&mut file, &mut nowhere))
        .await
        .unwrap();
    assert_eq!(copied, LENGTH);
    let mut run = vm.exec(Command::argv(["cat", "large"])).await.unwrap();
    let mut said = 0;
    while let Some(output) = soon(run.next()).await.unwrap() {
        if let Output::Stdout(bytes) = output {
            said += bytes.len() as u64;
        }
    }
    assert_eq!(said, LENGTH);
    let archive = vm.pack("large").await.unwrap();
    let unpacked = soon(vm.unpack("copy", archive)).await.unwrap();
    assert_eq!(unpacked.bytes, LENGTH);
    let more = peak_mib() - before;
    assert!(more < 32, "{more} MiB");
}
