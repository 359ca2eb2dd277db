//! The emulated server: which accelerator works here, and QEMU's command line. The machine is always
//! real nested virtualization, by hardware or by emulation; nothing here may replace it by less.

use std::ffi::OsString;
use std::path::Path;

/// Names of QEMU's files in an instance's directory, which is its working directory: so the paths
/// of its sockets are short wherever the checkout is.
pub(crate) mod file {
    /// First serial port.
    pub(crate) const CONSOLE: &str = "console.log";
    /// Second serial port.
    pub(crate) const PROBE: &str = "probe.sock";
    /// Control.
    pub(crate) const QMP: &str = "qmp.sock";
    /// The initramfs with settings and probe.
    pub(crate) const INITRAMFS: &str = "initramfs.cpio";
    /// The data disk's overlay.
    pub(crate) const DATA: &str = "data.qcow2";
    /// What QEMU and its watcher say.
    pub(crate) const LOG: &str = "qemu.log";
    /// Who runs.
    pub(crate) const PID: &str = "pid";
}

/// The API's port inside the appliance.
pub(crate) const API_PORT: u16 = 7443;

/// The edge's port inside the appliance.
const EDGE_PORT: u16 = 443;

/// Everything that TCG emulates but for what it is slow at: the kernel would clear and copy pages
/// with `rep stosb` and `rep movsb` (ERMS, FSRM), which TCG runs byte by byte, and a fifth level of
/// page tables (LA57) makes every nested translation longer.
const EMULATED_CPU: &str = "max,-erms,-fsrm,-la57";

/// How instructions of the emulated server are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// Hardware with nested virtualization.
    Kvm,
    /// Emulation, AMD's virtualization extension included.
    Tcg,
}

impl Accelerator {
    /// Hardware only where a guest of a guest truly works.
    pub(crate) fn detect() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let nested = ["kvm_intel", "kvm_amd"]
            .map(|module| read(&format!("/sys/module/{module}/parameters/nested")));
        let usable = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        Self::choose(&read("/proc/cpuinfo"), &nested, usable)
    }

    fn choose(cpuinfo: &str, nested: &[String], usable: bool) -> Self {
        let extension = cpuinfo
            .lines()
            .filter(|line| line.starts_with("flags"))
            .flat_map(str::split_whitespace)
            .any(|flag| flag == "vmx" || flag == "svm");
        let nested = nested
            .iter()
            .any(|value| matches!(value.trim(), "1" | "Y" | "y"));
        if extension && nested && usable {
            Self::Kvm
        } else {
            Self::Tcg
        }
    }

    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU],
        }
    }
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Kvm => "hardware KVM, nested",
            Self::Tcg => "emulation (TCG), nested SVM",
        })
    }
}

/// The command that boots the appliance from `image`, run in the instance's directory. This host's
/// `edge_port` leads to the VMs' public addresses.
pub(crate) fn command(accelerator: Accelerator, image: &Path, edge_port: u16) -> Vec<OsString> {
    let mut command = vec![image.join("emulator/qemu-system-x86_64").into_os_string()];
    let mut add = |arguments: &[&str]| command.extend(arguments.iter().map(OsString::from));
    add(&["-name", "supvm", "-nodefaults", "-no-user-config"]);
    add(&["-M", "q35", "-smp", "2", "-m", "3072"]);
    add(&accelerator.arguments());
    add(&["-display", "none", "-no-reboot"]);
    let chardev = |kind: &str, id: &str, path: &str| match kind {
        "file" => format!("file,id={id},path={path}"),
        _ => format!("socket,id={id},path={path},server=on,wait=off"),
    };
    add(&["-chardev", &chardev("file", "console", file::CONSOLE)]);
    add(&["-serial", "chardev:console"]);
    add(&["-chardev", &chardev("socket", "probe", file::PROBE)]);
    add(&["-serial", "chardev:probe"]);
    add(&["-chardev", &chardev("socket", "qmp", file::QMP)]);
    add(&["-mon", "chardev=qmp,mode=control"]);
    add(&[
        "-netdev",
        &format!(
            "user,id=net,hostfwd=tcp:127.0.0.1:0-:{API_PORT},\
             hostfwd=tcp:127.0.0.1:{edge_port}-:{EDGE_PORT}"
        ),
    ]);
    add(&["-device", "virtio-net-pci,netdev=net,romfile="]);
    add(&["-device", "virtio-rng-pci"]);
    // Writes go to the host's page cache; a flush of the guest's is a flush of the file.
    add(&[
        "-drive",
        &format!(
            "if=none,id=data,format=qcow2,file={},cache=writeback,discard=unmap",
            file::DATA
        ),
    ]);
    add(&["-device", "virtio-blk-pci,drive=data,serial=supvm-data"]);
    let mut system = OsString::from("if=none,id=system,format=raw,readonly=on,file=");
    system.push(escaped(&image.join("system.squashfs")));
    command.extend(["-drive".into(), system]);
    let mut add = |arguments: &[&str]| command.extend(arguments.iter().map(OsString::from));
    add(&["-device", "virtio-blk-pci,drive=system,serial=supvm-system"]);
    add(&["-initrd", file::INITRAMFS]);
    add(&["-append", "console=ttyS0,115200 loglevel=5 panic=-1"]);
    command.push("-kernel".into());
    command.push(image.join("vmlinuz").into());
    command
}

/// In QEMU's option lists a comma is written twice.
fn escaped(path: &Path) -> OsString {
    OsString::from(path.to_string_lossy().replace(',', ",,"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_is_used_only_where_nesting_works() {
        let with = "processor: 0\nflags\t\t: fpu svm sse\n";
        let without = "flags\t\t: fpu sse\nmodel name: svm\n";
        let on = ["".to_owned(), "1\n".to_owned()];
        let off = ["N\n".to_owned(), "".to_owned()];
        assert_eq!(Accelerator::choose(with, &on, true), Accelerator::Kvm);
        assert_eq!(Accelerator::choose(without, &on, true), Accelerator::Tcg);
        assert_eq!(Accelerator::choose(with, &off, true), Accelerator::Tcg);
        assert_eq!(Accelerator::choose(with, &on, false), Accelerator::Tcg);
    }

    #[test]
    fn a_comma_in_the_path_does_not_end_the_option() {
        let command = command(Accelerator::Tcg, Path::new("/a,b"), 8443);
        let text = "if=none,id=system,format=raw,readonly=on,file=/a,,b/system.squashfs";
        assert!(command.contains(&text.into()));
    }
}
