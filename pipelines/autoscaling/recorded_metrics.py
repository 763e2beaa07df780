"""The numbers that replicas record for the scaling policy: their names, the encoder and the decoder.

Serve calls `record_autoscaling_stats` of each replica, keeps every number as a time series by name and replica, and
passes the series to the policy as `raw_metrics`. `live` is the stream of submissions, `backfill` the stream of
backfill:

- `live_backlog`: messages of the whole group that are published and not acknowledged (on Kafka: whose offsets are not
  committed).
- `live_published`: messages ever published, from the same reading as `live_backlog`. It only grows. On Kafka it is the
  sum of the end offsets, on Redis Streams `entries-added`.
- `live_partitions`: partitions of the stream. 0 on Redis Streams, where every member may receive every message.
- `live_backlog_<n>`: the same for partition n. Each member records the busiest of the partitions that it holds, and
  none on Redis Streams.
- `backfill_backlog`, `backfill_published`: the same for backfill, if backfill is read.
- `at_guard`: submissions that this replica has sent to the guard and that have no answer yet. Every deployment that
  calls the guard records it.

A number that cannot be read is left out and never recorded as 0. So while the broker is down, Intake records `at_guard`
alone. Several members may record the same stream. The newest number counts, so the clocks of the nodes should agree to
a second.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pipelines.autoscaling.measurements import Reading
from pipelines.autoscaling.replica_decision import Backlog

if TYPE_CHECKING:  # Serve's controller imports this module, and needs nothing of services/
    from services.core.values import Priority
    from services.streams.base import Lag

RawMetrics = Mapping[str, Mapping[Any, Sequence[Any]]]
"""By name and replica: points with `timestamp` and `value`, the newest last."""

_AT_GUARD: Final = "at_guard"
_BACKLOG: Final = "{}_backlog"
_PUBLISHED: Final = "{}_published"
_PARTITIONS: Final = "live_partitions"
_PARTITION_PREFIX: Final = "live_backlog_"
_MAX_PARTITIONS: Final = 4
"""Partitions that one member records: only the busiest count, and each one costs Serve's controller time."""


def encode(lags: "Mapping[Priority, Lag]", at_guard: int) -> dict[str, float]:
    """Return the numbers to record. `lags` are the lags that could be read, `at_guard` the calls without an answer.

    `record_autoscaling_stats` must always return this dict: Serve stops asking a replica that once returned something
    else.
    """
    recorded: dict[str, float] = {_AT_GUARD: at_guard}
    for stream, lag in lags.items():
        recorded |= {_BACKLOG.format(stream): lag.total, _PUBLISHED.format(stream): lag.published}
    if live := lags.get("live"):
        recorded[_PARTITIONS] = live.partitions
        busiest = sorted(live.owned_partitions, key=lambda each: live.by_partition.get(each, 0))[-_MAX_PARTITIONS:]
        recorded |= {f"{_PARTITION_PREFIX}{each}": live.by_partition.get(each, 0) for each in busiest}
    return recorded


def decode(metrics: RawMetrics, oldest_s: float) -> Reading | None:
    """Return the newest reading that Intake's replicas recorded, or None if there is none since `oldest_s`."""
    live = _find_newest(metrics, "live", oldest_s)
    if live is None or not (math.isfinite(live.waiting) and math.isfinite(live.published)):
        return None
    backfill = _find_newest(metrics, "backfill", oldest_s)
    partitions = metrics.get(_PARTITIONS, {}).get(live.replica)
    return Reading(
        at_s=live.at_s,
        live=Backlog(
            live.waiting, _decode_partitions(metrics, oldest_s), int(partitions[-1].value) if partitions else 0
        ),
        live_published=live.published,
        backfill=backfill.waiting if backfill else 0.0,
        backfill_published=backfill.published if backfill else 0.0,
        at_guard=sum_at_guard(metrics, oldest_s),
    )


def sum_at_guard(metrics: RawMetrics, oldest_s: float) -> float | None:
    """Return the submissions that a deployment's replicas have at the guard, or None if no replica recorded any."""
    newest = [each[-1] for each in metrics.get(_AT_GUARD, {}).values() if each]
    values = [point.value for point in newest if point.timestamp >= oldest_s]
    return float(sum(values)) if values else None


class _StreamPoint(NamedTuple):
    """One replica's newest numbers of one stream."""

    at_s: float
    waiting: float
    published: float
    replica: Any


def _find_newest(metrics: RawMetrics, stream: str, oldest_s: float) -> _StreamPoint | None:
    published = metrics.get(_PUBLISHED.format(stream), {})
    newest = None
    for replica, series in metrics.get(_BACKLOG.format(stream), {}).items():
        if not series or not published.get(replica):
            continue
        point = _StreamPoint(series[-1].timestamp, series[-1].value, published[replica][-1].value, replica)
        if point.at_s >= (newest.at_s if newest else oldest_s):
            newest = point
    return newest


def _decode_partitions(metrics: RawMetrics, oldest_s: float) -> dict[int, float]:
    by_partition: dict[int, float] = {}
    for name, by_replica in metrics.items():
        if name.startswith(_PARTITION_PREFIX):
            points = [series[-1] for series in by_replica.values() if series and series[-1].timestamp >= oldest_s]
            if points:
                by_partition[int(name.removeprefix(_PARTITION_PREFIX))] = max(
                    points, key=lambda point: point.timestamp
                ).value
    return by_partition
