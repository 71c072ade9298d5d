"""Bytes by hand for one case, and the directions in which they must go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planned import setup_of

from gkd import chunks
from gkd.config import load_config
from gkd.errors import ConfigError
from gkd.objectives.divergence import Divergence
from gkd.ops import linear_divergence, scratch
from gkd.ops.linear_terms import linear_terms
from gkd.ops.pass_job import WeightedLoss
from gkd.planning.devices import device_named
from gkd.planning.memory import memory_plan, student_state
from gkd.planning.models import architectures
from gkd.planning.settled import make_setup
from gkd.planning.suggest import suggest
from gkd.planning.time import training_s
from gkd.types import OutputHead, TopkScores

SMALL, LARGE, HUGE = "qwen3_8b_to_1.7b", "qwen3_32b_to_1.7b", "qwen3_235b_to_8b"
PARAMETERS = 1_720_574_976  # of Qwen3-1.7B: 151936 x 2048 + 28 x (12582912 + 37748736 + 4096 + 256) + 2048


def test_zero_by_hand() -> None:
    """8 ranks; bytes a parameter as DeepSpeed 0.19 keeps them under autocast."""
    setup = setup_of(SMALL, 8)
    assert setup.student.parameters == PARAMETERS
    expected = {0: 4 + 4 + 8, 1: 4 + 4 + (4 + 8) / 8, 2: 4 + (4 + 4 + 8) / 8, 3: (4 + 4 + 8) / 8}
    buffers = {0: 0.0, 1: 0.0, 2: 4 * 5e8, 3: 4 * 5e8 + 4 * 1e9}  # reduce bucket; gathered weights
    for stage, bytes_a_parameter in expected.items():
        device, host = student_state(replace(setup, zero_stage=stage))
        assert sum(device.values()) == pytest.approx(bytes_a_parameter * PARAMETERS + buffers[stage])
        assert not host


def test_states_of_layers_by_hand() -> None:
    """A pair of the last layers, widths 2048 and 4096, and one for every token: a projector each, and bf16 states."""
    plain = setup_of(SMALL, 1)
    term = {"kind": "hidden_states", "tokens": "all", "layers": [[0, 0], [28, 36]]}
    asked = setup_of(SMALL, 1, "objective=" + json.dumps({"terms": [{}, term]}))
    assert asked.trained_parameters - PARAMETERS == 2 * 2048 * 4096
    more = (
        memory_plan(asked).phases["score"]["teacher hidden states"]
        / memory_plan(plain).phases["score"]["teacher hidden states"]
    )
    assert more == pytest.approx(1 + 2 * plain.longest_tokens / plain.max_new_tokens)
    vectors = setup_of(SMALL, 1, "objective={terms: [{}, {kind: rkd}]}")
    forward = training_s(vectors)["forwards without gradients"]
    assert 3 * forward == pytest.approx(training_s(replace(vectors, checkpointing=False))["layers, compute"])
    assert "forwards without gradients" not in training_s(plain)
    only = setup_of(SMALL, 1, "objective=" + json.dumps({"terms": [term]}))
    assert (only.head_products, plain.head_products) == ((0, 0), (1, 1))


def test_the_student_as_it_was_by_hand() -> None:
    """A copy in bf16 and a third side's logits; a forward, and a product with a head of the student's size."""
    plain, held = setup_of(SMALL, 1), setup_of(SMALL, 1, "objective={terms: [{}, {kind: reference_kl}]}")
    before, after = memory_plan(plain), memory_plan(held)
    assert after.resident["initial student's weights"] == 2 * PARAMETERS
    of_before, of_after = (plan.phases["train"]["loss, logits of all sides"] for plan in (before, after))
    assert of_after == pytest.approx(1.5 * of_before)
    assert (held.head_products, held.extra_forwards) == ((2, 1), 1)
    below = setup_of(SMALL, 1, "objective={terms: [{}, {kind: reference_kl}]}", "student.lora={}")
    assert below.reference_bytes == 0 and below.extra_forwards == 1


def test_another_tokenizer_costs_products_with_the_heads() -> None:
    """The log-probabilities of all labels, and of longer spans those of both sides."""
    plain, aligned = setup_of(SMALL, 1), setup_of(SMALL, 1, "teacher.alignment=shared")
    assert (plain.head_products, aligned.head_products) == ((1, 1), (3, 2))
    assert training_s(aligned)["loss, compute"] > 1.5 * training_s(plain)["loss, compute"]


def test_an_offloaded_optimizer_by_hand() -> None:
    setup = replace(setup_of(SMALL, 8), offload_optimizer=True)
    for stage, on_device in {1: 4 + 4, 2: 4, 3: 4 / 8}.items():
        device, host = student_state(replace(setup, zero_stage=stage))
        weights_and_gradients = sum(size for name, size in device.items() if name.startswith("student"))
        assert weights_and_gradients == pytest.approx(on_device * PARAMETERS)
        assert sum(host.values()) == pytest.approx((4 + 8 + 4) / 8 * PARAMETERS)


def test_half_precision_weights_by_hand() -> None:
    """bf16 in the DeepSpeed JSON: 2 + 2 for weights and gradients, 4 + 8 for the float32 copy and Adam."""
    device, _ = student_state(replace(setup_of(SMALL, 1), half_weights=True, zero_stage=0))
    assert sum(device.values()) == pytest.approx(16 * PARAMETERS)
    device, _ = student_state(replace(setup_of(SMALL, 4), half_weights=True, zero_stage=1))
    assert sum(device.values()) == pytest.approx((2 + 2 + 12 / 4) * PARAMETERS)


@pytest.mark.parametrize("devices", [8, 64])
def test_more_sharding_never_needs_more_memory(devices: int) -> None:
    """For a student whose shards are larger than DeepSpeed's buckets."""
    peaks = [
        memory_plan(replace(setup_of(HUGE, 128), devices=devices, zero_stage=stage)).peak_bytes for stage in range(4)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"offload_optimizer": True},
        {"offload_optimizer": True, "offload_parameters": True},
        {"checkpointing": True},
        {"micro_batch_size": 2},
        {"sampler_memory_share": 0.2},
        {"teacher_placement": "sharded"},
        {"teacher_placement": "served", "teacher_devices": 1},
        {"devices": 64},
        {"chunk_bytes": 1e8},
    ],
)
def test_what_saves_memory(change: dict[str, object]) -> None:
    before = replace(setup_of(SMALL, 8), checkpointing=False, zero_stage=3)
    assert memory_plan(replace(before, **change)).peak_bytes < memory_plan(before).peak_bytes


def test_offloading_counts_against_the_host() -> None:
    setup = replace(setup_of(HUGE, 8), offload_optimizer=True, zero_stage=1, batch_size=64)
    plan = memory_plan(setup)
    assert plan.host_bytes == pytest.approx(16 * setup.student.parameters)  # 8 ranks on one host, an eighth each
    tiny_host = replace(setup, device=replace(setup.device, host_memory_bytes=1e9))
    assert any("host" in fault for fault in memory_plan(tiny_host).faults)


def test_the_deepspeed_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    )
    setup = setup_of(SMALL, 8, f"deepspeed.config={path}")
    assert (setup.zero_stage, setup.offload_parameters, setup.offload_optimizer) == (3, True, False)
    assert setup.half_weights and not setup.autocast
    path.write_text(json.dumps({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}))
    with pytest.raises(ConfigError, match=r"^deepspeed\.config: .*stage of at least 1"):
        setup_of(SMALL, 8, f"deepspeed.config={path}")


def test_an_impossible_plan_suggests_one_that_fits() -> None:
    """What is suggested, given as overrides, makes the same setup: it can be typed as it stands."""
    overrides = ["deepspeed.zero_stage=0", "optim.micro_batch_size=32", "student.gradient_checkpointing=false"]
    asked = setup_of(SMALL, 8, *overrides)
    assert not memory_plan(asked).fits
    suggestion = suggest(asked)
    assert suggestion is not None
    assert memory_plan(suggestion.setup).fits
    assert len(suggestion.changes) == len(suggestion.why) >= 1
    assert setup_of(SMALL, 8, *overrides, *suggestion.changes) == suggestion.setup


def test_a_packed_run_is_told_of_fewer_tokens() -> None:
    """optim.micro_batch_size would change nothing for it."""
    at_first = setup_of(SMALL, 8)
    overrides = ["student.gradient_checkpointing=true", "deepspeed.zero_stage=3", "rollout.gpu_memory_utilization=0.1"]
    overrides += ["optim.batch_size=2048", f"optim.micro_batch_tokens={256 * at_first.longest_tokens}"]
    asked = setup_of(SMALL, 8, *overrides)
    suggestion = suggest(asked)
    assert suggestion is not None and asked.packed
    assert any(change.startswith("optim.micro_batch_tokens=") for change in suggestion.changes)
    assert setup_of(SMALL, 8, *overrides, *suggestion.changes) == suggestion.setup


def test_a_suggestion_is_the_smallest_change() -> None:
    """Undoing any of it no longer fits."""
    asked = setup_of(
        SMALL, 8, "deepspeed.zero_stage=0", "optim.micro_batch_size=32", "rollout.gpu_memory_utilization=0.4"
    )
    suggestion = suggest(asked)
    assert suggestion is not None
    changed = {name for name in vars(asked) if getattr(asked, name) != getattr(suggestion.setup, name)}
    assert len(changed) >= 1
    for name in changed:
        assert not memory_plan(replace(suggestion.setup, **{name: getattr(asked, name)})).fits, name


@pytest.mark.parametrize(("name", "devices", "placement"), [(LARGE, 8, "sharded"), (HUGE, 128, "served")])
def test_a_teacher_that_is_too_large_goes_elsewhere(name: str, devices: int, placement: str) -> None:
    suggestion = suggest(setup_of(name, devices))
    assert suggestion is not None and suggestion.setup.teacher_placement == placement
    assert memory_plan(suggestion.setup).fits


def test_a_served_teacher_on_too_few_devices_gets_more() -> None:
    asked = replace(setup_of(HUGE, 128), teacher_placement="served", teacher_devices=2)
    assert any("served teacher" in fault for fault in memory_plan(asked).faults)
    suggestion = suggest(asked)
    assert suggestion is not None and memory_plan(suggestion.setup).fits
    assert suggestion.changes == (f"--teacher-gpus {suggestion.setup.teacher_devices}",)


def test_a_served_sampler_has_a_whole_device() -> None:
    """It takes nothing of the training devices, and 90 % of its own: 72 GB less 2 bytes a parameter."""
    here = setup_of(SMALL, 8)
    elsewhere = replace(here, sampler_replicas=4)
    plans = [memory_plan(setup) for setup in (here, elsewhere)]
    assert plans[0].peak_bytes - plans[1].peak_bytes == pytest.approx(0.25 * 80e9)
    a_sequence = 3072 * 2 * 28 * 1024 * 2
    assert plans[1].sequences_at_once == pytest.approx((0.9 * 80e9 - 2 * PARAMETERS) / a_sequence)


def test_a_sampler_that_sleeps_takes_nothing_of_training() -> None:
    """At level 1 its weights wait on the host, 2 bytes a parameter and rank; level 2 drops them."""
    awake = setup_of(SMALL, 8)
    for level, waiting in ((1, 8 * 2 * PARAMETERS), (2, 0)):
        asleep = setup_of(SMALL, 8, f"rollout.sleep_level={level}")
        plans = [memory_plan(setup) for setup in (awake, asleep)]
        for phase, saved in (("sample", 0), ("score", 0.25 * 80e9), ("train", 0.25 * 80e9), ("sync", 0)):
            assert plans[0].peak_of(phase) - plans[1].peak_of(phase) == pytest.approx(saved), phase
        assert plans[1].host_bytes == waiting
    on_cpu = replace(awake, device=device_named("cpu"))
    assert memory_plan(replace(on_cpu, sleep_level=2)) == memory_plan(on_cpu), "there it gives nothing back"


def test_a_sampler_split_over_ranks_has_a_share_of_the_weights_on_each() -> None:
    whole, split = setup_of(SMALL, 8), setup_of(SMALL, 8, "rollout.tensor_parallel=4")
    rooms = [memory_plan(setup).sampler_room_bytes for setup in (whole, split)]
    assert rooms[1] - rooms[0] == pytest.approx(2 * PARAMETERS * 3 / 4)
    with pytest.raises(ConfigError, match=r"^rollout\.tensor_parallel: 3 does not divide the number of ranks, 8"):
        setup_of(SMALL, 8, "rollout.tensor_parallel=3")


def test_a_sampler_that_fits_nowhere_else_is_served() -> None:
    setup = setup_of(HUGE, 8)
    suggestion = suggest(replace(setup, device=replace(setup.device, memory_bytes=40e9)))
    assert suggestion is not None and memory_plan(suggestion.setup).fits
    assert f"--sampler-gpus {suggestion.setup.sampler_replicas}" in suggestion.changes
    beside = replace(suggestion.setup, sampler_replicas=0)
    assert not memory_plan(beside).fits


def test_nothing_fits_on_too_little() -> None:
    setup = setup_of(HUGE, 1, "optim.micro_batch_size=1")
    tiny = replace(setup, device=replace(setup.device, memory_bytes=1e9))
    assert suggest(tiny) is None


def test_a_student_from_layers_and_a_wheel_are_known_without_being_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path))  # the wheel was never converted
    config = load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    student, teacher = architectures(config)
    assert teacher.parameters == 134_515_008
    assert student.layers == 20
    setup = make_setup(config, student, teacher, setup_of(SMALL, 8).device, 1)
    assert memory_plan(setup).fits


def test_lora_by_hand() -> None:
    """Frozen bf16 weights of 2 bytes, and of the adapters alone 4 + 4 + 8 under autocast."""
    setup = setup_of(SMALL, 8, "student.lora.rank=16")
    inputs_and_outputs = 2 * (2048 + 2048) + 2 * (2048 + 1024) + 3 * (2048 + 6144)  # q, o; k, v; the MLP's three
    adapters = 28 * 16 * inputs_and_outputs
    assert setup.adapter_parameters == adapters == 17_432_576
    bytes_of_adapters = {0: 4 + 4 + 8, 1: 4 + 4 + (4 + 8) / 8, 2: 4 + (4 + 4 + 8) / 8, 3: (4 + 4 + 8) / 8}
    for stage, bytes_a_parameter in bytes_of_adapters.items():
        device, _ = student_state(replace(setup, zero_stage=stage))
        frozen = 2 * PARAMETERS / (8 if stage == 3 else 1)
        state = sum(size for name, size in device.items() if not name.startswith("ZeRO"))
        assert state == pytest.approx(frozen + bytes_a_parameter * adapters)
    plan, full = memory_plan(setup), memory_plan(setup_of(SMALL, 8))
    assert "loss, head and its gradient" not in plan.phases["train"]
    assert plan.peak_bytes < full.peak_bytes
    some = setup_of(SMALL, 8, "student.lora={rank: 8, target_modules: [q_proj, v_proj]}")
    assert some.adapter_parameters == 28 * 8 * (2048 + 2048 + 2048 + 1024)
    with pytest.raises(ConfigError, match=r"^student\.lora\.target_modules: 'lm_head' of .* is not planned for"):
        setup_of(SMALL, 8, "student.lora.target_modules=[lm_head]")


def _whole_loss(rows: int, vocabulary: int) -> None:
    student, teacher = torch.randn(rows, 2), torch.randn(rows, 3)
    linear_divergence(student, torch.randn(vocabulary, 2), teacher, torch.randn(vocabulary, 3), "jsd")


def _topk_loss(rows: int, vocabulary: int) -> None:
    teacher = TopkScores(torch.zeros(rows, 1, dtype=torch.int64), torch.full((rows, 1), -1.0))
    linear_terms(
        torch.randn(rows, 2),
        OutputHead(torch.randn(vocabulary, 2)),
        teacher,
        [WeightedLoss(Divergence("forward_kl"))],
        acts=torch.ones(1, rows, dtype=torch.bool),
        labels=torch.zeros(rows, dtype=torch.int64),
        valid_vocab=vocabulary,
    )


@pytest.mark.parametrize("loss", [_whole_loss, _topk_loss])
def test_the_plan_counts_with_the_chunk_of_the_losses(
    loss: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the default is, both follow it: a number of its own on either side would show."""
    vocabulary, chunk_rows = 16, 5
    monkeypatch.setitem(chunks.LOSS_CHUNK_BYTES, "cpu", 4 * vocabulary * chunk_rows)
    monkeypatch.setitem(chunks.LOSS_CHUNK_BYTES, "cuda", 12345)
    taken: list[int] = []
    take = scratch.take

    def recorded(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        taken.append(shape[0] * shape[1] * dtype.itemsize)
        return take(shape, dtype, device)

    monkeypatch.setattr(scratch, "take", recorded)
    loss(4 * chunk_rows, vocabulary)
    assert max(taken) == setup_of(SMALL, 1, gpu="cpu").chunk_bytes == 4 * vocabulary * chunk_rows
    assert setup_of(SMALL, 1).chunk_bytes == 12345
