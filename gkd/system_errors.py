"""What the operating system refuses, as one line that names the path and what to do about it."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gkd.errors import GkdError, RunError

_ELSEWHERE = "name another place: run.dir for a run, GKD_CACHE for the cache, TMPDIR for temporary files"
_REMEDIES = {
    errno.ENOSPC: f"make room there, or {_ELSEWHERE}",
    errno.EDQUOT: f"make room in your quota, or {_ELSEWHERE}",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: f"get the right to it, or {_ELSEWHERE}",
    errno.EPERM: f"get the right to it, or {_ELSEWHERE}",
    errno.ENOTDIR: f"a file stands where a folder is needed: {_ELSEWHERE}",
    errno.EEXIST: f"a file stands where a folder is needed: {_ELSEWHERE}",
    errno.EISDIR: "a folder stands where a file is needed: name a file",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "end other processes: the machine has no open files left",
    errno.EIO: "the disk, or the server of its files, is failing",
    errno.ESTALE: "the server of its files has lost it: mount it again",
    errno.ENOENT: "bring it back",
}
_RUST_CODE = re.compile(r"\(os error (\d+)\)")
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory")  # of CUDA, of torch's CPU allocator
_TRIED_BYTES = 1 << 20
_BEYOND_BYTES = 64 << 20  # torch writes a tensor at once: where that stopped is somewhere before its end


@contextmanager
def system_errors(kind: type[GkdError]) -> Iterator[None]:
    """Turns an OSError that says which path it is about into a `kind`: its message names path, reason and remedy."""
    try:
        yield
    except OSError as error:
        text = explained(error)
        if text is None:
            raise
        raise kind(text) from error


@contextmanager
def memory_for(work: str, remedy: str) -> Iterator[None]:
    """Around `work`: memory that does not suffice for it is a RunError, which says what to do.

    torch has a RuntimeError for it, in words of each allocator's own.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        said = next(iter(str(error).splitlines()), "")
        raise RunError(f"{work}: memory does not suffice ({said}); {remedy}") from error


def explained(error: OSError) -> str | None:
    """None for what is no matter of files, and for what nobody knows a remedy of."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None or error.filename is None:
        return None
    return f"{os.fsdecode(error.filename)}: {error.strerror}; {remedy}"


@contextmanager
def writing_into(place: Path) -> Iterator[None]:
    """Around what writes into `place`, a folder or a file. Where the system refused that, raises the OSError, with a
    path.

    safetensors has the system's number in its text alone; torch says "unexpected pos", or that a stream failed.
    """
    try:
        yield
    except Exception as error:
        fault = _fault_behind(error, place)
        if fault is None:
            raise
        raise fault from error


def _fault_behind(error: Exception, place: Path) -> OSError | None:
    if isinstance(error, OSError):
        return None if error.filename is not None or error.errno is None else _fault(error.errno, place)
    code = _RUST_CODE.search(str(error))
    if code is not None:
        return _fault(int(code[1]), place)
    if not isinstance(error, RuntimeError) or isinstance(error, GkdError):
        return None
    longest = max((file.stat().st_size for file in place.rglob("*") if file.is_file()), default=0)
    return write_fault(place, longest + _BEYOND_BYTES)


def _fault(code: int, place: Path) -> OSError:
    return OSError(code, os.strerror(code), str(place))


def nearest_above(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def write_fault(folder: Path, size_bytes: int = _TRIED_BYTES) -> OSError | None:
    """What the system says to a new file in `folder`, or in the nearest folder above it that is there; None: nothing.

    The file has no name and leaves nothing behind; beyond its first MiB it is a hole.
    """
    folder = nearest_above(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size_bytes)
            file.write(bytes(_TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return OSError(error.errno, error.strerror, str(folder))
    return None
