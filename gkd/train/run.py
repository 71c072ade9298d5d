"""One run, assembled: its parts in the order of what fails first, then measured, trained, measured and exported."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from gkd.config import Config, Launch
from gkd.config.training import TrainingSettings
from gkd.errors import CollapseError, PartError, RunInterruptedError, StepRefusedError, StorageError
from gkd.files import write_atomically, write_json
from gkd.monitor import Monitor, RunSummary, read_metrics
from gkd.rollout.sync import SyncedSampler
from gkd.run_files import RunFiles
from gkd.system_errors import system_errors
from gkd.teacher.base import Teacher
from gkd.teacher.unasked import Unasked
from gkd.train import parts
from gkd.train.collapse import CollapseWatch
from gkd.train.engine import StudentEngine
from gkd.train.interruption import Interruption
from gkd.train.loop import Metrics, train_loop
from gkd.train.mean_weights import FollowedStudent
from gkd.train.placements import Placements
from gkd.train.result import export, model_card, resume_command, summarise
from gkd.train.run_folder import check_inputs
from gkd.train.signals import Signals
from gkd.train.snapshots import read_snapshot
from gkd.types import Rollout

_log = logging.getLogger(__name__)


class Run:
    """The parts of a run, and their order. `gkd.Distiller` makes it after the cheap checks, and runs it as it is.

    A benchmark or a test with a monitor, sampler, student or teacher of its own overrides the method that builds it.
    `build` and `loop` alone are a run that measures and writes nothing at its ends.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        folder: RunFiles,
        placements: Placements,
        *,
        begin: Callable[[], None] = lambda: None,
        run_id: str = "",
        signals: Signals | None = None,
        resume: bool = False,
    ) -> None:
        """Finds checkpoint and models, reads the data and takes the sampler; loads no weights. Raises InputError.
        Collective, in the process group that `distributed.initialize` has made.

        `begin` is called when all of that is known to be good, before anything is written into `folder`. `run_id`, the
        main rank's, is what servers know the run by; "" is one that nobody has. `signals` are those that stop it.
        """
        self.signals = signals or Signals(config.run.term_grace_s)
        self.config, self.launch, self.folder, self.placements = config, launch, folder, placements
        parts.check_same_settings(config)
        parts.check_deepspeed(TrainingSettings.of(config), launch.world_size)
        self.start_step = parts.resume_step(config, folder, launch, _log.warning) if resume else 0
        self.steps_done = self.start_step
        self.models = parts.locate_models(config, folder, launch, placements)
        self.prompts = parts.load_data(config, self.models)
        for line in parts.audit_tokenizers(config, self.models, self.prompts):
            _log.info(line)
        self.conversations = parts.build_conversations(config, self.models, self.prompts)
        parts.take_sampler(config, folder, launch, placements.sampler, run_id)
        begin()
        parts.make_student(config, self.models, self.prompts, launch)
        if launch.is_main:
            if self.start_step:
                read_snapshot(folder.before)  # the end needs it
            check_inputs(folder, parts.run_inputs(config, self.models, self.prompts), resume=resume)
        self.monitor = self.build_monitor()

    def train(self, started: float) -> RunSummary:
        """All of it. `started` is `time.monotonic` of the beginning."""
        with self.monitor:
            self.monitor.note(self.prompts.description)
            try:
                self.build()
                self.start()
                with system_errors(StorageError):
                    self.loop()
                    return self.finish(started)
            except PartError as error:
                if self.config.fails_apart or self.launch.world_size == 1:  # else it may be on this rank alone
                    self.stop(error)
                raise

    # ---- parts

    def build(self) -> None:
        """Everything that training needs; what takes most memory comes last. The student is in the sampler then."""
        config, models, launch = self.config, self.models, self.launch
        self.data = parts.prompt_data(config, self.prompts, launch)
        self.texts = parts.teacher_texts(config, models, self.prompts, self.data, launch, self.monitor.note)
        self.monitor.note(f"starting the sampler ({config.rollout.engine}), the student (DeepSpeed) and the teacher")
        self.sampler = self.build_sampler()
        room = partial(parts.room_of_texts, config)
        self.watch = CollapseWatch(config.run.collapse, is_main=launch.is_main, room=room)
        self.student = self.build_student()
        self.means = parts.build_means(config, models, launch, self.student)
        self.teacher = self.build_teacher()
        self.pack = parts.step_packer(config, models)
        self.rollouts = parts.build_mixture(
            config, models, self.prompts, self.sampler, self.texts, self.teacher, self.conversations
        )
        sources = parts.SourceStates(self.rollouts, launch.rank)
        self.checkpoints = parts.build_checkpoints(
            config, self.folder, launch, self.student, sources, self.watch, *self.means.values()
        )
        self.interruption = Interruption(self.signals)
        if self.start_step:
            self.checkpoints.load(self.start_step)
            self.monitor.note(f"resumed at step {self.start_step}")
        self.sampler.load_weights(self.student.weights(), version=self.start_step)

    def build_monitor(self) -> Any:
        """What the loop asks of a monitor, with `note`; `train` also takes it for a context manager."""
        config, decode = self.config, self.models.decode
        return Monitor(config, self.folder.path, is_main=self.launch.is_main, decode=decode, start_step=self.start_step)

    def build_sampler(self) -> SyncedSampler:
        return parts.build_sampler(self.config, self.models, self.prompts, self.launch, self.placements.sampler)

    def build_student(self) -> StudentEngine:
        phase, watch = self.monitor.phase, self.watch.observe
        return parts.build_student(self.config, self.models, self.prompts, self.launch, phase, watch)

    def build_teacher(self) -> Teacher:
        config, models, launch = self.config, self.models, self.launch
        return parts.build_teacher(config, models, launch, self.placements, self.student, self.means)

    # ---- from start to end

    def start(self) -> None:
        """Measures the student as it is before the first step."""
        self.snapshots = parts.build_snapshots(
            self.config,
            self.models,
            self.prompts,
            self.texts,
            self.folder,
            self.launch,
            sampler=self.sampler,
            teacher=self.teacher,
            student=self.student,
            start_step=self.start_step,
            conversations=self.conversations,
        )
        if self.start_step == 0:
            self.monitor.note("measuring the student before the first step")
            before = self.snapshots.take(0, self.folder.tokens_before)
            if self.launch.is_main:
                write_json(self.folder.before, before._asdict())

    def loop(self) -> None:
        rollouts = parts.ahead_of_training(self.config, self.rollouts, self.data)
        if self.config.fails_apart:
            rollouts = parts.SharedRollouts(rollouts, self.interruption.because_of)
        try:
            with self.signals.deferred():
                train_loop(
                    data=self.data,
                    rollout=rollouts,
                    teacher=self.teacher if self.config.objective.needs_teacher else Unasked(),
                    student=FollowedStudent(self.student, self.means) if self.means else self.student,
                    pack=self.pack,
                    measure=self.measure,
                    evaluate=self.evaluate,
                    monitor=self.monitor,
                    save=self.save,
                )
        except BaseException as error:
            rollouts.close()  # or it would go on sampling for later steps
            if isinstance(error, StepRefusedError) and error.step > self.start_step:
                saved = self.checkpoints.save_beside(error.step)
                self.monitor.note(f"the student as it was before step {error.step} is saved in {saved}")
            raise

    def finish(self, started: float) -> RunSummary:
        """Writes the student, measures it as it is now, writes the summary, and stops the sampler."""
        config, folder, is_main = self.config, self.folder, self.launch.is_main
        self.monitor.note(f"writing the student to {folder.final}, and measuring it")
        if self.sampler.weights_version is None:  # a sync would have measured it, where it had grown
            self.sampler.measure_rounding(self.student.weights(), config.run.steps)
        export(  # before anything else can fail
            config,
            folder.final,
            self.student,
            origin=self.models.student_path,
            probe_ids=parts.probe_texts(config, self.models, self.prompts)(config.run.steps),
            tolerance=self.sampler.tolerance,
            end_token_ids=self.models.stop_token_ids,
            is_main=is_main,
        )
        if self.interruption.error is not None:
            raise self.interruption.error
        self.catch_up(config.run.steps)
        after = self.snapshots.take(config.run.steps, folder.tokens_after)
        summary = summarise(
            config,
            folder,
            records=read_metrics(folder.metrics) if is_main else (),
            before=read_snapshot(folder.before) if is_main else after,
            after=after,
            shown=parts.shown_texts(config, self.models, self.prompts, self.texts),
            wall_s=time.monotonic() - started,
        )
        if is_main:
            write_atomically(folder.final / "README.md", model_card(config, summary.heldout).render().encode())
            summary.write_summary_json(folder.summary)
            summary.write_samples_markdown(folder.samples)
        self.snapshots.close()
        self.sampler.close()
        return summary

    def catch_up(self, steps_done: int) -> None:
        """Sends the weights to a sampler that fell behind, as no step would have sampled from them. Collective."""
        if self.sampler.weights_version is None:
            self.sampler.load_weights(self.student.weights(), version=steps_done)

    def stop(self, error: PartError | None = None) -> NoReturn:
        """Saves what was trained and raises RunInterruptedError, with the command that goes on; or `error`, if that
        is for good. Collective."""
        done = self.steps_done
        saved = "nothing was trained since the start"
        if done > self.start_step:
            saved = f"saved in {self.checkpoints.save(done)}"
        reason = f" ({error})" if error is not None else ""
        if error is not None and not error.is_temporary:
            error.add_note(f"stopped after step {done}, {saved}")
            raise error
        launcher = "" if self.launch.world_size == 1 else " under the same launcher"
        raise RunInterruptedError(
            f"stopped after step {done}{reason}, {saved}; go on{launcher} with: {resume_command(self.folder)}"
        ) from error

    # ---- what the loop calls beside the parts

    def measure(self, rollouts: Sequence[Rollout]) -> Metrics:
        """Of a step's samples, over all ranks."""
        return self._observed(parts.describe_samples(rollouts, self.config.mixture, self.models.stop_token_ids))

    def evaluate(self, steps_done: int) -> Metrics:
        """The held-out divergences where they are due; those of the start and the end are in the summary."""
        every = self.config.eval.every
        if not (every and steps_done % every == 0 and steps_done < self.config.run.steps):
            return {}
        self.sampler.measure_rounding(self.student.weights(), steps_done)
        try:
            return self._observed(self.snapshots.heldout(steps_done))
        except PartError as error:
            if not self.config.has_servers:
                raise
            self.interruption.because_of(error)
            return {}

    def _observed(self, metrics: Metrics) -> Metrics:
        """What is logged of a step besides the student's own metrics: schedules may follow it."""
        self.student.observe(metrics)
        return metrics

    def save(self, steps_done: int) -> None:
        """A checkpoint where one is due. Stops after one if the run was asked to, by a signal or on a collapse."""
        self.steps_done = steps_done
        if (collapse := self.watch.judge(steps_done)) is not None and self.config.run.stop_on == "collapse":
            saved = self.checkpoints.save_beside(steps_done)  # what was good is among the older ones
            raise CollapseError(
                f"run.stop_on: after step {steps_done} {collapse}; the student as it is now is saved in {saved}, "
                "beside the checkpoints before it; to go on all the same, "
                f"{resume_command(self.folder)} run.stop_on=null"
            )
        if not self.interruption.is_requested():
            self.checkpoints.maybe_save(steps_done)
        elif steps_done == self.config.run.steps:
            self.checkpoints.save(steps_done)  # and the end goes on, as long as there is time
        elif self.interruption.error is not None:
            raise self.interruption.error
        else:
            self.stop()
