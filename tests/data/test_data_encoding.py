"""The ids of prompt and completion are those of the one text that they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import SPECIAL_TOKENS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from gkd.config import DataConfig
from gkd.data.encoding import RowEncoder
from gkd.data.formats import Row
from gkd.data.prompts import load_prompts
from gkd.data.templates import ChatTemplate
from gkd.errors import DataError
from gkd.types import Prompt

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PREFIX_SPACES = ("normalizer", "always", "first")  # Llama 2's, and the two schemes of newer files
CONTROL = ("<unk>", "<s>", "</s>")


def make_sentencepiece(
    prefix_space: str, control: tuple[str, ...] = CONTROL, extra_merges: Sequence[tuple[str, str]] = ()
) -> PreTrainedTokenizerFast:
    """Pieces as SentencePiece makes them: a space is `▁`, and one is put before a text."""
    letters = ["▁", "\n", *map(chr, range(33, 127))]
    spelled = ["▁ H", "▁H e", "▁He l", "▁Hel l", "▁Hell o", "▁H o", "▁Ho w", "l o"]
    merges = [*extra_merges, *(tuple(pair.split()) for pair in spelled)]
    pieces = [*CONTROL, *letters, *(a + b for a, b in merges), "<e>"]
    core = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>"))
    if prefix_space == "normalizer":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # pyright: ignore
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix_space, split=False)  # pyright: ignore
        core.decoder = decoders.Metaspace(prepend_scheme=prefix_space, split=False)  # pyright: ignore
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=control[2], chat_template=TEMPLATE)


def make_bytes(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL_TOKENS, *alphabet, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|start|>", eos_token="<|end|>")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Prompt]:
    def load_row(tokenizer: Any, row: object) -> Prompt:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row), encoding="utf-8")
        (prompt,) = load_prompts(str(path), "train", tokenizer, DataConfig(train=str(path))).prompts  # pyright: ignore
        return prompt

    return load_row


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str, **options: bool) -> list[int]:
    return tokenizer(text, **options)["input_ids"]  # pyright: ignore


# ---- what a tokenizer puts around a text


@pytest.mark.parametrize("frame", ["$A <|end|>", "<|start|> $A <|end|>", "<|start|> $A", "$A"])
def test_an_end_token_stands_behind_the_answer_alone(load: Callable[..., Prompt], frame: str) -> None:
    tokenizer = make_bytes()
    special = [(token, index) for index, token in enumerate(SPECIAL_TOKENS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=special)  # pyright: ignore
    end = tokenizer.eos_token_id
    prompt = load(tokenizer, {"prompt": "Once", "completion": " upon"})
    whole = ids_of(tokenizer, "Once upon")
    assert [*prompt.token_ids, *(prompt.completion_ids or ())] == whole + [end] * (whole[-1] != end)
    assert end not in prompt.token_ids, "a prompt that ends has no answer"
    assert load(tokenizer, {"prompt": "Once"}).token_ids == prompt.token_ids


# ---- a space before a text


@pytest.mark.parametrize("prefix_space", PREFIX_SPACES)
@pytest.mark.parametrize(
    ("prompt", "completion"), [("Hello", "! How"), ("Hello!", " How"), ("a\n", "b"), ("Hello", "")]
)
def test_an_answer_begins_where_the_prompt_ends(
    load: Callable[..., Prompt], prefix_space: str, prompt: str, completion: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tokenizer = make_sentencepiece(prefix_space)
    loaded = load(tokenizer, {"prompt": prompt, "completion": completion})
    ids = [*loaded.token_ids, *(loaded.completion_ids or ())]
    assert ids == [*ids_of(tokenizer, prompt + completion), tokenizer.eos_token_id]
    assert tokenizer.decode(ids[:-1]) == prompt + completion
    assert "one token would hold" not in caplog.text


@pytest.mark.parametrize("prefix_space", PREFIX_SPACES)
def test_a_token_over_the_border(
    load: Callable[..., Prompt], prefix_space: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`Hello` is one token, but a sampler that was given `Hel` goes on behind it."""
    tokenizer = make_sentencepiece(prefix_space)
    with caplog.at_level(logging.INFO):
        loaded = load(tokenizer, {"prompt": "Hel", "completion": "lo How"})
    assert list(loaded.token_ids) == ids_of(tokenizer, "Hel")
    assert tokenizer.convert_ids_to_tokens(list(loaded.completion_ids or ())) == ["lo", "▁How", "</s>"]
    assert "data.train: in 1 rows, first" in caplog.text


def test_a_join_that_cannot_be_had_is_shown_both_ways(load: Callable[..., Prompt]) -> None:
    """An accent that composes with the prompt's last letter is in no token of its own."""
    tokenizer = make_bytes()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # pyright: ignore
    assert load(tokenizer, {"prompt": "cafe", "completion": "s"}).completion_ids
    apart, whole = "cafe\u0301 au", "caf\u00e9 au"
    with pytest.raises(DataError, match=rf"jsonl:1: .* tokenised apart read '{apart}', and as one text '{whole}'"):
        load(tokenizer, {"prompt": "cafe", "completion": "\u0301 au"})


def test_cleaned_up_text_proves_nothing(load: Callable[..., Prompt]) -> None:
    """transformers' clean-up turns ` !` into `!`, and would call the two readings one."""
    tokenizer = make_sentencepiece("always", extra_merges=[("o", "!")])
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True  # pyright: ignore
    prompt = load(tokenizer, {"prompt": "o", "completion": "! How"})
    tokens = tokenizer.convert_ids_to_tokens([*prompt.token_ids, *(prompt.completion_ids or ())])
    assert tokens == ["▁", "o", "!", "▁How", "</s>"]


# ---- typed control tokens


@pytest.mark.parametrize("prefix_space", PREFIX_SPACES)
@pytest.mark.parametrize("typed", ["</s>Hello", "a</s>How", "a </s> How", "</s>", "<s></s>"])
def test_a_typed_control_token_adds_no_piece(prefix_space: str, typed: str) -> None:
    """As a tokenizer reads it for which `</s>` is no control token."""
    ordinary = make_sentencepiece(prefix_space, ("<unk>", "<e>", "<e>"))
    text = TEMPLATE.replace("</s>", "<e>").replace("<s>", "<e>")
    rendered = ordinary.apply_chat_template(
        [{"role": "user", "content": typed}], chat_template=text, tokenize=False, add_generation_prompt=True
    )
    expected = ordinary.convert_ids_to_tokens(ids_of(ordinary, str(rendered), add_special_tokens=False))
    tokenizer = make_sentencepiece(prefix_space)
    row = Row("row", messages=({"role": "user", "content": typed},))
    ids = RowEncoder(tokenizer, ChatTemplate(tokenizer, {})).prompt_ids(row)
    tokens = [token if token not in CONTROL else "<e>" for token in tokenizer.convert_ids_to_tokens(ids)]
    assert tokens == expected
    assert tokens.count("<e>") == 3, "the template's own"


words = st.lists(st.sampled_from(["Hello", " How", "! ", "\n", "lo", " ", "<", "s>", "<e>"]), max_size=6).map("".join)


@given(words, st.sampled_from(PREFIX_SPACES))
def test_stand_ins_give_the_ordinary_tokens(content: str, prefix_space: str) -> None:
    tokenizer = SENTENCEPIECE[prefix_space]
    messages = [{"role": "user", "content": content}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    encoder = RowEncoder(tokenizer, ChatTemplate(tokenizer, {}))
    assert encoder.encode(text, {"no such mark": ""}, "row") == ids_of(tokenizer, text, add_special_tokens=False)


SENTENCEPIECE = {prefix_space: make_sentencepiece(prefix_space) for prefix_space in PREFIX_SPACES}


def test_a_name_that_is_a_stand_in(load: Callable[..., Prompt]) -> None:
    content = "</s>\uf8fe1\ue001"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a text with the character U\+F8FE cannot take"):
        load(make_sentencepiece("first"), {"prompt": [{"role": "user", "content": content}]})
