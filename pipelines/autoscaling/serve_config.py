"""Serve's configuration of replicas: fixed numbers, or bounds and the policy that scales between them.

The replicas follow the backlog if the setting `guard_max_replicas` is set. Otherwise each deployment has the number of
replicas that the settings say.
"""

from typing import Any, Final

from pipelines.autoscaling.replica_decision import ReplicaBounds
from services.core.settings import Settings
from services.guard.checkpoints import assume_in_flight

REPORT_INTERVAL_S: Final = 1.0
"""Time between two reports of a deployment that calls the guard. With Serve's own 10 s, a decision would mostly wait
for the report."""

_POLICY_FUNCTION: Final = "pipelines.autoscaling.serve_policy:BacklogScaling"
_GUARD_REPORT_INTERVAL_S: Final = 10.0
_MAX_SURGE_PERCENT: Final = 25
"""Guard replicas of a new version that start before replicas of the old version stop. Only with autoscaling: on a
cluster without autoscaling the new replicas would wait for a GPU for ever."""


def is_autoscaled(settings: Settings) -> bool:
    """Return whether the replicas follow the backlog."""
    return settings.guard_max_replicas is not None


def guard_options(settings: Settings) -> dict[str, Any]:
    """Return the options of the deployment Guard that set its replicas."""
    if settings.guard_max_replicas is None:
        return {"num_replicas": settings.guard_replicas}
    # A client of the gateway waits for its answer, and a guard takes minutes to start.
    minimum = max(settings.guard_min_replicas, 1 if settings.gateway_replicas else 0)
    bounds = ReplicaBounds(min(minimum, settings.guard_max_replicas), settings.guard_max_replicas)
    return {
        "autoscaling_config": autoscaling_config(bounds, _GUARD_REPORT_INTERVAL_S),
        "max_surge_percent": _MAX_SURGE_PERCENT,
    }


def intake_options(settings: Settings) -> dict[str, Any]:
    """Return the options of the deployment Intake that set its replicas and their resources."""
    return _caller_options(settings, ReplicaBounds(settings.intake_replicas, _max_intake_replicas(settings)))


def gateway_options(settings: Settings) -> dict[str, Any]:
    """Return the options of the deployment Gateway. Its number is fixed, but its calls to the guard count."""
    return _caller_options(settings, ReplicaBounds(settings.gateway_replicas, settings.gateway_replicas))


def count_max_replicas(settings: Settings) -> int:
    """Return the most replicas that Guard and Intake together may have."""
    guard = settings.guard_max_replicas or settings.guard_replicas
    return guard + (_max_intake_replicas(settings) if is_autoscaled(settings) else settings.intake_replicas)


def make_autoscaling_policy(settings: Settings) -> dict[str, Any]:
    """Return the `autoscaling_policy` of the application."""
    return {
        "policy_function": _POLICY_FUNCTION,
        "policy_kwargs": {
            "objective_s": settings.objective_s,
            "backfill_objective_s": settings.backfill_objective_s,
            "replica_rate": settings.replica_rate,
            "start_s": settings.replica_start_s,
            "idle_s": settings.idle_s,
            "scale_down_s": settings.scale_down_s,
            "guard_in_flight": assume_in_flight(settings),
            "intake_in_flight": settings.in_flight,
        },
    }


def autoscaling_config(bounds: ReplicaBounds, report_interval_s: float) -> dict[str, float]:
    """Return the `autoscaling_config` of a deployment that `BacklogScaling` scales."""
    return {
        "min_replicas": bounds.minimum,
        "max_replicas": bounds.maximum,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "downscale_to_zero_delay_s": 0,
        # Serve 2.60 deprecates this for an environment variable that it defines and does not read.
        "metrics_interval_s": report_interval_s,
        # Serve requires more than the interval. Only the newest point counts.
        "look_back_period_s": 1.2 * report_interval_s,
    }


def _caller_options(settings: Settings, bounds: ReplicaBounds) -> dict[str, Any]:
    """Return the options of a deployment that calls the guard.

    On a cluster with node labels, its replicas avoid the nodes of the guard. A replica that took the CPU beside a GPU
    would keep the guard from starting there, and the node from being released.
    """
    resources: dict[str, Any] = {"num_cpus": 1, "label_selector": {"sluice.io/role": "!guard"}}
    if not is_autoscaled(settings):
        return {"num_replicas": bounds.minimum, "ray_actor_options": resources}
    return {"autoscaling_config": autoscaling_config(bounds, REPORT_INTERVAL_S), "ray_actor_options": resources}


def _max_intake_replicas(settings: Settings) -> int:
    return max(settings.intake_replicas, settings.intake_max_replicas or settings.intake_replicas)
