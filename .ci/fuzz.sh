#!/usr/bin/env bash
# Fuzzes every target for a while: fuzz.sh SECONDS, which are shared out evenly. It begins with what is
# in fuzz/corpus, where there is something for a target; what is found is kept in the cache, outside the
# checkout. Uses an installed nightly, else this project's own compiler
# with RUSTC_BOOTSTRAP. Without cargo-fuzz or a compiler it fails; it never skips.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:?usage: fuzz.sh SECONDS}
version=$(sed -n 's/^cargo_fuzz_version=//p' setup.sh)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/supvm
tool=$cache/cargo-fuzz-$version/bin/cargo-fuzz
[ -x "$tool" ] || { echo "fuzz: $tool is missing; run \`make setup\`" >&2; exit 1; }

# A message that no target reads would never be found missing.
mapfile -t messages < <(awk '/^messages! \{|::messages! \{/ { on = 1 }
    on { line = $0; while (match(line, /=> [A-Za-z0-9]+,/)) {
        print substr(line, RSTART + 3, RLENGTH - 4); line = substr(line, RSTART + RLENGTH) } }
    on && /\}/ { on = 0 }' protocol/src/*.rs protocol/src/*/*.rs)
[ "${#messages[@]}" -gt 50 ] || { echo "fuzz: the messages of protocol/ were not found" >&2; exit 1; }
missing=0
for type in "${messages[@]}"; do
    grep -q "::$type,$" fuzz/fuzz_targets/messages.rs || {
        echo "fuzz: message $type is not in fuzz/fuzz_targets/messages.rs" >&2
        missing=1
    }
done
[ "$missing" = 0 ]

host=$(rustc -vV | sed -n 's/^host: //p')
if rustup toolchain list | grep -q '^nightly'; then
    export RUSTUP_TOOLCHAIN=nightly
else
    export RUSTC_BOOTSTRAP=1
fi
# cargo-fuzz is found as a subcommand; the corpus and the build stay out of the checkout.
export PATH=$(dirname "$tool"):$PATH
target=$(cargo metadata --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/fuzz
# What targets leave behind when they are ended goes with this.
TMPDIR=$(mktemp -d /dev/shm/supvm-fuzz.XXXXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
mapfile -t targets < <(cargo fuzz list)
each=$((seconds / ${#targets[@]}))
[ "$each" -gt 0 ] || each=1
cargo fuzz build --target "$host" --target-dir "$target"
# As cargo-fuzz starts them, without asking cargo again for each.
export ASAN_OPTIONS=detect_odr_violation=0
for name in "${targets[@]}"; do
    corpus=$cache/fuzz-corpus/$name
    finds=$cache/fuzz-finds/$name
    mkdir -p "$corpus" "$finds"
    # Before all else, and every time: what was once worth keeping.
    own=()
    if [ -d "fuzz/corpus/$name" ]; then
        own=("fuzz/corpus/$name")
        "$target/$host/release/$name" -runs=0 -rss_limit_mb=1024 -timeout=10 "${own[@]}" \
            >"$target/$name.log" 2>&1 || { tail -40 "$target/$name.log"; exit 1; }
    fi
    echo "fuzz: $name for $each s"
    "$target/$host/release/$name" "$corpus" "${own[@]}" \
        -max_total_time="$each" -rss_limit_mb=1024 -timeout=10 -max_len=70000 -print_final_stats=1 -artifact_prefix="$finds/" \
        >"$target/$name.log" 2>&1 || { tail -40 "$target/$name.log"; exit 1; }
    sed -n 's/^stat::number_of_executed_units: */fuzz: inputs: /p' "$target/$name.log"
done
echo "fuzz: ${#targets[@]} targets, nothing found"
