#!/bin/sh
# Run by busybox init in the test guest: what a small distribution would set up, then an agent on every
# console.
export PATH=/bin
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
ip link set lo up
hostname guest
# Kernel messages would get between the agent's lines; dmesg still has them, and a panic still prints.
dmesg -n 2
# The ACPI power button.
[ -e /dev/input/event0 ] && acpid -l /dev/null

# The 8250 driver has nodes for ports that do not exist (type 0), and hvc has sixteen of them.
for port in /sys/class/tty/ttyS*; do
    [ "$(cat "$port/type")" = 0 ] || agent "${port##*/}" &
done
n=0
for port in /sys/class/virtio-ports/*; do
    [ -e "$port" ] || break
    agent hvc$n &
    n=$((n + 1))
done
