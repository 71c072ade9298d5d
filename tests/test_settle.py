"""What `auto` is for a sampler, by the device and the batch: settled once, said and kept."""

from __future__ import annotations

from typing import Any

import pytest

from gkd.config import Config, Machine, make_config, served_choices, settle, settled_values
from gkd.config.choices import value_of, with_value
from gkd.config.sampler_choices import plain_memory
from gkd.processor import ChosenDtype

DTYPE = ChosenDtype("float32", "it is so")
CPU = Machine(DTYPE)
PLAIN = {
    "rollout.max_num_seqs": 64,
    "rollout.enforce_eager": True,
    "rollout.gpu_memory_utilization": 0.3,
    "rollout.sleep_level": 0,
}


def gpu(ranks: int = 1) -> Machine:
    return Machine(DTYPE, is_gpu=True, ranks=ranks, sampler_memory=lambda config: plain_memory("it is not planned"))


def config(batch_size: int = 16, **rollout: Any) -> Config:
    return make_config(
        {
            "teacher": {"model": "t", "dtype": "float32"},
            "student": {"model": "s", "dtype": "float32"},
            "data": {"train": "d"},
            "optim": {"batch_size": batch_size},
            "rollout": rollout,
        }
    )


def settled_rollout(*arguments: Any) -> dict[str, Any]:
    values = settled_values(settle(*arguments).config)
    return {key: value for key, value in values.items() if key.startswith("rollout.")}


def test_a_cpu_stays_as_it_was_and_says_why() -> None:
    assert {key: value_of(config(), key) for key in PLAIN} == dict.fromkeys(PLAIN, "auto")
    assert settled_rollout(config(batch_size=4096), CPU) == PLAIN
    lines = settle(config(), CPU).notes
    assert lines == [
        "rollout.max_num_seqs: 64; rollout.enforce_eager: true; rollout.gpu_memory_utilization: 0.3; "
        "rollout.sleep_level: 0, by auto: a CPU has no graphs to capture, and no memory of its own to share out"
    ]


@pytest.mark.parametrize(
    ("batch_size", "ranks", "tensor_parallel", "sequences"),
    [(16, 1, 1, 64), (512, 8, 1, 64), (1024, 8, 1, 128), (1024, 8, 2, 256), (8192, 8, 1, 512)],
)
def test_a_gpu_captures_graphs_for_all_sequences_of_an_engine(
    batch_size: int, ranks: int, tensor_parallel: int, sequences: int
) -> None:
    found = settled_rollout(config(batch_size, tensor_parallel=tensor_parallel), gpu(ranks))
    assert found == {**PLAIN, "rollout.max_num_seqs": sequences, "rollout.enforce_eager": False}


def test_what_is_said_stays() -> None:
    own = {"max_num_seqs": 7, "enforce_eager": True, "gpu_memory_utilization": 0.5, "sleep_level": 1}
    assert settled_rollout(config(**own), gpu()) == {f"rollout.{key}": value for key, value in own.items()}
    assert not settle(config(**own), gpu()).notes


def test_a_resume_keeps_each_and_what_no_key_can_be_is_passed_over() -> None:
    kept = {"rollout.max_num_seqs": 3, "rollout.enforce_eager": True, "rollout.sleep_level": "auto"}
    settled = settle(config(), gpu(), {**kept, "rollout.gpu_memory_utilization": 7.0})
    assert settled_rollout(config(), gpu(), kept) == {**PLAIN, "rollout.max_num_seqs": 3}
    assert settled.config.rollout.gpu_memory_utilization == 0.3
    (line,) = [line for line in settled.notes if "enforce_eager" in line]
    assert line.startswith("rollout.enforce_eager: true, as the run was started; auto would be false here: a GPU")


def test_a_key_whose_teacher_has_dots_in_its_name() -> None:
    values = {"other_teachers": {"a": {"model": "1", "weight": 0.1}, "a.b": {"model": "2", "weight": 0.1}}}
    two = make_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}, **values})
    changed = with_value(two, "other_teachers.a.b.dtype", "float16")
    assert [teacher.dtype for teacher in changed.other_teachers.values()] == ["auto", "float16"]
    assert value_of(changed, "other_teachers.a.b.dtype") == "float16"


@pytest.mark.parametrize(
    ("is_gpu", "sequences", "eager", "expected"),
    [(False, "auto", "auto", (64, True)), (True, "auto", "auto", (256, False)), (True, 9, True, (9, True))],
)
def test_a_servers_options(
    is_gpu: bool, sequences: Any, eager: Any, expected: tuple[int, bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gkd")
    assert served_choices(is_gpu, sequences, eager) == expected
    assert caplog.text.count("by auto: ") == 2 * (sequences == "auto")
