#!/bin/sh
# The test guest's first process, in the initramfs: loads the virtio drivers (modules in Debian's kernel);
# then a root file system if the command line has root=, else the agents right here.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module" || echo "init: cannot load $module"; done < /modules/order

root= flags=rw
for word in $(cat /proc/cmdline); do
    case $word in
        root=*) root=${word#root=} ;;
        ro | rw) flags=$word ;;
    esac
done
[ -n "$root" ] || exec /bin/init
[ -b "$root" ] || echo "init: $root is not there; disks: $(ls /sys/block)"
mount -t ext4 -o "$flags" "$root" /root && {
    for d in dev proc sys; do mount -o move /$d /root/$d; done
    exec switch_root /root /bin/init
}
echo "init: cannot mount $root"
poweroff -f
