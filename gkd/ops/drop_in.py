"""The losses of TRL and Liger-Kernel under their own names and signatures: change the import, keep the call.

Legend: N rows (tokens), V vocabulary, Hs and Ht hidden sizes; `...` any leading dimensions.

Both packages mean by beta the teacher's weight in the mixture, with the forward KL at 0 and the reverse KL at 1, as
`gkd.divergence` does. Every difference in behaviour is listed in docs/drop_in.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gkd.errors import ConfigError
from gkd.objectives.divergence import Divergence
from gkd.ops.divergence import divergence
from gkd.ops.linear_divergence import linear_divergence

_IGNORE_INDEX = -100  # TRL's, fixed there
_LOGIT_BYTES = 4  # logits of a chunk are float32

_Side = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states [N, H], head [V, H], bias [V]."""


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """TRL's `GKDTrainer.generalized_jsd_loss`: the JSD of logits [..., V], its gradient in student_logits only.

    labels              [...]; rows where it is -100 are ignored, even if they hold NaN.
    reduction           of the sum over rows and vocabulary: "sum" keeps it, "batchmean" divides it by the number of
                        rows that count (without labels by the first dimension), "mean" by that number of rows times V.
    num_items_in_batch  divides the sum instead, whatever the reduction.

    Returns float32 (float64 for float64 logits); 0 where no row counts.
    Raises ConfigError for an option's value, InputError (its base) for shapes or dtypes that do not fit.
    """
    counted = None if labels is None else labels != _IGNORE_INDEX  # [...]
    weights = None if counted is None else counted.to(torch.float32)
    total = divergence(student_logits, teacher_logits, "jsd", beta=beta, temperature=temperature, weights=weights)
    if num_items_in_batch is not None:
        return _divide(total, num_items_in_batch)
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return _divide(total, student_logits.shape[0] if counted is None else counted.sum())
    if reduction == "mean":
        vocabulary = student_logits.shape[-1]
        return _divide(total, student_logits.numel() if counted is None else counted.sum() * vocabulary)
    raise ConfigError(
        f"reduction: {reduction!r} is not 'batchmean', 'sum' or 'mean'; for one value a token call gkd.divergence with "
        "reduction='none'"
    )


class LigerJSD(torch.nn.Module):
    """Liger's `liger_kernel.transformers.LigerJSD`: the mean JSD of log-probabilities (or logits) [..., V].

    beta is the teacher's weight. Raises ConfigError unless it is in [0, 1].
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        Divergence("jsd", beta)  # raises
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """log_q [..., V] is the student, log_p [..., V] the teacher; rows whose shift_labels [...] is ignore_index are
        ignored.

        Returns the mean over the rows that count, float32 (float64 for float64 inputs); 0 where none does. The gradient
        is that with respect to logits: the student's log_softmax passes it on unchanged.
        Raises InputError for shapes or dtypes that do not fit.
        """
        weights = None if shift_labels is None else (shift_labels != self.ignore_index).to(torch.float32)
        return divergence(log_q, log_p, "jsd", beta=self.beta, weights=weights, reduction="mean")


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """Liger's `liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`: JSD and cross-entropy from hidden states.

    (weight_soft_loss sum JSD + weight_hard_loss sum cross-entropy) / number of rows whose label is not ignore_index

    beta                    the teacher's weight in the JSD's mixture.
    temperature             divides the logits of both sides in the JSD, not in the cross-entropy; no factor T^2.
    compiled                has no effect: there is nothing to compile.
    chunk_size              rows whose logits exist at a time, at most; bounds memory, changes no value.
    return_soft_hard_loss   also return the two means, unweighted and detached; costs two more passes without gradient.

    Raises ConfigError for an option's value.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        Divergence("jsd", beta, temperature=temperature)  # raises
        _check_weight("weight_hard_loss", weight_hard_loss)
        _check_weight("weight_soft_loss", weight_soft_loss)
        if chunk_size < 1:
            raise ConfigError(f"chunk_size: {chunk_size} must be at least 1")
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss, or (loss, soft loss, hard loss), of hidden states [..., Hs] and [..., Ht] with heads [V, H].

        true_labels [...] are token ids or ignore_index; biases [V]. A teacher head with more rows than the student's is
        compared over the student's. An enclosing autocast rounds hidden states and heads, never the logits.
        Returns float32 (float64 for float64 inputs). Gradients go to the student's hidden states, head and bias.
        Raises InputError for shapes or dtypes that do not fit.
        """
        student = (student_input.flatten(0, -2), student_weight, student_bias)
        teacher = (teacher_input.flatten(0, -2), teacher_weight, teacher_bias)
        labels = true_labels.flatten()  # [N]
        loss = self._mean(student, teacher, labels, self.weight_hard_loss, self.weight_soft_loss)
        if not self.return_soft_hard_loss:
            return loss
        with torch.no_grad():
            soft = self._mean(student, teacher, labels, 0.0, 1.0)
            hard = self._mean(student, teacher, labels, 1.0, 0.0)
        return loss, soft, hard

    def _mean(self, student: _Side, teacher: _Side, labels: Tensor, hard_weight: float, soft_weight: float) -> Tensor:
        counted = labels != self.ignore_index  # [N]
        hard = hard_weight * (labels >= 0).double()  # [N]; a negative label has no cross-entropy
        both = hard + soft_weight
        student_vocabulary, teacher_vocabulary = student[1].shape[0], teacher[1].shape[0]
        return linear_divergence(
            *student[:2],
            *teacher[:2],
            "jsd",
            beta=self.beta,
            temperature=self.temperature,
            weights=counted * both / counted.sum().clamp(min=1),
            student_bias=student[2],
            teacher_bias=teacher[2],
            # Columns beyond the student's are the teacher's padding; a longer student stays the error that it is.
            valid_vocab=student_vocabulary if teacher_vocabulary > student_vocabulary else None,
            labels=labels if hard_weight else None,
            hard_label_weight=hard / torch.where(both > 0, both, 1.0) if hard_weight else None,
            compute_dtype=_autocast_dtype(student[0].device.type),
            chunk_bytes=self.chunk_size * student_vocabulary * _LOGIT_BYTES,
        )


def _divide(total: Tensor, count: Tensor | float) -> Tensor:
    """total / count, 0 for a count of 0: then nothing was summed."""
    if isinstance(count, Tensor):
        count = count.to(total.device)
        return total / torch.where(count == 0, 1, count)
    return total / (count or 1)


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0.0):
        raise ConfigError(f"{name}: {weight} must be a finite number, 0 or more")


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
