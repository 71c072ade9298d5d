"""Sinks: the JSON lines survive crashes and full disks, the optional ones fail softly."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gkd.errors import RunFolderError
from gkd.monitor import JsonlSink, OptionalSink, TensorBoardSink, WandbSink, read_metrics


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not strict JSON")


def _filled(path: Path, steps: int) -> JsonlSink:
    sink = JsonlSink(path)
    for step in range(steps):
        sink.log(step, {"loss": 1.0 / (step + 1)})
    return sink


def test_a_line_is_readable_before_the_sink_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(0, {"loss": 1.5, "step": 0, "tokens/scored": 7})
    assert path.read_text() == '{"step": 0, "loss": 1.5, "tokens/scored": 7}\n'
    sink.close()


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(0, {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    record = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=_refuse)
    assert record == {"step": 0, "loss": None, "grad_norm": None, "lr": None}
    sink.close()


def test_a_resume_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _filled(path, 5).close()
    before = path.read_bytes().splitlines(keepends=True)
    sink = JsonlSink(path)
    sink.truncate_after(2)
    sink.log(3, {"loss": 9.0})
    sink.close()
    assert path.read_bytes() == b"".join(before[:3]) + b'{"step": 3, "loss": 9.0}\n'
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"], "the file written aside is gone"


def test_truncating_before_the_first_step_drops_all(tmp_path: Path) -> None:
    sink = _filled(tmp_path / "m.jsonl", 2)
    sink.truncate_after(-1)
    sink.close()
    assert (tmp_path / "m.jsonl").read_bytes() == b""


@pytest.mark.parametrize("cut", [1, 10, 23])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.jsonl"
    _filled(path, 3).close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "loss": 0.25}\n'[:cut])
    assert len(read_metrics(path)) == 3
    JsonlSink(path).close()
    assert path.read_bytes() == whole


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _filled(path, 2).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    sink = JsonlSink(path)
    sink.log(2, {"loss": 0.0})
    sink.close()
    assert len(read_metrics(path)) == 3


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 0}\n\xff\x00\n{"step": 2}\n')
    with pytest.raises(RunFolderError, match=r"m\.jsonl:2: not a metrics record"):
        JsonlSink(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink._file.close()
    sink._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device.*m\.jsonl"):
        sink.log(0, {"loss": 1.0})
    sink.close()  # nothing is left that could fail again


def test_a_failed_rewrite_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    sink = _filled(path, 3)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gkd.files.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left.*m\.jsonl"):
        sink.truncate_after(0)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


class Failing:
    """A sink that works `good` times."""

    def __init__(self, good: int) -> None:
        self.good, self.calls = good, 0

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.calls += 1
        if self.calls > self.good:
            raise ConnectionError("no route to host\nmore")

    def close(self) -> None:
        raise ConnectionError("closed")


def test_an_optional_sink_warns_once_and_falls_silent() -> None:
    warnings: list[str] = []
    inner = Failing(good=2)
    sink = OptionalSink("Service", lambda: inner, warnings.append)
    for step in range(5):
        sink.log(step, {"loss": 1.0})
    sink.close()
    assert inner.calls == 3
    assert warnings == ["warning: Service is off for the rest of the run (no route to host); metrics.jsonl goes on"]


def test_a_sink_that_fails_to_close_warns() -> None:
    warnings: list[str] = []
    sink = OptionalSink("Service", lambda: Failing(good=9), warnings.append)
    sink.close()
    sink.close()
    assert len(warnings) == 1


def test_a_missing_package_is_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    sink = OptionalSink("W&B", lambda: WandbSink(tmp_path, "run", {}), warnings.append)
    sink.log(0, {"loss": 1.0})
    sink.close()
    assert len(warnings) == 1
    assert "W&B is off" in warnings[0]


def test_wandb_continues_its_run_after_a_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[dict[str, Any]] = []
    logged: list[Any] = []

    def init(**arguments: Any) -> Any:
        started.append(arguments)
        return types.SimpleNamespace(
            id=arguments["id"] or "abc123",
            log=lambda metrics, step: logged.append((step, metrics)),
            finish=lambda: logged.append("finished"),
        )

    fake = types.SimpleNamespace(init=init, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in range(2):
        sink = WandbSink(tmp_path, "night", {"run": {"steps": 2}})
        sink.log(step, {"loss": 1.0})
        sink.close()
    assert [(call["name"], call["id"], call["resume"]) for call in started] == [
        ("night", None, None),
        ("night", "abc123", "allow"),
    ]
    assert logged == [(0, {"loss": 1.0}), "finished", (1, {"loss": 1.0}), "finished"]


def test_tensorboard_has_the_same_names_and_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((0, 3), (2, 4)):
        sink = TensorBoardSink(tmp_path, start_step=start)
        for step in range(start, stop):
            sink.log(step, {"step": step, "loss": float(10 * start + step), "divergence/forward_kl": 2.5})
        sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "divergence/forward_kl"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 22), (3, 23)]
