"""A narrower model by student.init.width, one size at a time: how far from the whole one it starts, and its price.

python -m benchmarks.runs.narrow [--sizes ffn=1024 kv_heads=2 hidden=504] [--calibration-tokens 256] [--out FILE]

Beside what the prompts use most stands a control, the first channels, heads and neurons of the same number. Model and
prompts are those of configs/quickstart.yaml; the divergences are the run's own, before any training, on the teacher's
answers to held-out prompts. Seconds are those of measuring and of writing the student.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import warn_if_busy
from benchmarks.records import rounded, say
from benchmarks.runs.cut import conditions, distances, parsed, quickstart
from gkd.config import StudentWidth
from gkd.data import calibration_texts, load_prompts
from gkd.files import write_json
from gkd.models import WidthChoice, choose_width, load_tokenizer, make_narrower, resolve_model
from gkd.planning.models import architectures


def main() -> None:
    options = arguments()
    warn_if_busy()
    config = quickstart(options)
    source = Path(resolve_model(config.teacher.model))
    prompts = load_prompts(config.data.train, config.data.train_split, load_tokenizer(str(source)), config.data).prompts
    texts = calibration_texts(prompts, options.calibration_tokens)
    _, teacher = architectures(config)
    sizes: dict[str, Any] = {}
    for size in options.sizes:
        name, _, number = size.partition("=")
        width = StudentWidth.model_validate({name: int(number)})
        started = time.perf_counter()
        choice = choose_width(source, width, texts, dtype=options.dtype, device=torch.device("cpu"))
        target = options.work / size
        make_narrower(source, width, choice, target)
        seconds = time.perf_counter() - started
        control = options.work / f"{size}-first"
        make_narrower(source, width, first_of(choice), control)
        sizes[size] = {
            "seconds": rounded(seconds, 3),
            "share_of_parameters": rounded(teacher.narrowed(width).parameters / teacher.parameters, 3),
            "most_used": distances(config, target),
            "first": distances(config, control),
        }
        say(f"{size}: {sizes[size]}")
    record = {**conditions(config, options), "sizes": sizes}
    write_json(options.out, record)
    say(str(options.out))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["ffn=1024", "kv_heads=2", "hidden=504"], metavar="KEY=NUMBER")
    return parsed(parser, "narrow")


def first_of(choice: WidthChoice) -> WidthChoice:
    """As many as it keeps, from the front."""

    def first(kept: Any) -> Any:
        if kept and isinstance(kept[0], tuple):
            return tuple(first(layer) for layer in kept)
        return None if kept is None else tuple(range(len(kept)))

    return replace(choice, **{field.name: first(getattr(choice, field.name)) for field in fields(choice)})


if __name__ == "__main__":
    main()
