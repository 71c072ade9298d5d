"""From a config and a range of sizes to a record: what could be is planned, and some of it is made and measured."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from gkd.bench.kept import kept_result, read_json, short_name
from gkd.bench.machine import measured_with
from gkd.bench.work import Job, Workers, run_stages
from gkd.config import Config, LayerRule, load_config
from gkd.config.files import read_mapping
from gkd.digests import file_digest
from gkd.environment import prepare_process
from gkd.errors import InputError
from gkd.files import write_json
from gkd.models import model_fingerprint, resolve_model
from gkd.planning.devices import Device
from gkd.shape.candidates import Candidate, Candidates, spread
from gkd.shape.planned import Planner
from gkd.system_errors import write_fault
from gkd.train.distiller import Distiller

_VERSION = 1  # of what a result holds
_INIT = "student.init"


@dataclass(frozen=True)
class Asked:
    """A config's file with its overrides, and where results lie. `choose`: which layers a student keeps."""

    file: Path
    overrides: tuple[str, ...]
    folder: Path
    probe_steps: int
    choose: LayerRule = "divergence"
    calibration_tokens: int = 256
    config: Config = field(repr=False, kw_only=True)  # with some student

    @classmethod
    def read(cls, file: Path, overrides: Sequence[str], folder: Path, probe_steps: int) -> Asked:
        """Raises ConfigError, and InputError for a config whose student is not cut out of its teacher."""
        student = read_mapping(file, "sections such as 'run:' and 'teacher:'").get("student")
        says_which = isinstance(student, dict) and bool(student.get("init"))
        says_which |= any(override.strip().startswith(_INIT) for override in overrides)
        config = load_config(file, [*overrides, *([] if says_which else [f"{_INIT}={{layers: 1}}"])])
        _check_student(config, probe_steps)
        init = config.student.init
        assert init is not None
        choose = init.choose if "choose" in init.model_fields_set else "divergence"
        tokens = init.calibration_tokens
        return cls(file, tuple(overrides), folder, probe_steps, choose, tokens, config=config)

    def init_override(self, candidate: Candidate) -> str:
        """As `gkd train` would take it on its command line."""
        init = candidate.init(self.choose, self.calibration_tokens)
        values = init.model_dump(exclude_none=True, exclude_defaults=True)
        return f"{_INIT}={yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=math.inf).strip()}"

    def run_config(self, candidate: Candidate) -> Config:
        """The run's first steps, with the rate that it has after its warm-up, without what it measures on its way."""
        config, steps = self.config, max(1, self.probe_steps)
        follows_heldout = any(name.startswith("heldout/") for name in config.objective.followed_metrics)
        return load_config(
            self.file,
            [
                *self.overrides,
                self.init_override(candidate),
                f"run.dir={json.dumps(str(self.scratch(candidate)))}",
                f"run.steps={steps}",
                "optim.schedule=constant",
                f"optim.warmup_steps={min(config.optim.warmup_steps, steps // 4)}",
                *([] if follows_heldout else ["data.heldout=null"]),
            ],
        )

    def scratch(self, candidate: Candidate) -> Path:
        return self.folder / "runs" / candidate.name

    @cached_property
    def _common_key(self) -> str:
        """Changes with whatever decides figures, but for the candidate."""
        values = self.config.model_dump(mode="json", exclude={"eval": True, "student": {"init"}, "run": True})
        data = Path(self.config.data.train)
        train = file_digest(data) if data.is_file() else ""
        model = model_fingerprint(self.source, self.config.teacher.revision)
        return short_name(_VERSION, values, self.config.run.seed, self.probe_steps, train, model)

    def _key(self, candidate: Candidate) -> str:
        init = candidate.init(self.choose, self.calibration_tokens)
        return short_name(self._common_key, init.model_dump(mode="json"))

    @property
    def source(self) -> str:
        return resolve_model(self.config.teacher.model, revision=self.config.teacher.revision, key="teacher.model")

    def result(self, candidate: Candidate) -> Path:
        return self.folder / "results" / f"{candidate.name}-{self._key(candidate)}.json"

    def layers_result(self, candidate: Candidate) -> Path:
        return self.folder / "results" / f"layers-{candidate.layers}-{self._key(candidate)}.json"


def _check_student(config: Config, probe_steps: int) -> None:
    if config.student.model is not None:
        raise InputError("student.model: gkd shape cuts the student out of teacher.model; leave student.model out")
    if config.teacher.placement == "topk":
        raise InputError(
            "teacher.placement: of a top k there is no divergence over the vocabulary; add teacher.placement=local"
        )
    if probe_steps and not config.objective.needs_teacher:
        raise InputError("--probe-steps: no term of this objective needs the teacher to measure with; set it to 0")


def shape(
    asked: Asked,
    share: tuple[float, float],
    candidates: Candidates,
    *,
    count: int,
    picked: Candidate | None,
    device: Device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Plans all candidates within `share` and measures `count` of them, and the one that is `picked`.

    Returns the record. Results are kept in the folder: what is there is not measured again. Raises InputError before
    anything is loaded.
    """
    within = candidates.within(share)
    chosen = spread(within, count)
    if picked is not None and picked not in chosen:
        chosen.append(picked)
        within = sorted({*within, picked}, key=lambda one: (one.parameters, one.layers))
    if chosen:
        check(asked, chosen)
        say(f"{len(within)} candidates, of which {len(chosen)} are made and measured; kept in {asked.folder}")
        # one process at a time, with all threads; each candidate in a new one, so that what it held is free again
        run_stages(Workers(1, say, threads=None, is_fresh=True), stages(asked, chosen, candidates.teacher_layers))
    return recorded(asked, share, candidates, within, Planner(asked.config, device), device)


def check(asked: Asked, chosen: Sequence[Candidate]) -> None:
    """What a run would be refused for, and a folder that cannot be written. Loads no weights."""
    if (fault := write_fault(asked.folder)) is not None:
        raise fault
    for candidate in chosen:
        Distiller(asked.run_config(candidate)).check()


def stages(asked: Asked, chosen: Sequence[Candidate], teacher_layers: int) -> Iterator[Sequence[Job]]:
    """First the search for the fewest layers, which comes by all others; then the candidates."""
    shallow = [candidate for candidate in chosen if candidate.layers < teacher_layers]
    if shallow and asked.choose == "divergence":
        fewest = min(shallow, key=lambda one: one.layers)
        label = f"which layers to leave out, down to {fewest.layers} of {teacher_layers}"
        yield [Job(label, asked.layers_result(fewest), _search_layers, (asked, fewest))]
    yield [
        Job(candidate.name, asked.result(candidate), _measure, (asked, candidate), cost=0.5 + candidate.share)
        for candidate in chosen
    ]


# ---- what workers do: in processes that load torch only here


def _search_layers(asked: Asked, candidate: Candidate) -> str:
    prepare_process()
    logging.basicConfig(format="    %(message)s")
    logging.getLogger("gkd.models.layer_choice").setLevel(logging.INFO)  # a minute and more: the progress
    whole_width = Candidate(**{**asdict(candidate), "is_whole_width": True})
    found = _measured(asked, whole_width, probe_steps=0)
    write_json(asked.layers_result(candidate), found)
    return f"{found['after_cut']:.3f} nats without any training, {found['cut_s']:.0f} s"


def _measure(asked: Asked, candidate: Candidate) -> str:
    prepare_process()
    found = kept_result(asked.result(candidate), lambda: _measured(asked, candidate, asked.probe_steps))
    if "failed" in found:
        return found["failed"]
    probe = f", {found['after_probe']:.3f} after {asked.probe_steps} steps" if "after_probe" in found else ""
    return f"{found['after_cut']:.3f} nats after the cut{probe}; {found['cut_s'] + found.get('probe_s', 0.0):.0f} s"


def _measured(asked: Asked, candidate: Candidate, probe_steps: int) -> dict[str, Any]:
    from gkd.shape.measured import measure

    try:
        return measure(asked.run_config(candidate), probe_steps)
    finally:
        shutil.rmtree(asked.scratch(candidate), ignore_errors=True)


# ---- results


def recorded(
    asked: Asked,
    share: tuple[float, float],
    candidates: Candidates,
    within: Sequence[Candidate],
    planner: Planner,
    device: Device,
) -> dict[str, Any]:
    """Plain values: every candidate with its plan, and with its figures where it was measured."""
    rows: list[dict[str, Any]] = []
    for candidate in within:
        plan, result = planner.plan(candidate), asked.result(candidate)
        row = {**candidate.as_record(), "plan": None if plan is None else asdict(plan)}
        rows.append({**row, **(read_json(result) if result.exists() else {})})
    return {
        "config": str(asked.file),
        "overrides": list(asked.overrides),
        **measured_with(),
        "teacher": asked.config.teacher.model,
        "teacher_parameters": candidates.teacher_parameters,
        "teacher_layers": candidates.teacher_layers,
        "share": list(share),
        "choose": asked.choose,
        "calibration_tokens": asked.calibration_tokens,
        "probe_steps": asked.probe_steps,
        "planned_for": device.name,
        "not_planned": planner.why_not,
        "candidates": rows,
    }
