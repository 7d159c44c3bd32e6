#!/bin/bash
# Runs as PID 1 of new namespaces: makes the machine's root file system, moves into it, becomes systemd.
#
#   build_root.sh STORE SYSTEMD GENERATORS TARGET [BIND...]
#
# STORE is a file system in memory that outlives this boot: what the machine writes to its disk is in
# STORE/upper, over the host's own root, which is not changed. BINDs are folders of the host that are
# there as they are, read-only.
set -euo pipefail
store=$1 systemd=$2 generators=$3 target=$4
shift 4
root=$store/root
is_new=no
[ -d "$store/upper" ] || is_new=yes
mkdir -p "$store"/{upper,work,root}
mount -t overlay -o "lowerdir=/,upperdir=$store/upper,workdir=$store/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for directory in dev run tmp; do mount -t tmpfs -o mode=755 tmpfs "$root/$directory"; done
chmod 1777 "$root/tmp"
mkdir -m 1777 "$root/dev/shm"
mkdir "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts "$root/dev/pts"
for device in null zero full random urandom tty; do
    : > "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
ln -s fd/1 "$root/dev/stdout"
ln -s fd/2 "$root/dev/stderr"
for bound in "$@"; do
    mkdir -p "$root$bound"
    mount --rbind "$bound" "$root$bound"
    mount -o remount,bind,ro "$root$bound"
done
if [ $is_new = yes ]; then
    # Nothing of the host's is started: only the journal, D-Bus for systemctl's watchers, and what
    # a boot does for packages (users and directories).
    units=$root/usr/lib/systemd/system
    rm -rf "$root"/etc/systemd/system/* "$root"/usr/local/lib/systemd "$units"/*.target.wants/*
    rm -rf "$root"/etc/sysusers.d "$root"/etc/tmpfiles.d
    mkdir -p "$units"/{sysinit,sockets}.target.wants
    for wanted in sysinit/systemd-journald.service sockets/systemd-journald.socket \
        sockets/systemd-journald-dev-log.socket sockets/dbus.socket; do
        [ ! -e "$units/${wanted#*/}" ] || ln -sf "../${wanted#*/}" "$units/${wanted%/*}.target.wants/"
    done
    ln -sf /bin/true "$units/../systemd-shutdown" # the end of PID 1 is all that a shutdown is here
fi
mkdir -p "$root/mnt"
cd "$root"
pivot_root . mnt
cd /
umount -l /mnt
mount --make-rshared / # as on a booted machine: credentials of units rely on it
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
    container=vtpm-test SYSTEMD_GENERATOR_PATH="$generators" \
    "$systemd" --system --unit="$target" --show-status=no
