"""Sampling ahead: the next batches are sampled while the student trains on this one, with weights that much older."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from gkd.rollout.mixture import MixtureRollouts
from gkd.types import PromptDraw, Rollout, WeightStream

Batch = Callable[[int], list[PromptDraw]]


class SampleAhead:
    """Keeps up to `staleness` batches of later steps sampled or being sampled, by one thread.

    A batch is sampled whole from one version v of the weights; for step s it is one with s - staleness <= v < s, which
    `rollouts` asserts; with a staleness of 1 it is always s - 1, after the first step. Nothing is sampled beyond
    `last_step`. No collective is called from the thread.
    """

    def __init__(
        self,
        rollouts: MixtureRollouts,
        *,
        batch: Batch,
        last_step: int,
        staleness: int,
        sum_over_ranks: Callable[[Sequence[float]], list[float]],
    ) -> None:
        """`sum_over_ranks` adds a few numbers up over all ranks, in the thread of the training."""
        self._rollouts, self._batch = rollouts, batch
        self._last_step, self._staleness = last_step, staleness
        self._sum_over_ranks = sum_over_ranks
        self._sampled: dict[int, Future[list[Rollout]]] = {}
        self._changed = threading.Condition()
        self._updating_to: int | None = None  # the version of an update that waits or is under way
        self._is_sampling = False
        self._is_closed = False
        self._next_step: int | None = None  # to be given to the thread
        self._trained: list[Rollout] = []

    def sample(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """The step's rollouts; `draws` are those of `batch`. An error of the thread's is raised in the step it hit."""
        if self._next_step is None:
            self._next_step = step
            threading.Thread(target=self._work, args=(step,), name="sampling ahead", daemon=True).start()
        with self._changed:
            until = min(step + self._staleness, self._last_step)
            for later in range(self._next_step, until + 1):
                self._sampled[later] = Future()
            self._next_step = max(self._next_step, until + 1)
            self._changed.notify_all()
        self._trained = self._sampled[step].result()
        with self._changed:
            del self._sampled[step]
        return self._trained

    def load_weights(self, weights: WeightStream, version: int) -> dict[str, float]:
        """As `MixtureRollouts.load_weights`, and how old the step's samples were.

        Waits for the batch under way, and for that of the next step: its age does not depend on who was faster.
        """
        with self._changed:
            self._updating_to, due = version, self._sampled.get(version)
            self._changed.wait_for(lambda: not self._is_sampling and (due is None or due.done()))
        self._sum_over_ranks([0.0])  # nor is another rank's batch under way: servers are shared by all
        try:
            return self._rollouts.load_weights(weights, version) | self._ages(version - 1)
        finally:
            with self._changed:
                self._updating_to = None
                self._changed.notify_all()

    def close(self) -> None:
        """Nothing further is begun; what is under way is not waited for."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._rollouts.close()

    def _work(self, first_step: int) -> None:
        for step in range(first_step, self._last_step + 1):
            with self._changed:
                self._changed.wait_for(lambda step=step: self._is_closed or self._may_sample(step))
                if self._is_closed:
                    return
                self._is_sampling, result = True, self._sampled[step]
            try:
                result.set_result(self._rollouts.sample(self._batch(step), step))
            except BaseException as error:  # noqa: BLE001  (raised again where the step is asked for)
                result.set_exception(error)
                return
            finally:
                with self._changed:
                    self._is_sampling = False
                    self._changed.notify_all()

    def _may_sample(self, step: int) -> bool:
        is_before_update = self._updating_to is None or step <= self._updating_to
        return step in self._sampled and is_before_update

    def _ages(self, step: int) -> dict[str, float]:
        versions = [r.weights_version for r in self._trained if r.weights_version is not None]
        count, total = self._sum_over_ranks([float(len(versions)), float(sum(versions))])
        if not count:
            return {}
        return {"weights_version": total / count, "rollout/staleness": step - total / count}
