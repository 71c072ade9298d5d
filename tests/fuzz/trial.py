"""All trials: what each tries so and so many inputs of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fuzz import inputs, servers, stores
from fuzz.outcome import Outcome

TRIALS: dict[str, tuple[Callable[[int, int], Outcome], int, int]] = {  # name -> trial, full count, short count
    "configs": (inputs.configs, 5_000, 150),
    "JSONL rows": (inputs.json_rows, 18_000, 1_500),
    "Parquet rows": (inputs.parquet_rows, 2_000, 80),
    "damaged Parquet files": (inputs.parquet_damage, 400, 40),
    "damaged checkpoints": (stores.checkpoints, 600, 40),
    "damaged texts": (stores.texts, 500, 40),
    "damaged scores": (stores.scores, 500, 40),
    **{f"requests to {path}": (partial(servers.requests, path), 5_000, 60) for path in servers.ROUTES},
}
