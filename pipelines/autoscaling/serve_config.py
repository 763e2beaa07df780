"""What Ray Serve is told where replicas follow the backlog: bounds, the policy, and what Intake reports.

They do where `guard_max_replicas` is set; else both deployments have as many replicas as the settings say.
"""

from collections.abc import Mapping
from typing import Any, Final

from pipelines.autoscaling.decision import ReplicaBounds
from services.core.settings import Settings
from services.core.values import Priority
from services.streams.base import Lag

_POLICY_FUNCTION: Final = "pipelines.autoscaling.serve_policy:BacklogScaling"

_MAX_SURGE_PERCENT: Final = 25
"""Guard replicas of a new version that start before old ones end. Only here: where nodes do not come on demand they
would wait for a GPU for ever."""

REPORT_INTERVAL_S: Final = 1.0
"""Between two reports of whoever calls the guard. Serve's own 10 s would be most of the time that a decision takes."""
_MAX_REPORTED_PARTITIONS: Final = 4
"""Partitions of which a member reports: only the busiest ones count, and each costs the controller time."""


def is_autoscaled(settings: Settings) -> bool:
    """Whether the replicas follow the backlog."""
    return settings.guard_max_replicas is not None


def guard_options(settings: Settings) -> dict[str, Any]:
    """The options of the deployment `Guard` that say how many there are."""
    if settings.guard_max_replicas is None:
        return {"num_replicas": settings.guard_replicas}
    # Whoever asks the gateway waits for the answer, and a guard needs minutes to start.
    least = max(settings.guard_min_replicas, 1 if settings.gateway_replicas else 0)
    return {
        "autoscaling_config": autoscaling_config(
            ReplicaBounds(min(least, settings.guard_max_replicas), settings.guard_max_replicas)
        ),
        "max_surge_percent": _MAX_SURGE_PERCENT,
    }


def intake_options(settings: Settings) -> dict[str, Any]:
    """The same of the deployment `Intake`, with what it needs beside."""
    return _reporting_options(settings, ReplicaBounds(settings.intake_replicas, _max_intake_replicas(settings)))


def gateway_options(settings: Settings) -> dict[str, Any]:
    """The same of the deployment `Gateway`: always as many, but what they have at the guard counts."""
    return _reporting_options(settings, ReplicaBounds(settings.gateway_replicas, settings.gateway_replicas))


def count_max_replicas(settings: Settings) -> int:
    """Of Guard and Intake together, at any time."""
    guard = settings.guard_max_replicas or settings.guard_replicas
    return guard + (_max_intake_replicas(settings) if is_autoscaled(settings) else settings.intake_replicas)


def scaling_policy(settings: Settings) -> dict[str, Any]:
    """`autoscaling_policy` of the application."""
    return {
        "policy_function": _POLICY_FUNCTION,
        "policy_kwargs": {
            "objective_s": settings.objective_s,
            "backfill_objective_s": settings.backfill_objective_s,
            "replica_rate": settings.replica_rate,
            "start_s": settings.replica_start_s,
            "idle_s": settings.idle_s,
            "scale_down_s": settings.scale_down_s,
            "guard_in_flight": settings.guard_in_flight,
            "intake_in_flight": settings.in_flight,
        },
    }


def report(lags: Mapping[Priority, Lag], at_guard: int) -> dict[str, float]:
    """What `pipelines.autoscaling.serve_policy` reads: see there."""
    reported: dict[str, float] = {"at_guard": at_guard}
    for priority, lag in lags.items():
        reported |= {f"{priority}_backlog": lag.total, f"{priority}_published": lag.published}
    if live := lags.get("live"):
        reported["live_partitions"] = live.partitions
        busiest = sorted(live.held, key=lambda each: live.by_partition.get(each, 0))[-_MAX_REPORTED_PARTITIONS:]
        reported |= {f"live_backlog_{each}": live.by_partition.get(each, 0) for each in busiest}
    return reported


def autoscaling_config(bounds: ReplicaBounds, report_interval_s: float = 10.0) -> dict[str, float]:
    """Return the `autoscaling_config` of a deployment that `BacklogScaling` scales. It reports at this interval."""
    return {
        "min_replicas": bounds.minimum,
        "max_replicas": bounds.maximum,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "downscale_to_zero_delay_s": 0,
        # Deprecated for an environment variable that Serve 2.60 defines and does not read.
        "metrics_interval_s": report_interval_s,
        # Serve requires more than the interval. Only the newest point counts.
        "look_back_period_s": 1.2 * report_interval_s,
    }


def _reporting_options(settings: Settings, bounds: ReplicaBounds) -> dict[str, Any]:
    """Of a deployment that calls the guard. Where nodes have labels, it never takes the CPU beside a GPU: no guard
    could start there, and the node would never go.
    """
    resources: dict[str, Any] = {"num_cpus": 1, "label_selector": {"sluice.io/role": "!guard"}}
    if not is_autoscaled(settings):
        return {"num_replicas": bounds.minimum, "ray_actor_options": resources}
    return {"autoscaling_config": autoscaling_config(bounds, REPORT_INTERVAL_S), "ray_actor_options": resources}


def _max_intake_replicas(settings: Settings) -> int:
    return max(settings.intake_replicas, settings.intake_max_replicas or settings.intake_replicas)
