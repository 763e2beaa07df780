"""Requests that will be refused are read at a limited rate. Others are read at once."""

import pytest

from services.gateway.flood_gate import FloodGate

HEAD = b"POST /v1/moderations HTTP/1.1\r\nHost: g\r\nauthorization: Bearer "
UNKNOWN = HEAD + b"unknown\r\n\r\n"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def gate(clock: Clock) -> FloodGate:
    return FloodGate({"valid"}.__contains__, clock)


def test_gate_is_open_until_the_burst_is_used_up() -> None:
    tested = gate(Clock())
    for _ in range(100):
        assert tested.admits(UNKNOWN)
        tested.count_refused()
    assert not tested.admits(UNKNOWN)
    assert not tested.is_open


def test_closed_gate_opens_at_the_rate_of_refused_requests() -> None:
    clock = Clock()
    tested = gate(clock)
    for _ in range(100):
        tested.count_refused()
    clock.now = 0.5
    for _ in range(50):
        assert tested.is_open
        tested.count_refused()
    assert not tested.is_open


def test_requests_beyond_the_limit_close_the_gate_for_two_seconds_at_most() -> None:
    """They were read while the gate was open, and are counted later."""
    clock = Clock()
    tested = gate(clock)
    for _ in range(10_000):
        tested.count_refused()
    clock.now = 1.01
    assert tested.is_open


@pytest.mark.parametrize(
    "start",
    [
        HEAD + b"valid\r\n\r\n",
        b"GET / HTTP/1.1\r\nAUTHORIZATION:bearer  valid\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /readyz HTTP/1.1\r\n\r\n",
    ],
)
def test_closed_gate_admits_valid_keys_and_health_checks(start: bytes) -> None:
    tested = gate(Clock())
    for _ in range(200):
        tested.count_refused()
    assert tested.admits(start)
    assert not tested.admits(UNKNOWN)


def test_closed_gate_limits_health_checks() -> None:
    clock = Clock()
    tested = gate(clock)
    for _ in range(200):
        tested.count_refused()
    check = b"GET /healthz HTTP/1.1\r\n\r\n"
    assert [tested.admits(check) for _ in range(3)] == [True, False, False]
    clock.now = 0.021
    assert tested.admits(check)
    for start in (b"GET /healthz2 HTTP/1.1\r\n\r\n", b"POST /healthz HTTP/1.1\r\n\r\n", b"", b"GET"):
        assert not tested.admits(start)


def test_delayed_requests_are_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    tested = gate(clock)
    for clock.now in (0.0, 0.1, 11.0):
        for _ in range(300):
            tested.count_refused()
        assert not tested.admits(UNKNOWN)
    assert len(caplog.records) == 2
