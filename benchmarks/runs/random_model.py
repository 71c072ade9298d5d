"""Models made on the spot, and a run that distils one: the text that comes out means nothing, its cost does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gkd.config import Config, make_config

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PAD, START, END = SPECIAL_TOKENS = ("<|pad|>", "<|start|>", "<|end|>")
TEXT = "Write down what a distillation step costs on this machine, and why. "


@dataclass(frozen=True)
class Size:
    """A model and a batch."""

    layers: int
    hidden: int
    vocabulary: int
    batch_size: int
    micro_batch_size: int
    max_prompt_tokens: int
    max_new_tokens: int


def save_model(folder: Path, layers: int, hidden: int, vocabulary: int) -> Path:
    """A seeded random Llama with a byte-level tokenizer; rows of the vocabulary beyond the bytes are never written."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 64),
            num_key_value_heads=max(1, hidden // 256),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=SPECIAL_TOKENS.index(END),
            pad_token_id=SPECIAL_TOKENS.index(PAD),
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """The bytes after the special tokens, nothing merged."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)


def run_config(size: Size, teacher: Path, folder: Path, sampler: str, steps: int) -> Config:
    """All samples the student's own and of full length, so that every step is the same work."""
    prompts = folder.with_name("prompts.jsonl")
    write_prompts(prompts, size)
    return make_config(
        {
            "run": {"name": folder.name, "dir": str(folder), "steps": steps},
            "teacher": {"model": str(teacher), "dtype": "bfloat16"},
            "student": {"init": {"layers": size.layers // 2}, "dtype": "bfloat16"},
            "data": {"train": str(prompts), "max_prompt_tokens": size.max_prompt_tokens},
            "rollout": {
                "engine": sampler,
                "max_new_tokens": size.max_new_tokens,
                "stop_token_ids": [],
                "kv_cache_gib": 0.25,
            },
            "objective": {"kind": "jsd"},
            "optim": {"batch_size": size.batch_size, "micro_batch_size": size.micro_batch_size},
            "log": {"show_first_batch": False},
        },
        origin="the benchmark's config",
    )


def write_prompts(path: Path, size: Size) -> None:
    """As many as a batch takes, none like another, a quarter to a half of the longest prompt each."""
    lengths = range(size.max_prompt_tokens // 4, size.max_prompt_tokens // 2)
    with path.open("w") as file:
        for start in range(max(len(lengths), size.batch_size)):
            length = lengths[start % len(lengths)]
            file.write(json.dumps({"prompt": (TEXT * 8)[start : start + length]}) + "\n")
