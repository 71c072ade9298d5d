"""A whole run: claim the folder, build the parts, measure, train, measure, export, summarise."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.config import Config, Launch, load_config, make_config
from gkd.data.formats import JSON_SUFFIXES, read_rows
from gkd.data.routing import check_teacher_names
from gkd.environment import local_rank_taken_back, prepare_process
from gkd.errors import RunInterruptedError
from gkd.extras import require_vllm
from gkd.files import write_atomically, write_json
from gkd.monitor import HeldoutSample, JsonlSink, Monitor, RunSummary, loss_curve, read_metrics, time_totals
from gkd.train.placements import Placements, ask_placements
from gkd.train.rank_log import rank_log
from gkd.train.run_folder import RunFolder, library_versions

if TYPE_CHECKING:
    from gkd.train.parts import Models
    from gkd.types import Rollout

_log = logging.getLogger(__name__)
Metrics = dict[str, float]


class Distiller:
    """Distils a teacher into a student as `config` says.

    `config` is a `gkd.Config`, nested plain values, or the path of a YAML file. Under torchrun or the deepspeed
    launcher every process makes one and calls `train`. Raises ConfigError at once for a config that cannot run.
    """

    def __init__(self, config: Config | Mapping[str, Any] | str | Path) -> None:
        if isinstance(config, str | Path):
            config = load_config(config)
        elif not isinstance(config, Config):
            config = make_config(config)
        self.config: Config = config
        self._launch = Launch.from_environment()
        config.check_world_size(self._launch.world_size)

    def train(self, *, resume: bool = False, overwrite: bool = False) -> RunSummary:
        """Runs to `run.steps` and returns what came of it; the student is in `<run folder>/final`.

        `resume` goes on from the newest checkpoint of the run folder, `overwrite` replaces what is in it.
        Raises a `gkd.errors.GkdError`: InputError before anything expensive has started, RunError after. On SIGUSR1
        it finishes the step, saves a checkpoint and raises RunInterruptedError.
        """
        started = time.monotonic()
        prepare_process()
        self._check_packages()
        self._check_data()
        with closing(ask_placements(self.config)) as placements:
            folder = RunFolder(self.config.run.folder)
            if self._launch.is_main:
                folder.open(self.config, resume=resume, overwrite=overwrite)
            try:
                with rank_log(folder.logs, self._launch.rank, append=resume), local_rank_taken_back():
                    return self._train(folder, placements, resume, started)
            finally:
                folder.close()

    def end_process(self) -> None:
        """Leaves the process group, after a last barrier. One rank of several does not return from this."""
        from gkd.train import distributed

        distributed.end_process()

    def check(self) -> None:
        """Checks what can be checked without torch: that vLLM is there if it samples, the data files, and the servers
        of a served teacher or sampler.

        Raises MissingPackageError, DataError with file:line, or ConfigError.
        """
        self._check_packages()
        self._check_data()
        ask_placements(self.config).close()

    def _check_packages(self) -> None:
        rollout = self.config.rollout
        if rollout.engine == "vllm" and rollout.placement == "local":
            require_vllm("rollout.engine", "or set it to transformers")

    def _check_data(self) -> None:
        data = self.config.data
        for key, path, split in (
            ("data.train", data.train, data.train_split),
            ("data.heldout", data.heldout, data.heldout_split),
        ):
            if path is not None and path.endswith(JSON_SUFFIXES):
                rows = read_rows(path, split, key=key, teacher_column=data.teacher_column)
                check_teacher_names(rows, self.config.teachers, data.teacher_column)

    def _train(self, folder: RunFolder, placements: Placements, resume: bool, started: float) -> RunSummary:
        from gkd.train import distributed, parts  # torch and DeepSpeed load here, after the cheap checks

        config, launch = self.config, self._launch
        distributed.initialize(launch)
        parts.check_precision(config, launch.world_size)
        start_step = parts.resume_step(config, folder, launch, _log.warning) if resume else 0
        models = parts.locate_models(config, folder, launch, placements)
        prompts = parts.load_data(config, models)
        with Monitor(
            config, folder.path, is_main=launch.is_main, decode=models.decode, start_step=start_step
        ) as monitor:
            monitor.note(_describe_data(prompts.train.counts, prompts.heldout and prompts.heldout.counts))
            run = _Run(config, launch, folder, monitor, placements, models, prompts)
            run.start(start_step)
            run.loop()
            return run.finish(started)


class _Run:
    """The parts of one run. They are built in the order of what fails first; what takes most memory comes last."""

    def __init__(
        self,
        config: Config,
        launch: Launch,
        folder: RunFolder,
        monitor: Monitor,
        placements: Placements,
        models: Models,
        prompts: Any,
    ) -> None:
        from gkd.train import parts
        from gkd.train.interruption import Interruption

        self.config, self.launch, self.folder = config, launch, folder
        self.monitor, self.models, self.prompts = monitor, models, prompts
        self.data = parts.prompt_data(config, prompts, launch)
        self.texts = parts.teacher_texts(config, models, prompts, self.data, launch, monitor.note)
        monitor.note(f"starting the sampler ({config.rollout.engine}), the student (DeepSpeed) and the teacher")
        self.sampler = parts.build_sampler(config, models, prompts, launch, placements.sampler)
        self.student = parts.build_student(config, models, launch, monitor.phase)
        self.teacher = parts.build_teacher(config, models, launch, placements)
        self.heldout = parts.build_heldout(
            config, models, prompts, self.texts, teacher=self.teacher, student=self.student, launch=launch
        )
        writes_positions = launch.is_main and self.heldout is not None
        self.positions = JsonlSink(folder.positions) if writes_positions else None
        self.answer_scoring = parts.build_answer_scoring(config, models, teacher=self.teacher, student=self.student)
        self.checkpoints = parts.build_checkpoints(config, folder, launch, self.student)
        self.interruption = Interruption()

    def start(self, start_step: int) -> None:
        """Loads a checkpoint on a resume, gives the sampler the student's weights, and measures the start."""
        if start_step:
            self.checkpoints.load(start_step)
            self.monitor.note(f"resumed at step {start_step}")
        self.sampler.load_weights(self.student.weights(), version=start_step)
        if self.positions is not None:
            self.positions.truncate_after(start_step or -1)  # a new run measures step 0 again
        if start_step == 0:
            before = self._snapshot(0, self.folder.tokens_before)
            if self.launch.is_main:
                write_json(self.folder.before, before)

    def loop(self) -> None:
        from gkd.train import parts
        from gkd.train.loop import train_loop

        rollouts = parts.build_rollouts(self.config, self.models, self.sampler, self.texts, self.data)
        try:
            train_loop(
                data=self.data,
                rollout=rollouts,
                teacher=self.teacher,
                student=self.student,
                pack=parts.packer(self.config, self.models, self.config.objective.reduction),
                measure=_measure,
                evaluate=self._evaluate,
                monitor=self.monitor,
                save=self._save,
            )
        except BaseException:
            rollouts.close()  # or it would go on sampling for later steps
            raise

    def _save(self, steps_done: int) -> None:
        """A checkpoint where one is due. Raises RunInterruptedError after one if the run was asked to stop."""
        if steps_done < self.config.run.steps and self.interruption.is_requested():
            saved = self.checkpoints.save(steps_done)
            raise RunInterruptedError(f"stopped after step {steps_done}, saved in {saved}; go on with --resume")
        self.checkpoints.maybe_save(steps_done)

    def finish(self, started: float) -> RunSummary:
        """Measures the end, writes the result and the summary, and stops the sampler. Collective."""
        after = self._snapshot(self.config.run.steps, self.folder.tokens_after)
        before = json.loads(self.folder.before.read_text()) if self.launch.is_main else after
        summary = self._summarise(before, after, time.monotonic() - started)
        self._export(summary)
        if self.launch.is_main:
            summary.write_summary_json(self.folder.summary)
            summary.write_samples_markdown(self.folder.samples)
        if self.positions is not None:
            self.positions.close()
        self.sampler.close()
        return summary

    def _snapshot(self, steps_done: int, tokens_path: Path) -> dict[str, Any]:
        """Held-out divergences, and on the main rank greedy answers to a few held-out prompts. Collective.

        The answers go into `tokens_path`, token by token.
        """
        heldout = self._measure_heldout(steps_done)
        answers = self._answers()
        self._score_answers(answers, tokens_path)
        return {"heldout": heldout, "answers": [self._text(ids) for ids in answers]}

    def _measure_heldout(self, steps_done: int) -> Metrics:
        """The means; what they are made of by position goes into the run folder."""
        if self.heldout is None:
            return {}
        figures = self.heldout.measure()
        if self.positions is not None and any(figures.tokens):
            self.positions.log(steps_done, figures.as_record())
        return figures.means

    def _score_answers(self, answers: Sequence[Sequence[int]], path: Path) -> None:
        from gkd.evaluate.samples import answer_rollouts

        if not self._shown_prompts():
            return
        scored = self.answer_scoring.measure(answer_rollouts(self._shown_prompts(), answers))
        if self.launch.is_main:
            write_atomically(path, scored.model_dump_json().encode())

    def _shown_prompts(self) -> Sequence[Any]:
        return () if self.prompts.heldout is None else self.prompts.heldout.prompts[: self.config.eval.samples]

    def _answers(self) -> list[Sequence[int]]:
        """The main rank's; the others ask for none, but an engine may span several ranks."""
        from gkd.train import parts

        shown = self._shown_prompts() if self.launch.is_main else ()
        requests, settings = parts.shown_requests(self.config, self.models, shown)
        return [c.token_ids for c in self.sampler.generate(requests, settings)]

    def _text(self, token_ids: Sequence[int]) -> str:
        return self.models.decode(token_ids, skip_special_tokens=True).strip()

    def _evaluate(self, steps_done: int) -> Metrics:
        every = self.config.eval.every
        due = every and steps_done % every == 0 and steps_done < self.config.run.steps
        return self._measure_heldout(steps_done) if due else {}

    def _summarise(self, before: dict[str, Any], after: dict[str, Any], wall_s: float) -> RunSummary:
        from gkd.train import parts

        records = read_metrics(self.folder.metrics) if self.launch.is_main else []
        requests, _ = parts.shown_requests(self.config, self.models, self._shown_prompts())
        teacher_answers = [self._text(self.texts.greedy.get(request).token_ids) for request in requests]
        texts = zip(self._shown_prompts(), teacher_answers, before["answers"], after["answers"], strict=False)
        gkd = _command()
        return RunSummary(
            name=self.config.run.name,
            steps=self.config.run.steps,
            wall_s=wall_s,
            heldout={
                name.replace("/", "_"): (before["heldout"][name], value) for name, value in after["heldout"].items()
            },
            time_s=time_totals(records),
            samples=tuple(HeldoutSample(prompt.text, *answers) for prompt, *answers in texts),
            losses=loss_curve(records),
            final_folder=str(self.folder.final),
            next_commands=(
                f"{gkd} generate {self.folder.final} --prompt 'List three uses for a paper clip.'",
                f"{gkd} eval {self.folder.config} --student {self.folder.final}",
                f"less {self.folder.samples}",
            ),
        )

    def _export(self, summary: RunSummary) -> None:
        """Every rank scores and streams, as gathering is collective; the main rank writes and proves."""
        from gkd.models import ModelCard, Probe, save_final
        from gkd.rollout.sync import probe_prompt

        probe_ids = probe_prompt(prompt.token_ids for prompt in self.prompts.train.prompts)
        probe = Probe(probe_ids, self.student.token_logprobs(probe_ids, 1), self.config.sync_tolerance)
        weights, adapter = self.student.whole_weights(), self.student.adapter_weights()
        if not self.launch.is_main:
            for _ in itertools.chain(weights, adapter):
                pass
            return
        config = self.config
        card = ModelCard(
            teacher=", ".join(teacher.model for teacher in config.teachers.values()),
            student=config.student.model or f"{config.student.init} of the teacher",
            objective=config.objective.model_dump(mode="json"),
            mixture=config.mixture.model_dump(mode="json"),
            data=config.data.train,
            steps=config.run.steps,
            versions=library_versions(),
            lora=config.student.lora,
            heldout=summary.heldout,
        )
        path, dtype = self.models.student_path, config.student.dtype
        save_final(self.folder.final, weights, path, dtype, card, probe=probe, adapter=adapter)


def _measure(rollouts: Sequence[Rollout]) -> Metrics:
    """What the step's samples were, over all ranks."""
    from gkd.rollout.mixture import mixture_counts
    from gkd.train.distributed import sum_all

    counts = mixture_counts(rollouts)
    generated = sum(len(r.completion_ids) for r in rollouts if r.source == "student")
    total_generated, *realised = sum_all([generated, *counts.values()])
    total = max(1.0, sum(realised))
    return {
        "tokens/generated": total_generated,
        **{f"mixture/{source}": count / total for source, count in zip(counts, realised, strict=True)},
    }


def _command() -> str:
    """What a shell takes for gkd: its path, where the virtual environment is not active."""
    if shutil.which("gkd"):
        return "gkd"
    path = Path(sys.executable).parent / "gkd"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _describe_data(train: Mapping[str, int], heldout: Mapping[str, int] | None) -> str:
    def words(counts: Mapping[str, int]) -> str:
        dropped = {k: v for k, v in counts.items() if k.startswith("dropped") and v}
        return f"{counts['kept']} of {counts['rows']} rows" + (f" ({dropped})" if dropped else "")

    return f"data: train {words(train)}" + (f", held-out {words(heldout)}" if heldout else "")
