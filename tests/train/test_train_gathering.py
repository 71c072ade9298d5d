"""Whole weights out of ZeRO-3's shards."""

from __future__ import annotations

import json
from pathlib import Path

from launching import check, torchrun

JOB = Path(__file__).with_name("gathering_job.py")
PYTHONPATH = f"{JOB.parents[1]}:{JOB.parents[1] / 'invariants'}"


def test_buckets_hold_what_deepspeed_gathers_one_by_one(tiny_student: Path) -> None:
    """Bitwise, on two ranks, for whatever lies in shards; with a handful of collective operations."""
    found = json.loads(check(torchrun(2, [JOB, tiny_student], PYTHONPATH=PYTHONPATH)).stdout.splitlines()[-1])
    assert found.keys() == {"float32", "autocast", "lora", "offloaded"}
    for name, setup in found.items():
        for way in ("small buckets", "one bucket", "not at hand"):
            assert setup[way]["same"] and setup[way]["tensors"] > 10, f"{name}, {way}: {setup[way]}"
        assert setup["one bucket"]["gathers"] == (2 if name == "lora" else 1)  # of each dtype
        assert 2 < setup["small buckets"]["gathers"] < setup["parameters"]
        assert setup["small buckets"]["largest"] < setup["one bucket"]["largest"]
