"""Tiny Llamas and their supervised training, in plain PyTorch: what a distillation starts from.

Legend: B problems, T positions, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gkd.bench.sizes import Schooling, Shape
from gkd.bench.tasks import ALPHABET, TASKS, Problem

PAD, END = "<pad>", "<end>"
VOCABULARY = {token: index for index, token in enumerate([PAD, END, *ALPHABET])}
_CHARACTERS = {index: token for token, index in VOCABULARY.items() if token in ALPHABET}
IGNORED = -100


def save_tokenizer(folder: Path) -> None:
    """One token a character."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, END)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.save_pretrained(folder)


def make_model(shape: Shape, seed: int) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, shape.hidden // 16)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,  # the probe of gkd's weight sync is 176 tokens long
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY[END],
        pad_token_id=VOCABULARY[PAD],
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def save_model(model: Any, folder: Path) -> None:
    """As a Hugging Face folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    save_tokenizer(folder)


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def school(model: Any, schooling: Schooling, draw: Callable[[int], Sequence[Problem]]) -> None:
    """Trains on the right answers of the problems that `draw` gives for each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=schooling.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, schooling.steps))
    model.train()
    for step in range(schooling.steps):
        loss = _supervised_loss(model, draw(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _lr_factor(step: int, steps: int) -> float:
    """Linear up over the first twentieth, then linear down to a fiftieth."""
    return min(1.0, 20 * (step + 1) / steps) * max(0.02, 1 - step / steps)


def _supervised_loss(model: Any, problems: Sequence[Problem]) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens. Tasks go through the model one by one: less padding."""
    total, tokens = torch.zeros(()), 0
    for task in TASKS:
        ids, labels = _rows([problem for problem in problems if problem.task == task])
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1]  # [B, T - 1, V]
        wanted = labels[:, 1:].to(model.device)
        total = total.to(model.device) + nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        tokens += int((wanted != IGNORED).sum())
    return total / tokens


def _rows(problems: Sequence[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, [B, T]; the labels are the answers and their end token."""
    prompts = [encode(problem.prompt) for problem in problems]
    answers = [[*encode(problem.answer), VOCABULARY[END]] for problem in problems]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(problems), longest), VOCABULARY[PAD])
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor(prompt + answer)
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return ids, labels


def encode(text: str) -> list[int]:
    return [VOCABULARY[character] for character in text]


def decode(token_ids: Sequence[int]) -> str:
    """The characters; padding and end are none."""
    return "".join(_CHARACTERS.get(token_id, "") for token_id in token_ids)


def in_turn(problems: Sequence[Problem], schooling: Schooling, seed: int) -> Callable[[int], list[Problem]]:
    """For each step as many problems of every task, drawn at random from `problems`."""
    by_task = {task: [problem for problem in problems if problem.task == task] for task in TASKS}

    def draw(step: int) -> list[Problem]:
        chance = random.Random(f"{seed}/{step}")
        return [problem for group in by_task.values() for problem in chance.sample(group, schooling.problems_a_task)]

    return draw
