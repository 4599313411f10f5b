"""Real vhost-user backends for tests: qemu-storage-daemon with one disk. (virtiofsd needs a real guest.)"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from motorcade.sidecars.vhostuser.opening import connect

PROGRAM = "qemu-storage-daemon"
missing = "" if shutil.which(PROGRAM) else f"{PROGRAM} is not installed (apt install qemu-system-common qemu-utils)"


class Storage:
    """A qemu-storage-daemon that exports the raw image ``disk``. A context manager, which ends it."""

    def __init__(self, folder: Path, disk: Path, *, queues: int = 1, **options: str) -> None:
        """``options``: of the export."""
        self.path = folder / "disk.sock"
        self._disk, self._queues, self._options = disk, queues, options
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Listens when this returns."""
        self.path.unlink(missing_ok=True)
        export = {"writable": "on", "num-queues": str(self._queues), **self._options}
        words = ",".join(f"{key}={value}" for key, value in export.items())
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen(4)
            where = f"addr.type=fd,addr.str={listener.fileno()}"
            argv = [
                PROGRAM,
                *("--blockdev", f"driver=file,node-name=disk,filename={self._disk}"),
                *("--export", f"type=vhost-user-blk,id=export,node-name=disk,{words},{where}"),
            ]
            self.process = subprocess.Popen(argv, pass_fds=[listener.fileno()])

    def connect(self) -> dict[str, int]:
        """What the supervisor gives the sidecar. Errors: OSError."""
        return {"backend": connect(str(self.path))}

    def kill(self) -> None:
        """As a crash does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)
