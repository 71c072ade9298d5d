"""What has to be so at the end: the same student as undisturbed, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Set
from pathlib import Path

from benchmarks.runs.soak.world import MARK, World
from gkd.run_files import RunFiles

_UNFINISHED = ("*.tmp", "*.partial", ".*.tmp", ".*.partial", "final.refused")
# times, and what a sync was like: a step after which nobody took the weights is logged without, and is not done again
_NOT_OF_TRAINING = ("time/", "_per_s", "sync/")


def metrics(run: RunFiles) -> list[dict[str, float]]:
    """Every step's, but what is not of training; a run that lost or doubled a step has others."""
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{k: v for k, v in r.items() if not any(part in k for part in _NOT_OF_TRAINING)} for r in records]


def differences(one: list[dict[str, float]], other: list[dict[str, float]]) -> list[str]:
    """Which metrics differ, and at which step first; or that there are not as many steps."""
    if len(one) != len(other):
        return [f"{len(one)} and {len(other)} steps"]
    first: dict[str, str] = {}
    for a, b in zip(one, other, strict=True):
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                first.setdefault(name, f"{name} from step {a['step']} on: {a.get(name)}, {b.get(name)}")
    return list(first.values())


def weights_sha256(run: RunFiles) -> str:
    return hashlib.sha256((run.final / "model.safetensors").read_bytes()).hexdigest()


def left_behind(world: World, shared: Set[str]) -> dict[str, list[str]]:
    """After everything has ended: processes, ports, what there is of the `shared` memory that they used, and files."""
    time.sleep(1)
    return {
        "processes": [str(pid) for pid in _marked(world.mark)],
        "ports": [f"{kind} {port}" for kind, port in world.ports.items() if _is_taken(port)],
        "shared_memory": sorted(name for name in shared if Path(name).exists()),
        "files": sorted(
            {str(path.relative_to(world.disk)) for pattern in _UNFINISHED for path in world.disk.rglob(pattern)}
            | {str(path.relative_to(world.disk)) for path in (world.disk / "tmp").rglob("*")}
        ),
    }


def _marked(mark: str) -> list[int]:
    """Processes, whoever started them, whose environment has a soak's mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def _is_taken(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not for connections that linger
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
