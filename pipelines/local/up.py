"""Runs the service in the foreground: starts the backends, Ray and the application, and stops them at the end."""

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Final
from urllib.parse import urlsplit

import ray
from ray import serve

from pipelines.autoscaling import serve_config
from pipelines.clients.ray import (
    choose_guard_gpus,
    connect_to_cluster,
    deploy,
    explain_deploy_failure,
    start_local_cluster,
    start_serve,
    wait_until_running,
)
from pipelines.doctor.report import check_before_start
from pipelines.local.backends import start_backends
from pipelines.local.port import reserve_port
from pipelines.serving import build
from pipelines.serving.app import bind_application
from pipelines.serving.names import APPLICATION, GATEWAY, INTAKE
from services.core import settings as settings_module
from services.core.errors import ConfigurationError, PolicyUnavailable
from services.core.processes import adopt_orphans, kill_descendants, kill_descendants_on_exit
from services.core.retry import retry_blocking
from services.core.settings import Settings
from services.gateway.api_keys import ApiKeyRegistry
from services.guard import checkpoints
from services.policies.registry import PolicyRegistry

_BACKEND_TIMEOUT_S: Final = 20.0
"""Time limit for each backend to answer at the start. Then the command fails."""
_SHUTDOWN_S: Final = 12.0
"""Time limit of the shutdown after the drain. Then all child processes are killed."""
_KILL_S: Final = 3.0
"""Time limit for killed processes to disappear. A process that takes longer hangs in the kernel."""
_POLL_S: Final = 0.25

log = logging.getLogger(__name__)
Progress = Callable[[str], None]


class ShutdownRequested(BaseException):
    """SIGINT or SIGTERM arrived."""


@contextmanager
def run_service(*, embed: bool, progress: Progress) -> Iterator[tuple[Settings, Mapping[str, str]]]:
    """Start the service, yield once it is ready, and drain it at the end. For the main thread only.

    Yields the settings, with the address of the Ray cluster, and the other variables that a client needs: the addresses
    of the embedded backends (none without `embed`), and the authentication mode of Ray.

    Raises:
        ConfigurationError: the service cannot start; the message says why.
        ShutdownRequested: a signal arrived. It is also raised inside the block. A second signal ends the drain early.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_shutdown)
    shutdown_s = _SHUTDOWN_S
    variables: Mapping[str, str] = {}
    with _kill_descendants_at_exit() as limit_shutdown:
        stack = ExitStack()
        try:
            if embed:
                progress("starting the embedded backends")
                variables = stack.enter_context(
                    start_backends({name: value for name, value in os.environ.items() if value})
                )
                os.environ.update(variables)
                if "SLUICE_REDIS_URL" in variables:  # no process of another deployment uses the embedded Redis
                    os.environ.setdefault("SLUICE_REDIS_SIGNING_KEY", secrets.token_hex(32))
            settings = choose_gateway_port(settings_module.load(), embed=embed)
            log_file = stack.enter_context(_tail_log(settings.log_file))
            checkpoints.resolve_checkpoint(settings.model)
            for problem in check_before_start(settings):
                progress(f"{problem.check}: {problem.detail}")
            settings, reaching_gateway = stack.enter_context(_reserve_gateway_port(settings))
            _check_reachable(settings)
            _publish_built_in(settings)
            kill_descendants_on_exit()
            key = create_embedded_key(settings, variables)
            if embed and reaching_gateway and not key:
                progress(
                    f"no API key was created, because the bucket {settings.policy_bucket} is not embedded; "
                    "`sluice keys create` creates one"
                )
            reaching_gateway |= key
            progress("starting Ray")
            stack.enter_context(_run_ray(settings))
            _deploy(settings.model_copy(update={"log_file": log_file}), progress)
            stack.callback(_drain, settings, progress)
            if url := reaching_gateway.get("SLUICE_GATEWAY_URL"):
                progress(f"the gateway answers at {url}")
            shutdown_s += settings.drain_s
            yield _make_client_settings(settings), {**variables, **reaching_gateway, **_get_ray_authentication()}
        finally:
            limit_shutdown(shutdown_s)
            stack.close()


def _raise_shutdown(_signal: int, _frame: FrameType | None) -> None:
    raise ShutdownRequested


@contextmanager
def _kill_descendants_at_exit() -> Iterator[Callable[[float], None]]:
    """Kill the remaining descendants of this process at the end.

    Yields a function to call when the shutdown begins, with the seconds that it may take.
    """
    watchdog: threading.Timer | None = None

    def limit_shutdown(seconds: float) -> None:
        nonlocal watchdog
        adopt_orphans()
        watchdog = threading.Timer(seconds, _kill_after_timeout)
        watchdog.daemon = True
        watchdog.start()

    try:
        yield limit_shutdown
    finally:
        kill_descendants(within_s=_KILL_S)
        if watchdog:
            watchdog.cancel()


def _kill_after_timeout() -> None:
    log.error("shutdown timed out; killing remaining processes. Unfinished messages are redelivered on the next start")
    kill_descendants(within_s=_KILL_S)
    os._exit(1)


@contextmanager
def _tail_log(file: Path | None) -> Iterator[Path]:
    """Copy the log file of the replicas to stderr: `file`, or else a temporary file. Yields the file."""
    with tempfile.TemporaryDirectory(prefix="sluice-log-") as folder:
        file = file or Path(folder) / "log"
        file.touch()
        ended = threading.Event()

        def show() -> None:
            with file.open(encoding="utf-8", errors="replace") as lines:
                lines.seek(0, os.SEEK_END)
                while not ended.wait(_POLL_S):
                    sys.stderr.write(lines.read())
                sys.stderr.write(lines.read())

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield file
        finally:
            ended.set()
            thread.join()


def _check_reachable(settings: Settings) -> None:
    """Wait until every backend accepts a connection. Raises ConfigurationError after 20 s."""
    for name, url, default_port in (
        ("SLUICE_STREAM_URL", settings.stream_url, 9092),
        ("SLUICE_REDIS_URL", settings.redis_url, 6379),
        (
            "SLUICE_S3_ENDPOINT",
            settings.s3_endpoint,
            80 if urlsplit(settings.s3_endpoint or "").scheme == "http" else 443,
        ),
    ):
        if url and urlsplit(url).netloc:
            hosts = [urlsplit(f"//{host}") for host in urlsplit(url).netloc.rpartition("@")[2].split(",")]
            _wait_for_any([(host.hostname or "localhost", host.port or default_port) for host in hosts], name)


def _wait_for_any(addresses: list[tuple[str, int]], setting: str) -> None:
    deadline = time.monotonic() + _BACKEND_TIMEOUT_S
    while True:
        for address in addresses:
            with suppress(OSError), socket.create_connection(address, timeout=2):
                return
        if time.monotonic() > deadline:
            tried = ", ".join(f"{host}:{port}" for host, port in addresses)
            raise ConfigurationError(f"nothing answers at {setting} ({tried}); start it, or correct the setting")
        time.sleep(_POLL_S)


def _publish_built_in(settings: Settings) -> None:
    try:
        retry_blocking(PolicyRegistry.from_settings(settings).publish_built_in, within_s=_BACKEND_TIMEOUT_S)
    except PolicyUnavailable as error:
        raise ConfigurationError(str(error)) from error


def choose_gateway_port(settings: Settings, *, embed: bool) -> Settings:
    """With `embed`, give the gateway a free port (0) on this machine, unless the environment names one."""
    if embed and not settings.ray_address and not os.environ.get("SLUICE_GATEWAY_PORT"):
        return settings.model_copy(update={"gateway_port": 0})
    return settings


@contextmanager
def _reserve_gateway_port(settings: Settings) -> Iterator[tuple[Settings, dict[str, str]]]:
    """Reserve the gateway's port, a free one if it is 0. Yields the variables for clients."""
    if not settings.gateway_replicas:
        yield settings, {}
        return
    with ExitStack() as stack:
        port = settings.gateway_port
        if not settings.ray_address:  # on another cluster the gateway may run on another machine
            port = stack.enter_context(reserve_port(settings.gateway_host, port))
        variables = {"SLUICE_GATEWAY_URL": make_gateway_url(settings.gateway_host, port)}
        yield settings.model_copy(update={"gateway_port": port}), variables


def create_embedded_key(settings: Settings, backends: Mapping[str, str]) -> dict[str, str]:
    """Create an admin key, if `backends` include the bucket that has it. Returns the variable for clients.

    The embedded bucket disappears with this process. In another bucket, the key would stay valid after a SIGKILL.
    """
    if not settings.gateway_replicas or "SLUICE_S3_ENDPOINT" not in backends:
        return {}
    _, token = ApiKeyRegistry.from_settings(settings).create("embedded", "admin", all_tenants=True, who="sluice up")
    return {"SLUICE_API_KEY": token}


def make_gateway_url(host: str, port: int) -> str:
    """The address of the gateway for clients on this machine."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


@contextmanager
def _run_ray(settings: Settings) -> Iterator[None]:
    """Start a Ray cluster on this machine, or join the one that the settings name, and start Serve on it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if settings.ray_address:
        connect_to_cluster(settings.ray_address)
    else:
        replicas = serve_config.count_max_replicas(settings) + settings.gateway_replicas
        start_local_cluster(num_cpus=max(os.cpu_count() or 1, replicas))
    signal.signal(signal.SIGTERM, _raise_shutdown)  # Ray has installed its own handler
    try:
        start_serve()
        yield
    finally:
        # Ray prints errors to stdout about calls that its own shutdown interrupts.
        with redirect_stdout(StringIO()):
            with suppress(Exception):
                serve.delete(APPLICATION) if settings.ray_address else serve.shutdown()
            ray.shutdown()


def _make_client_settings(settings: Settings) -> Settings:
    address = settings.ray_address or ray.get_runtime_context().gcs_address
    return settings.model_copy(update={"ray_address": address})


def _get_ray_authentication() -> dict[str, str]:
    # Ray sets this variable in a process that starts a cluster, but not in one that joins a cluster by its address.
    return {name: os.environ[name] for name in ("RAY_AUTH_MODE",) if name in os.environ}


def _deploy(settings: Settings, progress: Progress) -> None:
    """Deploy the application, and wait until every replica is ready and the gateway can answer."""
    gpus = choose_guard_gpus(settings)
    if serve_config.is_autoscaled(settings):
        plan = build.make_deploy_schema(settings.model_copy(update={"guard_gpus": gpus}))
        # The only other way to deploy a plan is HTTP to Ray's dashboard, which a local cluster does not have.
        serve.context._get_global_client().deploy_apps(plan)
    else:
        deploy(bind_application(settings, guard_gpus=gpus), APPLICATION)
    wait_until_running(
        APPLICATION,
        is_ready=lambda: not _get_gateway_not_ready_reason(settings),
        loading=f"loading {settings.model} into the engine",
        progress=progress,
        explain=explain_deploy_failure,
    )


def _get_gateway_not_ready_reason(settings: Settings) -> str:
    """Why the gateway cannot answer yet; empty if it can, or if there is no gateway."""
    if not settings.gateway_replicas:
        return ""
    try:
        return str(
            serve.get_deployment_handle(GATEWAY, APPLICATION)
            .not_ready_reason.remote()
            .result(timeout_s=_BACKEND_TIMEOUT_S)
        )
    except Exception as error:  # noqa: BLE001 - Serve replaces a replica that has just ended
        return str(error)


def _drain(settings: Settings, progress: Progress) -> None:
    progress("draining")
    try:
        names = [GATEWAY, INTAKE] if settings.gateway_replicas else [INTAKE]
        draining = [serve.get_deployment_handle(name, APPLICATION).broadcast("drain") for name in names]
        for drained in draining:
            drained.results(timeout_s=settings.drain_s + 2)
    except Exception as error:  # noqa: BLE001 - the shutdown continues; unsettled messages are redelivered at the next start
        log.warning("the drain did not finish: %s; unsettled submissions are redelivered at the next start", error)
