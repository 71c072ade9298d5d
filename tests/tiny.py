"""A tiny real model: a byte-level tokenizer with a chat template, and a Llama that vLLM's CPU build runs.

head_dim is 32, the smallest that vLLM's CPU attention computes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|start|>", "<|end|>"]


def save_tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes after 3 special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)


def save_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    vocabulary: int = 259,
    tied: bool = True,
    scale: float = 0.3,
) -> Path:
    """A seeded random Llama with weights large enough that its distributions are far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=scale if "embed" in name or "lm_head" in name else hidden**-0.5)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def claim_tied(folder: Path) -> Path:
    """Lets the config of a model with a head of its own say that the embedding is its head."""
    import json

    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    return folder


def rewrite_tensor(file: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """`change` alters the tensor in place; the file keeps its length."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def save_prompts(file: Path, rows: int) -> Path:
    """JSONL with prompts of ragged lengths."""
    import json

    file.write_text("".join(json.dumps({"prompt": f"{i} {'x' * i}"}) + "\n" for i in range(rows)))
    return file
