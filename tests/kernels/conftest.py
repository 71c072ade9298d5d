"""One compilation of the emulation for all tests here."""

from __future__ import annotations

import ctypes

import pytest
from emulated import compile_emulation


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("emulation") / "rows.so"
    compile_emulation(target, "-shared", "-fPIC")
    library = ctypes.CDLL(str(target))
    for name in ("gkd_run_rows", "gkd_kinds", "gkd_run_topk_log_probs", "gkd_run_topk_gradient"):
        getattr(library, name).restype = ctypes.c_char_p
    library.gkd_plan.restype = ctypes.c_char_p
    library.gkd_is_whole.restype = ctypes.c_bool
    return library
