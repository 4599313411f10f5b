#!/run/box/busybox sh
# Holds a command in the box on its owner's leash: leash ID. Standard input carries the names of signals
# for it; "done" once it has ended. An end of file without that means that the owner died: then the command
# goes too, and whatever it started.
bb=/run/box/busybox
group=/sys/fs/cgroup/run/$1
while read -r word; do
    if [ "$word" = done ]; then
        # Stays where something of it goes on in the background.
        $bb rmdir "$group" 2> /dev/null
        $bb rm -f "/run/box/runs/$1"
        exit 0
    fi
    read -r leader < "/run/box/runs/$1" && kill -s "$word" "-$leader"
done
[ -d "$group" ] || exit 0
read -r leader < "/run/box/runs/$1" && kill -s TERM "-$leader"
n=0
while $bb grep -q '^populated 1' "$group/cgroup.events" && [ $n -lt 50 ]; do
    $bb usleep 100000
    n=$((n + 1))
done
echo 1 > "$group/cgroup.kill"
$bb rm -f "/run/box/runs/$1"
