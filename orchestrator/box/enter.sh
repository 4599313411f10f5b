#!/run/box/busybox sh
# Starts one command in the box, as the leader of the session that sshd made for it, in a mount namespace of
# its own (session.py starts this by unshare):
#   enter ID DIR [fresh:PATH | share:PATH | KEY=VALUE]... -- COMMAND...
# A path that cannot be mounted or entered ends it with 125, as env(1) and docker(1) do.
set -u
bb=/run/box/busybox
live=/run/box/live
fail() { echo "box: $*" >&2; exit 125; }

# PATH as it is on the host now, writes staying in the box. Mounted for every run anew: an overlay keeps to the
# file that it once found under a name, and says ESTALE when the host has put another one there.
fresh() {
    n=/run/box/fresh/$(echo "$1" | $bb sha256sum)
    n=${n%% *}
    $bb mkdir -p "$n/upper" "$n/work-$id"
    $bb mount -t overlay fresh "$1" \
        -o "lowerdir=$live$1,upperdir=$n/upper,workdir=$n/work-$id,index=off,metacopy=off,xino=off" \
        || fail "cannot show $1"
}

# PATH itself: what is written there is written on the host.
share() {
    if [ -d "$live$1" ]; then
        $bb mkdir -p "$1"
    else
        [ -e "$live$1" ] || fail "cannot share $1: the host has no such path"
        [ -e "$1" ] || { $bb mkdir -p "${1%/*}"; : > "$1"; }
    fi
    $bb mount -o bind "$live$1" "$1" || fail "cannot share $1"
}

id=$1 dir=$2
shift 2
while [ "$1" != -- ]; do
    case $1 in
        fresh:*) fresh "${1#fresh:}" ;;
        share:*) share "${1#share:}" ;;
        *) export "$1" ;;
    esac
    shift
done
shift

$bb mkdir "/sys/fs/cgroup/run/$id" && echo $$ > "/sys/fs/cgroup/run/$id/cgroup.procs" || fail "no cgroup"
echo $$ > "/run/box/runs/$id"
cd "$dir" || fail "$dir: the box cannot see this directory"
# A shell waits for the command, since ssh reports an exit status and loses the number of a signal.
trap : HUP INT QUIT TERM USR1 USR2
# By env(1), since this shell would take its own applet for any name that it has one of.
/usr/bin/env "$@"
exit $?
