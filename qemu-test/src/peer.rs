//! The benchmark's peer: QEMU's microvm machine inside the same appliance, with the same guest
//! kernel and the same root disk, timed from its start to the first line a program in the guest
//! prints. It is measured, never judged.

use std::time::Duration;

use crate::probe::{Probe, ProbeError};

/// What the guest's first program prints.
const SIGN: &str = "peer-is-up";

const PATIENCE: Duration = Duration::from_secs(180);

/// The command line of the machine: two CPUs and 1 GiB like a default VM, a disk that keeps nothing.
fn machine() -> String {
    let disk =
        "file=$(ls -d /data/templates/debian@*)/disk.img,format=raw,if=none,id=root,snapshot=on";
    let append = format!(
        "console=ttyS0 quiet root=/dev/vda rw init=/bin/sh -- -c \\\"echo {SIGN}; exec sleep 600\\\""
    );
    [
        "TMPDIR=/run qemu-system-x86_64 -M microvm,acpi=on,pit=off,pic=off -accel kvm -cpu host -smp 2 -m 1024",
        "-nodefaults -no-user-config -display none -no-reboot -serial file:/run/peer.log",
        "-kernel /usr/lib/supvm/guest/vmlinux",
        &format!("-append \"{append}\""),
        &format!("-drive {disk} -device virtio-blk-device,drive=root"),
    ]
    .join(" ")
}

/// Starts it, waits for the sign, ends it; gives the time between.
pub(crate) async fn first_output(probe: &mut Probe) -> Result<Duration, ProbeError> {
    let line = format!(
        "rm -f /run/peer.log; begin=$(cut -d' ' -f1 /proc/uptime); {} 2>/run/peer.err & p=$!; \
         until grep -q {SIGN} /run/peer.log 2>/dev/null || ! kill -0 $p 2>/dev/null; do sleep 0.02; done; \
         end=$(cut -d' ' -f1 /proc/uptime); kill $p; wait $p; \
         grep -q {SIGN} /run/peer.log || {{ cat /run/peer.err /run/peer.log; false; }} && echo \"$end $begin\" | awk '{{print $1 - $2}}'",
        machine()
    );
    let outcome = probe.outcome(&line, PATIENCE).await?;
    let last = outcome.text.lines().last().unwrap_or_default();
    match last.trim().parse() {
        Ok(seconds) if outcome.code == 0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(ProbeError::Failed {
            command: line,
            code: outcome.code,
            output: outcome.text,
        }),
    }
}
