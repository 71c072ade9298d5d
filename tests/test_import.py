"""`import gkd` is cheap, and offers what it promises."""

from __future__ import annotations

from launching import check, run_python

import gkd


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, time; b = time.perf_counter(); import gkd; s = time.perf_counter() - b\n"
        "heavy = {'torch', 'transformers', 'vllm', 'deepspeed', 'datasets', 'numpy', 'rich', 'pydantic'}\n"
        "assert not heavy & sys.modules.keys(); assert s < 0.5, s"
    )
    check(run_python(["-c", code]))


def test_public_names() -> None:
    assert set(gkd.__all__) <= set(dir(gkd))
    for name in gkd.__all__:
        assert getattr(gkd, name) is not None
