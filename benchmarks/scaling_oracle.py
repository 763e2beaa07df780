"""The cheapest schedule that keeps the objective, computed with the whole day known: a linear program.

Time is divided into slots. In each slot the oracle has some replicas and starts some. It pays for replicas while they
judge and while they load (the mean cold start). Provisioning of nodes costs nothing, as for every scaler, because the
oracle requests them in advance. It pays for no idle node and loses none. At the end of each slot it has judged
everything that arrived one objective earlier, and nothing that has not arrived. Parts of replicas are allowed. All of
this makes it cheaper than any real schedule, so a ratio to it never flatters. If even the maximum of replicas cannot
keep the objective, the lateness is minimal, and `misses` has the minutes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.sparse

from pipelines.autoscaling.simulation.cluster import ClusterSpec
from pipelines.autoscaling.simulation.load import WARM_UP_S, ArrivalCounts

_SLOT_S = 60
_LATE_COST = 1e3
"""GPU-seconds for a submission that is one slot late: more than any replica that could prevent it."""


@dataclass(frozen=True)
class Schedule:
    """The oracle's schedule, one row for each slot of a minute."""

    replicas: npt.NDArray[np.float64]
    misses: npt.NDArray[np.bool_]
    """Whether a submission that arrived in that minute is late."""
    gpu_hours: float


def cheapest(arrivals: ArrivalCounts, cluster: ClusterSpec, objective_s: float) -> Schedule:
    """The schedule for the day that follows the warm-up."""
    arrived = np.concatenate([[0], np.cumsum(arrivals[WARM_UP_S:])]).astype(float)
    seconds = len(arrived) - 1
    ends_s = np.arange(_SLOT_S, seconds + 1, _SLOT_S)
    slots = len(ends_s)
    due = np.interp(ends_s - (objective_s - cluster.service_s), np.arange(seconds + 1), arrived, left=0.0)
    cold_start_s = sum(cluster.cold_start_s) / 2

    # Variables of each slot: replicas, started replicas, submissions judged by its end, late submissions.
    one, zero = scipy.sparse.identity(slots, format="csr"), scipy.sparse.csr_matrix((slots, slots))
    growth = one - scipy.sparse.eye(slots, k=-1, format="csr")
    first = scipy.sparse.csr_matrix(([1.0], ([0], [0])), shape=(slots, slots))  # the first replicas were not started
    limits = scipy.sparse.vstack(
        [
            scipy.sparse.hstack([growth - first, -one, zero, zero]),
            scipy.sparse.hstack([-cluster.replica_rate * _SLOT_S * one, zero, growth, zero]),
            scipy.sparse.hstack([zero, zero, one, zero]),
            scipy.sparse.hstack([zero, zero, -one, -one]),
        ],
        format="csr",
    )
    found = scipy.optimize.linprog(
        np.repeat([_SLOT_S, cold_start_s, 0.0, _LATE_COST], slots),
        A_ub=limits,
        b_ub=np.concatenate([np.zeros(2 * slots), arrived[ends_s], -due]),
        bounds=[(0, cluster.max_replicas)] * slots + [(0, None)] * (3 * slots),
        method="highs",
    )
    if found.status != 0:
        raise RuntimeError(f"the oracle found no schedule: {found.message}")
    replicas, started, _, late = found.x.reshape(4, slots)
    misses = np.zeros(slots, bool)
    for slot in np.flatnonzero(late > 0.5):  # submissions late at the end of a slot arrived one objective earlier
        came_s = ends_s[slot] - objective_s
        misses[max(0, int(came_s // _SLOT_S) - 1) : max(0, int(came_s // _SLOT_S) + 1)] = True
    gpu_s = _SLOT_S * replicas.sum() + cold_start_s * started.sum()
    return Schedule(replicas, misses, float(gpu_s) / 3600)
