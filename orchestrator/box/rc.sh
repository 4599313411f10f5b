#!/run/box/busybox sh
# The box's start-up, run by busybox init inside the overlay. BOX_DIR on the kernel command line (init
# hands it on as environment) is the state directory on the host, where the keys are.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
bb=/run/box/busybox
state=/run/box/live$BOX_DIR
trap 'echo "box: start-up failed (rc)"; $bb poweroff -f' EXIT

$bb mkdir -p /dev/pts /dev/shm /run/lock /run/sshd /run/box/runs /run/box/fresh
$bb mount -t devpts -o mode=620,gid=5,ptmxmode=666 devpts /dev/pts
$bb mount -t tmpfs -o mode=1777 shm /dev/shm
$bb mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
echo "+cpu +memory +pids" > /sys/fs/cgroup/cgroup.subtree_control
$bb mkdir /sys/fs/cgroup/run
$bb ln -sf /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do $bb ln -sf /proc/self/fd/${n%%:*} /dev/${n##*:}; done
# Guest memory is memfds: without this each 4 KiB of them that a guest touches is a nested page fault.
echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled
$bb hostname box
$bb ip link set lo up
$bb ip addr add 10.0.2.15/24 dev eth0
$bb ip link set eth0 up
$bb ip route add default via 10.0.2.2
# modprobe finds the box's own kernel's modules.
$bb mkdir -p /lib/modules
$bb ln -sfn "$BOX_MODULES" "/lib/modules/$($bb uname -r)"

# sshd starts every command through root's login shell, and the host's may take seconds to start in here
# (bash reads ~/.bashrc under sshd). An interactive shell is started by name instead.
$bb ln -sf busybox /run/box/sh
$bb sed -i 's|^\(root:.*\):[^:]*$|\1:/run/box/sh|' /etc/passwd
# Without PAM sshd refuses an account whose password is locked, as root's is in many images.
case "$($bb grep '^root:' /etc/shadow)" in 'root:!'*) $bb sed -i 's/^root:[^:]*:/root:*:/' /etc/shadow ;; esac

/usr/sbin/sshd -D -e -f "$state/sshd_config" &
trap - EXIT
wait
