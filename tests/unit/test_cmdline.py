"""Command lines of QEMU and StratoVirt as machines of ours: what is understood, what is refused, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.vmmctl import Host
from motorcade.orchestrator import cli, config, yamlpos
from motorcade.orchestrator.cmdline import grammar, options, source, tables, translate
from motorcade.orchestrator.cmdline.grammar import Note, Wrong
from motorcade.orchestrator.cmdline.translate import Wish
from motorcade.orchestrator.errors import UserError

KERNEL = ["-machine", "microvm", "-kernel", "/k"]


def wish(line: str, *more: str) -> Wish:
    return translate.translate([*KERNEL, *line.split(), *more])


def data(line: str, *more: str) -> dict[str, Any]:
    """What the machine has besides its kernel, name and memory."""
    found = dict(wish(line, *more).data)
    for key in ("kernel", "name"):
        del found[key]
    if found["memory"] == "256M":
        del found["memory"]
    return found


def wrong(line: str, *more: str, kernel: bool = True) -> list[str]:
    """What is wrong with it."""
    with pytest.raises(UserError) as caught:
        translate.translate([*(KERNEL if kernel else []), *line.split(), *more])
    assert caught.value.status == 2
    return str(caught.value).splitlines()


def machine(line: str, *more: str) -> Any:
    """As the supervisor gets it."""
    found = wish(line, *more)
    return config.complete(found.data, source.CommandLine(found.data, found.places), Path("/here"))


# The grammar.


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("", []),
        ("a", [("x", "a")]),
        ("a=b", [("a", "b")]),
        ("a,b=c,server,nowait", [("x", "a"), ("b", "c"), ("server", None), ("nowait", None)]),
        ("file=a,,b=,c=d=e,", [("file", "a,b="), ("c", "d=e")]),
        ("unix:/a=b,server", [("x", "unix:/a=b"), ("server", None)]),
        ("a,,,b=1", [("x", "a,"), ("b", "1")]),
    ],
)
def test_pairs(text: str, pairs: list[tuple[str, str | None]]) -> None:
    assert grammar.pairs(text, "x") == pairs


@given(st.dictionaries(st.from_regex(r"[a-z][a-z-]*", fullmatch=True), st.text("ab,=: /"), min_size=1))
def test_any_value_can_be_written(values: dict[str, str]) -> None:
    line = ",".join(f"{key}={text.replace(',', ',,')}" for key, text in values.items())
    assert grammar.pairs(line) == list(values.items())


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("1", 1 << 20),
        ("2048", 2 << 30),
        ("2G", 2 << 30),
        ("2g", 2 << 30),
        ("1.5G", 3 << 29),
        ("0.5", 1 << 19),
        ("4096k", 4 << 20),
    ],
)
def test_sizes(text: str, bytes_: int) -> None:
    assert grammar.size("m")(text) == bytes_


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1GiB", "1.3333333333333333333333K", "1e3", "٣"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(Wrong):
        grammar.size("b")(text)


def test_flags() -> None:
    assert [grammar.flag(word) for word in ("on", "yes", "true", "y")] == [True] * 4
    assert [grammar.flag(word) for word in ("off", "no", "false", "n")] == [False] * 4
    for word in ("", "1", "ON", "maybe"):
        with pytest.raises(Wrong):
            grammar.flag(word)


def test_every_check_says_no_in_words() -> None:
    """Whatever comes, a table's check gives a value, a word about it, or the reason why not."""
    checks = [c for spec in options.OPTIONS.values() for c in (spec.check, *(spec.table or {}).values())]
    for kinds in (tables.DEVICES, tables.NETDEVS, tables.CHARDEVS, tables.OBJECTS):
        checks += [check for table in kinds.values() if not isinstance(table, str) for check in table.values()]
    for check in checks:
        for text in ("", "on", "off", "nonsense", "-1", "99999999999999999999", "/a"):
            try:
                check(text)
            except (Wrong, Note) as e:
                assert str(e), (check, text)


# Whole lines.


def test_stratovirts_quickstart() -> None:
    found = wish(
        "-smp 1 -m 1024 -drive file=/rootfs,id=rootfs,readonly=off,direct=off -device "
         "virtio-blk-device,drive=rootfs,id=rootfs "
        "-qmp unix:/qmp.sock,server,nowait -serial stdio",
        "-append", "console=ttyS0 pci=off reboot=k quiet panic=1 root=/dev/vda",
    )  # fmt: skip
    assert (found.notes, found.attached, found.paused, found.daemonize) == ([], True, False, False)
    del found.data["name"]
    assert found.data == {
        "cpus": 1,
        "memory": "1G",
        "kernel": {"image": "/k", "cmdline": "console=ttyS0 pci=off reboot=k quiet panic=1 root=/dev/vda"},
        "disks": [{"id": "rootfs", "path": "/rootfs"}],
        "consoles": [{"id": "ttyS0", "type": "uart", "backend": "terminal"}],
        "qmp": ["unix:/qmp.sock"],
    }


def test_qemus_microvm() -> None:
    """The example of QEMU's documentation of microvm."""
    found = wish(
        "-M microvm,x-option-roms=off,isa-serial=off -enable-kvm -cpu host -m 512m -smp 2 -nodefaults -no-user-config "
        "-nographic -chardev stdio,id=virtiocon0 -device virtio-serial-device -device virtconsole,chardev=virtiocon0 "
        "-drive id=test,file=/test.img,format=raw,if=none -device virtio-blk-device,drive=test "
        "-netdev tap,id=tap0,script=no,downscript=no,ifname=t0 -device virtio-net-device,netdev=tap0",
        "-append", "console=hvc0 root=/dev/vda",
    )  # fmt: skip
    assert found.notes == []
    assert found.attached
    del found.data["name"]
    assert found.data == {
        "cpus": 2,
        "memory": "512M",
        "accel": "kvm",
        "kernel": {"image": "/k", "cmdline": "console=hvc0 root=/dev/vda"},
        "disks": [{"id": "test", "path": "/test.img"}],
        "nets": [{"id": "tap0", "tap": "t0"}],
        "consoles": [{"id": "virtiocon0", "type": "virtio", "backend": "terminal"}],
        "uart": False,
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-smp cpus=4,maxcpus=4", {"cpus": 4}),
        ("-smp cores=2,threads=2", {"cpus": 4}),
        ("-m size=2G", {"memory": "2G"}),
        ("-m 1.5G", {"memory": "1536M"}),
        ("-accel kvm", {"accel": "kvm"}),
        ("--enable-kvm -machine accel=kvm", {"accel": "kvm"}),
        ("-machine accel=kvm:tcg", {"accel": "auto"}),
        ("-no-reboot", {"on_reboot": "exit"}),
        ("-action reboot=shutdown", {"on_reboot": "exit"}),
        ("-no-shutdown", {"on_poweroff": "pause"}),
        ("-action shutdown=pause,reboot=reset", {"on_reboot": "reset", "on_poweroff": "pause"}),
        ("-uuid 12345678-1234-1234-1234-123456789abc", {"uuid": "12345678-1234-1234-1234-123456789abc"}),
        ("-serial none", {"uart": False}),
        ("-nodefaults", {"uart": False}),
        ("-nographic", {"consoles": [{"id": "ttyS0", "type": "uart", "backend": "terminal"}]}),
        ("-serial mon:stdio", {"consoles": [{"id": "ttyS0", "type": "uart", "backend": "terminal"}]}),
        ("-serial pty", {"consoles": [{"id": "ttyS0", "type": "uart", "backend": "pty"}]}),
        ("-serial null", {"consoles": [{"id": "ttyS0", "type": "uart", "backend": "none"}]}),
        ("-serial file:/a=b,,c", {"consoles": [{"id": "ttyS0", "type": "uart", "backend": {"file": "/a=b,c"}}]}),
        ("-serial file,path=/f", {"consoles": [{"id": "ttyS0", "type": "uart", "backend": {"file": "/f"}}]}),
        ("-serial unix:/s,server=on,wait=off",
         {"consoles": [{"id": "ttyS0", "type": "uart", "backend": {"socket": "/s"}}]}),
        ("-serial socket,path=/s,server,nowait",
         {"consoles": [{"id": "ttyS0", "type": "uart", "backend": {"socket": "/s"}}]}),
        ("-chardev pty,id=c -serial chardev:c", {"consoles": [{"id": "ttyS0", "type": "uart", "backend": "pty"}]}),
        ("-qmp tcp:127.0.0.1:4444,server,nowait", {"qmp": ["tcp:127.0.0.1:4444"]}),
        ("-chardev socket,id=q,path=/q,server=on,wait=off -mon chardev=q,mode=control", {"qmp": ["unix:/q"]}),
        ("-drive file=/a,if=virtio,cache=none,aio=io_uring,discard=ignore",
         {"disks": [{"id": "virtio0", "path": "/a", "direct": True, "engine": "io_uring", "discard": False}]}),
        ("-drive file=/a,,b,id=d,read-only=on,serial=S -device virtio-blk-device,drive=d,num-queues=2,serial=T",
         {"disks": [{"id": "d", "path": "/a,b", "readonly": True, "serial": "T", "queues": 2}]}),
        ("-blockdev driver=file,filename=/a,node-name=f,cache.direct=on -blockdev raw,file=f,node-name=d "
         "-device virtio-blk-device,drive=d,id=x", {"disks": [{"id": "x", "path": "/a", "direct": True}]}),
        ('-blockdev {"driver":"raw","node-name":"d","read-only":true,"file":{"driver":"file","filename":"/a,b"}} '
         "-device virtio-blk-device,drive=d", {"disks": [{"id": "d", "path": "/a,b", "readonly": True}]}),
        ('-object {"id":"r","qom-type":"rng-builtin"} '
         '-device {"driver":"virtio-rng-device","rng":"r","id":"x","max-bytes":5}',
         {"devices": [{"id": "x", "kind": "rng", "rate": 1}]}),
        ("-device virtio-net-device,id=n", {"nets": [{"id": "n", "unplugged": True}]}),
        ("-netdev user,id=u,hostfwd=tcp:127.0.0.1:8080-:80,hostfwd=udp::53-:53 -device virtio-net-device,netdev=u",
         {"nets": [{"id": "u", "user": True, "forward": ["127.0.0.1:8080:80", "udp:53:53"]}]}),
        ("-nic tap,ifname=t,script=no,model=virtio-net-device,mac=52:54:00:00:00:01",
         {"nets": [{"id": "nic0", "tap": "t", "mac": "52:54:00:00:00:01"}]}),
        ("-netdev tap,id=t,ifname=t,queues=2 -device virtio-net-device,netdev=t,mq=on,host_mtu=9000",
         {"nets": [{"id": "t", "tap": "t", "queues": 2, "mtu": 9000}]}),
        ("-device virtio-rng-device", {"devices": [{"id": "rng", "kind": "rng"}]}),
        ("-device virtio-balloon-device", {"balloon": True}),
        ("-device virtio-balloon-device,id=b,deflate-on-oom=on,free-page-reporting=off",
         {"balloon": {"id": "b", "deflate_on_oom": True}}),
        ("-object rng-random,id=r,filename=/dev/urandom -device virtio-rng-device,rng=r,max-bytes=1024,period=1000",
         {"devices": [{"id": "rng", "kind": "rng", "rate": 1024}]}),
        ("-chardev socket,id=f,path=/run/fs.sock -device vhost-user-fs-device,chardev=f,tag=shared,queue-size=1024 "
         "-chardev socket,id=b,path=/b,reconnect=5 -device vhost-user-blk-device,chardev=b,num-queues=2,id=disk1",
         {"devices": [
             {"id": "fs", "kind": "vhost-user", "type": "fs", "socket": "/run/fs.sock", "tag": "shared",
              "queue_size": 1024},
             {"id": "disk1", "kind": "vhost-user", "type": "blk", "socket": "/b", "queues": 2,
              "reconnect": 5}]}),
        ("-mem-path /dev/shm/x -mem-prealloc", {"memory_file": "/dev/shm/x", "memory_prealloc": True}),
        ("-object memory-backend-file,id=m,mem-path=/x,size=256M,share=on -machine microvm,memory-backend=m",
         {"memory_file": "/x"}),
        ("-object memory-backend-file,id=m,mem-path=/x,size=256M -machine microvm,memory-backend=m",
         {"memory_file": "/x", "memory_share": False}),
        ("-object memory-backend-memfd,id=m,size=256M,share=on -machine memory-backend=m", {}),
        ("-display none -monitor none -vga none -parallel none -net none -rtc base=utc -no-hpet -msg timestamp=on "
         "-global virtio-mmio.force-legacy=false -sandbox on,spawn=deny -overcommit mem-lock=off -disable-seccomp", {}),
    ],
)  # fmt: skip
def test_what_it_comes_to(line: str, expected: dict[str, Any]) -> None:
    assert data(line) == expected
    machine(line)


def test_what_vmmctl_does() -> None:
    found = wish("-S -daemonize -pidfile p -D l -incoming file:/t -name web,debug-threads=on")
    assert (found.paused, found.daemonize, found.pidfile, found.log_file, found.incoming, found.attached) == (
        True, True, "p", "l", "file:/t", False)  # fmt: skip
    assert found.data["name"] == "web"


def test_a_name_of_its_own() -> None:
    """The same for the same machine, wherever it goes on from."""
    line = "-drive file=/a,id=d -device virtio-blk-device,drive=d"
    name = wish(line).data["name"]
    assert wish(f"{line} -incoming file:/t -S -daemonize -pidfile p -D x").data["name"] == name
    assert wish(line.replace("/a", "/b")).data["name"] != name
    assert machine(line).name == name


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("-drive file=/a,id=d", "-drive file=/a,id=d: no device uses it"),
        ("-netdev tap,id=t,ifname=t", "-netdev tap,id=t,ifname=t: no device uses it"),
        ("-chardev pty,id=c", "-chardev pty,id=c: no device uses it"),
        ("-machine microvm,pit=off", "-machine microvm,pit=off: pit=off: the PIT is there, and harmless"),
        ("-object iothread,id=i", f"-object iothread,id=i: {tables.OWN_PROCESS}"),
        ("-object memory-backend-ram,id=m,size=1M",
         "-object memory-backend-ram,id=m,size=1M: nobody uses it (-machine memory-backend=ID)"),
        ("-smp 4,sockets=1,cores=4", "-smp 4,sockets=1,cores=4: sockets=1: the guest is not told about the topology"),
        ("-no-acpi", f"-no-acpi: {tables.NO_ACPI}"),
        ("-disable-seccomp", "-disable-seccomp: the processes are always sandboxed"),
        ("-sandbox off", "-sandbox off: the processes are always sandboxed"),
        ("-netdev tap,id=t,ifname=t,vhost=on -device virtio-net-device,netdev=t",
         "-netdev tap,id=t,ifname=t,vhost=on: vhost=on: a process of its own moves the packets, and not vhost-net"),
    ],
)  # fmt: skip
def test_what_is_worth_a_word(line: str, note: str) -> None:
    assert note in wish(line).notes


# What is refused, and how.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-drvie x", "-drvie: unknown option; did you mean drive?"),
        ("-frobnicate", "-frobnicate: unknown option"),
        ("disk.img", "disk.img: an image alone is no option; -drive file=IMAGE,id=D -device virtio-blk-device,drive=D"),
        ("-hda x", "-hda x: a disk is -drive file=IMAGE,id=D -device virtio-blk-device,drive=D"),
        ("-smp", "-smp: an argument is missing"),
        ("-initrd -S", "-initrd: an argument is missing"),
        ("-smp 1 -smp 2", "-smp 2: -smp 1 was said before"),
        ("-smp 0", "-smp 0: 0 is too small (from 1 to 255)"),
        ("-smp 256", "-smp 256: 256 is too large (from 1 to 255)"),
        ("-smp two", "-smp two: a whole number is wanted"),
        ("-smp 2,maxcpus=4", "-smp 2,maxcpus=4: maxcpus=4: CPUs cannot be plugged in later"),
        ("-smp 3,sockets=2", "-smp 3,sockets=2: sockets are 2, which 3 CPUs cannot be made of"),
        ("-m lots", "-m lots: a size such as 512M or 2G is wanted"),
        ("-m 1G,maxmem=2G", "-m 1G,maxmem=2G: maxmem=2G: memory cannot be plugged in later"),
        ("-machine q35", "-machine q35: q35: the only machine is microvm"),
        ("-machine microv", "-machine microv: microv is not one of microvm"),
        ("-machine microvm,pci=on", "-machine microvm,pci=on: pci: no such key; did you mean pcie?"),
        ("-accel tcg", "-accel tcg: tcg: guests run on KVM; where the host's cannot, vmmctl run --accel box"),
        ("-cpu EPYC", "-cpu EPYC: EPYC is not one of host, max"),
        ("-cpu host,-avx", "-cpu host,-avx: -avx: no such key (there are: migratable, model, pmu)"),
        ("-drive id=d", "-drive id=d: file= is missing"),
        ("-drive file=/a", "-drive file=/a: id= is missing: no -device can use it"),
        ("-drive file=/a,id=d,redonly=on",
         "-drive file=/a,id=d,redonly=on: redonly: no such key; did you mean readonly?"),
        ("-drive file=/a,id=d,id=e", "-drive file=/a,id=d,id=e: id is there twice"),
        ("-drive file=/a,id=d,readonly=maybe",
         "-drive file=/a,id=d,readonly=maybe: readonly=maybe: on or off (yes, no, true, false) is wanted"),
        ("-drive file=/a,id=d,format=qcow2",
         "-drive file=/a,id=d,format=qcow2: format=qcow2: images are raw (qemu-img convert -O raw); an overlay may lie "
         "over one (vmmctl up)"),
        ("-drive file=/a,id=d -drive file=/b,id=d", "-drive file=/b,id=d: d is the id of -drive file=/a,id=d"),
        ("-device virtio-blk-device", "-device virtio-blk-device: drive= is missing"),
        ("-drive file=/a,id=rootfs -device virtio-blk-device,drive=rootf",
         "-device virtio-blk-device,drive=rootf: drive=rootf: there is no -drive of that id; did you mean rootfs?"),
        ("-drive file=/a,id=d -device virtio-blk-device,drive=d -device virtio-blk-device,drive=d,id=e",
         "-device virtio-blk-device,drive=d,id=e: drive=d: -device virtio-blk-device,drive=d uses it already"),
        ("-drive file=/a,id=d -device virtio-blk-device,drive=d,id=x -device virtio-net-device,id=x",
         "-device virtio-net-device,id=x: x is the id of -device virtio-blk-device,drive=d,id=x"),
        ("-device virtio-net-device,id=ttyS0",
         "-device virtio-net-device,id=ttyS0: ttyS0 is the id of the serial port"),
        ("-device virtio-blk-pci,drive=d",
         "-device virtio-blk-pci,drive=d: there is no PCI, a microvm has virtio-mmio: virtio-blk-device"),
        ("-device virtio-blk-devise", "-device virtio-blk-devise: there is no device virtio-blk-devise; did you mean "
         "virtio-blk-device?"),
        ("-device virtio-net-device,netdev=n",
         "-device virtio-net-device,netdev=n: netdev=n: there is no -netdev of that id"),
        ("-netdev tap,id=n -device virtio-net-device,netdev=n",
         "-netdev tap,id=n: ifname= is missing: a tap that is there (ip tuntap add NAME mode tap)"),
        ("-netdev tap,id=n,ifname=t,script=/etc/qemu-ifup",
         "-netdev tap,id=n,ifname=t,script=/etc/qemu-ifup: script=/etc/qemu-ifup: no script is run; make the interface "
         "before (ip tuntap add ...), and say script=no"),
        ("-netdev bridge,id=n", "-netdev bridge,id=n: bridge: there are tap and user; two VMs are wired together by a "
         "link in machine.yaml"),
        ("-netdev ifname=t", "-netdev ifname=t: there is no ifname (there are: passt, tap, user)"),
        ("-netdev user,id=n,hostfwd=80 -device virtio-net-device,netdev=n",
         "-netdev user,id=n,hostfwd=80: hostfwd=80: [tcp|udp]:[ADDRESS]:PORT-:PORT is wanted"),
        ("-serial stdio -serial pty", "-serial pty: there is one serial port (-serial stdio); more consoles are "
         "virtconsole devices"),
        ("-serial vc",
         "-serial vc: one of stdio, unix:PATH,server,nowait, socket,path=PATH,server,nowait, pty, file:PATH, "
         "null, none, chardev:ID is wanted"),
        ("-serial unix:/s", "-serial unix:/s: it listens, and does not connect; say server"),
        ("-serial unix:/s,server", "-serial unix:/s,server: nothing waits for a client here; say nowait (or wait=off)"),
        ("-serial chardev:c", "-serial chardev:c: chardev=c: there is no -chardev of that id"),
        ("-serial tcp:h:1,server,nowait", "-serial tcp:h:1,server,nowait: a console's socket is a unix socket (path=)"),
        ("-serial stdio -chardev stdio,id=c -device virtio-serial-device -device virtconsole,chardev=c",
         "-device virtconsole,chardev=c: -serial stdio has standard input and output"),
        ("-chardev pty,id=c -device virtconsole,chardev=c",
         "-device virtconsole,chardev=c: no -device virtio-serial-device comes before it"),
        ("-chardev spicevmc,id=c", "-chardev spicevmc,id=c: spicevmc: there are stdio, pty, socket, file and null"),
        ("-chardev file,id=c", "-chardev file,id=c: path= is missing"),
        ("-chardev pty,id=c -device vhost-user-fs-device,chardev=c,tag=t",
         "-chardev pty,id=c: a vhost-user backend is at a unix socket (socket, path=)"),
        ("-chardev pty,id=c -device virtio-serial-device -device virtconsole,chardev=c,nr=1",
         "-device virtconsole,chardev=c,nr=1: nr=1: consoles are in the order of the command line, this is hvc0"),
        ("-drive if=virtio,file=/a,index=1",
         "-drive if=virtio,file=/a,index=1: index=1: disks are in the order of the command line"),
        ("-qmp stdio", "-qmp stdio: QMP is spoken on sockets: unix:PATH,server,nowait or tcp:HOST:PORT,server,nowait"),
        ("-monitor stdio", "-monitor stdio: there is no human monitor; -qmp, or QMP's human-monitor-command"),
        ("-device virtio-rng-device,rng=r", "-device virtio-rng-device,rng=r: rng=r: there is no -object rng-random of "
         "that id"),
        ("-device virtio-balloon-device -device virtio-balloon-device",
         "-device virtio-balloon-device: a machine has one balloon"),
        ("-device virtio-rng-device,period=5",
         "-device virtio-rng-device,period=5: period= is nothing without max-bytes="),
        ("-object rng-random,id=r,filename=/dev/hwrng",
         "-object rng-random,id=r,filename=/dev/hwrng: filename=/dev/hwrng: the host's kernel gives random numbers: "
         "/dev/urandom"),
        ("-object memory-backend-file,id=m,size=1G,mem-path=/x -machine memory-backend=m",
         "-object memory-backend-file,id=m,size=1G,mem-path=/x: 1073741824 bytes, but -m says 268435456"),
        ("-machine memory-backend=m", "-machine memory-backend=m: no -object has the id m"),
        ("-blockdev {", "-blockdev {: not JSON that says an option: Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)"),
        ("-global virtio-blk-device.x=1", "-global virtio-blk-device.x=1: no property is set this way but "
         "virtio-mmio.force-legacy=false, which is so anyway"),
        ("-incoming tcp:0:1", "-incoming tcp:0:1: a state comes from file:DIR, exec:COMMAND, fd:N, or defer"),
        ("-incoming fd:x", "-incoming fd:x: fd: wants the number of an open descriptor"),
        ("-daemonize -serial stdio", "-daemonize: -serial stdio needs the terminal that the VM is to leave"),
        ("-daemonize -nographic", "-daemonize: -nographic needs the terminal that the VM is to leave"),
        ("-numa node", "-numa node: the guest has one node"),
        ("-device vhost-vsock-device,guest-cid=3", "-device vhost-vsock-device,guest-cid=3: there is no vsock"),
    ],
)  # fmt: skip
def test_what_is_refused(line: str, message: str) -> None:
    assert wrong(line) == [message]


def test_all_that_is_wrong_is_told_at_once() -> None:
    assert wrong("-smp 0 -m x -foo -device virtio-blk-device", kernel=False) == [
        "-foo: unknown option",
        "-smp 0: 0 is too small (from 1 to 255)",
        "-m x: a size such as 512M or 2G is wanted",
        "-kernel: missing: a microvm boots a kernel (a bzImage, or an ELF with a PVH note)",
        "-device virtio-blk-device: drive= is missing",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-m 4k", "-m 4k: RAM must be at least 1M and a multiple of 4096 bytes"),
        ("-device virtio-net-device,mac=52:54:00:00:00:01 -device virtio-net-device,mac=52:54:00:00:00:01,id=b",
         "-device virtio-net-device,mac=52:54:00:00:00:01,id=b: mac: 52:54:00:00:00:01 is already the address of "
         "-device virtio-net-device,mac=52:54:00:00:00:01"),
        ("-chardev socket,id=c,path=/c -device vhost-user-fs-device,chardev=c",
         "-device vhost-user-fs-device,chardev=c: what the guest is to mount is missing (tag)"),
        ("-name a/b", "-name a/b: 'a/b': letters, digits, - _ and . only, at most 31, the first a letter or digit"),
        ("-uuid 5", "-uuid 5: '5' is not a UUID"),
        ("-device virtio-net-device,mac=01:00:00:00:00:00",
         "-device virtio-net-device,mac=01:00:00:00:00:00: mac: 01:00:00:00:00:00 is not a unicast address (the first "
         "byte must be even)"),
        ("-netdev tap,id=t,ifname=abcdefghijklmnopq -device virtio-net-device,netdev=t",
         "-netdev tap,id=t,ifname=abcdefghijklmnopq: too long (the most is 15 characters)"),
        ("-qmp unix:" + "x" * 108 + ",server,nowait",
         "-qmp unix:" + "x" * 108 + ",server,nowait: the path is too long for a unix socket (107 bytes)"),
        ("-drive file=/a,id=d -device virtio-blk-device,drive=d,serial=123456789012345678901",
         "-device virtio-blk-device,drive=d,serial=123456789012345678901: serial: too long (the most is 20 "
          "characters)"),
    ],
)  # fmt: skip
def test_what_the_machine_cannot_be_names_the_option(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        machine(line)
    assert str(caught.value).splitlines() == [message]
    assert caught.value.status == 2


# As YAML.

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF))


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.one_of(
    TEXT, st.integers(0, 1 << 40), st.booleans(), st.lists(st.dictionaries(st.sampled_from("abc"), TEXT, min_size=1),
    min_size=1), st.dictionaries(st.sampled_from("abc"), TEXT, min_size=1)), min_size=1))  # fmt: skip
def test_yaml_says_what_was_meant(found: dict[str, Any]) -> None:
    assert yamlpos.parse(source.yaml(found)).data == found


def test_print_yaml(tmp_path: Path) -> None:
    """What it prints is the same machine to vmmctl up, and how to start it so."""
    line = ["-smp", "2", "-drive", "file=a b.img,id=d", "-device", "virtio-blk-device,drive=d", "-S", "-daemonize",
            "-pidfile", "p", "-qmp", "unix:q,server,nowait", "-netdev", "tap,id=t,ifname=no",
            "-device", "virtio-net-device,netdev=t,mac=52:54:00:00:00:01", "-append", "on: a=\"b\" # c"]  # fmt: skip
    with Host() as host:
        done = subprocess.run(
            host.command("run", "--print-yaml", "--", *KERNEL, *line),
            env=host.env, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.startswith("# vmmctl up -d --paused --pidfile p machine.yaml\nname: vm-")
    (tmp_path / "machine.yaml").write_text(done.stdout)
    loaded, _ = config.load(tmp_path / "machine.yaml")
    found = translate.translate([*KERNEL, *line])
    assert loaded == config.complete(found.data, source.CommandLine(found.data, found.places), tmp_path)


def test_a_wrong_line_starts_nothing() -> None:
    with Host() as host:
        done = host.vmmctl("run", "--", *KERNEL, "-drvie", "x", check=2)
        assert done.stderr == "vmmctl: -drvie: unknown option; did you mean drive?\n"
        done = host.vmmctl("run", "--same-id", *KERNEL, check=2)
        assert done.stderr == "vmmctl: --same-id and --keep-overlays go with -incoming\n"


def test_words_that_are_ours_and_theirs() -> None:
    """-- may be left out."""
    parse = cli.parser().parse_args
    assert parse(["run"]).words == []
    assert parse(["run", "-M", "microvm", "-h"]).words == ["-M", "microvm", "-h"]
    args = parse(["run", "--print-yaml", "--accel", "box", "--", "--accel", "kvm"])
    assert (args.print_yaml, args.accel, args.words) == (True, "box", ["--accel", "kvm"])
    args = parse(["run", "--accel=box", "--same-id", "-m", "1G", "--", "x"])
    assert (args.same_id, args.accel, args.words) == (True, "box", ["-m", "1G", "--", "x"])


def test_names_that_are_no_text() -> None:
    assert wrong("", "-initrd", "a\udcff") == ["-initrd: not UTF-8 text"]
    assert wrong("", "\udcff") == ["\\udcff: not UTF-8 text"]


def test_nobody_else_imports_it() -> None:
    code = "import sys; from motorcade.orchestrator import cli; cli.parser(); "
    code += "import motorcade.orchestrator.supervisor; "
    code += "import motorcade.orchestrator.commands.up; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "cmdline" not in done.stdout
