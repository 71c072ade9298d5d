"""What a contender is told and what it says: plain values, as JSON between processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import read_json
from gkd.files import write_json

WARM_UP_STEPS = 1  # of a round, not counted: first touches of memory, lazy imports, a first request to vLLM
PARTS: tuple[str, ...] = ("sampling", "scoring", "training", "sync", "other")


@dataclass(frozen=True)
class Work:
    """The same for all contenders. The loss is a mean over the step's scored tokens, its temperature 1."""

    teacher: str  # folder or wheel:NAME, as gkd takes it
    layers: int | tuple[int, ...]  # of the teacher, kept in the student: how many, or which
    train: str  # JSONL of messages
    heldout: str
    folder: str  # everything that is made on the way
    batch_size: int = 16
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None  # gkd packed, without padding
    max_prompt_tokens: int = 192
    max_new_tokens: int = 48
    steps: int = 8
    kind: str = "jsd"  # one of the divergences that TRL has too
    beta: float = 0.5  # of jsd; weights the teacher, in TRL too
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    heldout_prompts: int = 32
    engine: str = "vllm"  # gkd's sampler

    @property
    def prepared(self) -> Path:
        """Folder of what `prepare` makes: the student's start, the prompts in their order, prepared.json."""
        return Path(self.folder) / "prepared"

    @property
    def student(self) -> Path:
        return self.prepared / "student"

    @property
    def ordered_prompts(self) -> Path:
        """One line a prompt, the batches of the steps one after another."""
        return self.prepared / "train.jsonl"


@dataclass(frozen=True)
class Job:
    """One process. `options` are the role's own."""

    role: str
    work: Work
    options: dict[str, Any]
    result: str

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Job:
        values = read_json(path)
        work = values["work"]
        layers = work["layers"] if isinstance(work["layers"], int) else tuple(work["layers"])
        return cls(**{**values, "work": Work(**{**work, "betas": tuple(work["betas"]), "layers": layers})})


class Stopwatch:
    """Seconds of a step by part. Parts do not nest; what is in none of them is given by `rest`."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize  # waits for a device that works in the background
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._tokens = 0
        self._start = self._now()
        self.steps: list[dict[str, float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def add_tokens(self, count: int) -> None:
        self._tokens += count

    def restart(self) -> None:
        """The first step begins now."""
        self._start = self._now()

    def finish_step(self, rest: str = "training") -> None:
        """Ends a step and begins the next; time in no part counts as `rest`."""
        now = self._now()
        step_s = now - self._start
        self._seconds[rest] += step_s - sum(self._seconds.values())
        record = {f"{name}_s": seconds for name, seconds in self._seconds.items()}
        self.steps.append({"step_s": step_s, **record, "tokens": self._tokens})
        self._seconds, self._tokens, self._start = dict.fromkeys(PARTS, 0.0), 0, now

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()


def check_same_work(
    seen_prompts: Sequence[Sequence[int]], stop_token_ids: int | Sequence[int], work: Work, prepared: dict[str, Any]
) -> None:
    """Raises RuntimeError unless the token ids of the prompts, their order and the stop tokens were gkd's."""
    wanted = [prompt["ids"] for prompt in prepared["prompts"][: work.steps * work.batch_size]]
    if list(seen_prompts) != wanted:
        same = sum(seen == want for seen, want in zip(seen_prompts, wanted, strict=False))
        raise RuntimeError(f"TRL sampled from {len(seen_prompts)} prompts, {same} of them gkd's {len(wanted)} in order")
    stops = {stop_token_ids} if isinstance(stop_token_ids, int) else set(stop_token_ids)
    if stops != set(prepared["stop_token_ids"]):
        raise RuntimeError(f"TRL stops at the tokens {sorted(stops)}, gkd at {sorted(prepared['stop_token_ids'])}")
