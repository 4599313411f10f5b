#!/run/box/busybox sh
# Starts one command in the box, as the leader of the session that sshd made for it:
#   enter ID DIR [fresh:PATH | share:PATH | KEY=VALUE]... -- COMMAND...
# A path that cannot be mounted or entered ends it with 125, as env(1) and docker(1) do.
set -u
bb=/run/box/busybox
live=/run/box/live
fail() { echo "box: $*" >&2; exit 125; }
mounted() { while read -r _ at _; do [ "$at" = "$1" ] && return; done < /proc/self/mounts; return 1; }
covered() { for d in /run/box/fresh/*/path; do [ -e "$d" ] && case "$1/" in "$(cat "$d")"/*) return;; esac; done; return 1; }
cat() { read -r line < "$1" && echo "$line"; }

# PATH as it is on the host now, writes staying in the box.
fresh() {
    covered "$1" && return
    n=$($bb mktemp -d /run/box/fresh/XXXXXX) && $bb mkdir "$n/upper" "$n/work"
    $bb mount -t overlay fresh "$1" \
        -o "lowerdir=$live$1,upperdir=$n/upper,workdir=$n/work,index=off,metacopy=off,xino=off" || fail "cannot show $1"
    echo "$1" > "$n/path"
    # What was shared below it before is hidden now.
    while read -r path; do
        case "$path" in "$1"/*) $bb mount -o bind "$live$path" "$path" || fail "cannot share $path" ;; esac
    done < /run/box/shares
}

# PATH itself: what is written there is written on the host.
share() {
    mounted "$1" && $bb grep -qxF "$1" /run/box/shares && return
    if [ -d "$live$1" ]; then
        $bb mkdir -p "$1"
    else
        [ -e "$live$1" ] || fail "cannot share $1: the host has no such path"
        [ -e "$1" ] || { $bb mkdir -p "${1%/*}"; : > "$1"; }
    fi
    $bb mount -o bind "$live$1" "$1" || fail "cannot share $1"
    echo "$1" >> /run/box/shares
}

id=$1 dir=$2
shift 2
exec 9> /run/box/mounts.lock
flock 9
while [ "$1" != -- ]; do
    case $1 in
        fresh:*) fresh "${1#fresh:}" ;;
        share:*) share "${1#share:}" ;;
        *) export "$1" ;;
    esac
    shift
done
exec 9>&-
shift

$bb mkdir "/sys/fs/cgroup/run/$id" && echo $$ > "/sys/fs/cgroup/run/$id/cgroup.procs" || fail "no cgroup"
echo $$ > "/run/box/runs/$id"
cd "$dir" || fail "$dir: the box cannot see this directory"
# A shell waits for the command, since ssh reports an exit status and loses the number of a signal.
trap : HUP INT QUIT TERM USR1 USR2
"$@"
exit $?
