"""`import gkd` is cheap, and offers what it promises."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from launching import check, run_python

import gkd
import gkd.errors
import gkd.ops
import gkd.ops.drop_in

PROMISED = Path(__file__).parent / "public_names.txt"


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


def test_public_names_and_signatures_are_those_that_were_promised() -> None:
    """A name or a parameter that goes breaks someone's code: it needs a line in the CHANGELOG, and one here."""
    assert list(_public_names()) == PROMISED.read_text().splitlines()


def _public_names() -> Iterator[str]:
    for module in (gkd, gkd.ops, gkd.ops.drop_in, gkd.errors):
        for name in sorted(_names(module)):
            yield from _described(f"{module.__name__}.{name}", getattr(module, name))


def _names(module: ModuleType) -> list[str]:
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    if module is gkd.errors:
        own = [name for name in own if inspect.isclass(getattr(module, name))]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def _described(name: str, value: object) -> Iterator[str]:
    """A config's fields are in the documentation of the keys; an error is known by what it is caught as."""
    if inspect.isclass(value):
        yield f"{name}: {', '.join(base.__name__ for base in value.__bases__)}"
        methods = [method for method in vars(value) if not method.startswith("_")] if value is gkd.Distiller else []
        for method in sorted(methods):
            yield from _described(f"{name}.{method}", getattr(value, method))
    elif callable(value):
        yield f"{name}{inspect.signature(value)}"
