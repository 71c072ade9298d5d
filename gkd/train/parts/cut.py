"""The student that is made of a part of a model: which part, and where that is kept."""

from __future__ import annotations

import json
import logging
import tempfile
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from gkd.config import Config, Launch, StudentInit, StudentWidth, cache_folder
from gkd.digests import digest
from gkd.files import write_json
from gkd.models import (
    LayerChoice,
    WidthChoice,
    choose_by_measure,
    choose_width,
    forward_kl,
    is_made_by,
    local_folder,
    make_narrower,
    make_student_from_layers,
    model_fingerprint,
    record_width,
    recorded_choice,
)
from gkd.train.distributed import barrier, compute_device
from gkd.train.parts.data import Prompts
from gkd.train.parts.models import Models, source_revision

_log = logging.getLogger(__name__)
_KEY = "student.init"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # never measured, or damaged
T = TypeVar("T")


def make_student(config: Config, models: Models, prompts: Prompts, launch: Launch) -> None:
    """Cuts the student out, where the config says so. Raises ModelError. Collective; the main rank does it."""
    init = config.student.init
    if init is not None and launch.is_main:
        source = local_folder(models.student_source, revision=source_revision(config), key=_KEY)
        maker = _Maker(init, source, config.student.dtype, prompts.calibration, launch)
        if init.width is None:
            maker.of_layers(Path(models.student_path))
        else:
            maker.narrower(init.width, Path(models.student_path))
    barrier()


class _Maker:
    """Makes the student of `init` from the model in `source`; `texts` are the token ids that it is measured on."""

    def __init__(
        self, init: StudentInit, source: Path, dtype: str, texts: Sequence[tuple[int, ...]], launch: Launch
    ) -> None:
        self._init, self._source, self._texts = init, source, texts
        self._dtype, self._device = dtype, compute_device(launch)

    def of_layers(self, target: Path) -> None:
        init = self._init
        if not init.is_measured:
            assert init.layers is not None
            make_student_from_layers(self._source, init.layers, target)
            return
        rule = self._rule(choose=init.choose, count=init.layers)
        choice = recorded_choice(target, rule)  # of a run that goes on: even if the cache is gone
        if choice is None:
            read, written = LayerChoice.from_record, LayerChoice.as_record
            choice = self._cached("cuts", rule, read, written, lambda: self._choose_layers(rule))
        _log.info(
            "%s keeps layers %s of %d: %.3f nats a token from the whole model, on %d tokens of data.train's prompts",
            init.choose, list(choice.layers), len(choice.layers) + len(choice.removed), choice.forward_kl,
            init.calibration_tokens,
        )  # fmt: skip
        make_student_from_layers(self._source, choice.layers, target, chosen={**rule, **choice.as_record()})

    def narrower(self, width: StudentWidth, target: Path) -> None:
        """The layers first, in a folder of their own, and then its width."""
        init = self._init
        rule = self._rule(choose=init.choose, layers=init.layers, width=width.model_dump())
        if is_made_by(target, rule):
            return
        with ExitStack() as stack:
            folder = self._source
            if init.layers is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent))) / "layers"
                self.of_layers(folder)
            choice = self._width_of(folder, width, rule)
            make_narrower(folder, width, choice, target)
            figure = forward_kl(self._source, target, self._texts, dtype=self._dtype, device=self._device, key=_KEY)
            record_width(folder, target, rule, choice, figure)
        _log.info(
            "a student of %s: %.3f nats a token from the whole model, on %d tokens of data.train's prompts",
            width.describe(), figure, init.calibration_tokens,
        )  # fmt: skip

    def _width_of(self, folder: Path, width: StudentWidth, rule: dict[str, Any]) -> WidthChoice:
        def measure() -> WidthChoice:
            return choose_width(folder, width, self._texts, dtype=self._dtype, device=self._device)

        return self._cached("widths", rule, WidthChoice.from_record, WidthChoice.as_record, measure)

    def _rule(self, **asked: Any) -> dict[str, Any]:
        """What decides a choice besides the texts."""
        return {
            **asked,
            "calibration_tokens": self._init.calibration_tokens,
            "dtype": self._dtype,
            "source_fingerprint": model_fingerprint(self._source, key=_KEY),
        }

    def _cached(
        self,
        kind: str,
        rule: dict[str, Any],
        read: Callable[[dict[str, Any]], T],
        written: Callable[[T], dict[str, Any]],
        measure: Callable[[], T],
    ) -> T:
        """From the cache, or measured now."""
        file = self._file(kind, rule)
        try:
            return read(json.loads(file.read_text(encoding="utf-8")))
        except _UNREADABLE:
            pass
        choice = measure()
        write_json(file, written(choice))
        return choice

    def _file(self, kind: str, rule: dict[str, Any]) -> Path:
        numbers = [array("q", (len(ids), *ids)) for ids in self._texts]
        name = digest(json.dumps(rule, sort_keys=True).encode(), *numbers).hex()
        return cache_folder() / kind / f"{name}.json"

    def _choose_layers(self, rule: dict[str, Any]) -> LayerChoice:
        """A greedy search leaves in the cache also what it came by: students of more layers need none of their own."""
        assert isinstance(self._init.layers, int)
        choice = choose_by_measure(
            self._source,
            self._init.choose,
            self._init.layers,
            self._texts,
            dtype=self._dtype,
            device=self._device,
            key=_KEY,
        )
        if self._init.choose == "divergence":
            for larger in choice.on_the_way():
                write_json(self._file("cuts", {**rule, "count": len(larger.layers)}), larger.as_record())
        return choice
