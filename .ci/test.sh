#!/usr/bin/env bash
# Everything that must hold, in phases; `make test` runs it. All phases are played even when one
# fails, so that one run tells all; the last line counts phases, tests and scenarios together.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
logs=$target/test-logs
mkdir -p "$logs"
passed=0 failed=0

# phase NAME COMMAND...: shows the output as it comes and keeps it for counting.
phase() {
    local name=$1 begun=$SECONDS log=$logs/$1.log code=0
    shift
    printf '== %s (at %d:%02d)\n' "$name" $((SECONDS / 60)) $((SECONDS % 60))
    "$@" 2>&1 | tee "$log" || code=$?
    local p=0 f=0
    # Lines of cargo's test harness and of qemu-test; a phase without any counts as one.
    read -r p f < <(awk '
        /^test result:/ { p += $4; f += $6; seen = 1 }
        /^[0-9]+ passed, [0-9]+ failed$/ { p += $1; f += $3; seen = 1 }
        END { if (!seen) print 0, 0; else print p, f }' "$log")
    if [ "$code" = 0 ] && [ "$f" = 0 ]; then
        if [ "$p" = 0 ]; then p=1; fi
        printf '== %s: ok, %d s\n' "$name" $((SECONDS - begun))
    else
        # A phase that broke before it could count is one failure.
        if [ "$f" = 0 ]; then f=1; fi
        printf '== %s: FAILED (code %d), %d s\n' "$name" "$code" $((SECONDS - begun))
    fi
    passed=$((passed + p)) failed=$((failed + f))
}

deny() {
    local version
    version=$(sed -n 's/^cargo_deny_version=//p' setup.sh)
    "${XDG_CACHE_HOME:-$HOME/.cache}/supvm/cargo-deny-$version/bin/cargo-deny" \
        check bans licenses sources
}

# Some tests mount, make namespaces and change users: they need root and say so.
unit_tests() {
    cargo test --workspace --no-fail-fast --no-run || return
    if [ "$(id -u)" = 0 ]; then
        cargo test --workspace --no-fail-fast
    else
        echo "root is needed, by sudo, for the tests that mount and make namespaces"
        cargo test --workspace --no-fail-fast --config 'target."cfg(unix)".runner="sudo -E"'
    fi
}

# A guest under QEMU, with parts of the images, in front of the gateway.
qemu_guest() {
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        as_root=(--config 'target."cfg(unix)".runner="sudo -E"')
    fi
    cargo test -p proxy --test qemu_guest "${as_root[@]}" -- --ignored
}

images() {
    make --no-print-directory images
}

# Nothing may be left of a run, whatever became of it.
left_over() {
    local left
    left=$(pgrep -af 'qemu-system-x86_64 -name supvm|qemu-test watch' || true)
    if [ -n "$left" ]; then
        printf 'left running:\n%s\n' "$left"
        return 1
    fi
    echo "nothing is left running"
}

phase formatting cargo fmt --all --check
phase lints cargo clippy --workspace --all-targets --quiet -- -D warnings
phase dependencies deny
phase field .ci/field.sh
phase unit-tests unit_tests
phase fuzzing .ci/fuzz.sh 45
phase images images
phase qemu-guest qemu_guest
if [ -e "$target/image/initramfs.cpio" ]; then
    phase scenarios "$target/release/qemu-test" run
else
    phase scenarios false
fi
phase left-over left_over

printf 'in %d:%02d\n' $((SECONDS / 60)) $((SECONDS % 60))
printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
