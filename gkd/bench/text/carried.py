"""Going on from a record, on any machine: its runs, and what they started from.

A run's figures at equal tokens are not its machine's. What all runs share is, though: which layers the cut kept, and
what the teacher wrote for the held-out prompts. So a record holds both, and whoever goes on from it starts from these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gkd.bench.kept import read_json
from gkd.bench.text.folder import Folder
from gkd.bench.text.plan import run_key
from gkd.errors import InputError
from gkd.files import write_json

OPTION = "--continue"


def shared_by_runs(folder: Folder) -> dict[str, Any]:
    """What a record needs for others to go on from it; nothing of what is not there yet."""
    found: dict[str, Any] = {"key": folder.key}
    if (layers := folder.kept_layers()) is not None:
        found["student_layers"] = layers
    if folder.teacher_texts.exists():
        found["teacher_texts"] = read_json(folder.teacher_texts)
    return found


def carry_over(folder: Folder, path: Path) -> int:
    """Puts what a record holds where a comparison looks for it; returns how many runs that were not there.

    Its times stay behind: they are of its machine. Raises InputError for a file that is no such record, or one of
    other models, prompts or sizes, and where the folder's own runs started from another student or other texts.
    """
    record = _read(path)
    if record["key"] != folder.key:
        raise InputError(f"{OPTION}: {path} is of another model, other prompts, or another size or version")
    texts, layers = record["teacher_texts"], record["student_layers"]
    own_layers = folder.kept_layers()
    if own_layers not in (None, layers) or (folder.teacher_texts.exists() and read_json(folder.teacher_texts) != texts):
        raise InputError(
            f"{OPTION}: the runs in {folder.root} start from another cut or are judged on other texts than those of "
            f"{path}; give another --folder"
        )
    write_json(folder.layers, layers)
    write_json(folder.teacher_texts, texts)
    cells = {run_key(cell): cell for cell in folder.size.cells()}
    missing = [run for run in record["runs"] if not folder.result(cells[run["method"], run["seed"]]).exists()]
    for run in missing:
        result = {"device": record["device"]} | {name: v for name, v in run.items() if name not in ("method", "seed")}
        write_json(folder.result(cells[run["method"], run["seed"]]), result)
    return len(missing)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{OPTION}: {path} cannot be read ({error})") from None
    needed = ("key", "student_layers", "teacher_texts", "runs")
    if not isinstance(record, dict) or any(name not in record for name in needed):
        raise InputError(f"{OPTION}: {path} is no record of gkd bench text that can be gone on from")
    return record
