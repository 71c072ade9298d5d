"""Seconds: by hand where that is possible, the directions in which they must go, and against runs that happened."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import pytest
from planned import REPOSITORY, setup_of

from benchmarks.runs import fit_planner as fit
from benchmarks.runs import planned as recorded
from gkd.config import load_config
from gkd.errors import DataError
from gkd.monitor import PHASES
from gkd.planning.compare import compare
from gkd.planning.devices import device_named
from gkd.planning.memory import memory_plan
from gkd.planning.models import architectures
from gkd.planning.settled import make_setup
from gkd.planning.setup import Setup
from gkd.planning.sweep import sweep
from gkd.planning.time import time_plan
from gkd.processor import ChosenDtype

SMALL, HUGE = "qwen3_8b_to_1.7b", "qwen3_235b_to_8b"


def test_phases_are_those_of_a_run() -> None:
    assert tuple(time_plan(setup_of(SMALL, 8)).phases) == PHASES


def test_training_by_hand() -> None:
    """Llama-like FLOPs at 40 % of 989.4 TFLOP/s: 64 sequences a GPU, 1.2 x (512 + 2048) tokens, 4 forwards."""
    plan = time_plan(setup_of(SMALL, 8))
    matrices = 28 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144)
    forward = 2 * matrices + 4 * 28 * 2048 * 1280
    assert plan.phases["forward_backward"]["layers, compute"] == pytest.approx(
        64 * 1.2 * 2560 * 4 * forward / 0.4 / 989.4e12
    )
    pairs = 64 * 2048 * 151936
    loss = 2 * pairs * (3 * 2048 + 4096)
    assert plan.phases["forward_backward"]["loss, compute"] == pytest.approx(loss / 0.4 / 989.4e12)


@pytest.mark.parametrize(
    ("token_weight", "student_products", "teacher_products"),
    [("teacher_entropy: {threshold: 1.0}", 3, 1), ("importance: {}", 4, 1), ("drift: {}", 4, 2)],
)
def test_what_a_weight_needs_first_is_a_product_a_side(
    token_weight: str, student_products: int, teacher_products: int
) -> None:
    plan = time_plan(setup_of(SMALL, 8, f"objective.token_weight={{{token_weight}}}"))
    products = student_products * 2048 + teacher_products * 4096
    expected = 2 * 64 * 2048 * 151936 * products / 0.4 / 989.4e12
    assert plan.phases["forward_backward"]["loss, compute"] == pytest.approx(expected)


def test_a_teacher_that_no_term_needs_takes_nothing() -> None:
    setup = setup_of(SMALL, 8, "objective={kind: cross_entropy}", "mixture={student: 0.0, dataset: 1.0}")
    plan, memory = time_plan(setup), memory_plan(setup)
    assert plan.phase_s("score") == 0.0 and not any("teacher" in link.name for link in plan.links)
    assert plan.phases["forward_backward"]["loss, compute"] == pytest.approx(
        2 * 64 * 2048 * 151936 * 3 * 2048 / 0.4 / 989.4e12
    )
    taken = [*memory.resident.items(), *(item for phase in memory.phases.values() for item in phase.items())]
    assert sum(count for name, count in taken if "teacher" in name) == 0


def test_all_reduce_by_hand() -> None:
    """ZeRO 0 passes 4 bytes a parameter twice, 7/8 of it over each of 8 GPUs' NVLink."""
    setup = replace(setup_of(SMALL, 8), zero_stage=0)
    link = next(link for link in time_plan(setup).links if link.name == "gradients")
    assert link.bytes_a_step == pytest.approx(2 * 4 * setup.student.parameters * 7 / 8)
    assert link.seconds == pytest.approx(link.bytes_a_step / (0.75 * 450e9) + 15e-6)
    assert link.link == "node"


def test_a_teacher_hands_over_two_bytes_an_entry_of_a_hidden_state() -> None:
    setup = replace(setup_of(SMALL, 8), teacher_placement="served", teacher_devices=8)
    link = next(link for link in time_plan(setup).links if link.name == "teacher's hidden states")
    assert link.bytes_a_step == 64 * 2048 * 4096 * 2 and link.link == "network"


@pytest.mark.parametrize(
    ("change", "phase"),
    [
        ({"checkpointing": False}, "forward_backward"),
        ({"completion_tokens": 1024.0}, "forward_backward"),
        ({"decode_overhead_s": 0.0}, "sample"),
        ({"student_share": 0.5}, "sample"),
        ({"student_share": 0.0}, "sample"),
        ({"devices": 16}, "score"),
        ({"teacher_placement": "served", "teacher_devices": 64}, "score"),
    ],
)
def test_what_saves_time(change: dict[str, object], phase: str) -> None:
    before = setup_of(SMALL, 8)
    assert time_plan(replace(before, **change)).phase_s(phase) < time_plan(before).phase_s(phase)


def test_one_device_sends_nothing() -> None:
    plan = time_plan(setup_of(SMALL, 1))
    assert all(link.link in ("device", "host") for link in plan.links)
    assert all(link.seconds == 0 for link in plan.links)


def test_cost() -> None:
    plan = time_plan(setup_of(SMALL, 8))
    a_hour = plan.tokens_a_day / 24
    assert plan.cost_of_a_million_tokens(2.5, 8) == pytest.approx(8 * 2.5 / a_hour * 1e6)


def test_a_fixed_batch_stops_scaling_and_says_why() -> None:
    result = sweep(setup_of(SMALL, 8), "fixed batch")
    rates = [point.tokens_a_s for point in result.points]
    assert rates == sorted(rates) and result.points[-1].setup.devices == 512
    assert result.points[-1].efficiency < 0.5
    assert "worth it up to" in result.verdict and "sample" in result.verdict
    assert all(
        point.setup.batch_size % (point.setup.micro_batch_size * point.setup.devices) == 0 for point in result.points
    )


def test_a_growing_batch_goes_to_thousands() -> None:
    result = sweep(setup_of(SMALL, 8), "batch grows")
    assert result.points[-1].setup.devices == 4096 and result.points[-1].setup.batch_size == 64 * 4096


def test_a_sweep_where_nothing_fits() -> None:
    setup = setup_of(HUGE, 128)
    result = sweep(setup, "fixed batch")
    assert result.verdict == "fits on no number of devices" and not any(point.efficiency for point in result.points)


def test_a_machine_of_half_the_rates_takes_twice_as_long() -> None:
    """What --measure finds scales every phase of a CPU."""
    setup = recorded.setup_of(recorded.recorded_runs()[0])
    device = setup.device
    slower = replace(
        device, bf16_flops_per_s=device.bf16_flops_per_s / 2, bandwidth_bytes_per_s=device.bandwidth_bytes_per_s / 2
    )
    plan, twice = time_plan(setup), time_plan(replace(setup, device=slower))
    assert [twice.phase_s(phase) for phase in PHASES] == pytest.approx([2 * plan.phase_s(phase) for phase in PHASES])


def test_auto_is_what_a_run_there_would_choose() -> None:
    """The rates of a CPU held to AVX2: a product in bfloat16 takes 6 times as long as in float32."""
    cpu = device_named("cpu")
    slow = replace(
        cpu, bf16_flops_per_s=1e10, float32_flops_per_s=6e10, fastest_dtype=ChosenDtype("float32", "it has AVX2 alone")
    )
    overrides = ("run.name=x",), ("teacher.dtype=bfloat16", "student.dtype=bfloat16")
    configs = [load_config(REPOSITORY / "configs" / "quickstart.yaml", words) for words in overrides]
    auto, half = (make_setup(config, *architectures(config), slow, 1) for config in configs)
    assert (auto.teacher_dtype, auto.student_dtype) == ("float32", "float32")
    assert auto.settled_lines[0] == "teacher.dtype, student.dtype: float32, by auto: it has AVX2 alone"
    assert half.settled_lines[-1].startswith(
        "teacher.dtype, student.dtype: a product in bfloat16 takes 6.0 times as long"
    )
    seconds = [time_plan(setup).phases["forward_backward"]["layers, compute"] for setup in (auto, half)]
    assert seconds[1] == pytest.approx(6 * seconds[0])
    assert make_setup(configs[0], *architectures(configs[0]), cpu, 1).student_dtype == "bfloat16"


# ---- a served sampler


def served(name: str, devices: int, *overrides: str, replicas: int = 8, staleness: int = 0) -> Setup:
    where = ("rollout.placement=served", "rollout.addresses=[http://10.0.0.1:8400]", f"rollout.staleness={staleness}")
    return setup_of(name, devices, *overrides, *where, sampler_replicas=replicas)


def test_sampling_ahead_by_hand() -> None:
    """step = max(sampling, scoring + training) + sync; run by run as its timers would have it."""
    plan = time_plan(served(SMALL, 8))
    sample, score, backward, optimizer, sync = (plan.phase_s(phase) for phase in PHASES)
    training = score + backward + optimizer
    assert not plan.overlaps and plan.step_s == pytest.approx(sample + training + sync)
    assert sample > training
    ahead = time_plan(served(SMALL, 8, staleness=1))
    assert ahead.phases == plan.phases and ahead.step_s == pytest.approx(sample + sync)
    assert ahead.timed_s == pytest.approx(
        {"sample": 0, "score": score, "forward_backward": backward, "optimizer": optimizer,
         "sync": sync + sample - training}
    )  # fmt: skip
    assert ahead.bottleneck == ("sample", "weights and cache")
    assert time_plan(served(SMALL, 8, staleness=4)).step_s == ahead.step_s
    plan = time_plan(served(SMALL, 2, replicas=14, staleness=1))
    training = sum(plan.phase_s(phase) for phase in ("score", "forward_backward", "optimizer"))
    assert plan.phase_s("sample") < training and plan.step_s == pytest.approx(training + plan.phase_s("sync"))
    assert plan.timed_s["sync"] == plan.phase_s("sync") and plan.bottleneck[0] == "forward_backward"
    assert replace(plan, overlaps=False).bottleneck[0] == "forward_backward"


def test_a_sampler_that_sleeps_lightly_moves_its_weights_twice() -> None:
    awake, light, deep = (
        time_plan(setup_of(SMALL, 8, f"rollout.sleep_level={level}")).phases["sync"] for level in (0, 1, 2)
    )
    device = device_named("h100")
    expected_s = 2 * 2 * setup_of(SMALL, 8).student.parameters / device.host_link_bytes_per_s / device.efficiency.link
    assert light == awake | {"sampler's sleep": pytest.approx(expected_s)} and deep == awake


def test_weights_to_servers_by_hand() -> None:
    """Two bytes a parameter to each of 8 servers, over one GPU's 50 GB/s; sharded ones are gathered before."""
    setup = served(SMALL, 8)
    links = {link.name: link for link in time_plan(setup).links}
    assert links["weights to the sampler"].link == "network" and "weights gathered" not in links
    assert links["weights to the sampler"].bytes_a_step == 8 * 2 * setup.student.parameters
    assert links["weights to the sampler"].seconds == pytest.approx(8 * 2 * setup.student.parameters / 0.75 / 50e9)
    small = {link.name: link for link in time_plan(served(SMALL, 4, replicas=4)).links}
    assert small["weights to the sampler"].link == "node", "all of the run is in one"
    sharded = {link.name: link for link in time_plan(replace(setup, zero_stage=3)).links}
    assert sharded["weights gathered"].bytes_a_step == 4 * setup.student.parameters * 7 / 8
    assert sharded["weights to the sampler"] == links["weights to the sampler"]
    probes = [time_plan(served(SMALL, 8, replicas=count)).phases["sync"]["probe"] for count in (1, 2, 8)]
    a_server = probes[1] - probes[0]
    assert probes[2] - probes[0] == pytest.approx(7 * a_server)
    assert 0 < probes[0] - a_server <= a_server, "the trainer scores it once, without an engine around it"


def test_servers_share_the_batch() -> None:
    """512 sequences on 8 servers are 64 each, as on 8 ranks; on 16 they are 32."""
    assert [served(SMALL, 8, replicas=count).sampled_sequences for count in (8, 16)] == [64, 32]
    assert served(SMALL, 8).all_devices == 16
    assert time_plan(served(SMALL, 8, replicas=16)).phase_s("sample") < time_plan(served(SMALL, 8)).phase_s("sample")
    narrow = served(SMALL, 8, "rollout.max_concurrency=2")
    assert narrow.sampler_sequences == 16, "8 ranks send 2 each"
    grown = sweep(served(SMALL, 8, replicas=4), "batch grows", (8, 16, 2))
    assert [point.setup.sampler_replicas for point in grown.points] == [4, 8, 1]


# ---- LoRA


def test_lora_by_hand() -> None:
    """A frozen layer's backward is one forward; the adapter's own products have all three, and a checkpoint's."""
    full, lora = setup_of(SMALL, 8), setup_of(SMALL, 8, "student.lora.rank=16")
    tokens = 64 * 1.2 * 2560
    forward = full.student.forward_flops(1280)
    rate = 0.4 * 989.4e12
    plans = [time_plan(setup) for setup in (full, lora)]
    layers = [plan.phases["forward_backward"]["layers, compute"] for plan in plans]
    assert layers[0] == pytest.approx(tokens * 4 * forward / rate)
    assert layers[1] == pytest.approx(tokens * (3 * forward + 4 * 2 * lora.adapter_parameters) / rate)
    losses = [plan.phases["forward_backward"]["loss, compute"] for plan in plans]
    assert losses[0] - losses[1] == pytest.approx(2 * 64 * 2048 * 151936 * 2048 / rate), "the head's gradient"
    optimizers = [plan.phases["optimizer"]["memory"] for plan in plans]
    assert optimizers[1] / optimizers[0] == pytest.approx(lora.adapter_parameters / full.student.parameters)


def test_an_adapter_alone_is_synced_where_the_sampler_applies_it() -> None:
    """On a GPU, by default: float32, read and written. Merged weights are whole ones, and cost their sums."""
    lora, merged = (
        setup_of(SMALL, 8, "student.lora.rank=16", f"rollout.lora_sync={way}") for way in ("auto", "merged")
    )
    served_lora = served(SMALL, 8, "student.lora.rank=16")
    assert lora.sampler_applies_adapter and not merged.sampler_applies_adapter
    assert not served_lora.sampler_applies_adapter, "a served sampler takes merged weights only"
    assert not setup_of(SMALL, 1, "student.lora.rank=16", gpu="cpu").sampler_applies_adapter
    plans = [time_plan(setup) for setup in (lora, merged)]
    sent = [{link.name: link for link in plan.links}["weights to the sampler"].bytes_a_step for plan in plans]
    assert sent == [4 * lora.adapter_parameters, 2 * lora.student.parameters]
    assert plans[0].phases["sync"]["weights"] == pytest.approx(8 * lora.adapter_parameters / 0.5 / 3350e9)
    matrices = 28 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144)
    assert plans[1].phases["sync"]["merging adapters"] == pytest.approx(14 * matrices / 0.7 / 3350e9)
    assert "merging adapters" not in plans[0].phases["sync"]
    gathered = [time_plan(replace(setup, zero_stage=3)).links[-1].bytes_a_step for setup in (lora, merged)]
    kept = 4 * lora.adapter_parameters
    assert gathered == pytest.approx([7 / 8 * kept, 7 / 8 * (kept + 2 * lora.student.parameters)])


# ---- against runs


def test_the_numbers_of_the_cpu_come_from_the_record() -> None:
    """Fitted anew they are the same, and one number a phase leaves no more than rounding of its run's errors."""
    fitted_to, *_ = recorded.recorded_runs()
    assert fit.fitted(fitted_to) == device_named("cpu")
    source = fit.DEVICES.read_text()
    assert fit.with_numbers(source, device_named("cpu")) == source
    assert all(abs(recorded.compared(fitted_to).error(phase)) < 0.03 for phase in PHASES)


def test_a_fit_finds_the_efficiencies_that_made_the_times() -> None:
    setup = recorded.setup_of(recorded.recorded_runs()[0])
    efficiency = replace(setup.device.efficiency, sample=0.5, score=0.12, train=0.31, optimizer=0.8, sync=0.07)
    device = replace(setup.device, efficiency=efficiency, bf16_flops_per_s=2e12, bandwidth_bytes_per_s=3e10)
    plan = time_plan(replace(setup, device=device))
    times = {f"time/{phase}_s": 3 * seconds for phase, seconds in plan.timed_s.items()}
    rates = {"bf16_flops_per_s": 2e12, "bandwidth_bytes_per_s": 3e10}
    run = {**recorded.recorded_runs()[0], **rates, "summary": {"steps": 3, **times}}
    assert fit.fitted(run).efficiency == efficiency
    written = fit.with_numbers(fit.DEVICES.read_text(), fit.fitted(run))
    assert "= 2e12, 30 * GB" in written and "Efficiency(sample=0.5, score=0.12, train=0.31, " in written
    run["summary"]["time/sync_s"] = 1e-3  # less than its probe takes
    with pytest.raises(DataError, match=r"^time/sync_s: .* less than the "):
        fit.fitted(run)


def test_a_machine_that_changes_during_a_run_is_not_fitted_to() -> None:
    before = {"bf16_flops_per_s": 1.0e12, "bandwidth_bytes_per_s": 2.0e10}
    assert fit.steady_rates(before, {**before, "bf16_flops_per_s": 1.1e12})["bf16_flops_per_s"] == 1.05e12
    with pytest.raises(fit.UnsteadyError, match="bandwidth_bytes_per_s went from"):
        fit.steady_rates(before, {**before, "bandwidth_bytes_per_s": 1.4e10})
    fit.check_not_stolen((100, 10_000), (119, 11_000))
    with pytest.raises(fit.UnsteadyError, match="the host took 3% of the run's time"):
        fit.check_not_stolen((100, 10_000), (130, 11_000))
    stolen, ticks = fit.processor_ticks()
    assert 0 <= stolen <= ticks


def test_runs_that_nothing_was_fitted_to() -> None:
    """The machine they ran on can slow down in the middle of one, and come back before its rates are measured."""
    _, *held_out = recorded.recorded_runs()
    errors = {run["what"]: abs(recorded.compared(run).step_error) for run in held_out}
    assert len(errors) >= 4
    assert errors["the quickstart again, 6 steps"] < 0.25
    assert statistics.median(errors.values()) < 0.25 and max(errors.values()) < 0.5


def test_memory_is_what_a_process_held() -> None:
    """Libraries and the allocator's reserves are not counted, so the plan is below, by less than 15 %."""
    held = json.loads((REPOSITORY / "benchmarks" / "results" / "plan_cpu.json").read_text())["memory"]
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", held["overrides"])
    plan = memory_plan(make_setup(config, *architectures(config), device_named("cpu"), 1))
    assert 0.85 * held["max_rss_bytes"] < plan.peak_bytes < held["max_rss_bytes"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"steps": 0}', '{"steps": 2, "time/sample_s": 1.0}'])
def test_a_summary_that_cannot_be_compared_with(tmp_path, text: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"summary\.json"):
        compare(time_plan(setup_of(SMALL, 8)), path)


def test_a_comparison_is_a_step(tmp_path) -> None:
    plan = time_plan(setup_of(SMALL, 8))
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"steps": 4, **{f"time/{phase}_s": 8 * plan.phase_s(phase) for phase in PHASES}}))
    comparison = compare(plan, path)
    assert comparison.slowdown == pytest.approx(2.0) and comparison.step_error == pytest.approx(-0.5)
    assert all(abs(comparison.error_beside_slowdown(phase)) < 1e-9 for phase in PHASES)
