"""What a run tells while it goes on: one record a step to every sink, and a line or a bar for people."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.text import Text

from gkd.config import Config, Launch
from gkd.files import write_atomically
from gkd.monitor.first_batch import first_batch_text, render_first_batch, scored_tokens
from gkd.monitor.metrics import MetricValue, merge_metrics
from gkd.monitor.pulse import Pulse
from gkd.monitor.sinks import JsonlSink, MetricSink, OptionalSink, TensorBoardSink, WandbSink
from gkd.monitor.terminal import QuietProgress, RunProgress, TerminalProgress
from gkd.monitor.timing import PhaseTimer
from gkd.run_files import RunFiles
from gkd.types import Decode, Rollout, TokenBatch

PHASE_LOGGER = "gkd.phases"  # says where a rank is; for a file, not for the terminal
_log = logging.getLogger(PHASE_LOGGER)


class Monitor:
    """Times the steps of a run and reports them; a context manager, so that the terminal is always given back.

    `start_step` is the first step that is run: what metrics.jsonl holds of it and later ones is dropped, as they
    are done again. Ranks that are not main only time. `decode` turns ids into text and keeps special tokens.
    `synchronize` is `PhaseTimer`'s.
    """

    def __init__(
        self,
        config: Config,
        run_folder: str | Path,
        *,
        is_main: bool,
        decode: Decode,
        start_step: int = 0,
        console: Console | None = None,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._config, self._files = config, RunFiles(Path(run_folder))
        self._is_main, self._start_step, self._decode = is_main, start_step, decode
        self._timer = PhaseTimer(synchronize=synchronize)
        self._last_step = start_step - 1
        self._step = start_step  # being done
        self._first_batch_shown = False
        self._progress: RunProgress = (
            TerminalProgress(config.run.steps, start_step, console) if is_main else QuietProgress()
        )
        self._pulse = Pulse(self._progress.note)
        self._sinks: list[MetricSink] = self._make_sinks() if is_main else []

    def steps(self) -> Iterator[int]:
        """The steps still to do, with the progress on show; it ends with the loop, however that ends."""
        self._progress.start()
        self._timer.start()
        try:
            for step in range(self._start_step, self._config.run.steps):
                self._step = step
                yield step
        finally:
            self._progress.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block as one of `timing.PHASES`. An error says in which of them it came, and on which rank."""
        _log.debug("step %d: %s", self._step, name)
        self._progress.phase(name)
        self._pulse.task(f"step {self._step + 1}, {name}")
        try:
            with self._timer.phase(name):
                yield
        except Exception as error:
            error.add_note(f"rank {Launch.from_environment().rank}, step {self._step}, phase {name}")
            raise
        finally:
            self._progress.phase(None)

    def log(self, step: int, *metrics: Mapping[str, MetricValue]) -> dict[str, MetricValue]:
        """Ends the step: one record of all groups of `metrics`, the time split and the speeds, to every sink.

        Returns the record (the time split alone on a rank that is not main). Raises ValueError for a metric that
        is unknown, no plain value, or there twice with different values, for a missing `loss`, and for a step
        that was logged already; OSError if metrics.jsonl cannot be written.
        """
        timing = self._timer.finish_step()
        if not self._is_main:
            return dict(timing)
        if step <= self._last_step:
            raise ValueError(f"step {step} is logged after step {self._last_step}")
        record = merge_metrics({"step": step}, *metrics)
        if "loss" not in record:
            raise ValueError(f"the metrics of step {step} have no loss")
        record = merge_metrics(record, _speeds(record, timing), timing)
        self._last_step = step
        for sink in self._sinks:
            sink.log(step, record)
        self._progress.update(step, record)
        self._pulse.heard()
        return record

    def note(self, text: str | Text) -> None:
        """Says something on the main rank, above the bar or as a line. A string is plain text, never markup."""
        self._progress.note(text)
        self._pulse.task(str(text))
        self._pulse.heard()

    def first_batch(self, rollouts: Sequence[Rollout], micro_batches: Sequence[TokenBatch]) -> None:
        """Shows the first batch that it is given, once, and keeps it in samples/first_batch.txt.

        What is coloured is what `micro_batches` really score, so that a mistake in packing shows. Does nothing with
        `log.show_first_batch` off, or on a rank that is not main.
        """
        if self._first_batch_shown or not self._is_main or not self._config.log.show_first_batch:
            return
        self._first_batch_shown = True
        scored = scored_tokens(rollouts, micro_batches)
        plain = first_batch_text(rollouts, self._decode, scored=scored)
        write_atomically(self._files.first_batch, plain.encode("utf-8"))
        colours = isinstance(self._progress, TerminalProgress) and self._progress.console.color_system is not None
        self.note(render_first_batch(rollouts, self._decode, scored=scored) if colours else plain.rstrip("\n"))

    @property
    def time_totals(self) -> dict[str, float]:
        """`time/*_s` summed over the steps of this process."""
        return self._timer.totals

    def close(self) -> None:
        """Ends the progress and closes all sinks; may be called twice."""
        self._pulse.stop()
        self._progress.stop()
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()

    def __enter__(self) -> Monitor:
        if isinstance(self._progress, TerminalProgress) and not self._progress.draws:
            self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _make_sinks(self) -> list[MetricSink]:
        config, files = self._config, self._files
        lines = JsonlSink(files.metrics)
        lines.truncate_after(self._start_step - 1)
        sinks: list[MetricSink] = [lines]
        if config.log.tensorboard:
            events = partial(TensorBoardSink, files.tensorboard, self._start_step)
            sinks.append(OptionalSink("TensorBoard", events, self.note))
        if config.log.wandb:
            service = partial(WandbSink, files.path, config.run.name, config.model_dump(mode="json"))
            sinks.append(OptionalSink("W&B", service, self.note))
        return sinks


def _speeds(record: Mapping[str, MetricValue], timing: Mapping[str, float]) -> dict[str, float]:
    """Tokens a second; 0 where no time was measured, none where there is no count."""
    speeds: dict[str, float] = {}
    for tokens, seconds in (("tokens/scored", "time/step_s"), ("tokens/generated", "time/sample_s")):
        count = record.get(tokens)
        if isinstance(count, (int, float)):
            speeds[f"{tokens}_per_s"] = count / timing[seconds] if timing[seconds] > 0 else 0.0
    return speeds
