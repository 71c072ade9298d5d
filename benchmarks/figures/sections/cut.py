"""A student cut out of its teacher by each rule: its distance before any training, and what the choice costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.figures.sections.reading import records
from benchmarks.figures.sections.text import markdown, section, three_digits


def cut_section(results: Path) -> str:
    """One table a record, a line a rule, the nearest student first."""
    parts = []
    for record in records(results, "cut").values():
        rules = sorted(record["rules"].items(), key=lambda item: item[1].get("heldout/forward_kl", math.inf))
        computing = f"{record['dtype']} ({record['capability']})"
        parts += [
            f"{record['device']} (load {record['load_average']}), {record['versions']}; {record['model']} cut from "
            f"{record['of_layers']} layers in {computing}, on {record['calibration_tokens']} calibration tokens. "
            f"Held-out divergences in nats a token, on the teacher's answers to {record['heldout_prompts']} prompts.",
            markdown(
                ["choose", "forward KL", "reverse KL", "JSD", "s", "processor s", "layers left out"],
                [_line(name, rule, record["of_layers"]) for name, rule in rules],
            ),
        ]
    return section(parts)


def _line(name: str, rule: dict[str, Any], of_layers: int) -> list[str]:
    divergences = [three_digits(rule.get(f"heldout/{kind}")) for kind in ("forward_kl", "reverse_kl", "jsd")]
    gone = [layer for layer in range(of_layers) if layer not in rule["layers"]]
    seconds = [three_digits(rule[key]) for key in ("seconds", "processor_seconds")]
    return [name, *divergences, *seconds, " ".join(map(str, gone))]
