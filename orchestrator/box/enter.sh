#!/run/box/busybox sh
# Starts one command in the box, as the leader of the session that sshd made for it:
#   enter ID DIR [fresh:PATH | share:PATH | KEY=VALUE]... -- COMMAND...
# A path that cannot be mounted or entered ends it with 125, as env(1) and docker(1) do.
set -u
bb=/run/box/busybox
live=/run/box/live
fail() { echo "box: $*" >&2; exit 125; }
# The kind of what is mounted at a path, the last one on top: virtiofs is shared, overlay is fresh.
top() {
    kind=
    while read -r _ at type _; do [ "$at" = "$1" ] && kind=$type; done < /proc/self/mounts
    [ "$kind" = "$2" ]
}

# PATH as it is on the host now, writes staying in the box. Mounted anew for every run: an overlay keeps to
# the file that it once found under a name, and says ESTALE when the host has put another one there.
fresh() {
    path=$1
    for n in /run/box/fresh/*; do
        [ -e "$n/path" ] && read -r known < "$n/path" || continue
        case "$path/" in "$known"/*) path=$known; break ;; esac
        n=
    done
    [ -e "$n/path" ] || { n=$($bb mktemp -d /run/box/fresh/XXXXXX) && $bb mkdir "$n/upper"; } || fail "cannot show $path"
    # Lazily: whoever still works in the old one keeps it, with a work directory of its own.
    top "$path" overlay && $bb umount -l "$path"
    echo "$path" > "$n/path"
    $bb mkdir "$n/work-$id"
    $bb mount -t overlay fresh "$path" \
        -o "lowerdir=$live$path,upperdir=$n/upper,workdir=$n/work-$id,index=off,metacopy=off,xino=off" \
        || fail "cannot show $path"
    # What was shared below it before is hidden now.
    while read -r shared; do
        case "$shared" in "$path"/*) $bb mount -o bind "$live$shared" "$shared" || fail "cannot share $shared" ;; esac
    done < /run/box/shares
}

# PATH itself: what is written there is written on the host.
share() {
    top "$1" virtiofs && return
    if [ -d "$live$1" ]; then
        $bb mkdir -p "$1"
    else
        [ -e "$live$1" ] || fail "cannot share $1: the host has no such path"
        [ -e "$1" ] || { $bb mkdir -p "${1%/*}"; : > "$1"; }
    fi
    $bb mount -o bind "$live$1" "$1" || fail "cannot share $1"
    $bb grep -qxF "$1" /run/box/shares || echo "$1" >> /run/box/shares
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
# By env(1), since this shell would take its own applet for any name that it has one of.
/usr/bin/env "$@"
exit $?
