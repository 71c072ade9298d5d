"""Terms against a teacher with another tokenizer: values and gradients against plain float64 PyTorch, span by span."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gkd.objectives.divergence import Divergence, divergence_value
from gkd.objectives.outcomes import EMPTY_BUCKET
from gkd.objectives.row_losses import LabelLoss
from gkd.ops.aligned_terms import aligned_terms
from gkd.ops.linear_terms import TermScores, linear_terms
from gkd.ops.pass_job import WeightedLoss
from gkd.types import AlignedScores, Alignment, AlignmentKind, HiddenScores, OutputHead

HIDDEN, TEACHER_HIDDEN = 8, 6
KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd", "alpha")


@dataclass(frozen=True)
class Case:
    """N student tokens, M teacher tokens; spans are numbers, -1 for none."""

    student_spans: tuple[int, ...] = (0, 1, 1, 2, -1, 3, 3, 3, 4, 5)
    spans: tuple[int, ...] = (0, 1, 2, 2, 3, 3, 4, 5, 5)
    student_columns: int = 13
    teacher_columns: int = 17
    pairs: tuple[tuple[int, int], ...] = ((0, 3), (2, 1), (4, 9), (5, 16), (12, 0))
    temperature: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype = torch.float64
    kind: AlignmentKind = "shared"

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(self.dtype)

        n, m = len(self.student_spans), len(self.spans)
        return {
            "hidden": normal(n, HIDDEN).requires_grad_(),
            "weight": normal(self.student_columns, HIDDEN).requires_grad_(),
            "bias": normal(self.student_columns).requires_grad_(),
            "teacher_hidden": normal(m, TEACHER_HIDDEN),
            "teacher_weight": normal(self.teacher_columns, TEACHER_HIDDEN),
            "labels": torch.randint(self.student_columns, (n,), generator=draw),
            "teacher_labels": torch.randint(self.teacher_columns, (m,), generator=draw),
            "weights": torch.rand(n, generator=draw, dtype=torch.float64) + 0.5,
        }

    def scores(self, t: dict[str, Tensor]) -> AlignedScores:
        alignment = Alignment(self.kind, tuple(s for s, _ in self.pairs), tuple(t for _, t in self.pairs), ())
        return AlignedScores(
            t["teacher_hidden"],
            OutputHead(t["teacher_weight"]),
            t["teacher_labels"],
            torch.tensor(self.spans, dtype=torch.int64),
            torch.tensor(self.student_spans, dtype=torch.int64),
            alignment,
        )

    def run(self, t: dict[str, Tensor], losses: list[WeightedLoss], chunk_bytes: int | None = None) -> TermScores:
        head = OutputHead(t["weight"], t["bias"], softcap=self.softcap)
        return aligned_terms(
            t["hidden"],
            head,
            self.scores(t),
            losses,
            acts=torch.ones(len(losses), len(self.student_spans), dtype=torch.bool),
            labels=t["labels"],
            valid_vocab=self.student_columns,
            temperature=self.temperature,
            chunk_bytes=chunk_bytes,
        )


def student_logits(case: Case, t: dict[str, Tensor]) -> Tensor:
    logits = t["hidden"] @ t["weight"].T + t["bias"]
    return logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)


def outcome_log_probs(logits: Tensor, shared: list[int], *, with_bucket: bool, temperature: float) -> Tensor:
    """[K + 1] of [V], by sums of probabilities."""
    probabilities = (logits / temperature).softmax(-1)
    kept = probabilities[shared]
    if not with_bucket:
        return kept.log()
    others = [i for i in range(len(logits)) if i not in shared]
    rest = probabilities[others].sum()[None] if others else probabilities.sum()[None] * EMPTY_BUCKET
    return torch.cat([kept, rest]).log()


def projected(case: Case, own: Tensor, theirs: Tensor) -> list[Tensor]:
    """Log-probabilities of the outcomes: the student's times a dense matrix whose rows sum to 1, and the teacher's."""
    goes_to = dict(case.pairs)
    matrix = torch.zeros(case.student_columns, case.teacher_columns + 1, dtype=own.dtype)
    for student in range(case.student_columns):
        matrix[student, goes_to.get(student, case.teacher_columns)] = 1.0
    assert matrix.sum(1).eq(1.0).all()
    q, p = (own / case.temperature).softmax(-1) @ matrix, (theirs / case.temperature).softmax(-1)
    reached = sorted(set(goes_to.values()))
    others = [i for i in range(case.teacher_columns) if i not in reached]
    q_rest = q[-1:] if len(goes_to) < case.student_columns else q.sum()[None] * EMPTY_BUCKET
    return [torch.cat([q[reached], q_rest]).log(), torch.cat([p[reached], p[others].sum()[None]]).log()]


def reference(case: Case, t: dict[str, Tensor], divergence: Divergence) -> dict[int, Tensor]:
    """The divergence of each span."""
    own, teacher = student_logits(case, t), t["teacher_hidden"] @ t["teacher_weight"].T
    at_one = replace(divergence, temperature=1.0, scale_by_temperature_squared=False)
    scale = case.temperature**2 if divergence.scale_by_temperature_squared else 1.0
    found: dict[int, Tensor] = {}
    with_bucket = max(case.student_columns, case.teacher_columns) > len(case.pairs)
    for span in range(max(case.spans, default=-1) + 1):
        rows = [i for i, number in enumerate(case.student_spans) if number == span]
        theirs = [i for i, number in enumerate(case.spans) if number == span]
        if len(rows) == len(theirs) == 1 and case.kind == "projection":
            sides = projected(case, own[rows[0]], teacher[theirs[0]])
        elif len(rows) == len(theirs) == 1 and case.kind == "uld":
            q, p = ((side / case.temperature).softmax(-1) for side in (own[rows[0]], teacher[theirs[0]]))
            count = max(len(q), len(p))
            q, p = (
                torch.cat([side.sort(descending=True).values, side.new_zeros(count - len(side))]) for side in (q, p)
            )
            found[span] = 0.5 * (q - p).abs().sum() * scale
            continue
        elif len(rows) == len(theirs) == 1:
            sides = [
                outcome_log_probs(logits, ids, with_bucket=with_bucket, temperature=case.temperature)
                for logits, ids in (
                    (own[rows[0]], [s for s, _ in case.pairs]),
                    (teacher[theirs[0]], [t for _, t in case.pairs]),
                )
            ]
        else:
            sides = []
            for logits, labels, places in ((own, t["labels"], rows), (teacher, t["teacher_labels"], theirs)):
                log_probs = (logits / case.temperature).log_softmax(-1)
                pi = math.prod([log_probs[i, labels[i]].exp() for i in places], start=torch.tensor(1.0))
                sides.append(torch.stack([pi, 1 - pi]).log())
        found[span] = divergence_value(sides[0][None], sides[1][None], at_one)[0] * scale
    return found


def reference_loss(case: Case, t: dict[str, Tensor], divergence: Divergence) -> Tensor:
    total = t["hidden"].new_zeros(())
    for span, value in reference(case, t, divergence).items():
        rows = [i for i, number in enumerate(case.student_spans) if number == span]
        total = total + t["weights"][rows].mean() * value
    return total


def gradients(loss: Tensor, t: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [t["hidden"], t["weight"], t["bias"]]))


CASES = {
    "plain": Case(),
    "temperature": Case(temperature=2.5),
    "softcap": Case(softcap=3.0),
    "no_longer_spans": Case((0, 1, 2), (0, 1, 2)),
    "longer_spans_only": Case((0, 0, 1), (0, 1, 1)),
    "no_span": Case((-1, -1), ()),
    "nothing": Case((), ()),
    "student_is_all_shared": Case(student_columns=5, pairs=((0, 3), (1, 1), (2, 9), (3, 16), (4, 0))),
    "teacher_is_all_shared": Case(teacher_columns=4, pairs=((0, 3), (2, 1), (4, 2), (5, 0))),
    "nothing_is_shared": Case(pairs=()),
    "projection": Case(kind="projection", pairs=((0, 3), (1, 3), (2, 1), (4, 9), (5, 16), (7, 9), (8, 9), (12, 0))),
    "projection_of_all": Case(kind="projection", temperature=1.5, pairs=tuple((i, i % 4) for i in range(13))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_float64(name: str, kind: str) -> None:
    case = CASES[name]
    t = case.tensors()
    divergence = Divergence(kind, temperature=case.temperature, scale_by_temperature_squared=True)
    scores = case.run(t, [WeightedLoss(divergence, t["weights"])])
    expected = reference_loss(case, t, divergence)
    torch.testing.assert_close(scores.loss, expected, rtol=1e-9, atol=1e-12)
    if expected.requires_grad:
        for ours, theirs in zip(gradients(scores.loss, t), gradients(expected, t), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    for span, value in reference(case, t, divergence).items():
        rows = [i for i, number in enumerate(case.student_spans) if number == span]
        torch.testing.assert_close(scores.values[0, rows].sum(), value, rtol=1e-9, atol=1e-12)
    assert scores.compared.tolist() == [span >= 0 for span in case.student_spans]


@pytest.mark.parametrize("columns", [(13, 17), (17, 13), (9, 9)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ranks_are_compared_by_half_of_their_l1(columns: tuple[int, int], temperature: float) -> None:
    case = Case(
        kind="uld", student_columns=columns[0], teacher_columns=columns[1], pairs=((0, 3),), temperature=temperature
    )
    t = case.tensors()
    divergence = Divergence("tvd", temperature=temperature)
    scores = case.run(t, [WeightedLoss(divergence, t["weights"])])
    expected = reference_loss(case, t, divergence)
    torch.testing.assert_close(scores.loss, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(gradients(scores.loss, t), gradients(expected, t), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert not scores.compared.any(), "the likeliest of both sides are always rank one"
    measured, shared = case.run(t, [WeightedLoss(Divergence("jsd"))]), replace(case, kind="shared")
    torch.testing.assert_close(measured.values, shared.run(t, [WeightedLoss(Divergence("jsd"))]).values)
    assert measured.compared.any()


@pytest.mark.parametrize("case", [Case(), Case(kind="projection"), Case(kind="uld", student_columns=31)])
def test_float32_of_unlikely_tokens_has_no_infinite_loss(case: Case) -> None:
    """Logits that are far apart: outcomes whose probabilities float32 cannot hold."""
    t = replace(case, dtype=torch.float32).tensors()
    with torch.no_grad():
        t["weight"].mul_(40.0)
    t["teacher_weight"].mul_(40.0)
    kinds = ["tvd"] if case.kind == "uld" else ["jsd", "forward_kl"]
    for kind in kinds:
        scores = replace(case, dtype=torch.float32).run(t, [WeightedLoss(Divergence(kind))])
        assert scores.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(scores.loss, t))


def test_float32_is_as_good_as_its_numbers() -> None:
    exact, case = Case(), Case(dtype=torch.float32)
    divergence = Divergence("forward_kl")
    want, t = exact.tensors(), case.tensors()
    ours = gradients(case.run(t, [WeightedLoss(divergence, t["weights"].float())]).loss, t)
    theirs = gradients(reference_loss(exact, want, divergence), want)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing() -> None:
    case = Case()
    t = case.tensors()
    loss = [WeightedLoss(Divergence("jsd"), t["weights"])]
    whole, cut = case.run(t, loss), case.run(t, loss, chunk_bytes=2 * 17 * 8)
    torch.testing.assert_close(whole.values, cut.values)
    for one, other in zip(gradients(whole.loss, t), gradients(cut.loss, t), strict=True):
        torch.testing.assert_close(one, other)


def test_losses_without_a_teacher_stand_beside_them() -> None:
    """A cross-entropy of every token, and the divergence of some."""
    case = Case()
    t = case.tensors()
    both = case.run(t, [WeightedLoss(LabelLoss(), t["weights"]), WeightedLoss(Divergence("jsd"), t["weights"])])
    log_probs = student_logits(case, t).log_softmax(-1)
    cross_entropy = -log_probs.gather(1, t["labels"][:, None])[:, 0]
    expected = (t["weights"] * cross_entropy).sum() + reference_loss(case, t, Divergence("jsd"))
    torch.testing.assert_close(both.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(both.values[0], cross_entropy.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(both.measures["label_logprob"], -cross_entropy.detach(), rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(gradients(both.loss, t), gradients(expected, t), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alignment", ["shared", "projection"])
def test_one_tokenizer_through_this_path_is_the_ordinary_path(
    kind: str, temperature: float, alignment: AlignmentKind
) -> None:
    columns, rows = 13, tuple(range(6))
    pairs = tuple((i, i) for i in range(columns))
    case = Case(rows, rows, columns, columns, pairs, temperature, kind=alignment)
    t = case.tensors()
    loss = WeightedLoss(Divergence(kind, temperature=temperature), t["weights"])
    head = OutputHead(t["weight"], t["bias"])
    ordinary = linear_terms(
        t["hidden"],
        head,
        HiddenScores(t["teacher_hidden"], OutputHead(t["teacher_weight"])),
        [loss],
        acts=torch.ones(1, len(rows), dtype=torch.bool),
        labels=t["labels"],
        valid_vocab=columns,
        temperature=temperature,
    )
    aligned = case.run(t, [loss])
    torch.testing.assert_close(aligned.values, ordinary.values, rtol=1e-12, atol=1e-13)
    for name, source in (("aligned_forward_kl", "forward_kl"), ("label_logprob", "label_logprob")):
        torch.testing.assert_close(aligned.measures[name], ordinary.measures[source], rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(gradients(aligned.loss, t), gradients(ordinary.loss, t), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_what_is_certain_on_both_sides_gives_nothing_and_no_nan() -> None:
    """A product of probabilities that is rounded to 1."""
    case = Case((0, 0), (0,), dtype=torch.float32)
    t = case.tensors()
    with torch.no_grad():
        t["bias"].fill_(-60.0)
        t["bias"][t["labels"]] = 60.0
        t["hidden"].zero_()
        t["labels"][1] = t["labels"][0]
        t["bias"].fill_(-60.0)[t["labels"][0]] = 60.0
    t["teacher_weight"].zero_()
    t["teacher_weight"][t["teacher_labels"][0]] = 100.0 * t["teacher_hidden"][0]
    scores = case.run(t, [WeightedLoss(Divergence("forward_kl"))])
    assert scores.loss.abs() < 1e-5
    for gradient in gradients(scores.loss, t):
        assert gradient.isfinite().all() and gradient.abs().max() < 1e-4
