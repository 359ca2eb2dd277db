#!/usr/bin/env bash
# Makes a Debian 12 or 13 machine ready to build and test supvm: Debian packages, programs and Node
# packages that tests use (in the cache, not installed), the musl target, cargo-deny, cargo-fuzz; with the
# argument `bench` also to measure it. Safe to run as often as wanted: a run with nothing to do needs no
# root, touches no network and ends in well under a second. It must never change a machine in other ways
# than these.
set -euo pipefail

cargo_deny_version=0.20.2
cargo_fuzz_version=0.13.2
musl_target=x86_64-unknown-linux-musl
cache=${XDG_CACHE_HOME:-$HOME/.cache}/supvm

packages=(
    # Rust crates with C parts, static
    build-essential musl-tools pkg-config
    # guest kernel
    bc bison flex libelf-dev libssl-dev xz-utils zstd kmod cpio
    # images
    mmdebstrap debian-archive-keyring uidmap e2fsprogs xfsprogs squashfs-tools
    # downloads and tests
    ca-certificates curl iproute2 openssl pebble python3
    # what is tested through the gateway
    iperf3
    # visitors of the edge
    chromium nghttp2-client
    # disks of the emulated server (the emulator itself is an artifact of image-builder)
    qemu-utils
)
# Node may have come from elsewhere; then Debian's packages would not go with it.
if ! command -v node >/dev/null; then packages+=(nodejs); fi
if ! command -v npm >/dev/null; then packages+=(npm); fi
# What `make bench` measures the gateway beside.
if [ "${1:-}" = bench ]; then packages+=(slirp4netns passt); fi

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# shellcheck source=/dev/null
. /etc/os-release
[ "${ID:-}" = debian ] || die "this is ${PRETTY_NAME:-an unknown system}; set-up knows Debian 12 and 13 only"
case "${VERSION_ID:-}" in
12 | 13) ;;
*) die "this is Debian ${VERSION_ID:-unknown}; set-up knows Debian 12 and 13 only" ;;
esac
[ "$(uname -m)" = x86_64 ] || die "this is $(uname -m); supvm is built on x86_64 only"
command -v cargo >/dev/null || die "cargo is missing: install Rust with rustup first"
command -v rustup >/dev/null || die "rustup is missing: the musl target comes from it"

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        command -v sudo >/dev/null || die "root is needed for: $* (and sudo is missing)"
        say "root is needed, by sudo, for: $*"
        sudo "$@"
    fi
}

missing=()
mapfile -t present < <(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "${packages[@]}" 2>/dev/null |
    awk '$2 == "installed" { print $1 }')
for package in "${packages[@]}"; do
    case " ${present[*]} " in
    *" $package "*) ;;
    *) missing+=("$package") ;;
    esac
done

# Debian 12's own qemu-utils (7.2) conflicts with other parts of a newer QEMU, where one is installed
# already; its backports carry QEMU 10. The mirror is the one this machine already uses.
add_backports() {
    local list=/etc/apt/sources.list.d/supvm-backports.sources mirror
    if apt-get indextargets --format '$(RELEASE)' 'Identifier: Packages' | grep -qx bookworm-backports; then
        return
    fi
    mirror=$(apt-get indextargets --format '$(RELEASE) $(ORIGIN) $(COMPONENT) $(REPO_URI)' 'Identifier: Packages' |
        awk '$1 == "bookworm" && $2 == "Debian" && $3 == "main" { print $4; exit }')
    if [ -z "$mirror" ]; then # before the first `apt-get update` the origin is not known
        mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Identifier: Packages' |
            awk '$1 == "bookworm" && $2 == "main" { print $3; exit }')
    fi
    [ -n "$mirror" ] || die "no apt source for bookworm main found; add one, then run this again"
    say "adding bookworm-backports to apt ($list)"
    printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: %s\n' \
        "$mirror" /usr/share/keyrings/debian-archive-keyring.gpg | as_root tee "$list" >/dev/null
}

install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -qq -o Dpkg::Use-Pty=0 install \
        --no-install-recommends "$@"
}

if [ "${#missing[@]}" -gt 0 ]; then
    say "installing Debian packages: ${missing[*]}"
    plain=() qemu=()
    for package in "${missing[@]}"; do
        case "$VERSION_ID $package" in
        '12 qemu-'*) qemu+=("$package") ;;
        *) plain+=("$package") ;;
        esac
    done
    if [ "${#qemu[@]}" -gt 0 ]; then add_backports; fi
    as_root apt-get -qq update
    if [ "${#plain[@]}" -gt 0 ]; then install "${plain[@]}"; fi
    # The target release carries over to what these depend on, so they get a call of their own.
    if [ "${#qemu[@]}" -gt 0 ]; then install -t bookworm-backports "${qemu[@]}"; fi
fi

# What rust-toolchain.toml names (toolchain and target) is installed by rustup when it is missing.
sysroot=$(cd "$(dirname "$0")" && rustc --print sysroot)
if [ ! -d "$sysroot/lib/rustlib/$musl_target" ]; then
    say "adding the Rust target $musl_target"
    (cd "$(dirname "$0")" && rustup target add "$musl_target")
fi

# tool NAME VERSION: a cargo subcommand, built once and kept by version.
tool() {
    local name=$1 version=$2 home=$cache/$1-$2 staging
    if [ -x "$home/bin/$name" ]; then return; fi
    say "building $name $version into $home (a few minutes, once)"
    mkdir -p "$cache"
    staging=$(mktemp -d "$cache/.$name.XXXXXX")
    # shellcheck disable=SC2064 # the directory as it is now
    trap "rm -rf '$staging'" EXIT
    cargo install --quiet --locked --version "$version" --root "$staging" \
        --target-dir "$staging/target" "$name"
    rm -rf "$staging/target"
    chmod 755 "$staging"
    # Another run may have finished first; its result is as good as ours.
    mv -T "$staging" "$home" 2>/dev/null || [ -x "$home/bin/$name" ]
}
tool cargo-deny "$cargo_deny_version"
tool cargo-fuzz "$cargo_fuzz_version"

# program PACKAGE PATH...: a program that tests need alone, taken out of its package. Installed, nginx
# would serve at every boot, and one busybox would take the place of another.
program() {
    local package=$1 home=$cache/programs staging file
    shift
    if [ -x "$home/${1##*/}" ]; then return; fi
    say "fetching ${1##*/} into $home"
    mkdir -p "$home"
    staging=$(mktemp -d "$cache/.program.XXXXXX")
    # shellcheck disable=SC2064 # the directory as it is now
    trap "rm -rf '$staging'" EXIT
    (cd "$staging" && apt-get -qq download "$package" 2>/dev/null) ||
        (as_root apt-get -qq update && cd "$staging" && apt-get -qq download "$package")
    dpkg-deb -x "$staging/$package"_*.deb "$staging/x"
    for file in "$@"; do
        if [ -f "$staging/x/$file" ]; then mv "$staging/x/$file" "$home"; fi
    done
    [ -x "$home/${1##*/}" ] || die "Debian's package $package has none of: $*"
    rm -rf "$staging"
}
program nginx usr/sbin/nginx
program busybox-static usr/bin/busybox bin/busybox

# Node packages that stand for a visitor's or a VM's, kept by the sum of their lock file.
node_packages() {
    local from home staging
    from=$(dirname "$0")/proxy/tests/browsers/npm
    home=$cache/node-$(sha256sum <"$from/package-lock.json" | cut -c 1-16)
    if [ -d "$home/node_modules" ]; then return; fi
    say "fetching Node packages into $home"
    mkdir -p "$cache"
    staging=$(mktemp -d "$cache/.node.XXXXXX")
    # shellcheck disable=SC2064 # the directory as it is now
    trap "rm -rf '$staging'" EXIT
    cp "$from"/package*.json "$staging"
    (cd "$staging" && npm ci --silent --ignore-scripts --no-audit --no-fund)
    chmod 755 "$staging"
    # Another run may have finished first; its result is as good as ours.
    mv -T "$staging" "$home" 2>/dev/null || [ -d "$home/node_modules" ]
}
node_packages
