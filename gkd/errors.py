"""Every error that gkd raises on purpose.

GkdError
├── InputError (ValueError)            what the user gave is wrong: exit code 2, one line, no traceback
│   ├── ConfigError                    a config key; the message starts with its path
│   ├── DataError                      a data file; the message starts with file:line
│   ├── ModelError                     a model that is missing, incomplete or unsupported
│   │   └── TokenizerMismatchError     student and teacher do not share a token -> id map
│   ├── MissingPackageError            (ModuleNotFoundError) an extra of gkd's that is not installed, or not usable
│   ├── RunFolderError                 a run folder that is in use, or that cannot be resumed
│   └── MachineError                   this machine lacks or denies something: a folder, space, a limit, a variable
└── RunError (RuntimeError)            a run that must not go on: exit code 1
    ├── PartError                      a sampler or a teacher failed; the student is as good as before
    │   ├── SamplerError               the sampler returned something incomplete
    │   ├── ConversationError          an environment failed, or what it said cannot follow what the student said
    │   ├── TeacherError               a served teacher failed, or answered something else than was asked
    │   └── WeightSyncError            the sampler does not hold the trainer's weights
    ├── StepRefusedError               a step is not to be trusted; what was before it is saved
    │   ├── NonFiniteError             a loss or a gradient is not finite; no optimizer step was taken
    │   ├── MismatchError              the sampler drew the step's tokens from another distribution than the trainer's
    │   └── LossScaleError             float16 gradients stay infinite, however small their scale
    ├── CollapseError                  the student came apart, and run.stop_on asks to stop then
    ├── StageError                     a stage of a chain ended with another exit code than 0, which is the chain's then
    ├── CheckpointError                a checkpoint is damaged or does not belong to this run
    ├── StorageError                   what a run writes while it goes on finds no room, or may not be written
    └── RunInterruptedError            a signal asked the run to stop, its state is saved: exit code 75
"""

from __future__ import annotations

import reprlib
import unicodedata

_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, invisible and turning ones, lone surrogates, line ends
_LONGEST_MESSAGE = 2000  # characters: a key may have thousands, and its remedy stands at the end
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


class GkdError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with.

    Its text is one line whatever it quotes: file names, keys and values come from anywhere.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = one_line(super().__str__())
        half = _LONGEST_MESSAGE // 2
        return text if len(text) <= _LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def one_line(text: str) -> str:
    """`text` with every character that breaks a line, or acts on a terminal, spelled as Python spells it."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNPRINTABLE else c for c in text)


def shown(value: object) -> str:
    """A user's value as a message quotes it: its `repr`, shortened."""
    return _SHORT.repr(value)


class InputError(GkdError, ValueError):
    """Something the user gave is wrong; the message says where and how to mend it."""

    exit_code = 2


class ConfigError(InputError):
    """A config key is unknown, has the wrong type, or contradicts another."""


class DataError(InputError):
    """A row or a file of the data cannot be used."""


class ModelError(InputError):
    """A model is missing, incomplete, or of a kind that is not supported."""


class TokenizerMismatchError(ModelError):
    """Student and teacher map the same token to different ids."""


class MissingPackageError(InputError, ModuleNotFoundError):
    """A package that gkd's core does without is needed and not installed; the message is the command for it."""


class RunFolderError(InputError):
    """The run folder is in use, or does not fit the run that wants it."""


class MachineError(InputError):
    """The machine or its environment lacks or denies what is needed: a folder, room, a limit, a launcher's variable."""


class RunError(GkdError, RuntimeError):
    """The run has to stop; nothing that was saved is lost."""


class StepRefusedError(RunError):
    """A step that training must not go on from; raised on all ranks. `step` of them were done before it."""

    def __init__(self, step: int, text: str) -> None:
        super().__init__(f"step {step}: {text}")
        self.step = step


class NonFiniteError(StepRefusedError):
    """A loss or gradient is NaN or infinite; raised on all ranks before the optimizer steps."""


class MismatchError(StepRefusedError):
    """The sampler's log-probabilities of its tokens are far from the trainer's; raised before the optimizer steps."""


class LossScaleError(StepRefusedError):
    """Every one of the last steps was left out, as its float16 gradients were infinite."""


class PartError(RunError):
    """A sampler or teacher failed, which leaves the student as good as before. `is_temporary`: it may work later."""

    def __init__(self, message: str = "", *, is_temporary: bool = False) -> None:
        super().__init__(message)
        self.is_temporary = is_temporary


class SamplerError(PartError):
    """The sampler returned fewer or other completions than were asked for."""


class ConversationError(PartError):
    """An environment failed, or answered something else than an observation that the chat template has a place for."""


class TeacherError(PartError):
    """A served teacher is out of reach, refuses a request, or answers something else than was asked."""


class WeightSyncError(PartError):
    """The sampler's weights are incomplete or differ from the trainer's."""


class CollapseError(RunError):
    """The student's samples or its entropy say that it comes apart; raised on all ranks, with the run saved."""


class StageError(RunError):
    """A stage of a chain failed, or was interrupted; the chain ends with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CheckpointError(RunError):
    """A checkpoint is damaged, incomplete, or belongs to another run."""


class StorageError(RunError):
    """Disk, folder or limit refuses what a run writes while it goes on; the checkpoints that are there stay."""


class RunInterruptedError(RunError):
    """The run stopped early because it was asked to; it goes on with --resume. 75 is sysexits' EX_TEMPFAIL."""

    exit_code = 75
