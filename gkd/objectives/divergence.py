"""Which divergence, and its value and gradient for rows of logits: the mathematical truth of the project.

Legend: N rows (scored tokens), V vocabulary, n rows of a tile; `...` any leading dimensions.

The formulas live in `closed_forms.py`; conventions (beta, temperature, limits) and the way over the rows live here.
Everything is computed in float32, whatever the dtype of the logits, or in float64 for float64 logits.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gkd.errors import ConfigError, InputError
from gkd.objectives.byproducts import concatenate, row_byproducts
from gkd.objectives.closed_forms import DEFINITIONS, MIXED_KL, RowPair, mixed_kl
from gkd.objectives.hard_label import HardLabels
from gkd.objectives.tiles import row_tiles

KINDS: Collection[str] = DEFINITIONS.keys()
"""The names of all divergences, those registered later included."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Divergence:
    """A divergence and its conventions. Raises ConfigError for a value outside its range.

    beta    weight of the TEACHER in the mixture M = beta P_teacher + (1 - beta) P_student of `jsd` (GKD's convention).
            At exactly 0 and 1 `jsd` is the forward and the reverse KL (TRL's convention).
    alpha   skew of `skew_forward_kl` = KL(P || alpha P + (1 - alpha) Q) and of
            `skew_reverse_kl` = KL(Q || (1 - alpha) P + alpha Q); order of `alpha`, whose limits 0 and 1 are the
            reverse and the forward KL.
    temperature                   divides the logits of both sides; the gradient carries 1/T.
    scale_by_temperature_squared  multiplies value and gradient by T^2 (Hinton et al., arXiv 1503.02531, section 2.1).
    normalize_jsd                 divides `jsd` by beta (1 - beta): then it tends to the forward KL for beta -> 0 and
                                  to the reverse KL for beta -> 1 without the jump that the plain JSD has.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    temperature: float = 1.0
    scale_by_temperature_squared: bool = False
    normalize_jsd: bool = False

    def __post_init__(self) -> None:
        self._check_kind()
        for name in ("beta", "alpha"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                nearest = 1.0 if value > 1.0 else 0.0
                raise ConfigError(f"{name}: {value} is outside [0, 1]; the nearest valid value is {nearest}")
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise ConfigError(f"temperature: {self.temperature} must be a finite number above 0, such as 1.0")

    def _check_kind(self) -> None:
        if self.kind not in KINDS:
            nearest = difflib.get_close_matches(str(self.kind), KINDS, n=1, cutoff=0.0)[0]
            known = ", ".join(KINDS)
            raise ConfigError(f"kind: unknown divergence {self.kind!r}; did you mean {nearest!r}? Known: {known}")

    @property
    def parameter(self) -> float:
        """beta or alpha, whichever this kind has; 0 for a kind without."""
        name = DEFINITIONS[self.kind].parameter
        return 0.0 if name is None else getattr(self, name)

    @property
    def limit(self) -> str:
        """The kind to compute: `jsd`, the skewed KLs and `alpha` are a KL at an end of their range."""
        return DEFINITIONS[self.kind].ends.get(self.parameter, self.kind)

    @property
    def scale(self) -> float:
        """What the conventions multiply the bare divergence by."""
        scale = self.temperature**2 if self.scale_by_temperature_squared else 1.0
        if self.normalize_jsd and self.limit == "jsd":
            scale /= self.beta * (1.0 - self.beta)
        return scale


@dataclass(frozen=True)
class MixedKl(Divergence):
    """a KL(P || Q) + b KL(Q || P) of each row, whose coefficients `score_rows` takes as kl_weights: a pass for both.

    Only what takes kl_weights takes it. It is not one of KINDS, so it cannot be asked for by name.
    """

    kind: str = field(default=MIXED_KL, init=False)

    def _check_kind(self) -> None: ...

    @property
    def parameter(self) -> float:
        return 0.0

    @property
    def limit(self) -> str:
        return self.kind


@dataclass(frozen=True)
class RowScores:
    """What `score_rows` returns, all [N] and detached."""

    value: Tensor  # the loss of each row, hard label included
    byproducts: dict[str, Tensor]  # empty unless asked for


def divergence_value(student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence) -> Tensor:
    """The divergence of each row, [...], from logits [..., V]; plain differentiable PyTorch.

    Autograd through it is right for finite logits; with -inf among them use the closed form (`value_and_gradient`).
    Raises InputError for a shape or dtype that does not fit.
    """
    dtype = check_logits(student_logits, teacher_logits)
    pair = RowPair.from_logits(student_logits.to(dtype), teacher_logits.to(dtype), divergence.temperature)
    value, _ = DEFINITIONS[divergence.limit].closed_form(pair, divergence.parameter, False)
    return value * divergence.scale


def value_and_gradient(student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """The divergence of each row [N] and its gradient with respect to student_logits [N, V], in closed form.

    Logits are [N, V]; both results are float32 (float64 for float64 logits) and detached.
    Raises InputError for a shape or dtype that does not fit.
    """
    dtype = check_logits(student_logits, teacher_logits)
    gradient = torch.empty(student_logits.shape, dtype=dtype, device=student_logits.device)  # [N, V]
    return score_rows(student_logits, teacher_logits, divergence, gradient=gradient).value, gradient


@torch.no_grad()
def score_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    *,
    gradient: Tensor | None = None,
    gradient_scale: Tensor | None = None,
    alive: Tensor | None = None,
    hard_labels: HardLabels | None = None,
    kl_weights: Tensor | None = None,
    byproducts: bool = False,
) -> RowScores:
    """The losses of rows of logits [N, V], tile by tile.

    gradient        buffer [N, V] for the gradient with respect to student_logits; may be student_logits itself.
    gradient_scale  [N]; multiplies the rows of the gradient, not the values.
    alive           [N] bool; a row where it is False is scored as if all its logits were 0.
    hard_labels     mixed in as (1 - h) divergence + h cross-entropy (`hard_label.py`).
    kl_weights      [2, N], of a MixedKl and required there: what the rows' forward and reverse KL are multiplied by. A
                    weight of exactly 0 drops its term, inf included.
    byproducts      also return what `byproducts.py` measures.

    Raises InputError for logits or weights whose shapes or dtypes do not fit. No host synchronisation.
    """
    dtype = check_logits(student_logits, teacher_logits)
    check_kl_weights(kl_weights, divergence, student_logits.shape[0])
    value = torch.empty(student_logits.shape[0], dtype=dtype, device=student_logits.device)

    def score_tile(rows: slice) -> dict[str, Tensor]:
        student, teacher = student_logits[rows].to(dtype), teacher_logits[rows].to(dtype)  # [n, V]
        if alive is not None:
            dead = ~alive[rows].unsqueeze(-1)
            student, teacher = student.masked_fill(dead, 0.0), teacher.masked_fill(dead, 0.0)
        pair = RowPair.from_logits(student, teacher, divergence.temperature)
        with_gradient = gradient is not None
        if kl_weights is None:
            closed_form = DEFINITIONS[divergence.limit].closed_form
            tile_value, tile_gradient = closed_form(pair, divergence.parameter, with_gradient)
            exact = {divergence.limit: tile_value}
        else:
            tile_value, tile_gradient, exact = mixed_kl(pair, kl_weights[:, rows].to(dtype), with_gradient)
        measured = {}
        if byproducts:
            exact["divergence"] = tile_value * divergence.scale
            measured = row_byproducts(pair, student, teacher, divergence.temperature, exact)
        tile_value = tile_value * divergence.scale
        factor = divergence.scale / divergence.temperature
        if hard_labels is not None:
            tile_labels = hard_labels.rows(rows)
            tile_value = tile_labels.mix(student, tile_value, tile_gradient, factor)
            factor = 1.0
        value[rows] = tile_value
        if gradient is not None and tile_gradient is not None:
            scale = factor if gradient_scale is None else gradient_scale[rows].unsqueeze(-1) * factor
            torch.mul(tile_gradient, scale, out=gradient[rows])
        return measured

    n_rows, vocabulary = student_logits.shape
    tiles = row_tiles(n_rows, vocabulary * dtype.itemsize, student_logits.device)
    measured = [score_tile(rows) for rows in tiles]
    return RowScores(value, concatenate(measured, value) if byproducts else {})


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> torch.dtype:
    """The dtype to compute in, float32 or float64. Raises InputError for shapes or dtypes that do not fit."""
    if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
        shapes = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise InputError(f"student and teacher logits must have the same shape [..., V], not {shapes}")
    if student_logits.shape[-1] == 0:
        raise InputError("logits have an empty vocabulary: the last dimension is 0")
    return working_dtype(student_logits, teacher_logits)


def check_kl_weights(kl_weights: Tensor | None, divergence: Divergence, n_rows: int) -> None:
    """Raises InputError unless kl_weights are [2, n_rows] for a MixedKl, and None for any other divergence."""
    if (kl_weights is None) == isinstance(divergence, MixedKl):
        raise InputError(f"kl_weights belong to MixedKl, which needs them; the divergence is {divergence.kind!r}")
    if kl_weights is not None and kl_weights.shape != (2, n_rows):
        raise InputError(f"kl_weights must be [2, {n_rows}], forward and reverse, not {list(kl_weights.shape)}")


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of the tensors is, else float32. Raises InputError for anything but floating point."""
    for tensor in tensors:
        if tensor.dtype not in _FLOATS:
            raise InputError(f"{tensor.dtype} is not supported; use float16, bfloat16, float32 or float64")
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
