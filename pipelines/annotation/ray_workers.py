"""The Ray cluster that a data set is annotated on, the guard that it is judged by, and the workers in between."""

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
from ray.serve.schema import ApplicationStatus, LoggingConfig

from pipelines.clients.ray import OBJECT_STORE_BYTES, QUIET, join, last_line, own_error, silent, wait_until_running
from pipelines.clients.ray_address import NO_CLUSTER
from pipelines.serving.guard_deployment import GuardDeployment
from pipelines.serving.names import APPLICATION
from services.core.errors import ConfigurationError, SluiceError
from services.core.processes import kill_descendants_on_exit
from services.core.settings import Settings
from services.guard import checkpoints

_GUARD: Final = "Guard"
_STOP_S: Final = 10.0
_CALLS: Final = 2
"""Units that a worker is at: the next one is under way while the last images of one are judged."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pool:
    """Where a guard is, and what it can take."""

    application: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Placement:
    """How workers are run."""

    workers: int
    here: bool
    """On this machine only: nobody else has the files."""


@contextmanager
def joined(settings: Settings, progress: Progress) -> Iterator[None]:
    """The cluster at SLUICE_RAY_ADDRESS; unset, one of this machine's own, which ends with this process.

    Raises:
        ConfigurationError: it does not answer.
    """
    address = settings.ray_address or ""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",  # its errors come as exceptions, too
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }.items():
        os.environ.setdefault(name, value)
    if address in NO_CLUSTER:
        progress("starting Ray on this machine")
        kill_descendants_on_exit()
        with silent():
            ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **QUIET)
    else:
        join(address)
    for name in ("ray.serve", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is said in a sentence of our own
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def guard(settings: Settings, name: str, replicas: int | None, share: bool, progress: Progress) -> Iterator[Pool]:
    """The running service's guard, or a pool of its own: with `replicas`, and where no service runs.

    `name` is that of the pool's application, which is found again by a run that goes on after it was killed.

    Raises:
        ConfigurationError: there is no service to share the guard of, or no room for a pool.
    """
    running = _replicas(APPLICATION)
    if share and not running:
        raise ConfigurationError("no service runs whose guard could be shared; leave --share-guard out")
    if running and (share or replicas is None):
        progress("judging on the running service's guard, after everything live")
        yield Pool(APPLICATION, running)
        return
    wanted = replicas or 1
    _deploy(settings, name, wanted, progress)
    try:
        yield Pool(name, wanted)
    finally:
        with suppress(Exception):
            serve.delete(name)


def run_units(
    worker: type[Any], arguments: Mapping[str, Any], units: Sequence[int], placement: Placement
) -> Iterator[dict[str, Any]]:
    """Have every unit worked on by `worker(**arguments).work(unit)`, and yield what each says, as they come.

    A worker that dies is replaced, and its units are worked on again.

    Raises:
        SluiceError: a worker failed.
    """
    count = min(placement.workers, len(units))
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()} if placement.here else None
    pool = ActorPoolStrategy(size=count, max_concurrent_calls_per_actor=_CALLS, enable_true_multi_threading=True)
    data = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
    worked = data.map_batches(
        _Worker,
        batch_size=1,
        compute=pool,
        fn_constructor_args=(worker, dict(arguments)),
        # On one machine the guard has taken the CPUs, and waits for images most of the time.
        num_cpus=1 if ray.available_resources().get("CPU", 0) > count else 0,
        label_selector=here,
    )
    try:
        for batch in worked.iter_batches(batch_size=None, prefetch_batches=0):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield {name: int(value) for name, value in zip(names, values, strict=True)}
    except Exception as error:  # noqa: BLE001 - Ray raises whatever it likes
        raise own_error(error) or SluiceError(f"a worker failed: {last_line(error)}") from None


def run_here(worker: type[Any], arguments: Mapping[str, Any], units: Sequence[int]) -> Iterator[dict[str, Any]]:
    """As `run_units` in this process: for so few units that starting workers would take longer."""
    if units:
        made = _Worker(worker, arguments)
        for unit in units:
            done = made({"unit": [unit]})
            yield {name: values[0] for name, values in done.items()}


class _Worker:
    """An actor of Ray Data's: runs an asynchronous worker on a loop of its own, several units at a time."""

    def __init__(self, worker: type[Any], arguments: Mapping[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._worker = self._on_loop(_create(worker, arguments))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        done: dict[str, int] = self._on_loop(self._worker.work(int(batch["unit"][0])))
        return {name: [value] for name, value in done.items()}

    def _on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _create(worker: type[Any], arguments: Mapping[str, Any]) -> Any:
    return worker(**arguments)


def _replicas(application: str) -> int:
    """Of the guard of an application that runs; 0 where none does."""
    try:
        found = serve.status().applications.get(application)
    except (RayError, RayServeException, ValueError):
        return 0
    if found is None or found.status not in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING):
        return 0
    deployment = found.deployments.get(_GUARD)
    return max(1, deployment.replica_states.get("RUNNING", 0)) if deployment else 0


def _deploy(settings: Settings, name: str, replicas: int, progress: Progress) -> None:
    """Run a pool of guards, and wait until every one is ready."""
    checkpoints.resolve(settings.model)
    gpus = settings.guard_gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    free = ray.available_resources()
    if _replicas(name) == 0 and gpus * replicas > free.get("GPU", 0):
        progress(
            f"{replicas} guards need {gpus * replicas:g} GPUs and {free.get('GPU', 0):g} are free; waiting for more"
        )
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(proxy_location="Disabled", logging_config=quiet)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    application = GuardDeployment.options(  # type: ignore[attr-defined]  # the decorator makes a Deployment of it
        num_replicas=replicas,
        max_ongoing_requests=2 * settings.guard_in_flight,
        ray_actor_options={"num_cpus": 1 if free.get("CPU", 0) >= replicas else 0, "num_gpus": gpus},
        graceful_shutdown_timeout_s=_STOP_S,
    ).bind(settings)
    target = serve.RunTarget(application, name=name, route_prefix=None, logging_config=quiet)
    serve.run_many([target], wait_for_applications_running=False)
    wait_until_running(
        name,
        loading=f"loading {settings.model} into {replicas} engines of its own",
        progress=progress,
        explain=lambda messages: f"the guard did not start: {last_line(messages)}",
    )
