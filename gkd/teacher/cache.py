"""A teacher's scores on disk: what it has said of a text once need not be computed again.

For completions of the data set and of the teacher, which come back every epoch, on a resume and in the next run; the
student's own hardly ever do. The teacher itself is made when the first text is missing: a run whose texts are all there
loads none.

Legend: n completion tokens, H_t the teacher's hidden size, K slots of its top k.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from gkd.digests import sealed, unsealed
from gkd.files import written_aside
from gkd.models.head_bytes import head_from_bytes, head_to_bytes
from gkd.registry import SOURCES, Drawn
from gkd.teacher.base import Teacher
from gkd.types import HiddenScores, Rollout, TeacherScores, TopkScores, first_rows

_log = logging.getLogger(__name__)
_EMPTY, _SUFFIX = "empty", ".sealed"
_STATES, _IDS, _LOG_PROBS = "states", "ids", "log_probs"  # names of tensors: [n, H_t], or [n, K] each
_KEPT_SHARE = 0.9  # of the limit, once it is exceeded: not to tidy up after every rollout


class CachedTeacher:
    """Implements `Teacher` with the scores in `folder`, and those of the teacher that `make` returns for the rest.

    `folder` belongs to one teacher: weights, revision, dtype, and how many of its tokens it tells. Beyond `limit_bytes`
    what was not used for longest goes. Files are complete when they have their name, so ranks and runs may share the
    folder; one that is damaged, if only by a bit, is computed again. What is the same for all texts, the output head,
    is kept once, in what the teacher says of an empty completion.
    """

    def __init__(self, make: Callable[[], Teacher], folder: Path, *, limit_bytes: int, device: torch.device) -> None:
        self._make, self._folder, self._limit_bytes, self._device = make, folder, limit_bytes, device
        folder.mkdir(parents=True, exist_ok=True)
        self._used_bytes = sum(size for _, size, _ in self._entries())
        self._teacher: Teacher | None = None
        self._empty = self._read_empty()

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """What the teacher says of each rollout, from the disk where it is there."""
        known = {i: scores for i, rollout in enumerate(rollouts) if (scores := self._find(rollout)) is not None}
        missing = [i for i in range(len(rollouts)) if i not in known]
        if missing:
            found = self._loaded_teacher().score([rollouts[i] for i in missing])
            empty = self._keep_empty(found[0])
            known = {i: _with_head_of(empty, scores) for i, scores in known.items()}  # two heads would be two teachers
            known |= dict(zip(missing, found, strict=True))
            for i, scores in zip(missing, found, strict=True):
                if _is_kept(rollouts[i]):
                    self._write(self._path(rollouts[i]), save(_tensors(scores)))
            self._tidy()
        return [known[i] for i in range(len(rollouts))]

    def _loaded_teacher(self) -> Teacher:
        if self._teacher is None:
            self._teacher = self._make()
        return self._teacher

    # ---- the disk

    def _path(self, rollout: Rollout) -> Path:
        first_row = len(rollout.draw.prompt.token_ids) - 1
        ids = np.array([first_row, *rollout.token_ids], dtype="<i4").tobytes()
        return self._folder / f"{hashlib.blake2b(ids, digest_size=16).hexdigest()}{_SUFFIX}"

    def _find(self, rollout: Rollout) -> TeacherScores | None:
        if not rollout.completion_ids or self._empty is None:
            return self._empty
        return self._read(rollout, self._empty) if _is_kept(rollout) else None

    def _read(self, rollout: Rollout, empty: TeacherScores) -> TeacherScores | None:
        path = self._path(rollout)
        try:
            scores = _scores(load(unsealed(path.read_bytes(), path.name)), empty)
            os.utime(path)  # used now
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            _log.warning("%s cannot be read and is computed again: %s", path, error)
            return None
        return scores.to(self._device) if len(scores) == len(rollout.completion_ids) else None

    def _write(self, path: Path, data: bytes) -> None:
        with written_aside(path) as aside:
            self._used_bytes += aside.write_bytes(sealed(data, path.name))

    def _read_empty(self) -> TeacherScores | None:
        path = self._folder / _EMPTY
        try:
            data = unsealed(path.read_bytes(), path.name)
            tensors = load(data)
            if _IDS in tensors:
                return TopkScores(tensors[_IDS].long(), tensors[_LOG_PROBS]).to(self._device)
            head = head_from_bytes(data, self._device)
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError) as error:
            _log.warning("%s cannot be read and is written again: %s", path, error)
            return None
        return HiddenScores(head.weight.new_empty(0, head.weight.shape[1]), head)

    def _keep_empty(self, scores: TeacherScores) -> TeacherScores:
        is_on_disk, empty = self._empty is not None, first_rows(scores, 0)
        self._empty = empty
        if not is_on_disk:
            is_whole = isinstance(empty, HiddenScores)
            self._write(self._folder / _EMPTY, head_to_bytes(empty.head) if is_whole else save(_tensors(empty)))
        return empty

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
    return SOURCES.drawn(rollout.source) is Drawn.ELSEWHERE and bool(rollout.completion_ids)


def _with_head_of(empty: TeacherScores, scores: TeacherScores) -> TeacherScores:
    if isinstance(empty, HiddenScores) and isinstance(scores, HiddenScores):
        return replace(scores, head=empty.head)
    return scores


def _tensors(scores: TeacherScores) -> dict[str, torch.Tensor]:
    """What differs from text to text."""
    if isinstance(scores, HiddenScores):
        return {_STATES: scores.states.cpu().contiguous()}
    assert isinstance(scores, TopkScores)
    ids = scores.ids.to(torch.int32)  # half of the bytes, and no vocabulary is larger
    return {_IDS: ids.cpu().contiguous(), _LOG_PROBS: scores.log_probs.cpu().contiguous()}


def _scores(tensors: Mapping[str, torch.Tensor], empty: TeacherScores) -> TeacherScores:
    """Of the same kind as those of an empty completion."""
    if isinstance(empty, HiddenScores):
        return HiddenScores(tensors[_STATES], empty.head)
    return TopkScores(tensors[_IDS].long(), tensors[_LOG_PROBS])
