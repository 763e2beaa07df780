"""Runs the workers of `sluice annotate` on a Ray cluster, and provides the guard that judges for them."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray import serve
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from pipelines.clients.ray import (
    choose_guard_gpus,
    connect_to_cluster,
    deploy,
    discard_stderr,
    find_own_error,
    get_last_line,
    start_local_cluster,
    start_serve,
    wait_until_running,
)
from pipelines.clients.ray_address import NO_CLUSTER
from pipelines.serving.guard_deployment import GuardDeployment
from pipelines.serving.names import APPLICATION, GUARD
from services.core.errors import ConfigurationError, SluiceError
from services.core.processes import kill_descendants_on_exit
from services.core.settings import Settings
from services.guard import checkpoints

_STOP_S: Final = 10.0
_CALLS_PER_WORKER: Final = 2
"""A worker starts the next shard or chunk while the last images of the one before are judged."""

Progress = Callable[[str], None]
WorkResult = dict[str, int]
"""`number`: the shard or chunk; `rows`: its rows."""


@dataclass(frozen=True, slots=True)
class GuardPool:
    """The guard replicas of a Serve application."""

    application: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The number of workers, and whether they have to run on this machine."""

    workers: int
    is_local_only: bool
    """Whether all workers run on this machine, because the files are local."""


@contextmanager
def join_cluster(settings: Settings, progress: Progress) -> Iterator[None]:
    """Join the cluster at SLUICE_RAY_ADDRESS. If it is unset, start one on this machine that ends with the process.

    Raises:
        ConfigurationError: the cluster does not answer.
    """
    address = settings.ray_address or ""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",  # errors are raised as exceptions, too
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }.items():
        os.environ.setdefault(name, value)
    if address in NO_CLUSTER:
        progress("starting Ray on this machine")
        kill_descendants_on_exit()
        with discard_stderr():
            start_local_cluster()
    else:
        connect_to_cluster(address)
    for name in ("ray.serve", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are reported by exceptions of Sluice
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def provide_guard(
    settings: Settings, name: str, replicas: int | None, share: bool, progress: Progress
) -> Iterator[GuardPool]:
    """Use the guard of the running service. With `replicas`, or if no service runs, deploy guards of its own.

    `name` is the application of these guards. A run that resumes a killed one finds them by this name.

    Raises:
        ConfigurationError: no service runs although `share` is set, or the guards do not start.
    """
    running = _count_guard_replicas(APPLICATION)
    if share and not running:
        raise ConfigurationError(
            "--share-guard needs a running service, and none runs; start one with `sluice up`, or leave the option out"
        )
    if running and (share or replicas is None):
        progress("judging with the guard of the running service, after all live submissions")
        yield GuardPool(APPLICATION, running)
        return
    wanted = replicas or 1
    _deploy_guard(settings, name, wanted, progress)
    try:
        yield GuardPool(name, wanted)
    finally:
        with suppress(Exception):
            serve.delete(name)


def run_on_workers(
    worker: type[Any], arguments: Mapping[str, Any], numbers: Sequence[int], placement: Placement
) -> Iterator[WorkResult]:
    """Call `worker(**arguments).work(number)` on workers for every number; yield the results as they finish.

    Ray replaces a worker that dies, and the calls that it had not finished are repeated.

    Raises:
        SluiceError: a worker failed.
    """
    count = min(placement.workers, len(numbers))
    this_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()} if placement.is_local_only else None
    pool = ActorPoolStrategy(
        size=count, max_concurrent_calls_per_actor=_CALLS_PER_WORKER, enable_true_multi_threading=True
    )
    data = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    worked = data.map_batches(
        _WorkerActor,
        batch_size=1,
        compute=pool,
        fn_constructor_args=(worker, dict(arguments)),
        # If the guard has reserved all CPUs of a small machine, workers share them: the guard mostly waits for images.
        num_cpus=1 if ray.available_resources().get("CPU", 0) > count else 0,
        label_selector=this_node,
    )
    try:
        for batch in worked.iter_batches(batch_size=None, prefetch_batches=0):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield {name: int(value) for name, value in zip(names, values, strict=True)}
    except Exception as error:  # noqa: BLE001 - Ray's errors have no common class
        raise find_own_error(error) or SluiceError(
            f"a worker failed: {get_last_line(error)}; run the command again to resume"
        ) from None


def run_in_process(worker: type[Any], arguments: Mapping[str, Any], numbers: Sequence[int]) -> Iterator[WorkResult]:
    """Like `run_on_workers`, but in this process: for so few calls that it would take longer to start workers."""
    if numbers:
        actor = _WorkerActor(worker, arguments)
        for number in numbers:
            yield {name: values[0] for name, values in actor({"number": [number]}).items()}


class _WorkerActor:
    """An actor of Ray Data. Runs an asynchronous worker on its own event loop, with several calls at a time."""

    def __init__(self, worker: type[Any], arguments: Mapping[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._worker = self._run(_create(worker, arguments))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        result: WorkResult = self._run(self._worker.work(int(batch["number"][0])))
        return {name: [value] for name, value in result.items()}

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


async def _create(worker: type[Any], arguments: Mapping[str, Any]) -> Any:
    return worker(**arguments)


def _count_guard_replicas(application: str) -> int:
    """The guard replicas of an application; 0 if it does not run."""
    try:
        found = serve.status().applications.get(application)
    except (RayError, RayServeException, ValueError):
        return 0
    if found is None or found.status not in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING):
        return 0
    deployment = found.deployments.get(GUARD)
    return max(1, deployment.replica_states.get("RUNNING", 0)) if deployment else 0


def _deploy_guard(settings: Settings, name: str, replicas: int, progress: Progress) -> None:
    """Deploy guards, and wait until all are ready."""
    checkpoints.resolve_checkpoint(settings.model)
    gpus = choose_guard_gpus(settings)
    free = ray.available_resources()
    if _count_guard_replicas(name) == 0 and gpus * replicas > free.get("GPU", 0):
        progress(
            f"{replicas} guards need {gpus * replicas:g} GPUs, and {free.get('GPU', 0):g} are free; waiting for more"
        )
    start_serve()
    application = GuardDeployment.options(  # type: ignore[attr-defined]  # the decorator returns a Deployment
        num_replicas=replicas,
        max_ongoing_requests=2 * checkpoints.assume_in_flight(settings),
        ray_actor_options={"num_cpus": 1 if free.get("CPU", 0) >= replicas else 0, "num_gpus": gpus},
        graceful_shutdown_timeout_s=_STOP_S,
    ).bind(settings)
    deploy(application, name)
    wait_until_running(
        name,
        loading=f"loading {settings.model} into {replicas} engines",
        progress=progress,
        explain=lambda messages: f"the guard did not start: {get_last_line(messages)}",
    )
