"""A teacher reads its own context before the student's tokens, and nothing else of a rollout changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scores import whole
from teacher_servers import rollout, with_view
from transformers import AutoModelForCausalLM

from gkd.data import pack
from gkd.models import head_logits, load_causal_lm
from gkd.teacher.cache import CachedTeacher
from gkd.teacher.local import LocalTeacher
from gkd.teacher.views import WithViews
from gkd.types import Rollout

CPU = torch.device("cpu")
ROLLOUTS = [rollout(0, 5, 9), rollout(1, 2, 1), rollout(2, 11, 0), rollout(3, 1, 20)]
VIEWS = [tuple(range(3, 3 + length)) for length in (40, 1, 7, 2)]


@pytest.fixture(scope="module")
def local(tiny_teacher: Path) -> LocalTeacher:
    model = load_causal_lm(str(tiny_teacher), "float32", key="teacher.model")
    return LocalTeacher(model, device=CPU, micro_batch_size=2, pad_token_id=0)


def seen() -> list[Rollout]:
    return [with_view(one, view) for one, view in zip(ROLLOUTS, VIEWS, strict=True)]


def test_scores_are_of_the_completion_behind_the_view(local: LocalTeacher, tiny_teacher: Path) -> None:
    exact = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float64).eval()
    for one, view, scores in zip(ROLLOUTS, VIEWS, whole(WithViews(local).score(seen())), strict=True):
        assert len(scores) == len(one.completion_ids)
        for place, said in enumerate(head_logits(scores.states, scores.head).double().log_softmax(-1)):
            before = torch.tensor([[*view, *one.completion_ids[:place]]])
            with torch.no_grad():
                expected = exact(before).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)


def test_the_students_own_view_changes_no_bit(local: LocalTeacher) -> None:
    same = [with_view(one, one.draw.prompt.token_ids) for one in ROLLOUTS]
    for found, expected in zip(whole(WithViews(local).score(same)), whole(local.score(ROLLOUTS)), strict=True):
        assert torch.equal(found.states, expected.states)


@pytest.mark.parametrize("packed", [None, 64])
def test_the_students_side_is_untouched(local: LocalTeacher, packed: int | None) -> None:
    def batches(rollouts: list[Rollout]) -> list[dict[str, object]]:
        made = pack(
            rollouts, WithViews(local).score(rollouts), micro_batch_size=2, micro_batch_tokens=packed,
            pad_token_id=0, reduction="token_mean",
        )  # fmt: skip
        names = ("input_ids", "score_index", "labels", "weights", "sequence_index")
        return [{name: getattr(batch, name).tolist() for name in names} for batch in made]

    assert batches(seen()) == batches(ROLLOUTS)


def test_kept_scores_belong_to_a_view(local: LocalTeacher, tmp_path: Path) -> None:
    """The same completion behind another context is something else; behind the same one it is found."""
    asked: list[int] = []

    class Counting:
        def score(self, rollouts: list[Rollout]) -> object:
            asked.append(len(rollouts))
            return local.score(rollouts)

    texts = [Rollout(one.draw, "dataset", one.completion_ids) for one in ROLLOUTS[:2]]
    viewed = [with_view(one, (5, 6, 7)) for one in texts]
    teacher = WithViews(CachedTeacher(Counting, tmp_path, limit_bytes=1 << 30, device=CPU))  # pyright: ignore
    plain, own = whole(teacher.score(texts)), whole(teacher.score(viewed))
    assert asked == [2, 2] and all(not torch.equal(p.states, o.states) for p, o in zip(plain, own, strict=True))
    again = whole(teacher.score(viewed))
    assert asked == [2, 2] and all(torch.equal(a.states, o.states) for a, o in zip(again, own, strict=True))
