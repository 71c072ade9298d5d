"""Teacher completions come from a process of their own, once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import pytest
from launching import environment

from gkd.engines.sampling import SamplerSpec
from gkd.errors import MachineError, ModelError, SamplerError
from gkd.rollout import offline
from gkd.rollout.base import Sampler
from gkd.rollout.offline import cache_for, complete, start_sampler
from gkd.types import SampleRequest, SamplingSettings

T = TypeVar("T")
SETTINGS = SamplingSettings(6, stop_token_ids=(2,))
GREEDY = SamplingSettings(3, temperature=0.0)
REQUESTS = [SampleRequest((1, 80 + i), i) for i in range(3)]


@pytest.mark.slow
def test_a_child_process_fills_the_caches_once(
    tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")  # a launcher's variables must not reach the child
    monkeypatch.setenv("WORLD_SIZE", "2")
    spec = SamplerSpec("transformers", str(tiny_student), "float32", 64, pad_token_id=0)
    caches = [cache_for(tmp_path, spec, "f", settings) for settings in (SETTINGS, GREEDY)]
    notes: list[str] = []
    jobs = [(caches[0], SETTINGS, REQUESTS), (caches[1], GREEDY, REQUESTS[:1])]
    complete(spec, jobs, notes.append)
    here = start_sampler(spec)  # one of its own: the shared sampler may carry another test's weights
    assert [caches[0].get(r).token_ids for r in REQUESTS] == [c.token_ids for c in here.generate(REQUESTS, SETTINGS)]
    assert len(caches[1].get(REQUESTS[0]).token_ids) == 3
    complete(spec, jobs, notes.append)
    assert len(notes) == 1 and "sampling 4 teacher completions" in notes[0]


@pytest.mark.slow
def test_a_failing_child_is_an_error(tmp_path: Path, tiny_student: Path) -> None:
    spec = SamplerSpec("transformers", str(tiny_student), "float7", 64, pad_token_id=0)
    with pytest.raises(SamplerError, match="its process ended with 1"):
        complete(spec, [(cache_for(tmp_path, spec, "f", SETTINGS), SETTINGS, REQUESTS)], lambda text: None)


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent(tiny_student: Path, tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "import sys\n"
        "from gkd.engines.sampling import SamplerSpec\n"
        "from gkd.rollout.offline import cache_for, complete\n"
        "from gkd.types import SampleRequest, SamplingSettings\n"
        "spec = SamplerSpec('transformers', sys.argv[1], 'float32', 100_000, pad_token_id=0)\n"
        "settings = SamplingSettings(50_000)\n"
        "jobs = [(cache_for(__import__('pathlib').Path(sys.argv[2]), spec, 'f', settings), settings, "
        "[SampleRequest((1, 87), 0)])]\n"
        "complete(spec, jobs, print)\n"
    )
    words = [sys.executable, "-c", script, str(tiny_student), str(tmp_path)]
    parent = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tasks = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child = int(wait_for(lambda: tasks.read_text().strip()))
    wait_for(lambda: b"gkd.rollout.offline" in Path(f"/proc/{child}/cmdline").read_bytes())
    time.sleep(0.5)  # it has begun
    parent.send_signal(number)
    parent.wait(20)
    wait_for(lambda: not Path(f"/proc/{child}").exists(), timeout_s=5)


def wait_for(found: Callable[[], T], timeout_s: float = 60) -> T:
    deadline = time.monotonic() + timeout_s
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return result


def test_a_hub_models_revision_is_the_samplers_too(
    tiny_student: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"v1": tiny_student, "v2": tiny_teacher}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, revision=None, **_: str(folders[revision or "v2"])
    )
    spec = SamplerSpec("transformers", "org/name", "float32", max_model_tokens=64, pad_token_id=0, revision="v1")
    local = start_sampler(replace(spec, model_folder=str(tiny_student), revision=None))
    assert start_sampler(spec).probe(range(3, 20)) == local.probe(range(3, 20))


@pytest.mark.fault
def test_what_ends_the_child_is_raised_in_its_parent(
    tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line by the teacher's key, not a traceback and a second error; a folder that cannot be written, too."""
    monkeypatch.setattr(offline, "die_with_parent", lambda parent_pid: None)
    monkeypatch.setattr(offline, "start_sampler", lambda spec: failing(spec))
    spec = SamplerSpec("transformers", str(tiny_student), "float32", 64, key="teacher.model")
    job_file = tmp_path / "job.json"
    job_file.write_text(json.dumps({"parent_pid": 1, "spec": asdict(spec), "jobs": []}))

    def failing(spec: SamplerSpec) -> Sampler:
        raise ModelError(f"{spec.key}: is of no use") if not tmp_path.joinpath("full").exists() else full

    full = OSError(28, "No space left on device", "/cache")
    for kind, message in ((ModelError, r"^teacher\.model: is of no use"), (MachineError, "^/cache: No space left")):
        with pytest.raises(SystemExit) as ended:
            offline._main(job_file)
        assert ended.value.code == 2
        with pytest.raises(kind, match=message):
            offline._raise_again(offline._error_file(job_file))
        (tmp_path / "full").touch()
