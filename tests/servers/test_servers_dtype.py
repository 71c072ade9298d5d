"""`--dtype auto` of both servers, up to the engine, which is told a dtype."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from gkd.engines.prefill import PrefillSettings
from gkd.engines.sampling import SamplerSpec
from gkd.servers import sampler, teacher
from gkd.servers.server import ServerSettings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and this holds a CPU to AVX2")


class _AskedError(Exception):
    """In which dtype an engine was asked to start."""


def asked(settings: Any) -> NoReturn:
    raise _AskedError(settings.dtype)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_the_engine_is_told_what_auto_is(
    dtype: str, tiny_student: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(teacher, "PrefillEngine", lambda path, settings, **_: asked(settings))
    monkeypatch.setattr(sampler, "SamplerEngine", lambda spec, backend, **_: asked(spec))
    caplog.set_level(logging.INFO, "gkd")
    settings = PrefillSettings(dtype, 64, 1, 0.9, 1.0)
    spec = SamplerSpec("vllm", str(tiny_student), dtype, max_model_tokens=64)
    server = ServerSettings("127.0.0.1", 0, None, log_requests=False)
    told = "float32" if dtype == "auto" else dtype
    with pytest.raises(_AskedError, match=told):
        teacher._start(str(tiny_student), None, settings, lambda: None)
    with pytest.raises(_AskedError, match=told):
        sampler._start(spec, None, sampler.TransferSettings("file", None), server, lambda: None)
    assert caplog.text.count("--dtype: float32, by auto: ") == (2 if dtype == "auto" else 0)
