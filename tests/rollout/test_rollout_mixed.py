"""Texts that student and teacher draw together are drawn from the distribution that is said."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gkd.config import make_config
from gkd.errors import ConfigError
from gkd.models import load_causal_lm
from gkd.rollout.hf import HfSampler
from gkd.teacher.local import LocalTeacher
from gkd.teacher.next_logits import next_logits
from gkd.types import SampleRequest, SamplingSettings

PROMPTS = [(7, 30, 31), (9,)]  # of two lengths, so that one is padded
SHARE, IDS, TEXTS = 0.3, 3, 3000  # the first ids alone: 0, 1 and 2, which ends a text
SETTINGS = SamplingSettings(max_new_tokens=2, stop_token_ids=(2,), shared_vocab=IDS)
OUTCOMES = [text for n in (1, 2) for text in itertools.product(range(IDS), repeat=n) if (n == 2) != (text[0] == 2)]


def chances(student: Any, teacher: Any, prompt: tuple[int, ...], share: float) -> dict[tuple[int, ...], float]:
    """Of every text, by the two models' own logits."""

    def next_token(text: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            own, other = (
                model(torch.tensor([text])).logits[0, -1, :IDS].double().softmax(-1) for model in (student, teacher)
            )
        return share * other + (1 - share) * own

    return {
        text: float(
            torch.stack([next_token((*prompt, *text[:place]))[token] for place, token in enumerate(text)]).prod()
        )
        for text in OUTCOMES
    }


def chi_squared(drawn: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    counts = Counter(drawn)
    assert counts.keys() <= expected.keys()
    return sum((counts[text] - len(drawn) * p) ** 2 / (len(drawn) * p) for text, p in expected.items())


def test_the_texts_have_the_chances_that_are_said(tiny_student: Path, tiny_teacher: Path) -> None:
    sampler = HfSampler(
        str(tiny_student), dtype="float32", device=torch.device("cpu"), pad_token_id=0, max_num_seqs=2 * TEXTS
    )
    student, teacher = (load_causal_lm(str(path), "float32").eval() for path in (tiny_student, tiny_teacher))
    scorer = LocalTeacher(teacher, device=torch.device("cpu"), micro_batch_size=512, pad_token_id=0)
    requests = [SampleRequest(prompt, 2 * seed + own) for seed in range(TEXTS) for own, prompt in enumerate(PROMPTS)]
    found = sampler.generate_mixed(requests, SETTINGS, partial(next_logits, scorer), SHARE)
    for own, prompt in enumerate(PROMPTS):
        drawn = [completion.token_ids for completion in found[own :: len(PROMPTS)]]
        limit = 16.8  # of 6 degrees of freedom: one in a hundred; the seeds are fixed
        assert len(OUTCOMES) == 7 and chi_squared(drawn, chances(student, teacher, prompt, SHARE)) < limit
        assert chi_squared(drawn, chances(student, teacher, prompt, 0.0)) > 3 * limit, "else it would show nothing"
        assert chi_squared(drawn, chances(student, teacher, prompt, 2 * SHARE)) > 3 * limit
    text, one = requests[0], found[0]
    alone = sampler.generate_mixed([text], SETTINGS, partial(next_logits, scorer), SHARE)[0]
    assert alone.token_ids == one.token_ids, "a request's seed decides"
    with torch.no_grad():
        ids = torch.tensor([[*text.prompt_ids, *one.token_ids]])
        own_logprobs = student(ids).logits[0].log_softmax(-1)[len(text.prompt_ids) - 1 : -1]
    expected = own_logprobs.gather(-1, ids[0, len(text.prompt_ids) :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"rollout": {"engine": "vllm"}},
            r"rollout\.engine: vllm cannot draw the texts of mixture\.mixed; set it to tr",
        ),
        ({"rollout": {"engine": "transformers", "temperature": 0.8}}, r"rollout\.temperature: 0\.8 cannot draw"),
        ({"teacher": {"model": "t", "placement": "sharded"}}, r"teacher\.placement: sharded cannot draw"),
        ({"teacher": {"model": "t", "cache_gib": 1.0}}, r"teacher\.cache_gib: 1\.0 cannot draw"),
        (
            {"objective": {"kind": "policy_gradient"}},
            r"objective\.on: policy_gradient is for the student's own samples",
        ),
    ],
)
def test_who_cannot_draw_together(sections: dict[str, Any], message: str) -> None:
    base = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}}
    base |= {"rollout": {"engine": "transformers"}, "mixture": {"student": 0.0, "mixed": 1.0}}
    with pytest.raises(ConfigError, match=message):
        make_config({**base, **sections})
    make_config({**base, "objective": {"kind": "policy_gradient", "advantage": "teacher"}})
