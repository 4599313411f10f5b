"""Writing an initramfs: a cpio archive in the "newc" format.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. Written here rather than by
cpio(1) because that one takes its file modes, owners and device nodes from a directory that only root
can make.
"""

import stat
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Archive:
    """An archive being put together in memory; every entry belongs to root and carries no time."""

    _parts: list[bytes] = field(default_factory=list)
    _inode: int = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        self._entry(name, stat.S_IFDIR | mode)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._entry(name, stat.S_IFREG | mode, content)

    def copy(self, name: str, source: Path, mode: int = 0o644) -> None:
        self.file(name, source.read_bytes(), mode)

    def symlink(self, name: str, target: str) -> None:
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._entry(name, stat.S_IFCHR | mode, device=(major, minor))

    def to_bytes(self) -> bytes:
        """The finished archive (its trailer included), uncompressed."""
        trailer = Archive(_inode=self._inode)
        trailer._entry("TRAILER!!!", 0)
        return b"".join(self._parts + trailer._parts)

    def _entry(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = [self._inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(path), 0]
        header = b"070701" + b"".join(b"%08X" % value for value in fields)
        # Both the name (with the header) and the content are padded to four bytes.
        self._parts += [header, path, bytes(-(len(header) + len(path)) % 4)]
        self._parts += [content, bytes(-len(content) % 4)]
