"""A student cut out of a model by each rule of student.init.choose: how far from its teacher it starts, and its price.

python -m benchmarks.runs.cut [--layers 20] [--calibration-tokens 256] [--dtype bfloat16] [--out FILE]

The model and the prompts are those of configs/quickstart.yaml. The divergences are the run's own, before any training,
on the teacher's answers to held-out prompts. Seconds are those of choosing, from the loaded tokenizer to the layers:
prompts and weights are read in them, the cache is not used. Processor seconds are of all threads: they hardly depend on
who else works on the machine.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.machine import environment, warn_if_busy
from benchmarks.records import RESULTS, ROOT, command, rounded, say
from benchmarks.runs.versus_trl.evaluate import heldout_divergences
from gkd.config import Config, LayerRule, load_config
from gkd.data import calibration_texts, load_prompts
from gkd.files import write_json
from gkd.models import (
    LayerChoice,
    choose_by_measure,
    choose_layers,
    load_tokenizer,
    make_student_from_layers,
    read_config,
    resolve_model,
)

CONFIG = "configs/quickstart.yaml"
RULES: tuple[LayerRule, ...] = get_args(LayerRule)


@dataclass(frozen=True)
class Chosen:
    """By a rule; `choice` where it was measured."""

    layers: list[int]
    seconds: float
    processor_seconds: float
    choice: LayerChoice | None

    def as_record(self) -> dict[str, Any]:
        measured = {} if self.choice is None else {
            "calibration_forward_kl": rounded(self.choice.forward_kl),
            "removed": [{"layer": one.layer, "figure": rounded(one.figure)} for one in self.choice.removed],
        }  # fmt: skip
        seconds = {"seconds": rounded(self.seconds, 3), "processor_seconds": rounded(self.processor_seconds, 3)}
        return {"layers": self.layers, **seconds, **measured}


def main() -> None:
    options = arguments()
    warn_if_busy()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gkd").setLevel(logging.INFO)  # the progress
    config = quickstart(options)
    source = resolve_model(config.teacher.model)
    rules: dict[str, Any] = {}
    for rule in options.rules:
        chosen = choose(config, source, rule, options)
        rules[rule] = chosen.as_record()
        if options.heldout:
            folder = make_student_from_layers(source, chosen.layers, options.work / rule)
            rules[rule] |= distances(config, folder)
        say(f"{rule}: {rules[rule]}")
    record = {
        **conditions(config, options),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "of_layers": read_config(source).get_text_config().num_hidden_layers,
        "rules": rules,
    }
    write_json(options.out, record)
    say(str(options.out))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    parser.add_argument("--no-heldout", dest="heldout", action="store_false", help="seconds alone")
    return parsed(parser, "cut")


def parsed(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """With the options that all cuts of the quickstart's teacher have."""
    parser.add_argument("--calibration-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", help="student.dtype: what is measured in")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="samples the answers")
    parser.add_argument("--work", type=Path, default=Path("runs") / name)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}_cpu.json")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def conditions(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """What the record of a cut says of what it was measured on."""
    return {
        "command": command(),
        **environment("cpu"),
        "load_average": round(os.getloadavg()[2], 1),
        "model": config.teacher.model,
        "calibration_tokens": options.calibration_tokens,
        "dtype": options.dtype,
        "heldout_prompts": config.eval.prompts,
    }


def distances(config: Config, folder: Path) -> dict[str, float]:
    """Held-out divergences of the student in `folder` from its teacher, before any training."""
    measured = heldout_divergences(with_student(config, str(folder)), str(folder))
    return {name: rounded(value) for name, value in measured.items()}


def quickstart(options: argparse.Namespace) -> Config:
    """Its config, from whatever folder one stands in; `options` have a work folder, an engine and a dtype."""
    overrides = [f"run.dir={options.work / 'run'}", "mixture={student: 1.0}", f"rollout.engine={options.engine}"]
    prompts = ROOT / "configs" / "prompts"
    overrides += [f"data.train={prompts / 'train.jsonl'}", f"data.heldout={prompts / 'heldout.jsonl'}"]
    overrides += [f"{side}.dtype={options.dtype}" for side in ("teacher", "student")]
    return load_config(ROOT / CONFIG, overrides)


def choose(config: Config, source: str, rule: LayerRule, options: argparse.Namespace) -> Chosen:
    tokenizer = load_tokenizer(source)
    start_s, processor_start_s = time.perf_counter(), time.process_time()
    choice = None
    if rule == "even":
        layers = choose_layers(options.layers, read_config(source).get_text_config().num_hidden_layers)
    else:
        prompts = load_prompts(config.data.train, config.data.train_split, tokenizer, config.data).prompts
        texts = calibration_texts(prompts, options.calibration_tokens)
        device = torch.device("cpu")
        choice = choose_by_measure(
            Path(source), rule, options.layers, texts, dtype=options.dtype, device=device, key="--rules"
        )
        layers = list(choice.layers)
    return Chosen(layers, time.perf_counter() - start_s, time.process_time() - processor_start_s, choice)


def with_student(config: Config, folder: str) -> Config:
    section = config.student.model_copy(update={"model": folder, "init": None})
    return config.model_copy(update={"student": section})


if __name__ == "__main__":
    main()
