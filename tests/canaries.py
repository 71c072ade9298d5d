"""Checkpoints as somebody may have made them to run code."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._folder,)


def plant(file: Path, canary: Path) -> None:
    """Into a file of DeepSpeed's, which is otherwise as it was."""
    state = torch.load(file, weights_only=False)
    torch.save({**state, "canary": Canary(canary)}, file)


def seal(checkpoint: Path) -> None:
    """Makes the manifest fit."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
