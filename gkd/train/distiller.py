"""The public entrance to a run: a config, the checks that cost nothing, and who may use the folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.config import Config, Launch, Settled, advice, advice_on_share, load_config, make_config
from gkd.data.encoding import RowEncoder
from gkd.data.formats import Row, read_rows
from gkd.data.prompts import texts_of
from gkd.data.routing import check_teacher_names, row_teachers
from gkd.data.sources import JSON_SUFFIXES
from gkd.data.tasks import check_tasks
from gkd.data.templates import ChatTemplate
from gkd.data.turns import TurnEncoder
from gkd.data.views import RowReaders, check_row_views, check_teaches
from gkd.environment import local_rank_taken_back, prepare_process
from gkd.errors import MachineError
from gkd.extras import require_vllm
from gkd.monitor import RunSummary
from gkd.monitor.side_by_side import side_by_side
from gkd.planning.settled import settle_here
from gkd.system_errors import system_errors, write_fault
from gkd.train.placements import ask_placements
from gkd.train.run_folder import claimed_folder, started_with
from gkd.train.signals import Signals
from gkd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from gkd.models import Side, TokenizerPair


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

    @system_errors(MachineError)
    def train(self, *, resume: bool = False, overwrite: bool = False) -> RunSummary:
        """Runs to `run.steps` and returns what came of it; the student is in `<run folder>/final`.

        `resume` goes on from the newest checkpoint of the run folder, `overwrite` moves the run that it holds to
        `<run folder>/previous`.
        Raises a `gkd.errors.GkdError`: InputError before anything expensive has started, RunError after. On SIGUSR1
        and SIGTERM it finishes the step, saves a checkpoint and raises RunInterruptedError.
        """
        started = time.monotonic()
        prepare_process()
        self._check_packages()
        self._check_data()
        settled, launch = self.settle(resume=resume), self._launch
        config = settled.config
        with (
            closing(ask_placements(config)) as placements,
            claimed_folder(config, launch, resume=resume, overwrite=overwrite) as folder,
            local_rank_taken_back(),
            (signals := Signals(config.run.term_grace_s, folder.write_exit)).heeded(),
        ):
            from gkd.train import distributed  # DeepSpeed loads here, after the cheap checks
            from gkd.train.run import Run

            if launch.is_main:
                settled.say()
            distributed.initialize(launch)
            begin, run_id = folder.begin, folder.run_id
            with distributed.ranks_heard(launch, config.run.silent_rank_s, partial(signals.end_process, 1)):
                run = Run(
                    config, launch, folder, placements, begin=begin, run_id=run_id, signals=signals, resume=resume
                )
                return run.train(started)

    def settle(self, *, resume: bool = False) -> Settled:
        """The config without `auto`: what the run that is resumed was started with, else what suits the device.

        Loads torch, which knows what GPUs there are.
        """
        kept = started_with(self.config) if resume else {}
        return settle_here(self.config, self._launch.local_rank, self._launch.world_size, kept)

    def end_process(self) -> None:
        """Leaves the process group, after a last barrier. One rank of several does not return from this."""
        from gkd.train import distributed

        distributed.end_process()

    @system_errors(MachineError)
    def check(self, *, resume: bool = False) -> list[str]:
        """Checks what can be checked without loading weights: that vLLM is there if it samples, the data files, the
        run's folder, the DeepSpeed JSON, the servers of a served teacher or sampler, and the folders of models that are
        here. Returns lines: what `auto` is, advice, which texts student and teacher draw together, what ends a
        completion, whether the sides' chat templates differ, and a row as both sides read it where they read different
        contexts.

        Raises MissingPackageError, DataError with file:line, ConfigError, MachineError, or ModelError.
        """
        self._check_packages()
        train_rows, heldout_rows = self._check_data()
        config, notes, warnings = self.settle(resume=resume)
        from gkd.config.training import TrainingSettings
        from gkd.train.deepspeed_check import check_deepspeed

        self._check_folder()
        check_deepspeed(TrainingSettings.of(config), self._launch.world_size)
        ask_placements(config).close()
        if config.environment is not None:
            config.environment.check_ready()
        together = [
            f"mixture.{source}: student and teacher draw together; the teacher reads a text again at each of its turns"
            for source in config.mixture.with_teacher
        ]
        return [*notes, *warnings, *advice(config), *together, *self._describe_models(train_rows, heldout_rows)]

    def _describe_models(self, train_rows: Sequence[Row], heldout_rows: Sequence[Row]) -> list[str]:
        """Nothing of models on the hub, which are not asked for here."""
        from gkd.models import (
            Side,
            check_covers,
            empty_model,
            lora_targets,
            model_shape,
            quantization_targets,
            read_config,
            resolve_model,
            student_config,
        )
        from gkd.models.hub import is_hub_name
        from gkd.models.resolve import WHEEL_PREFIX

        teachers = {
            f"{self.config.teacher_key(name)}.model": teacher.model
            for name, teacher in self.config.teachers.items()
            if not teacher.is_student
        }
        served = {f"{self.config.teacher_key(name)}.model" for name, t in self.config.teachers.items() if t.has_servers}
        student = self.config.student.model or self.config.teacher.model
        names = {"student.model": student, **teachers}
        paths = {
            key: resolve_model(name, key=key)
            for key, name in names.items()
            if name.startswith(WHEEL_PREFIX) or not is_hub_name(name)
        }
        for key, path in paths.items():
            if key not in served:
                check_covers(path, key=key, may_be_packed=key != "student.model")
        if paths.keys() != names.keys():
            return []
        sides = {key: Side.of(path, key=key) for key, path in paths.items()}
        rows = {key: read_config(path, key=key).get_text_config().vocab_size for key, path in paths.items()}
        pairs, lines = self._pair_tokenizers(sides, rows, heldout_rows or train_rows)
        student = student_config(paths["student.model"], self.config.student.init)  # raises for what does not fit
        if (init := self.config.student.init) is not None:
            available = read_config(paths["student.model"]).get_text_config().num_hidden_layers
            lines.append(f"student: {names['student.model']} of {available} layers: {init.describe()}")
        if "teacher.model" in paths:  # else the student is its teacher
            lines += self._describe_share(student, paths["teacher.model"])
        if self.config.objective.state_terms:
            own = "teacher.model" in paths
            teacher = read_config(paths["teacher.model"], key="teacher.model") if own else student
            self.config.objective.state_pairs(
                model_shape(student, "student.model"), model_shape(teacher, "teacher.model")
            )
        if (lora := self.config.student.lora) is not None:
            lora_targets(empty_model(student), lora)  # raises, too
        if (quantize := self.config.student.quantize) is not None:
            targets = quantization_targets(empty_model(student), quantize)
            lines.append(f"student.quantize: {len(targets)} matrices as {quantize.describe()}")
        tokenizer = sides["student.model"].tokenizer
        return [*lines, *self._show_view(train_rows, tokenizer, pairs), *self._show_turn(train_rows, tokenizer)]

    def _show_turn(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """What the student reads behind a turn of its own."""
        kind = self.config.environment
        if kind is None or not rows:
            return []
        if not kind.answers_turns:
            return [f"environment: {kind.describe()}"]
        template = ChatTemplate(tokenizer, self.config.data.chat_template_kwargs)
        row = rows[0]
        said = None if row.messages is None else tuple((one["role"], one["content"]) for one in row.messages)
        behind = TurnEncoder(tokenizer, template, kind, ()).probe(Prompt(0, (), "", origin=row.origin, messages=said))
        return [f"environment: {kind.describe()}; after a turn the student reads {behind!r}"]

    def _pair_tokenizers(
        self, sides: Mapping[str, Side], vocabulary_rows: Mapping[str, int], rows: Sequence[Row]
    ) -> tuple[Mapping[str, TokenizerPair], list[str]]:
        """Of teachers with another tokenizer the pairs, by name; and how texts begin and end for all of them."""
        from gkd.models import check_tokenizer_pair, describe_sides, union_of_ends
        from gkd.train.other_tokenizers import audit, tokenizer_pairs

        config = self.config
        keys = {name: f"{config.teacher_key(name)}.model" for name, t in config.teachers.items() if t.alignment}
        same = {key: side for key, side in sides.items() if key not in keys.values()}
        own = sides["student.model"].tokenizer
        for key, side in same.items():
            check_tokenizer_pair(own, side.tokenizer, vocabulary_rows["student.model"], vocabulary_rows[key])
        chosen = config.rollout.stop_token_ids
        others = {name: sides[key] for name, key in keys.items()}
        ends = union_of_ends(same) if chosen is None else chosen
        pairs = tokenizer_pairs(config, sides["student.model"], others, ends)
        texts = [text for row in rows for text in texts_of(row)]
        audited = [audit(config, name, pair, texts) for name, pair in pairs.items()]
        return pairs, [*describe_sides(same, chosen), *audited]

    def _show_view(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, pairs: Mapping[str, TokenizerPair]
    ) -> list[str]:
        """The first of the rows whose teacher reads another context, as both sides read it."""
        if not rows:
            return []
        data = self.config.data
        own = {name: pair.teacher.tokenizer for name, pair in pairs.items()}
        readers = RowReaders(self.config, "train", tokenizer, own)
        for index, row in enumerate(rows):
            name = readers.teacher_of(index, row)
            view = readers.views[name]
            if (teacher_ids := view.ids(row)) is not None:
                ids = RowEncoder(tokenizer, ChatTemplate(tokenizer, data.chat_template_kwargs)).prompt_ids(row)
                read, other = str(tokenizer.decode(ids)), str(own.get(name, tokenizer).decode([*teacher_ids]))
                titles = (f"student: {len(ids)} tokens", f"{view.section}: {len(teacher_ids)} tokens")
                return [
                    f"{row.origin}, as both sides read it before the completion:",
                    *side_by_side(read, other, titles),
                ]
        return []

    def _describe_share(self, student: PreTrainedConfig, teacher_path: str) -> list[str]:
        """Advice on a student that is small beside its teacher."""
        from gkd.models import count_parameters, read_config

        teacher = read_config(teacher_path, key="teacher.model")
        line = advice_on_share(count_parameters(student), count_parameters(teacher))
        return [] if line is None else [line]

    def _check_teaches(self, rows: Sequence[Row]) -> None:
        teacher_of, teachers = row_teachers(self.config, "train"), self.config.teachers
        named = ((teacher_of(index, row), row) for index, row in enumerate(rows))
        check_teaches(self.config, ((name, row.has_view or bool(teachers[name].view_keys)) for name, row in named))

    def _check_packages(self) -> None:
        rollout = self.config.rollout
        if rollout.engine == "vllm" and rollout.placement == "local":
            require_vllm("rollout.engine", "or set it to transformers")

    def _check_folder(self) -> None:
        if (fault := write_fault(self.config.run.folder)) is not None:
            raise fault

    def _check_data(self) -> tuple[Sequence[Row], Sequence[Row]]:
        """Returns the rows of data.train and data.heldout; none of a file that is not read here."""
        data, found = self.config.data, {"data.train": list[Row](), "data.heldout": list[Row]()}
        for key, path, split in (
            ("data.train", data.train, data.train_split),
            ("data.heldout", data.heldout, data.heldout_split),
        ):
            if path is not None and path.endswith(JSON_SUFFIXES):
                rows = read_rows(path, split, key=key, teacher_column=data.teacher_column)
                check_teacher_names(rows, self.config.teachers, data.teacher_column)
                check_row_views(rows, self.config.without_views())
                check_tasks(rows, self.config.environment)
                if key == "data.train":
                    self._check_teaches(rows)
                found[key] = rows
        return found["data.train"], found["data.heldout"]
