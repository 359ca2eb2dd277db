//! The kernel's settings of the appliance, each with its reason.

use std::fs;

/// Below /proc/sys.
const SETTINGS: &[(&str, &str)] = &[
    // A host whose kernel is broken comes back by itself.
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    // Nobody but root learns where the kernel lies or what it logs.
    ("kernel/kptr_restrict", "2"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/unprivileged_bpf_disabled", "1"),
    // Ctrl-Alt-Del is a signal to init, not a reset.
    ("kernel/ctrl-alt-del", "0"),
    // Guest memory is sparse by nature: it is refused by control's account, not by guess.
    ("vm/overcommit_memory", "1"),
    // The host forwards nothing: proxy does, in user space.
    ("net/ipv4/ip_forward", "0"),
    ("net/core/somaxconn", "4096"),
    // Proxy's group may send ICMP echo requests, and nothing else raw.
    ("net/ipv4/ping_group_range", "190001 190001"),
];

/// Lets monitors have guest memory, which is a memory file, in pages of 2 MiB: fewer faults while a
/// guest boots, shorter walks of its page tables ever after. Nobody else has them unasked: a heap that
/// holds little would take much.
const LARGE_PAGES: [(&str, &str); 2] = [
    (
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "advise",
    ),
    ("/sys/kernel/mm/transparent_hugepage/enabled", "madvise"),
];

/// Sets them. What this kernel does not have is told and done without.
pub(super) fn apply() {
    for (name, value) in SETTINGS {
        set(&format!("/proc/sys/{name}"), value);
    }
    for (path, value) in LARGE_PAGES {
        set(path, value);
    }
}

fn set(path: &str, value: &str) {
    if let Err(error) = fs::write(path, value) {
        tracing::warn!(path, value, %error, "kernel setting not made");
    }
}
