"""A teacher's scores on disk: what it has said of a text once need not be computed again.

For completions of the data set and of the teacher, which come back every epoch, on a resume and in the next run; the
student's own hardly ever do. The teacher itself is made when the first text is missing: a run whose texts are all there
loads none.

Legend: n completion tokens, H_t the teacher's hidden size.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from gkd.teacher.base import Teacher
from gkd.teacher.serving.head import head_from_bytes, head_to_bytes
from gkd.types import OutputHead, Rollout, TeacherScores

_log = logging.getLogger(__name__)
_HEAD, _SUFFIX, _STATES = "head", ".safetensors", "states"
_KEPT_SHARE = 0.9  # of the limit, once it is exceeded: not to tidy up after every rollout


class CachedTeacher:
    """Implements `Teacher` with the scores in `folder`, and those of the teacher that `make` returns for the rest.

    `folder` belongs to one teacher: weights, revision and dtype. Beyond `limit_bytes` what was not used for longest
    goes. Files are complete when they have their name, so ranks and runs may share the folder; a damaged one is
    computed again.
    """

    def __init__(self, make: Callable[[], Teacher], folder: Path, *, limit_bytes: int, device: torch.device) -> None:
        self._make, self._folder, self._limit_bytes, self._device = make, folder, limit_bytes, device
        folder.mkdir(parents=True, exist_ok=True)
        self._used_bytes = sum(size for _, size, _ in self._entries())
        self._teacher: Teacher | None = None
        self._head = self._read_head()

    def score(self, rollouts: Sequence[Rollout]) -> TeacherScores:
        """Hidden states [n, H_t] of each rollout, from the disk where they are there."""
        hidden = [self._read(rollout) if _is_kept(rollout) else None for rollout in rollouts]
        missing = [i for i, rollout in enumerate(rollouts) if hidden[i] is None and rollout.completion_ids]
        if missing or self._head is None:
            scores = self._loaded_teacher().score([rollouts[i] for i in missing])
            self._keep_head(scores.head)
            for i, states in zip(missing, scores.hidden, strict=True):
                hidden[i] = states
                if states is not None and _is_kept(rollouts[i]):
                    self._write(self._path(rollouts[i]), save({_STATES: states.cpu().contiguous()}))
            self._tidy()
        assert self._head is not None
        return TeacherScores(hidden, self._head)

    def _loaded_teacher(self) -> Teacher:
        if self._teacher is None:
            self._teacher = self._make()
        return self._teacher

    # ---- the disk

    def _path(self, rollout: Rollout) -> Path:
        first_row = len(rollout.draw.prompt.token_ids) - 1
        ids = np.array([first_row, *rollout.token_ids], dtype="<i4").tobytes()
        return self._folder / f"{hashlib.blake2b(ids, digest_size=16).hexdigest()}{_SUFFIX}"

    def _read(self, rollout: Rollout) -> torch.Tensor | None:
        path = self._path(rollout)
        try:
            states = load(path.read_bytes())[_STATES]
            os.utime(path)  # used now
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, OSError) as error:
            _log.warning("%s cannot be read and is computed again: %s", path, error)
            return None
        return states.to(self._device) if len(states) == len(rollout.completion_ids) else None

    def _write(self, path: Path, data: bytes) -> None:
        aside = path.with_name(f".{uuid.uuid4().hex}.part")
        aside.write_bytes(data)
        aside.replace(path)
        self._used_bytes += len(data)

    def _read_head(self) -> OutputHead | None:
        try:
            return head_from_bytes((self._folder / _HEAD).read_bytes(), self._device)
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError) as error:
            _log.warning("%s cannot be read and is written again: %s", self._folder / _HEAD, error)
            return None

    def _keep_head(self, head: OutputHead) -> None:
        if self._head is None:
            self._write(self._folder / _HEAD, head_to_bytes(head))
            self._head = head

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(time of the last use, bytes, path) of all states; those that another process removes meanwhile are left
        out."""
        found: list[tuple[float, int, Path]] = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        return found

    def _tidy(self) -> None:
        if self._used_bytes <= self._limit_bytes:
            return
        entries = sorted(self._entries())
        self._used_bytes = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if self._used_bytes <= _KEPT_SHARE * self._limit_bytes:
                break
            path.unlink(missing_ok=True)
            self._used_bytes -= size


def _is_kept(rollout: Rollout) -> bool:
    return rollout.source != "student" and bool(rollout.completion_ids)
