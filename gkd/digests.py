"""Digests: of records, so that a flipped bit shows, and of files, every byte, remembered until the file changes.

XXH3 with 128 bits: as fast as memory is read. It tells apart what differs; whoever wants two files to look alike can.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import xxhash

from gkd.config import cache_folder
from gkd.files import write_atomically

_SEAL_BYTES = 16
_CHUNK_BYTES = 8 << 20
_REMEMBERED_FROM_BYTES = 1 << 20  # smaller files are read again sooner than looked up
_SETTLED_AFTER_S = 2.0  # a file that was written just now may change again within the clock's resolution


def digest(*parts: Any) -> bytes:
    """16 bytes of what supports the buffer protocol, one part after another."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.digest()


def sealed(data: bytes, name: str) -> bytes:
    """`data` after its digest, which is of what it is called too."""
    return digest(name.encode(), data) + data


def unsealed(data: bytes, name: str) -> bytes:
    """What was sealed under this name. Raises ValueError if a bit of it is not as it was, or it was another's."""
    content = data[_SEAL_BYTES:]
    if digest(name.encode(), content) != data[:_SEAL_BYTES]:
        raise ValueError("its checksum does not fit")
    return content


def file_digest(path: Path) -> str:
    """32 hex digits of every byte of a file. A large one is read once: its digest is kept in the cache folder, under
    path, size, inode and times, and a file that changes in any of them is read again."""
    before = path.stat()
    if before.st_size < _REMEMBERED_FROM_BYTES:
        return digest(path.read_bytes()).hex()
    memory = cache_folder() / "digests" / f"{digest(str(path.absolute()).encode()).hex()}.json"
    state = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, before.st_dev]
    try:
        found = json.loads(memory.read_text())
        if found["state"] == state:
            return found["digest"]
    except (OSError, ValueError, KeyError, TypeError):  # never written, or damaged
        pass
    value = _read(path)
    if path.stat() == before and time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_AFTER_S:
        _remember(memory, {"path": str(path.absolute()), "state": state, "digest": value})
    return value


def _read(path: Path) -> str:
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def _remember(memory: Path, record: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a reading, not the run
        write_atomically(memory, json.dumps(record).encode())
