"""What was compiled, in files named after a digest of all that it was made of.

A file is written under a name of its own and then renamed, so that readers, in this process or in
others, see a whole file or none, and nobody waits for a lock.  One that cannot be read, or that
holds other bytes than were written, counts as absent; a folder that cannot be written to costs the
cache and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from attn_ext.backends.jit.nvrtc import Binary

MARK = b"attn_ext kernel 1\n"


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
    """The files of one folder, which is made when the first is written."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def get(self, key: str) -> Binary | None:
        """What was put under `key`; None where it is not there, or not whole."""
        try:
            return unpack(self._path(key).read_bytes())
        except OSError:
            return None

    def put(self, key: str, binary: Binary) -> None:
        """Keep it, if the folder lets us."""
        path, temporary = self._path(key), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".new")
            with os.fdopen(handle, "wb") as file:
                file.write(pack(binary))
            os.replace(temporary, path)
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
