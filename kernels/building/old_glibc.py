"""Linking for older glibc than this machine's: what it merely versioned again is taken as the older ones have it.

Which symbols these are is read from a first linking; `linker_arguments` are for the second.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

OLDEST_GLIBC = (2, 28)  # that torch itself runs with

_JUMP = {"x86_64": "jmp {0}@PLT", "aarch64": "b {0}"}
_WRAPPER = """
    .hidden __wrap_{name}
    .globl __wrap_{name}
    .type __wrap_{name}, %function
__wrap_{name}:
    {jump}
    .symver {old}, {name}@GLIBC_{version}
"""


def linker_arguments(library: Path, folder: Path) -> list[str]:
    """Options and a source for linking `library` again; empty if it asks for nothing new, or nothing old is there.

    Each call of such a symbol goes through one jump to its older version, whatever its arguments are.
    """
    older = {name: version for name in _too_new(library) if (version := _oldest(name)) is not None}
    if not older:
        return []
    jump = _JUMP[platform.machine()]
    text = "    .text\n"
    for name, version in older.items():
        old = f"old_{name}"
        text += _WRAPPER.format(name=name, version=version, old=old, jump=jump.format(old))
    source = folder / f"{library.stem}.old_glibc.s"
    source.write_text(text + '    .section .note.GNU-stack, "", %progbits\n')
    return [*(f"-Wl,--wrap={name}" for name in older), str(source)]


def _too_new(library: Path) -> Iterator[str]:
    for line in _symbols("--undefined-only", library):
        found = re.search(r" [Uw] (\w+)@+GLIBC_([\d.]+)$", line)
        if found and _number(found[2]) > OLDEST_GLIBC:
            yield found[1]


def _oldest(name: str) -> str | None:
    """The oldest version of a symbol in this machine's glibc, if `OLDEST_GLIBC` has it."""
    versions = [v for file in _glibc() for v in _versions(file, name)]
    oldest = min(versions, key=_number, default=None)
    return oldest if oldest is not None and _number(oldest) <= OLDEST_GLIBC else None


def _glibc() -> list[Path]:
    asked = subprocess.run(["gcc", "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True).stdout
    return [Path(asked.strip()), Path(asked.strip()).with_name("libm.so.6")]


def _versions(file: Path, name: str) -> list[str]:
    return re.findall(rf" {name}@+GLIBC_([\d.]+)$", "\n".join(_symbols("--defined-only", file)), flags=re.MULTILINE)


def _symbols(which: str, library: Path) -> list[str]:
    listed = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
