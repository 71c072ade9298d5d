"""Tokenizers of other families than the tiny models', trained on a few lines, and models that have one."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import save_tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The cat sat on the mat, and the dog ran to the house.",
    "the quick brown fox jumps over the lazy dog; the cat and the mat",
    "你好，世界。猫坐在垫子上。 🤖 café naïve",
] * 8
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(size: int = 340, control: tuple[str, ...] = ("</s>", "<pad>")) -> PreTrainedTokenizerFast:
    """BPE over bytes, as GPT-2's; the first control token ends a text, the second is padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(  # pyright: ignore
        vocab_size=size, special_tokens=list(control), initial_alphabet=_BYTES, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=control[0], pad_token=control[1])


def sentencepiece(size: int = 120, *, unigram: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are U+2581, one before a text, and bytes without a token are `<0x0A>`."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    control, byte_names = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.Unigram() if unigram else models.BPE())
    trained.normalizer = normalizers.Sequence(steps)  # pyright: ignore
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # pyright: ignore
    kind = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
    trained.train_from_iterator(LINES, kind(vocab_size=size, show_progress=False))  # pyright: ignore
    learned = json.loads(trained.to_str())["model"]
    if unigram:
        pieces = [(name, 0.0) for name in [*control, *byte_names]] + [tuple(piece) for piece in learned["vocab"]]
        model = models.Unigram(pieces, unk_id=0, byte_fallback=True)  # pyright: ignore
    else:
        names = [*control, *byte_names, *sorted(learned["vocab"], key=learned["vocab"].get)]
        vocabulary = {name: index for index, name in enumerate(names)}
        merges = [tuple(merge) for merge in learned["merges"]]
        model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in control])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def save_other_model(folder: Path, *, seed: int = 1, layers: int = 2, hidden: int = 64) -> Path:
    """A tiny model with the byte-level tokenizer above: two columns more than it has tokens."""
    tokenizer = byte_level()
    save_tiny_model(folder, seed=seed, layers=layers, hidden=hidden, vocabulary=len(tokenizer) + 2)
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    file.write_text(json.dumps({**json.loads(file.read_text()), **ends}))
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), **ends}))
    return folder
