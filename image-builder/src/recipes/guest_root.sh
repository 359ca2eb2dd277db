# Turns the tar of the guest root into its ext4 image. Runs as root or as root of a user namespace
# (never on the machine's own files): $1 = tar, $2 = empty work directory, $3 = image to write.
# UUID and HASH_SEED identify the file system; SOURCE_DATE_EPOCH dates everything.
set -eu
tar=$1 work=$2 image=$3
root=$work/root
trap 'rm -rf "$work"' EXIT
mkdir -p "$root"
tar -C "$root" --numeric-owner --xattrs --xattrs-include='*' -xpf "$tar"

# Nothing of the machine that built it: no names, no resolvers, no logs, no lists.
mkdir -p "$root/dev" "$root/proc" "$root/sys" "$root/run" "$root/tmp"
mkdir -p -m 755 "$root/workspace"
printf 'localhost\n' >"$root/etc/hostname"
cat >"$root/etc/hosts" <<'HOSTS'
127.0.0.1 localhost
::1 localhost ip6-localhost ip6-loopback
ff02::1 ip6-allnodes
ff02::2 ip6-allrouters
HOSTS
rm -f "$root/etc/resolv.conf"
printf 'nameserver 10.213.0.1\n' >"$root/etc/resolv.conf"
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"
printf 'LANG=C.UTF-8\n' >"$root/etc/default/locale"
chmod 644 "$root/etc/hostname" "$root/etc/hosts" "$root/etc/resolv.conf" \
    "$root/etc/machine-id" "$root/etc/default/locale"
find "$root/var/log" -type f -delete
find "$root/run" "$root/tmp" "$root/var/tmp" -mindepth 1 -delete
find "$root/var/lib/apt/lists" "$root/var/cache/apt" -type f -delete
rm -rf "$root/var/cache/ldconfig/aux-cache" "$root/var/cache/debconf/"*-old "$root/var/lib/dpkg/"*-old

# What was written here is dated like the rest.
find "$root" -newermt "@$SOURCE_DATE_EPOCH" -print0 | xargs -0r touch -hd "@$SOURCE_DATE_EPOCH"

# As large as a VM's disk is by default: growing a mounted file system costs seconds of a VM's start,
# holes cost nothing. A VM with a larger disk grows it when it first starts.
used=$(du -s -B1 "$root" | cut -f1)
inodes=$(find "$root" | wc -l)
bytes=$((used + used / 12 + inodes * 256 + (128 << 20)))
bytes=$(((bytes + (64 << 20) - 1) / (64 << 20) * (64 << 20)))
if [ "$bytes" -lt $((10 << 30)) ]; then bytes=$((10 << 30)); fi
truncate -s "$bytes" "$image"
# resize: tables reserved so that the mounted file system can grow to 4 TiB.
# assume_storage_prezeroed: the file is new, so the guest need not zero inode tables later.
E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mke2fs -q -F -t ext4 -b 4096 -I 256 -i 16384 -m 1 \
    -O '^orphan_file,^metadata_csum_seed' -J size=64 -L supvm-root -U "$UUID" \
    -E "hash_seed=$HASH_SEED,resize=1073741824,root_owner=0:0,assume_storage_prezeroed=1" \
    -d "$root" "$image"
e2fsck -fn "$image"
