"""The application-level autoscaling policy of Ray Serve 2.60: it measures, decides and answers Serve.

`BacklogScaling` runs on the event loop of Serve's controller, so it neither blocks nor raises. Serve pickles this
module by value. The controller imports the other modules of this folder from its own installation of Sluice, so the
head of the cluster needs the same version of Sluice as the application. They import nothing but the standard library.

`serve_config` makes the configuration that the policy needs: an `autoscaling_config` for each deployment, without which
Serve neither records nor scales, and an `AutoscalingPolicy` for the application, whose `policy_kwargs` are the fields
of `Rules`. Serve's own delays are 0, because the decision has its own. `recorded_metrics` says what replicas record.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pipelines.autoscaling.measurements import Measurements
from pipelines.autoscaling.recorded_metrics import decode, sum_at_guard
from pipelines.autoscaling.replica_decision import Decision, ReplicaBounds, ReplicaCounts, Rules, decide_replicas

log = logging.getLogger("ray.serve")


class BacklogScaling:
    """Ray Serve's application-level policy: `{DeploymentID: AutoscalingContext} -> ({DeploymentID: n}, state)`.

    If the policy fails, the replicas stay as they are. The log says so once, and again only after a decision has
    succeeded. While the policy wants no guard replica, Serve itself starts one if a call waits at a handle.
    """

    def __init__(self, guard: str = "Guard", intake: str = "Intake", **rules: float) -> None:
        """`guard` and `intake` are names of deployments; `rules` are fields of `Rules`. Unknown ones are ignored."""
        self._names = (guard, intake)
        self._rules = Rules(**{each.name: rules[each.name] for each in fields(Rules) if each.name in rules})  # type: ignore[arg-type]  # JSON numbers
        self._fault = ""

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Return the replicas of each deployment that is scaled now, and the state that Serve keeps.

        Serve calls this several times a second. A deployment without an entry keeps its replicas.
        """
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
        guard_id, intake_id = self._find_deployments(contexts)
        measurements: Measurements = state[guard_id].setdefault("measurements", Measurements(self._rules))
        now_s = contexts[guard_id].current_time or time.time()
        since_s = None if measurements.last_decision_s is None else now_s - measurements.last_decision_s
        if since_s is not None and 0 <= since_s < self._rules.every_s:
            return {}
        measurements.last_decision_s = now_s
        guard, intake = (_read_replica_counts(contexts[each], now_s) for each in (guard_id, intake_id))
        oldest_s = now_s - self._rules.stale_s
        reading = decode(contexts[intake_id].raw_metrics or {}, oldest_s)
        others = [context for each, context in contexts.items() if each not in (guard_id, intake_id)]
        other_calls_at_guard = sum(sum_at_guard(context.raw_metrics or {}, oldest_s) or 0.0 for context in others)
        measurements.record_replicas(now_s, guard)
        if reading:
            measurements.record_reading(reading, guard)
        if contexts[guard_id].total_num_requests > 0:
            measurements.record_activity(now_s)
        observation = measurements.observe(
            now_s, guard, intake, reading.live if reading else None, other_calls_at_guard
        )
        decision = decide_replicas(observation, self._rules)
        if not guard.running and decision.guard:
            _bypass_cold_start(contexts[guard_id])
        _log_change(decision, guard, intake)
        return {guard_id: decision.guard, intake_id: decision.intake}

    def _find_deployments(self, contexts: Mapping[Any, Any]) -> tuple[Any, Any]:
        by_name = {context.deployment_name: each for each, context in contexts.items()}
        for name in self._names:
            if name not in by_name:
                raise LookupError(f"deployment {name} has no autoscaling_config; add one to the application's config")
        guard, intake = self._names
        return by_name[guard], by_name[intake]


def _read_replica_counts(context: Any, now_s: float) -> ReplicaCounts:
    """Return the replicas of a deployment from Serve's context of it."""
    up_s, down_s = context.last_scale_up_time, context.last_scale_down_time
    return ReplicaCounts(
        running=context.current_num_replicas,
        target=context.target_num_replicas,
        bounds=ReplicaBounds(context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas),
        since_scale_up_s=None if up_s is None else now_s - up_s,
        since_scale_down_s=None if down_s is None else now_s - down_s,
    )


def _bypass_cold_start(context: Any) -> None:
    """Make Serve use the policy's answer for a deployment that has no running replica.

    If calls wait for such a deployment, `_get_cold_start_scale_up_replicas` (ray/serve/autoscaling_policy.py) replaces
    the answer: it starts one replica, however many the policy wants. Serve calls that function after the policy, with
    the same context. If the context counts no request, the function does nothing. `total_num_requests` is a cached
    property, so a value in the context's `__dict__` takes its place.

    This is right for Ray 2.60 only, which pyproject.toml requires. Before https://github.com/ray-project/ray/pull/60851
    the same function kept a deployment without replicas and without requests as it is, so the guard would never leave
    zero. Two tests in tests/autoscaling/test_serve_policy.py run Serve's own code. The first one fails when this
    function no longer works, the second one when it is no longer needed.
    """
    vars(context)["total_num_requests"] = 0.0


def _log_change(decision: Decision, guard: ReplicaCounts, intake: ReplicaCounts) -> None:
    if (decision.guard, decision.intake) != (guard.target, intake.target):
        log.info(
            "guard %d -> %d, intake %d -> %d: %s",
            *(guard.target, decision.guard, intake.target, decision.intake, decision.reason),
        )
