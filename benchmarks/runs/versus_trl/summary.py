"""From the rounds' steps to the figures of the record: medians over rounds with their spread, ratios, the bound."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.runs.planned import training_flops
from benchmarks.runs.versus_trl.engine import gkd_config
from benchmarks.runs.versus_trl.job import PARTS, WARM_UP_STEPS, Work
from gkd.planning.models import architectures

Round = dict[str, Any]


def round_figures(done: Mapping[str, Any]) -> Round:
    """Means over a round's counted steps, so that the parts add up to the step."""
    counted = done["steps"][WARM_UP_STEPS:]
    figures = {name: statistics.mean(step[name] for step in counted) for name in counted[0]}
    return {
        **figures,
        "tokens_per_s": figures["tokens"] / figures["step_s"],
        "peak_rss_bytes": done["peak_rss_bytes"],
        "wall_s": done["wall_s"],
        "steps": done["steps"],
    }


def over_rounds(rounds: Sequence[Round]) -> dict[str, dict[str, float]]:
    """Median, least and most of every figure that a round has."""
    names = [f"{part}_s" for part in ("step", *PARTS)] + ["tokens", "tokens_per_s", "peak_rss_bytes"]
    values = {name: [float(done[name]) for done in rounds] for name in names}
    measured = [done["heldout"] for done in rounds if "heldout" in done]
    for name in measured[0] if measured else ():
        values[name] = [heldout[name] for heldout in measured]
    return {
        name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in values.items()
    }


def bound(work: Work, rates: Sequence[float], prompt_tokens: float, ours: Mapping[str, Any]) -> dict[str, Any]:
    """The training half against the rate of bare bfloat16 products, measured in the same rounds."""
    rate = statistics.median(rates)
    models = architectures(gkd_config(work, work.prepared / "run", 0))
    flops = training_flops(*models, work.batch_size, prompt_tokens, ours["tokens"]["median"] / work.batch_size)
    return {
        "bf16_matmul_flops_per_s": list(rates),
        "training_flops_a_step": flops,
        "least_training_s": flops / rate,
        "share_reached": flops / rate / ours["training_s"]["median"],
    }


def comparison(contenders: Mapping[str, Any]) -> dict[str, Any]:
    """gkd against the faster of the TRL trainers, by medians over rounds."""
    figures = {name: contender["over_rounds"] for name, contender in contenders.items()}
    step_s = {name: found["step_s"]["median"] for name, found in figures.items()}
    fastest = min((name for name in step_s if name != "gkd"), key=lambda name: step_s[name])
    return {
        "fastest_trl": fastest,
        "speedup_vs_fastest_trl": step_s[fastest] / step_s["gkd"],
        "memory_vs_fastest_trl": figures["gkd"]["peak_rss_bytes"]["median"]
        / figures[fastest]["peak_rss_bytes"]["median"],
        "speedup_by_trainer": {name: step_s[name] / step_s["gkd"] for name in step_s if name != "gkd"},
    }
