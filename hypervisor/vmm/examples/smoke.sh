#!/usr/bin/env bash
# Runs examples/smoke.rs in an emulated server. Needs a guest kernel (vmlinux), a host kernel and
# its modules unpacked, and the emulator that `make images` leaves; says what it needs when a variable is
# missing. Leaves nothing running.
set -euo pipefail
cd "$(dirname "$0")/../../.."

what=${1:-poweroff}
: "${GUEST_VMLINUX:?path of the guest kernel (ELF vmlinux)}"
: "${HOST_KERNEL:?path of the host kernel (bzImage)}"
: "${HOST_MODULES:?directory lib/modules/VERSION of that kernel}"
profile=${PROFILE:-release}

target=x86_64-unknown-linux-musl
cargo build -q -p vmm --example smoke --target "$target" --profile "$profile"
directory=$profile
[ "$profile" = dev ] && directory=debug
binary=target/$target/$directory/examples/smoke

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/guest" "$work/server/modules" "$work/server/dev"
cp "$binary" "$work/guest/init"
strip "$work/guest/init"
mkdir "$work/guest/dev"
pack() { (cd "$1" && find . | cpio -o -H newc --quiet --owner=0:0); }
pack "$work/guest" >"$work/server/guest.cpio"
cp "$work/guest/init" "$work/server/init"
cp "$GUEST_VMLINUX" "$work/server/vmlinux"
number=10
for module in virt/lib/irqbypass drivers/crypto/ccp/ccp arch/x86/kvm/kvm arch/x86/kvm/kvm-amd; do
    for file in "$HOST_MODULES/kernel/$module".ko*; do
        cp "$file" "$work/server/modules/$number-$(basename "$file")"
    done
    number=$((number + 1))
done
pack "$work/server" >"$work/server.cpio"
timeout "${DEADLINE:-120}" target/image/emulator/qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m 3072 \
    -nographic -no-reboot -nic none -kernel "$HOST_KERNEL" -initrd "$work/server.cpio" \
    -append "console=ttyS0 quiet smoke.do=$what ${APPEND:-}" </dev/null
