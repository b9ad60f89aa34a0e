"""Estimates of load: nothing before a measurement, then the last steps' averages."""

import pytest

from service.inference.load import KEPT_SECONDS, MAX_RETRY_SECONDS, LoadEstimate


def test_nothing_is_estimated_before_a_measurement() -> None:
    load = LoadEstimate(4)
    assert load.estimate_seconds(100) == load.estimate_wait(100, [10]) == 0.0
    assert load.round_retry(0.0) == 1


def test_the_fullest_batch_counts() -> None:
    load = LoadEstimate(4)
    load.observe_step(1, 0.1)
    assert load.estimate_seconds(10) == pytest.approx(1.0)
    load.observe_step(4, 0.2)
    load.observe_step(1, 0.1)
    assert load.estimate_seconds(10) == pytest.approx(2.0)
    # 60 tokens wait and 20 of 40 are left of what runs, four at a time
    assert load.estimate_wait(60, [20, 20]) == pytest.approx(80 * 0.2 / 4)


def test_averages_move() -> None:
    load = LoadEstimate(1)
    load.observe_step(1, 1.0)
    for _ in range(100):
        load.observe_step(1, 2.0)
    assert load.estimate_seconds(1) == pytest.approx(2.0, rel=1e-3)


def test_answers_that_end_early_shorten_the_wait_but_not_the_worst_case() -> None:
    load = LoadEstimate(1)
    load.observe_step(1, 1.0)
    for _ in range(100):
        load.observe_answer(100, 10)
    assert load.estimate_wait(100, []) == pytest.approx(10.0, rel=1e-2)
    assert load.estimate_seconds(100) == pytest.approx(100.0)


@pytest.mark.parametrize("work", [1, 100])
def test_answers_without_tokens_tell_nothing(work: int) -> None:
    load = LoadEstimate(1)
    load.observe_step(1, 1.0)
    for _ in range(100):
        load.observe_answer(work, 0)
    assert load.estimate_wait(100, []) == pytest.approx(100.0)


def test_old_measurements_are_forgotten_so_that_a_slow_period_ends() -> None:
    now = 0.0
    load = LoadEstimate(4, lambda: now)
    load.observe_step(4, 100.0)
    load.observe_step(1, 0.1)
    now = KEPT_SECONDS / 2
    load.observe_step(1, 0.1)
    assert load.estimate_seconds(1) == pytest.approx(100.0)
    now = KEPT_SECONDS + 1
    assert load.estimate_seconds(1) == pytest.approx(0.1)
    now = 2 * KEPT_SECONDS
    assert load.estimate_seconds(1) == 0.0
    load.observe_step(4, 0.2)  # starts anew
    assert load.estimate_seconds(1) == pytest.approx(0.2)


def test_retries_are_whole_seconds_and_bounded() -> None:
    load = LoadEstimate(1)
    assert load.round_retry(2.1) == 3
    assert load.round_retry(1e9) == MAX_RETRY_SECONDS
