#!/bin/busybox sh
# The box's first process, in the initramfs: loads what the box needs, puts a tmpfs overlay over the
# host's file tree and hands over to /run/box/rc in it (rc.sh). A failure stops here with the reason on
# the console; the kernel then panics, qemu exits, and whoever waits for the box sees it end.
set -eu
export PATH=/bin
say() { echo "box: $*"; }
trap 'say "init failed; the last lines of the kernel log:"; busybox dmesg | busybox tail -n 15' EXIT

busybox mkdir -p /proc /sys /dev /lower /live /upper /root
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do busybox insmod "/modules/$module"; done < /modules/order

busybox mount -t virtiofs root /lower -o ro
busybox mount -t virtiofs live /live
busybox mount -t tmpfs -o mode=755,size=75% upper /upper
busybox mkdir /upper/upper /upper/work
# index and xattr-based features need a lower file system with file handles; virtiofs has none here.
busybox mount -t overlay overlay -o lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work,index=off,metacopy=off,xino=off /root

for d in proc sys dev; do busybox mkdir -p /root/$d; busybox mount -o move /$d /root/$d; done
busybox mount -t tmpfs -o mode=755 run /root/run
# The host's tree itself, writable: where shared directories are bound from.
busybox mkdir -p /root/run/box/live
busybox mount -o move /live /root/run/box/live
busybox cp /bin/busybox /rc /enter /leash /root/run/box/
busybox cp /etc/inittab /root/etc/inittab
trap - EXIT
exec busybox switch_root /root /run/box/busybox init
