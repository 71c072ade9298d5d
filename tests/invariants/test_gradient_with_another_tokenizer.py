"""A teacher with another tokenizer beside one with the student's: one gradient, however the batch is cut.

The reference is autograd over full float64 logits, span by span, written here without any of the engine; the spans come
from the texts' bytes.
"""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from aligned_job import MOST_TOKENS, aligned_rollouts, pair_of
from launching import check, run_python, torchrun
from other_tokenizers import save_other_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gkd.models import TokenizerPair
from gkd.types import Rollout

JOB = Path(__file__).parent / "aligned_job.py"
TOLERANCE = 1e-5  # relative Frobenius error of each parameter's gradient, float32
Figures = dict[str, torch.Tensor]
Span = tuple[list[int], list[int]]  # rows of the student, rows of the teacher


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_other_model(tmp_path_factory.mktemp("other") / "teacher", seed=11, hidden=128)


def spans_of(rollout: Rollout, pair: TokenizerPair) -> tuple[list[int], list[Span]]:
    """What the teacher reads, and the spans: runs of bytes between control tokens, cut where both sides end a token."""
    read: list[int] = []
    spans: list[Span] = []
    run: list[int] = []

    def end_run() -> None:
        ids = pair.teacher.encode(b"".join(pair.student.of(rollout.completion_ids[row]) or b"" for row in run))
        own_ends = [*accumulate(len(pair.student.of(rollout.completion_ids[row]) or b"") for row in run)]
        their_ends = [*accumulate(len(pair.teacher.of(i) or b"") for i in ids)]
        start = 0
        for end in sorted({*own_ends} & {*their_ends}):
            own = [row for row, stop in zip(run, own_ends, strict=True) if start < stop <= end]
            theirs = [len(read) + place for place, stop in enumerate(their_ends) if start < stop <= end]
            spans.append((own, theirs))
            start = end
        read.extend(ids)
        run.clear()

    for row, token in enumerate(rollout.completion_ids):
        if pair.student.of(token) is not None:
            run.append(row)
            continue
        end_run()
        if token == pair.student.tokenizer.eos_token_id:
            spans.append(([row], [len(read)]))
            read.append(pair.teacher.tokenizer.eos_token_id)  # pyright: ignore
    end_run()
    return read, [span for span in spans if max(span[1]) < MOST_TOKENS]


def sides(own: torch.Tensor, theirs: torch.Tensor, span: Span, rollout: Rollout, read: list[int], pair: TokenizerPair):
    """Probabilities of the span's outcomes, of student and teacher, from logits of all rows."""
    rows, places = span
    if len(rows) == len(places) == 1:
        q, p = own[rows[0]].softmax(-1), theirs[places[0]].softmax(-1)
        ours, others = ([*ids] for ids in zip(*pair.shared, strict=True))
        return tuple(torch.cat([side[ids], (1 - side[ids].sum())[None]]) for side, ids in ((q, ours), (p, others)))
    labels = [(own, row, rollout.completion_ids[row]) for row in rows], [(theirs, i, read[i]) for i in places]
    pis = (
        torch.stack([logits[row].log_softmax(-1)[label] for logits, row, label in side]).sum().exp() for side in labels
    )
    return tuple(torch.stack([pi, 1 - pi]) for pi in pis)


def reference(student: Path, other: Path) -> Figures:
    s = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).train()
    same = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).eval()
    t = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float64).eval()
    pair = pair_of(str(student), str(other))
    total, tokens, aligned = torch.zeros((), dtype=torch.float64), 0, 0
    forward, reverse, agreed = [], [], 0
    for rollout in aligned_rollouts(pair):
        if not rollout.completion_ids:
            continue
        prompt, count = rollout.draw.prompt, len(rollout.completion_ids)
        tokens += count
        logits = s(torch.tensor([rollout.token_ids])).logits[0, len(prompt.token_ids) - 1 : -1]
        pairs: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        if prompt.teacher == "main":
            with torch.no_grad():
                theirs = same(torch.tensor([rollout.token_ids])).logits[0, len(prompt.token_ids) - 1 : -1]
            pairs = [(logits[row].softmax(-1), theirs[row].softmax(-1), 0) for row in range(count)]
        else:
            read, spans = spans_of(rollout, pair)
            context = [*(prompt.teacher_ids or ()), *read]
            with torch.no_grad():
                theirs = t(torch.tensor([context])).logits[0, len(prompt.teacher_ids or ()) - 1 : -1]
            pairs = [(*sides(logits, theirs, span, rollout, read, pair), len(span[0])) for span in spans]  # pyright: ignore
        for q, p, own_tokens in pairs:
            q, p = q.clamp(min=1e-300), p.clamp(min=1e-300)
            m = 0.5 * p + 0.5 * q
            total = total + (0.5 * p * (p / m).log() + 0.5 * q * (q / m).log()).sum()
            if own_tokens:
                aligned += own_tokens
                forward.append((p * (p / q).log()).sum().detach())
                reverse.append((q * (q / p).log()).sum().detach())
                agreed += own_tokens * int(p.argmax() == q.argmax())
    loss = total / tokens
    loss.backward()
    return {
        "loss": loss.detach(),
        "divergence/aligned_forward_kl": torch.stack(forward).sum() / aligned,
        "divergence/aligned_reverse_kl": torch.stack(reverse).sum() / aligned,
        "agreement/aligned_top1": torch.tensor(agreed / aligned, dtype=torch.float64),
        **{name: p.grad for name, p in s.named_parameters() if p.grad is not None},
    }


def assert_matches(results: Figures, key: str, expected: Figures) -> None:
    names = {name.removeprefix(f"{key}/") for name in results if name.startswith(f"{key}/")}
    assert names == expected.keys()
    for name, wanted in expected.items():
        error = torch.linalg.norm(results[f"{key}/{name}"].double() - wanted) / torch.linalg.norm(wanted)
        assert error < TOLERANCE, f"split {key}, {name}: {error:.2e}"


@pytest.mark.slow
def test_one_rank(tmp_path: Path, tiny_student: Path, other: Path) -> None:
    splits = [[8, 0], [2, 0], ["1000 tokens", 0], ["50 tokens", 2]]
    out = tmp_path / "out.safetensors"
    check(run_python([JOB, out, tiny_student, other, json.dumps(splits)]))
    expected, results = reference(tiny_student, other), load_file(out)
    for split, stage in splits:
        assert_matches(results, f"{split}/{stage}", expected)


@pytest.mark.slow
def test_two_ranks_at_every_zero_stage(tmp_path: Path, tiny_untied_student: Path, other: Path) -> None:
    splits = [[4, 0], [2, 1], [2, 2], [2, 3], ["50 tokens", 3]]
    out = tmp_path / "out.safetensors"
    check(torchrun(2, [JOB, out, tiny_untied_student, other, json.dumps(splits)]))
    expected, results = reference(tiny_untied_student, other), load_file(out)
    for split, stage in splits:
        assert_matches(results, f"{split}/{stage}", expected)
