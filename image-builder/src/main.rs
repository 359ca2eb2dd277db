//! Makes everything the appliance boots from: guest kernel, guest root, host kernel, the two first
//! roots and the two disks. It packs what the other rooms build and imports none of them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod all;
mod archive;
mod cache;
mod debian;
mod files;
mod kconfig;
mod progress;
mod recipes;
mod tool;

use recipes::{
    Kitchen, RecipeError, disks, emulator, guest_kernel, guest_root, host_kernel, initramfs, peer,
};

/// Makes the images of a supvm appliance. Slow parts are kept in the user's cache directory, under
/// a hash of their inputs; the path of what was asked for goes to standard output.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// The guest kernel, from Debian's source and guest-kernel.config
    GuestKernel,
    /// The guest root: Debian 13 as an ext4 image with its template.toml
    GuestRoot,
    /// Debian's kernel for the host, its modules and firmware
    HostKernel,
    /// The read-only system disk with the templates, compressed
    SystemDisk,
    /// The XFS data disk with the templates imported, as qcow2
    DataDisk,
    /// The emulator of the tests: Debian's newest QEMU, unpacked
    Emulator,
    /// The same QEMU as an archive, to run beside supvm in a benchmark
    PeerQemu,
    /// The guest's first root
    GuestInitramfs {
        /// The guest-init program
        #[arg(long)]
        guest_init: PathBuf,
        /// The archive to write
        #[arg(long)]
        out: PathBuf,
    },
    /// The host's first root: the whole appliance
    HostInitramfs {
        /// The supvm program
        #[arg(long)]
        supvm: PathBuf,
        /// The guest's first root
        #[arg(long)]
        guest_initramfs: PathBuf,
        /// The archive to write
        #[arg(long)]
        out: PathBuf,
    },
    /// Everything, into one directory (large parts as links into the cache)
    All {
        /// The supvm program
        #[arg(long)]
        supvm: PathBuf,
        /// The guest-init program
        #[arg(long)]
        guest_init: PathBuf,
        /// The directory to fill
        #[arg(long, default_value = "target/image")]
        out: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().part) {
        Ok(path) => {
            println!("{}", path.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("image-builder: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(part: Part) -> Result<PathBuf, RecipeError> {
    let kitchen = Kitchen::of_user()?;
    match part {
        Part::GuestKernel => guest_kernel::make(&kitchen),
        Part::GuestRoot => guest_root::make(&kitchen).map(|root| root.directory),
        Part::HostKernel => host_kernel::make(&kitchen),
        Part::SystemDisk => disks::system(&kitchen),
        Part::DataDisk => disks::data(&kitchen),
        Part::Emulator => emulator::make(&kitchen),
        Part::PeerQemu => peer::make(&kitchen),
        Part::GuestInitramfs { guest_init, out } => {
            initramfs::guest(&guest_init, &out)?;
            Ok(out)
        }
        Part::HostInitramfs {
            supvm,
            guest_initramfs,
            out,
        } => {
            let parts = initramfs::Host {
                supvm: &supvm,
                guest_vmlinux: &guest_kernel::make(&kitchen)?.join("vmlinux"),
                guest_initramfs: &guest_initramfs,
                modules: &host_kernel::make(&kitchen)?.join("host-modules.cpio"),
            };
            initramfs::host(&parts, &out)?;
            Ok(out)
        }
        Part::All {
            supvm,
            guest_init,
            out,
        } => {
            all::make(&kitchen, &supvm, &guest_init, &out)?;
            Ok(absolute(out))
        }
    }
}

fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

/// Fails early when a program that is to be packed is not there.
fn exists(path: &Path) -> Result<(), files::FileError> {
    use files::AtPath as _;
    std::fs::metadata(path).map(drop).at("find", path)
}
