"""Numbers that replicas record and the policy reads: what is encoded is decoded again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipelines.autoscaling.measurements import Reading
from pipelines.autoscaling.recorded_metrics import decode, encode, sum_at_guard
from pipelines.autoscaling.replica_decision import Backlog
from services.core.values import Priority
from services.streams.base import Lag

NOW_S = 1e9


@dataclass(frozen=True)
class Point:
    """As Serve's `TimeStampedValue`."""

    timestamp: float
    value: float


def collect(recorded: Mapping[str, Mapping[str, float]], at_s: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return what Serve passes to the policy: the numbers of each replica, by name and replica."""
    metrics: dict[str, dict[str, Any]] = {}
    for replica, numbers in recorded.items():
        for name, value in numbers.items():
            metrics.setdefault(name, {})[replica] = [Point(at_s[replica] - 1, -1.0), Point(at_s[replica], value)]
    return metrics


def lags(partitions: int) -> st.SearchStrategy[Lag]:
    waiting = st.lists(st.integers(0, 10**9), min_size=partitions, max_size=partitions)
    held = st.frozensets(st.integers(0, partitions - 1), max_size=4)
    return st.builds(
        lambda waiting, published, held: Lag(dict(enumerate(waiting)), published, partitions, held),
        *(waiting, st.integers(0, 10**12), held),
    )


@given(lags(12), st.none() | lags(1), st.integers(0, 500))
def test_encoded_lags_decode_to_the_same_reading(live: Lag, backfill: Lag | None, at_guard: int) -> None:
    read: dict[Priority, Lag] = {"live": live} | ({"backfill": backfill} if backfill else {})
    metrics = collect({"replica": encode(read, at_guard)}, {"replica": NOW_S})
    assert decode(metrics, NOW_S) == Reading(
        at_s=NOW_S,
        live=Backlog(live.total, {each: live.by_partition[each] for each in live.owned_partitions}, 12),
        live_published=live.published,
        backfill=backfill.total if backfill else 0.0,
        backfill_published=backfill.published if backfill else 0.0,
        at_guard=at_guard,
    )
    assert decode(metrics, NOW_S + 1) is None, "it is older than the oldest that counts"


def test_encoded_names_stay_as_older_processes_know_them() -> None:
    """During an upgrade, replicas of one version record for the policy of another."""
    live = Lag({0: 5, 1: 7, 2: 0}, published=90, partitions=3, owned_partitions=frozenset({1, 2}))
    backfill = Lag({0: 400}, published=1000, partitions=1, owned_partitions=frozenset({0}))
    assert encode({"live": live, "backfill": backfill}, at_guard=4) == {
        "at_guard": 4,
        "live_backlog": 12,
        "live_published": 90,
        "live_partitions": 3,
        "live_backlog_1": 7,
        "live_backlog_2": 0,
        "backfill_backlog": 400,
        "backfill_published": 1000,
    }


def test_encode_without_a_lag_records_only_the_calls() -> None:
    assert encode({}, at_guard=0) == {"at_guard": 0}


def test_encode_of_many_partitions_keeps_the_busiest() -> None:
    live = Lag(
        {each: 10 * each for each in range(9)}, published=360, partitions=9, owned_partitions=frozenset(range(9))
    )
    recorded = encode({"live": live}, at_guard=0)
    assert {name for name in recorded if name.startswith("live_backlog_")} == {
        f"live_backlog_{each}" for each in (5, 6, 7, 8)
    }


def test_decode_of_several_members_takes_the_newest_and_sums_their_calls() -> None:
    older = Lag({0: 5, 1: 0}, published=90, partitions=2, owned_partitions=frozenset({0}))
    newer = Lag({0: 5, 1: 8}, published=98, partitions=2, owned_partitions=frozenset({1}))
    recorded = {"a": encode({"live": older}, at_guard=2), "b": encode({"live": newer}, at_guard=3)}
    metrics = collect(recorded, {"a": NOW_S, "b": NOW_S + 1})
    assert decode(metrics, NOW_S) == Reading(NOW_S + 1, Backlog(13, {0: 5, 1: 8}, 2), live_published=98, at_guard=5)
    assert sum_at_guard(metrics, NOW_S + 1) == 3


def test_decode_without_the_published_count_returns_nothing() -> None:
    recorded = {"live_backlog": 5.0, "at_guard": 1.0}
    assert decode(collect({"a": recorded}, {"a": NOW_S}), NOW_S) is None


def test_sum_of_calls_that_nobody_recorded_is_unknown() -> None:
    assert sum_at_guard({}, NOW_S) is None
