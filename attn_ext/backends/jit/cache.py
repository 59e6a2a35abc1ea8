"""What was compiled, in files named after a digest of all that it was made of.

A file is written under a name of its own and then renamed, so that readers, in this process or in
others, see a whole file or none, and nobody waits for a lock.  One that cannot be read, or that
holds other bytes than were written, counts as absent; a folder that cannot be written to, or a full
disk, costs the cache and nothing else.  Beyond a size, what was not used for longest goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from attn_ext.backends.jit.nvrtc import Binary

MARK = b"attn_ext kernel 1\n"
LIMIT = 1 << 30  # bytes: several hundred kernels, each for several architectures
LEFT = 3600  # seconds after which the file of an interrupted writer is taken away
NEW = ".new"  # how such a file ends


def digest(facts: Iterable[object]) -> str:
    """Of all facts, in order."""
    total = hashlib.sha256()
    for fact in facts:
        text = repr(fact).encode()
        total.update(b"%d:" % len(text) + text)
    return total.hexdigest()


def pack(binary: Binary) -> bytes:
    """The bytes of a file: a mark, a digest of the rest, then each part behind its length."""
    parts = (binary.name.encode(), binary.ptx, binary.cubin, binary.log.encode())
    body = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return MARK + hashlib.sha256(body).digest() + body


def unpack(data: bytes) -> Binary | None:
    """What `pack` was given; None where the bytes are not those that it made."""
    head, body = len(MARK) + 32, data[len(MARK) + 32 :]
    if data[:head] != MARK + hashlib.sha256(body).digest():
        return None
    parts = []
    while body:
        size = int.from_bytes(body[:8], "little")
        parts.append(body[8 : 8 + size])
        body = body[8 + size :]
    if len(parts) != 4:
        return None
    name, ptx, cubin, log = parts
    return Binary(name.decode(), ptx, cubin, log.decode())


class Cache:
    """The files of one folder, which is made when the first is written; limit: bytes in all."""

    def __init__(self, folder: Path, limit: int = LIMIT):
        self.folder, self.limit = folder, limit

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def get(self, key: str) -> Binary | None:
        """What was put under `key`; None where it is not there, or not whole."""
        path = self._path(key)
        try:
            found = unpack(path.read_bytes())
        except OSError:
            return None
        if found is not None:
            with contextlib.suppress(OSError):  # a folder of somebody else's
                os.utime(path)
        return found

    def put(self, key: str, binary: Binary) -> None:
        """Keep it, if the folder lets us."""
        path, temporary = self._path(key), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=NEW)
            with os.fdopen(handle, "wb") as file:
                file.write(pack(binary))
            os.replace(temporary, path)
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
        self._shrink()

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(time of the last use, bytes, path) of each file, also of those being written."""
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):  # another process took it away
                found = path.stat()
                yield found.st_mtime, found.st_size, path

    def _shrink(self) -> None:
        """Takes away what is beyond the limit, and what interrupted writers left."""
        files = sorted(self._files(), reverse=True)
        total, now = 0, time.time()
        for used, size, path in files:
            total += size
            left = path.name.endswith(NEW) and now - used > LEFT
            if left or (total > self.limit and not path.name.endswith(NEW)):
                total -= size
                with contextlib.suppress(OSError):
                    path.unlink()

    def size(self) -> tuple[int, int]:
        """How many kernels are kept, and their bytes."""
        sizes = [size for _, size, path in self._files() if not path.name.endswith(NEW)]
        return len(sizes), sum(sizes)

    def clear(self) -> int:
        """Takes away all files; how many.  OSError where one cannot be."""
        count = 0
        for _, _, path in list(self._files()):
            path.unlink(missing_ok=True)
            count += not path.name.endswith(NEW)
        return count
