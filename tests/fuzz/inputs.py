"""Configs, rows and Parquet files: taken as they are written, or refused."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from fuzz import cases
from fuzz.outcome import Outcome
from gkd.config import load_config, make_config
from gkd.data.formats import read_table


def configs(seed: int, count: int) -> Outcome:
    """Half of them files, half overrides of a good file."""
    outcome, rng = Outcome(), random.Random(seed)
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        path, good = Path(folder) / "run.yaml", yaml.safe_dump(cases.CONFIG)
        for index in range(count):
            overrides = [cases.override(rng)] if index % 2 else []
            text = good if overrides else cases.config_text(rng)
            path.write_bytes(text.encode("utf-8", "surrogatepass"))

            def load(overrides: list[str] = overrides) -> str | None:
                config = load_config(path, overrides)
                kept = make_config(config.model_dump(mode="json"))  # as the run folder keeps it
                yaml.safe_dump(kept.model_dump(mode="json"))
                return None if kept == config else "its copy in the run folder is another config"

            outcome.add(overrides or text, load)
    return outcome


def json_rows(seed: int, count: int) -> Outcome:
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for _ in range(count):
            line = cases.json_line(rng)
            path.write_bytes(line)
            column = rng.choice([None, None, "tutor"])
            outcome.add(line, lambda column=column: _texts_are_whole(path, column))
    return outcome


def _texts_are_whole(path: Path, column: str | None) -> str | None:
    for row in read_table(str(path), "train", teacher_column=column).rows:
        messages = (*(row.messages or ()), *(row.completion_messages or ()))
        texts: list[Any] = [row.prompt_text or "", row.completion_text or "", *(m["content"] for m in messages)]
        if not all(isinstance(text, str) and text.encode() is not None for text in texts):
            return f"{row} was taken"
    return None


def parquet_rows(seed: int, count: int, rows_a_file: int = 4) -> Outcome:
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        for index in range(count // rows_a_file):
            texts = cases.parquet_file(path, rng, rows_a_file)
            outcome.add(f"seed {seed}, file {index}", lambda texts=texts: _same_texts(path, texts))
    return outcome


def parquet_damage(seed: int, count: int) -> Outcome:
    """Half of the files have page checksums: what is read of these is what was written."""
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        for index in range(count):
            checksums = index % 2 == 0
            texts = cases.parquet_file(path, rng, 50, checksums=checksums)
            path.write_bytes(cases.damaged(path.read_bytes(), rng))
            wanted = texts if checksums else None
            outcome.add(f"seed {seed}, file {index}", lambda wanted=wanted: _same_texts(path, wanted))
    return outcome


def _same_texts(path: Path, texts: list[str] | None) -> str | None:
    rows = read_table(str(path), "train").rows
    return None if texts is None or [row.prompt_text for row in rows] == texts else "other texts were read"
