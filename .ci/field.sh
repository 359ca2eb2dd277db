#!/usr/bin/env bash
# Checks docs/field.md: every line names tests that exist, or what it waits for. Prints what is wrong
# and fails; prints a count when all is well. Takes another file as an argument, for trying it out.
set -euo pipefail
cd "$(dirname "$0")/.."
page=${1:-docs/field.md}

# From the page: "line ID", "test ID FILE FUNCTION" and "waits ID", one a row. What follows a line
# without being one of both is its wording.
rows=$(awk '
    /^- \*\*[A-Z]+[0-9]+\*\* / { id = $2; gsub(/\*/, "", id); print "line", id; next }
    /^#/ { id = "" }
    id != "" && /^  waits for: ./ { print "waits", id; next }
    id != "" && /^  `[^`]+::[^`]+`$/ {
        name = $1; gsub(/`/, "", name)
        split(name, part, "::"); print "test", id, part[1], part[2]
        next
    }
    id != "" && /^  `/ { print "odd", id }' "$page")

wrong=0 lines=0 tests=0 waiting=0
complain() { printf '%s: %s\n' "$page" "$*"; wrong=$((wrong + 1)); }

declare -A kept last
while read -r what id file function; do
    case $what in
    line)
        lines=$((lines + 1))
        section=${id%%[0-9]*} number=${id#"${id%%[0-9]*}"}
        [ "$number" = $((${last[$section]:-0} + 1)) ] || complain "$id does not follow ${section}${last[$section]:-0}"
        last[$section]=$number
        ;;
    odd) complain "$id has a line that begins as the name of a test and goes on otherwise" ;;
    waits) waiting=$((waiting + 1)) kept[$id]=yes ;;
    test)
        tests=$((tests + 1)) kept[$id]=yes
        # A test stands right below an attribute that makes it one; a scenario is in the list of all;
        # a property stands in a proptest block, where the attribute is the same.
        if [ ! -f "$file" ]; then
            complain "$id names $file, which does not exist"
        elif [[ $file == qemu-test/src/scenarios/* ]]; then
            grep -q "$(basename "$file" .rs)::$function," qemu-test/src/scenarios/mod.rs ||
                complain "$id names $function, which is no scenario"
        elif ! grep -A3 -E '#\[(tokio::)?test' "$file" | grep -E "fn $function\(" >/dev/null; then
            complain "$id names $function, which is no test in $file"
        fi
        ;;
    esac
done <<<"$rows"

while read -r what id _; do
    if [ "$what" = line ] && [ -z "${kept[$id]:-}" ]; then
        complain "$id has neither a test nor what it waits for"
    fi
done <<<"$rows"

[ "$lines" -gt 0 ] || complain "no line was found"
if [ "$wrong" -gt 0 ]; then
    printf '%d things are wrong\n' "$wrong"
    exit 1
fi
printf '%d lines: %d tests exist, %d lines wait\n' "$lines" "$tests" "$waiting"
