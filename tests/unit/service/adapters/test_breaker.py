"""The breaker: closed, open, half open, and back."""

from service.adapters.breaker import Breaker


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_opens_at_a_failure_tries_once_and_closes_at_a_success() -> None:
    clock, states = Clock(), list[str]()
    breaker = Breaker(2.0, states.append, clock)
    assert breaker.state == "closed"
    assert breaker.allow()
    assert breaker.allow()

    breaker.record_failure()
    clock.now = 1.9
    assert not breaker.allow()
    clock.now = 2.0
    assert breaker.allow()
    assert breaker.state == "half_open"
    assert not breaker.allow(), "one call tries"

    breaker.record_failure()
    assert not breaker.allow()
    clock.now = 4.0
    assert breaker.allow()
    breaker.record_success()
    assert breaker.allow()
    assert breaker.allow()
    assert states == ["open", "half_open", "open", "half_open", "closed"]


def test_a_trial_that_never_reports_is_replaced() -> None:
    clock = Clock()
    breaker = Breaker(2.0, clock=clock)
    breaker.record_failure()
    clock.now = 2.0
    assert breaker.allow()
    clock.now = 3.9
    assert not breaker.allow()
    clock.now = 4.0
    assert breaker.allow()
