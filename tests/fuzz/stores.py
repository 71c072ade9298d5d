"""Checkpoints, cached texts and cached scores on a damaged disk: found out, or read as they were written."""

from __future__ import annotations

import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fuzz import cases
from fuzz.outcome import Outcome, Refused
from gkd.rollout.completion_cache import CompletionCache
from gkd.teacher.cache import CachedTeacher
from gkd.train.checkpoint import Checkpointer, find_resume_step
from gkd.types import Completion, Prompt, PromptDraw, Rollout, SampleRequest, TeacherScores, TopkScores

_LAYOUT = {"world_size": 1, "zero_stage": 2}
_CPU = torch.device("cpu")


def _damage(folder: Path, rng: random.Random) -> str:
    """Of one file: its bytes, its name, or its being there. Returns what was done."""
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    action = rng.random()
    if action < 0.8:
        content = file.read_bytes()
        file.write_bytes(cases.damaged(content, rng) if content else b"\x00")
        return f"{file.name}: damaged"
    if action < 0.87:
        file.unlink()
        return f"{file.name}: gone"
    if action < 0.94:
        file.rename(file.with_name(rng.choice(["x", file.name + ".pt", "é\n"])))
        return f"{file.name}: renamed"
    other = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if other != file:
        shutil.copyfile(other, file)
    else:
        file.write_bytes(b"")
    return f"{file.name}: {other.name} in its place"


# ---- checkpoints


class _State:
    """Files as an engine leaves them."""

    def save_state(self, folder: str) -> None:
        engine = Path(folder) / "engine"
        engine.mkdir()
        weights = {"module": {"w": torch.arange(64.0)}, "global_steps": 4}
        torch.save(weights, engine / "mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": {"m": torch.ones(64)}}, engine / "zero_pp_rank_0_optim_states.pt")
        (Path(folder) / "objective.json").write_text('{"metric_means": {"loss": 1.5}, "weight_rule": {}}')

    def load_state(self, folder: str) -> None: ...


def checkpoints(seed: int, count: int) -> Outcome:
    """The newer of two: a resume takes it as it was saved, takes the older one, or says in one line what is wrong."""
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        saved, folder = Path(name) / "saved", Path(name) / "checkpoints"
        saver = Checkpointer(saved, _State(), every=2, last_step=4, keep=2, layout=_LAYOUT, is_main=True)
        saver.save(2)
        saver.save(4)
        whole = _contents(saved / "step_4")
        for _ in range(count):
            shutil.copytree(saved, folder)
            done = _damage(folder / "step_4", rng)
            outcome.add(done, lambda: _resumed(folder, whole))
            shutil.rmtree(folder)
    return outcome


def _resumed(folder: Path, whole: dict[str, object]) -> str | None:
    notes: list[str] = []
    step = find_resume_step(folder, _LAYOUT, notes.append)
    if step == 2:
        raise Refused("; ".join(notes))
    return None if _contents(folder / "step_4") == whole else "what was damaged is resumed from"


def _contents(checkpoint: Path) -> dict[str, object]:
    """The manifest by what it says, all else by its bytes."""
    files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    return {n: json.loads(p.read_bytes()) if n == "manifest.json" else p.read_bytes() for n, p in files.items()}


# ---- caches


def texts(seed: int, count: int) -> Outcome:
    requests = [SampleRequest((1, 2, i), i) for i in range(3)]
    completions = [Completion((4, 5 + i), (-0.5, -1.0 - i), "stop") for i in range(3)]

    def write(folder: Path) -> None:
        CompletionCache(folder).add(requests, completions)

    def read(folder: Path) -> str | None:
        cache = CompletionCache(folder)
        if cache.missing(requests):
            return None  # sampled again
        return None if [cache.get(r) for r in requests] == completions else "other texts were read"

    return _cache(seed, count, write, read)


def scores(seed: int, count: int) -> Outcome:
    rollouts = [Rollout(PromptDraw(Prompt(i, (1, 2, 3 + i), ""), 0), "dataset", (5, 6, 7)) for i in range(3)]
    true = [TopkScores(torch.arange(6).view(3, 2) + i, -torch.rand(3, 2).add(1 + i)) for i in range(3)]

    class Truthful:
        def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
            return [true[rollout.draw.prompt.index] for rollout in rollouts]

    def score(folder: Path) -> list[TeacherScores]:
        return CachedTeacher(Truthful, folder, limit_bytes=1 << 20, device=_CPU).score(rollouts)

    def read(folder: Path) -> str | None:
        found = score(folder)
        same = all(
            isinstance(ours, TopkScores)
            and torch.equal(ours.ids, theirs.ids)
            and torch.equal(ours.log_probs, theirs.log_probs)
            for ours, theirs in zip(found, true, strict=True)
        )
        return None if same else "other scores were read"

    return _cache(seed, count, score, read)


def _cache(seed: int, count: int, write: Callable[[Path], object], read: Callable[[Path], str | None]) -> Outcome:
    """What a cache says of a damaged file is a warning of one line; what it gives is what was written."""
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        whole, folder = Path(name) / "whole", Path(name) / "cache"
        write(whole)
        for _ in range(count):
            shutil.copytree(whole, folder)
            done = _damage(folder, rng)
            outcome.add(done, lambda: _with_warnings(lambda: read(folder)))
            shutil.rmtree(folder)
    return outcome


def _with_warnings(read: Callable[[], str | None]) -> str | None:
    with _warnings() as said:
        wrong = read()
    if wrong is None and said:
        raise Refused("; ".join(said))
    return wrong


@contextmanager
def _warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("gkd")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
