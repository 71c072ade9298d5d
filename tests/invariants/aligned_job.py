"""One optimizer step of plain SGD against a teacher with another tokenizer; run by torchrun or alone.

python aligned_job.py OUT.safetensors STUDENT TEACHER '[[split, zero_stage], ...]'

Every other prompt is taught by the student's own kind instead, which shares its tokens. Splits and results are those of
`teachers_job.py`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from gradient_job import ragged_rollouts
from safetensors.torch import save_file
from teachers_job import local, run_split

from gkd.config import Launch
from gkd.models import TokenBytes, TokenizerPair, load_tokenizer
from gkd.teacher.routed import RoutedTeacher
from gkd.teacher.views import OtherTokenizer, WithViews
from gkd.train import distributed
from gkd.types import Rollout

MEASURED = ("loss", "divergence/aligned_forward_kl", "divergence/aligned_reverse_kl", "agreement/aligned_top1")
MOST_TOKENS = 24  # that the teacher reads of a completion


def aligned_rollouts(pair: TokenizerPair) -> list[Rollout]:
    """Every completion is a text, but for the bytes at its end, and has control tokens inside."""
    text = "the cat sat on the mat 你好 🤖 and the dog"
    rollouts: list[Rollout] = []
    for index, rollout in enumerate(ragged_rollouts()):
        ids = pair.student.encode(text.encode())[index : index + len(rollout.completion_ids)]
        if index % 3 == 1 and ids:
            ids[len(ids) // 2] = 1  # <|start|>, which the teacher has not
        if index % 4 == 2 and ids:
            ids[-1] = 2  # the end
        generator = torch.Generator().manual_seed(index)
        teacher_ids = tuple(torch.randint(2, 300, (3 + index % 5,), generator=generator).tolist())
        prompt = rollout.draw.prompt
        if index % 2 == 0:
            prompt = replace(prompt, teacher="other", teacher_ids=teacher_ids, is_translated=True)
        draw = replace(rollout.draw, prompt=prompt)
        rollouts.append(replace(rollout, draw=draw, completion_ids=tuple(ids), source="teacher", logprobs=None))
    return rollouts


def pair_of(student: str, teacher: str) -> TokenizerPair:
    own, other = (TokenBytes(load_tokenizer(folder), folder) for folder in (student, teacher))
    ends = ((side.tokenizer.eos_token_id,) for side in (own, other))
    return TokenizerPair.of(own, other, *ends)  # pyright: ignore


def main() -> None:
    out, student, teacher_folder, splits = sys.argv[1:]
    launch = Launch.from_environment()
    distributed.initialize(launch)
    pair = pair_of(student, teacher_folder)
    routed = RoutedTeacher({"main": local(student), "other": local(teacher_folder)})
    teacher = WithViews(routed, {"other": OtherTokenizer(pair, pair.alignment, MOST_TOKENS)})
    results: dict[str, torch.Tensor] = {}
    for split, stage in json.loads(splits):
        found = run_split(student, teacher, aligned_rollouts(pair), MEASURED, split, stage, launch)
        results |= {f"{split}/{stage}/{name}": tensor for name, tensor in found.items()}
    if launch.is_main:
        save_file(results, out)
    distributed.end_process()


if __name__ == "__main__":
    main()
