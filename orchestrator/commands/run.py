"""vmmctl run: start a VM from a command line of QEMU's or StratoVirt's."""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motorcade.orchestrator.commands.common import tell
from motorcade.orchestrator.errors import EXIT_OK, EXIT_USAGE, UserError

if TYPE_CHECKING:
    from motorcade.orchestrator.cmdline.source import CommandLine
    from motorcade.orchestrator.cmdline.translate import Wish
    from motorcade.orchestrator.frozendisks import Incoming
    from motorcade.orchestrator.machine import Machine

_EPILOG = """\
What stands behind -- is read as QEMU and StratoVirt do: -option key=value,key=value; a comma in a value is doubled;
on, yes and true are the same; server alone is server=on, nowait is wait=off. An option or key that is not known, or
asks for what is not there, is refused by name, and nothing starts.

  the machine   -machine microvm[,accel=kvm][,memory-backend=ID][,isa-serial=off]  -smp N  -m SIZE (256M)  -cpu host
                -name N  -uuid U  -accel kvm, -enable-kvm  -no-reboot  -no-shutdown
                -mem-path FILE  -mem-prealloc
                -object memory-backend-file,id=ID,mem-path=FILE,size=SIZE,share=on|off
  what it boots -kernel F  -append TEXT  -initrd F
  disks         -drive file=F,id=D[,readonly=on][,direct=on][,aio=io_uring|threads] (or -blockdev)
                -device virtio-blk-device,drive=D[,id=ID][,serial=S][,num-queues=N]
  NICs          -netdev tap,id=N,ifname=IF[,queues=N]  or  user,id=N[,hostfwd=tcp:127.0.0.1:8080-:80]  or  -nic ...
                -device virtio-net-device,netdev=N[,id=ID][,mac=MAC]
  consoles      -serial stdio | pty | file:F | unix:F,server,nowait | socket,path=F,server,nowait | chardev:C | none
                -chardev socket,id=C,path=F,server,nowait | pty,id=C | file,id=C,path=F | stdio,id=C | null,id=C
                -device virtio-serial-device  -device virtconsole,chardev=C[,id=ID]
  others        -device virtio-balloon-device[,deflate-on-oom=on][,free-page-reporting=on]
                -device virtio-rng-device[,max-bytes=N,period=MS][,rng=R]  -object rng-random,id=R,filename=/dev/urandom
                -chardev socket,id=C,path=F  -device vhost-user-fs-device,chardev=C,tag=T (or vhost-user-blk-device)
  control       -qmp unix:F,server,nowait | tcp:HOST:PORT,server,nowait (or -chardev socket and -mon mode=control)
                -daemonize  -pidfile F  -D LOG  -S
                -incoming file:DIR | exec:COMMAND | fd:N | defer

The process whose pid -pidfile tells is the VM's core, "motorcade: core (NAME)" to ps and pgrep -f. SIGTERM to it ends
the VM in good order. Without -daemonize vmmctl stays until the VM ends, its standard input and output being those of
-serial stdio (Ctrl-] leaves a terminal, and the VM goes on); SIGINT and SIGTERM press the guest's power button. All
other commands (ps, console, snapshot, ...) know the VM by its -name, or one that the command line always gives.
-incoming file:DIR restores what QMP's migrate or vmmctl snapshot wrote; a disk that has not moved is the template's
copy then, and what is written to it is forgotten at the end, unless --keep-overlays says where it goes.

examples, StratoVirt's:
  vmmctl run -- -machine microvm -kernel vmlinux.bin -smp 1 -m 1024 -append "console=ttyS0 root=/dev/vda" \\
      -drive file=rootfs.ext4,id=rootfs,readonly=off,direct=off -device virtio-blk-device,drive=rootfs,id=rootfs \\
      -qmp unix:stratovirt.sock,server,nowait -serial stdio
  vmmctl run -- ... the same ... -incoming file:template

QEMU's:
  vmmctl run -- -M microvm,accel=kvm -m 512m -smp 2 -kernel vmlinuz -initrd initrd.img -append "console=ttyS0" \\
      -nodefaults -no-user-config -nographic -serial stdio -drive id=test,file=test.img,format=raw,if=none \\
      -device virtio-blk-device,drive=test -netdev tap,id=tap0,script=no,downscript=no,ifname=tap0 \\
      -device virtio-net-device,netdev=tap0

  vmmctl run --print-yaml -- -M microvm -kernel vmlinuz > machine.yaml      and vmmctl up machine.yaml from then on

exit status: as of vmmctl up; with -daemonize 0 once the VM runs, or waits (-S, -incoming defer).
"""


def add_parser(commands: Any) -> None:
    """Adds ``run``."""
    p = commands.add_parser(
        "run",
        help="start a VM from a command line of QEMU's or StratoVirt's",
        usage="vmmctl run [--print-yaml] [--accel A] [--keep-overlays FOLDER] [--same-id] -- OPTION ...",
        description="Start the VM that a command line of QEMU's or StratoVirt's describes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "do not start it: show it as the machine.yaml that vmmctl up would start"
    p.add_argument("--print-yaml", action="store_true", help=about)
    p.add_argument("--accel", choices=["auto", "kvm", "box"], help="instead of what OPTIONs say")
    about = "of -incoming: overlays stay, as FOLDER/NAME-ID.overlay"
    p.add_argument("--keep-overlays", metavar="FOLDER", type=Path, help=about)
    p.add_argument("--same-id", action="store_true", help="of -incoming: the guest keeps its VM generation ID")
    p.add_argument("words", metavar="OPTION", nargs="*", help="see below")
    p.set_defaults(run=run)
    parse = p.parse_known_args

    def parse_known_args(args: Sequence[str], namespace: Any = None) -> Any:
        """-- may be left out: whatever is not one of ours begins QEMU's part."""
        return parse(_with_dashes(args), namespace)

    p.parse_known_args = parse_known_args


def _with_dashes(args: Sequence[str]) -> list[str]:
    flags, valued = {"-h", "--help", "--print-yaml", "--same-id"}, {"--accel", "--keep-overlays"}
    n = 0
    while n < len(args) and args[n] != "--":
        if args[n] in valued:
            n += 2
        elif args[n] in flags or args[n].partition("=")[0] in valued:
            n += 1
        else:
            return [*args[:n], "--", *args[n:]]
    return list(args)


def run(args: argparse.Namespace) -> int:
    """See the module. Errors: UserError."""
    from motorcade.orchestrator.cmdline.translate import translate

    wish = translate(args.words)
    if args.accel is not None:
        wish.data["accel"] = args.accel
    if not wish.incoming and (args.same_id or args.keep_overlays):
        raise UserError("--same-id and --keep-overlays go with -incoming", EXIT_USAGE)
    for note in wish.notes:
        tell(note)
    if args.print_yaml:
        return _print(wish)
    if wish.incoming.startswith("fd:"):
        try:
            os.fstat(int(wish.incoming[3:]))  # before a descriptor of ours gets the number
        except (OSError, OverflowError):
            raise UserError(f"-incoming {wish.incoming}: no such descriptor was inherited", EXIT_USAGE) from None
    gc.disable()  # see up.run
    from motorcade.orchestrator import daemon, machine  # noqa: F401

    pid, line = daemon.fork()
    try:
        return _start(args, wish, pid, line)
    finally:
        line.close()


def _described(wish: Wish) -> tuple[Machine, CommandLine]:
    """Errors: ConfigError, which names options."""
    from motorcade.orchestrator import config
    from motorcade.orchestrator.cmdline.source import CommandLine

    source = CommandLine(wish.data, wish.places)
    return config.complete(wish.data, source, Path.cwd()), source


def _print(wish: Wish) -> int:
    """The machine.yaml, and in a comment what it cannot say."""
    from motorcade.orchestrator.cmdline.source import yaml

    text = yaml(wish.data)
    _described(wish)  # whose errors are to be told here, too
    detach = wish.daemonize or not wish.attached
    words = [("-d", detach), ("--paused", wish.paused), (f"--incoming {shlex.quote(wish.incoming)}", wish.incoming),
             (f"--pidfile {shlex.quote(wish.pidfile)}", wish.pidfile)]  # fmt: skip
    said = " ".join(word for word, wanted in words if wanted)
    print(f"# vmmctl up {said + ' ' if said else ''}machine.yaml")
    if wish.incoming.startswith(("exec:", "fd:")):
        print("# (--incoming defer, and QMP's migrate-incoming, where a state comes from a command or a descriptor)")
    if wish.log_file:
        print(f"# -D {wish.log_file}: vmmctl logs {wish.data['name']}")
    print(text, end="")
    return EXIT_OK


def _start(args: argparse.Namespace, wish: Wish, pid: int, line: socket.socket) -> int:
    from motorcade.orchestrator.cmdline.front import Front
    from motorcade.orchestrator.commands import up

    machine, source = _described(wish)
    incoming = _incoming(args, wish, machine, source)
    for option, path in (("-pidfile", wish.pidfile), ("-D", wish.log_file)):
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{option} {path}: no such folder: {Path(path).absolute().parent}", EXIT_USAGE)
    pidfile, log_file = (str(Path(path).absolute()) if path else "" for path in (wish.pidfile, wish.log_file))
    up.launch(line, machine, source, incoming, paused=wish.paused, pidfile=pidfile, log_file=log_file)
    return Front(machine.name, pid, line, wish).run()


def _incoming(args: argparse.Namespace, wish: Wish, machine: Machine, source: CommandLine) -> Incoming | None:
    """What it goes on from. Errors: UserError."""
    if not wish.incoming:
        return None
    from motorcade.orchestrator import restore
    from motorcade.orchestrator.frozendisks import Incoming

    generation_id = b"" if args.same_id else os.urandom(restore.GENERATION_ID)
    if not wish.incoming.startswith("file:"):
        if args.keep_overlays:
            raise UserError("--keep-overlays goes with -incoming file:DIR", EXIT_USAGE)
        return Incoming(generation_id=generation_id)
    plan = restore.read(restore.uri_path(wish.incoming))
    restore.check(machine, source, plan)
    overlays = args.keep_overlays.absolute() if args.keep_overlays else None
    found = restore.incoming(machine, plan, generation_id=generation_id, overlays=overlays)
    readonly = {disk.id for disk in machine.disks if disk.readonly}
    lost = [r.disk.id for r in found.disks if r.overlay is None and r.disk.id not in readonly]
    if lost:
        tell(f"disk {', '.join(lost)} goes on from {plan.path}; what is written to it is forgotten at the end "
             "(--keep-overlays FOLDER keeps it)")  # fmt: skip
    return found
