"""Inputs drawn from a seed: configs, overrides, rows and files, each a good one that something happened to."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 10**5000 // 7, 1e308,
    float("nan"), float("inf"), "", " ", "~", "a" * 5000, "\x00", "\x1b[2J",
    "\ud800", "\u202e", "é\u0301", "../x", "2026-13-45", [], [[]], {}, {"a": {"b": [1]}}, [None], {"": ""},
)  # fmt: skip
YAML_BITS = (
    "!!int ", "!!bool x", "!!timestamp x", "!!set {a}", "!!python/name:os ", "&a ", "*a", "? ", "- ", "{", "}",
    "[", "]", ": ",
    "<<: *a", "\t", "\x07", "|\n", ">", "%YAML 9", "---\n", "\ufeff", "'", '"', "#", "=",
    "2026-13-45", "0x" + "f" * 6000, "[" * 400,
)  # fmt: skip
JSON_BITS = (
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    "\\",
    "\\ud800",
    "\\u0000",
    "null",
    "NaN",
    "1e999",
    "9" * 5000,
    "\x00",
    "é",
    "[" * 3000,
)
KEYS = ("prompt", "completion", "messages", "promt", "Prompt", "id", "role", "content", "name", "", "\n", "tutor")
CONFIG: dict[str, Any] = {
    "run": {"name": "x", "dir": None, "steps": 10, "seed": 0},
    "teacher": {"model": "t", "dtype": "bfloat16", "cache_gib": 0.5},
    "other_teachers": {"code": {"model": "c", "weight": 0.5}},
    "student": {"init": {"layers": [0, 3]}, "lora": {"rank": 4, "target_modules": ["q_proj"]}},
    "data": {"train": "d.jsonl", "chat_template_kwargs": {"enable_thinking": False}, "max_prompt_tokens": 99},
    "rollout": {"temperature": 0.7, "stop_token_ids": [2]},
    "mixture": {"student": 0.5, "dataset": 0.5},
    "objective": {"kind": "jsd", "beta": 0.5},
    "optim": {"lr": 1e-4, "betas": [0.9, 0.95], "batch_size": 16},
    "eval": {"tasks": ["chain_sum"], "engines": ["vllm"]},
    "log": {"wandb": False},
}
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "Once", "completion": " upon"},
    {"prompt": [{"role": "user", "content": "Why?"}], "completion": [{"role": "assistant", "content": "So."}]},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], "id": 3},
    {"prompt": "Hello", "tutor": "code", "completion": None},
)


def changed(value: Any, rng: random.Random) -> Any:
    """A copy of a nested value with one place replaced, renamed, wrapped, left out or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        copy = dict(value)
        action = rng.random()
        if action < 0.6:
            copy[key] = changed(copy[key], rng)
        elif action < 0.7:
            del copy[key]
        elif action < 0.85:
            copy[rng.choice([*KEYS, key[:-1], key + "s", key.upper(), key + "\x1b"])] = copy.pop(key)
        else:
            copy[rng.choice(KEYS)] = rng.choice(JUNK)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        return [*value[:place], changed(value[place], rng), *value[place + 1 :]]
    return rng.choice([*JUNK, [value], {"a": value}])


def garbled(text: str, bits: tuple[str, ...], rng: random.Random) -> str:
    """`text` with pieces put in, cut out or swapped."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 0, 1, 5]))
        text = text[:start] + rng.choice([*bits, ""]) + text[end:]
    return text


def damaged(content: bytes, rng: random.Random) -> bytes:
    """`content` with bytes flipped, zeroed, cut off, taken out or put twice; never as it was."""
    copy = bytearray(content)
    action, place = rng.randrange(5), rng.randrange(len(copy))
    if action < 2 or len(copy) < 16:
        for _ in range(rng.randint(1, 8)):
            copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
    elif action == 2:
        del copy[place:]
    elif action == 3:
        copy[place : place + 16] = bytes(16)
    else:
        del copy[place : place + rng.randint(1, 64)]
    return bytes(copy) if bytes(copy) != content else bytes(copy[:-1])


def config_text(rng: random.Random) -> str:
    import yaml

    value = CONFIG
    for _ in range(rng.randint(0, 2)):
        value = changed(value, rng)
    try:
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=rng.random() < 0.5)
    except ValueError:  # a number with more digits than Python writes
        text = "run: {seed: " + "9" * 5000 + "}\n"
    return garbled(text, YAML_BITS, rng) if rng.random() < 0.6 else text


def override(rng: random.Random) -> str:
    section = rng.choice(list(CONFIG))
    key = rng.choice([*CONFIG[section], "a", "\x1b[2J", ""])
    value = rng.choice(["1", "x", "null", "[a]", "{[a]: b}", "{1: 2}", "2026-13-45", "!!int x", "&a [*a]", "3e-4"])
    return garbled(f"{section}.{key}={value}", YAML_BITS, rng) if rng.random() < 0.5 else f"{section}.{key}={value}"


def json_line(rng: random.Random) -> bytes:
    value: Any = rng.choice(ROWS)
    for _ in range(rng.randint(0, 2)):
        value = changed(value, rng)
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    except ValueError:
        text = "9" * 5000
    if rng.random() < 0.4:
        text = garbled(text, JSON_BITS, rng)
    raw = text.encode("utf-8", "surrogatepass").replace(b"\n", b" ")
    return damaged(raw, rng) if rng.random() < 0.2 and raw else raw


def parquet_file(path: Path, rng: random.Random, rows: int, *, checksums: bool = False) -> list[str] | None:
    """A Parquet file of valid rows, or of changed ones; the prompts if all are valid. `checksums`: and valid."""
    import pyarrow
    import pyarrow.parquet

    texts = ["".join(rng.choices("abc é\n", k=rng.randint(1, 40))) for _ in range(rows)]
    values: list[Any] = [{"prompt": text, "id": i} for i, text in enumerate(texts)]
    valid = checksums or rng.random() < 0.3
    if not valid:
        values = [changed(rng.choice(ROWS), rng) for _ in range(rows)]
    try:
        table = pyarrow.Table.from_pylist(values)
        pyarrow.parquet.write_table(
            table,
            path,
            compression=rng.choice(["none", "snappy", "zstd", "gzip"]),
            use_dictionary=rng.random() < 0.5,
            write_page_checksum=checksums,
        )
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
        return parquet_file(path, rng, rows, checksums=checksums)  # no table is made of such values
    return texts if valid else None
