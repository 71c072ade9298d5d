"""The time split: nothing counts twice, nothing is lost, all keys are always there."""

from __future__ import annotations

import pytest

from gkd.monitor import METRICS, PHASES, PhaseTimer


class Clock:
    """Seconds that only pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timer(clock: Clock) -> PhaseTimer:
    return PhaseTimer(clock=clock)


def test_an_idle_step_has_all_keys_and_they_are_documented(timer: PhaseTimer) -> None:
    record = timer.finish_step()
    assert set(record) == {f"time/{name}_s" for name in (*PHASES, "train", "other", "step")}
    assert set(record) <= set(METRICS)
    assert all(seconds == 0 for seconds in record.values())


def test_phases_and_the_rest_add_up_to_the_step(timer: PhaseTimer, clock: Clock) -> None:
    for name, seconds in zip(PHASES, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True):
        with timer.phase(name):
            clock.pass_s(seconds)
        clock.pass_s(0.5)
    record = timer.finish_step()
    assert [record[f"time/{name}_s"] for name in PHASES] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert record["time/train_s"] == 7.0
    assert record["time/other_s"] == 2.5
    assert record["time/step_s"] == 17.5


def test_inner_time_counts_for_the_inner_phase_only(timer: PhaseTimer, clock: Clock) -> None:
    with timer.phase("forward_backward"):
        clock.pass_s(1)
        with timer.phase("optimizer"):
            clock.pass_s(2)
            with timer.phase("forward_backward"):  # entered again while it is open
                clock.pass_s(4)
        clock.pass_s(8)
    with timer.phase("forward_backward"):
        clock.pass_s(16)
    record = timer.finish_step()
    assert record["time/forward_backward_s"] == 29
    assert record["time/optimizer_s"] == 2
    assert record["time/step_s"] == 31
    assert record["time/other_s"] == 0


def test_a_step_ends_inside_a_phase(timer: PhaseTimer, clock: Clock) -> None:
    with timer.phase("sample"):
        clock.pass_s(1)
        assert timer.finish_step()["time/sample_s"] == 1
        clock.pass_s(2)
    assert timer.finish_step()["time/sample_s"] == 2
    assert timer.totals["time/sample_s"] == 3
    assert timer.totals["time/step_s"] == 3


def test_a_phase_that_raises_is_closed(timer: PhaseTimer, clock: Clock) -> None:
    with pytest.raises(KeyError), timer.phase("sample"):
        clock.pass_s(1)
        raise KeyError
    clock.pass_s(1)
    record = timer.finish_step()
    assert (record["time/sample_s"], record["time/other_s"]) == (1, 1)


def test_a_new_start(timer: PhaseTimer, clock: Clock) -> None:
    with timer.phase("sample"):
        clock.pass_s(7)
    timer.start()
    with timer.phase("score"):
        clock.pass_s(1)
        clock.pass_s(1)
    record = timer.finish_step()
    assert record["time/sample_s"] == 0
    assert (record["time/step_s"], record["time/other_s"]) == (2, 0)


def test_a_device_is_waited_for_where_a_phase_begins_and_ends(clock: Clock) -> None:
    pending = [3.0, 5.0]  # work that runs in the background when the phase begins, and when it ends
    timer = PhaseTimer(clock=clock, synchronize=lambda: clock.pass_s(pending.pop(0) if pending else 0.0))
    with timer.phase("score"):
        clock.pass_s(1)
    record = timer.finish_step()
    assert (record["time/score_s"], record["time/other_s"]) == (6, 3)


def test_unknown_phases_are_refused(timer: PhaseTimer) -> None:
    with pytest.raises(ValueError, match="no phase 'smaple'; known: sample, score"), timer.phase("smaple"):
        pass
