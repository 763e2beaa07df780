"""The application-level autoscaling policy of Ray Serve 2.60: it measures, decides and answers Serve.

`BacklogScaling` runs on the loop of Serve's controller, so it neither blocks nor raises. Serve pickles this module by
value. The controller imports `decision` and `measurements` from its own installation of Sluice: they import nothing but
the standard library, and the head of the cluster runs the same version of Sluice as the application.

**What Intake has to record** in `record_autoscaling_stats`, each replica on its own. Always return a dict, the first
time too (Serve switches the recording off for good otherwise); values are numbers. `live` is the stream of submissions,
`backfill` that of backfill.

- `live_backlog` (messages): published and not settled, of the whole group.
- `live_published` (messages): ever published, a count that only grows, of the same reading as `live_backlog`. Kafka:
  the sum of the end offsets; Redis Streams: `entries-added`.
- `live_partitions` (partitions): of the stream; 0 on Redis Streams, where every member may take every message.
- `live_backlog_<n>` (messages): published and not settled in partition n, for the busiest partitions that this member
  holds; none on Redis Streams.
- `backfill_backlog`, `backfill_published` (messages): likewise; left out where no backfill is read.
- `at_guard` (submissions): what this member has given to the guard and has no answer for, also what waits for one.

Other deployments that call the guard, such as Gateway, record `at_guard` as well.

What cannot be read is left out, never recorded as 0: while the broker is away `record_autoscaling_stats` returns only
`at_guard`. Several members may report the same thing; the newest point counts, so their clocks should agree to a
second. While Guard has no replica, Intake keeps what it holds and goes on recording.

**Settings of the deployments.** Both have an `autoscaling_config` (see `serve_config.autoscaling_config`); without it
Serve neither records nor scales. The application has an `AutoscalingPolicy` with
`policy_function="pipelines.autoscaling.serve_policy:BacklogScaling"` and the fields of `Rules` as `policy_kwargs`.
Serve's own delays are 0, because the decision has its own.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from pipelines.autoscaling.decision import Backlog, ReplicaBounds, ReplicaCounts, Rules, decide
from pipelines.autoscaling.measurements import Measurements, Reading

_PARTITION_PREFIX: Final = "live_backlog_"

log = logging.getLogger("ray.serve")


class BacklogScaling:
    """Ray Serve's application-level policy: `{DeploymentID: AutoscalingContext} -> ({DeploymentID: n}, state)`.

    Never blocks, never raises: on any fault the present state is held, and the log says so once until it is over.
    While no guard replica is wanted, Serve itself starts one if a call waits at a handle.
    """

    def __init__(self, guard: str = "Guard", intake: str = "Intake", **rules: float) -> None:
        """`guard`, `intake`: names of the deployments; `rules`: fields of `Rules`, unknown ones are ignored."""
        self._names = (guard, intake)
        self._rules = Rules(**{each.name: rules[each.name] for each in fields(Rules) if each.name in rules})  # type: ignore[arg-type]  # JSON numbers
        self._fault = ""

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Serve calls this several times a second; nothing is returned for a deployment that keeps what it has."""
        state = {each: dict(context.policy_state) for each, context in contexts.items()}
        try:
            decisions = self._decide(contexts, state)
            fault = ""
        except Exception as error:  # noqa: BLE001 - a policy that raises stalls Serve's controller
            decisions, fault = {}, f"{type(error).__name__}: {error}"
        if fault and not self._fault:
            log.error("cannot decide on replicas; keeping the present ones and deciding again in a second: %s", fault)
        self._fault = fault
        return decisions, state

    def _decide(self, contexts: Mapping[Any, Any], state: dict[Any, dict[str, Any]]) -> dict[Any, int]:
        by_name = {context.deployment_name: each for each, context in contexts.items()}
        missing = [name for name in self._names if name not in by_name]
        if missing:
            raise LookupError(f"deployment {missing[0]} has no autoscaling_config")
        guard_id, intake_id = (by_name[name] for name in self._names)
        measured: Measurements = state[guard_id].setdefault("measurements", Measurements(self._rules))
        now_s = contexts[guard_id].current_time or time.time()
        if measured.last_decision_s is not None and 0 <= now_s - measured.last_decision_s < self._rules.every_s:
            return {}
        measured.last_decision_s = now_s
        guard, intake = (replica_counts(contexts[each], now_s) for each in (guard_id, intake_id))
        oldest_s = now_s - self._rules.stale_s
        reading = read(contexts[intake_id].raw_metrics or {}, oldest_s)
        others = [context for each, context in contexts.items() if each not in (guard_id, intake_id)]
        active_callers = sum(at_guard(context.raw_metrics or {}, oldest_s) or 0.0 for context in others)
        measured.record_replicas(now_s, guard)
        if reading:
            measured.record_reading(reading, guard)
        if contexts[guard_id].total_num_requests > 0:
            measured.record_activity(now_s)
        live = reading.live if reading else None
        decision = decide(measured.observe(now_s, guard, intake, live, active_callers), self._rules)
        if not guard.running and decision.guard:
            # With calls waiting at a handle Serve would start a single replica, whatever is returned here.
            vars(contexts[guard_id])["total_num_requests"] = 0.0
        if (decision.guard, decision.intake) != (guard.target, intake.target):
            log.info(
                "guard %d -> %d, intake %d -> %d: %s",
                *(guard.target, decision.guard, intake.target, decision.intake, decision.reason),
            )
        return {guard_id: decision.guard, intake_id: decision.intake}


def replica_counts(context: Any, now_s: float) -> ReplicaCounts:
    """What Serve's context of a deployment says about its replicas."""
    up_s, down_s = context.last_scale_up_time, context.last_scale_down_time
    return ReplicaCounts(
        running=context.current_num_replicas,
        target=context.target_num_replicas,
        bounds=ReplicaBounds(context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas),
        since_scale_up_s=None if up_s is None else now_s - up_s,
        since_scale_down_s=None if down_s is None else now_s - down_s,
    )


def read(metrics: Mapping[str, Mapping[Any, Sequence[Any]]], oldest_s: float) -> Reading | None:
    """The newest numbers that Intake's replicas have recorded; None where they are missing or older than `oldest_s`.

    `metrics` is `raw_metrics` of Serve's context: by name and replica, points with `timestamp` and `value`.
    """
    live = _newest(metrics, "live", oldest_s)
    if live is None or not all(map(math.isfinite, live[1:3])):
        return None
    at_s, waiting, published, replica = live
    backfill = _newest(metrics, "backfill", oldest_s)
    by_partition: dict[int, float] = {}
    for name, series in metrics.items():
        if name.startswith(_PARTITION_PREFIX):
            newest_s = oldest_s
            for points in series.values():  # mostly one
                if points and points[-1].timestamp >= newest_s:
                    newest_s = points[-1].timestamp
                    by_partition[int(name[len(_PARTITION_PREFIX) :])] = points[-1].value
    partitions = metrics.get("live_partitions", {}).get(replica)
    return Reading(
        at_s=at_s,
        live=Backlog(waiting, by_partition, int(partitions[-1].value) if partitions else 0),
        live_published=published,
        backfill=backfill[1] if backfill else 0.0,
        backfill_published=backfill[2] if backfill else 0.0,
        at_guard=at_guard(metrics, oldest_s),
    )


def at_guard(metrics: Mapping[str, Mapping[Any, Sequence[Any]]], oldest_s: float) -> float | None:
    """Submissions that the replicas of a deployment have at the guard; None where none says so."""
    newest = [each[-1] for each in metrics.get("at_guard", {}).values() if each]
    values = [point.value for point in newest if point.timestamp >= oldest_s]
    return float(sum(values)) if values else None


def _newest(
    metrics: Mapping[str, Mapping[Any, Sequence[Any]]], stream: str, oldest_s: float
) -> tuple[float, float, float, Any] | None:
    """When, waiting, published, by which replica: the newest reading of a stream."""
    published = metrics.get(f"{stream}_published", {})
    found = None
    for replica, series in metrics.get(f"{stream}_backlog", {}).items():
        if series and published.get(replica) and series[-1].timestamp >= max(oldest_s, found[0] if found else oldest_s):
            found = (series[-1].timestamp, series[-1].value, published[replica][-1].value, replica)
    return found
