"""Starts and joins Ray clusters, deploys Ray Serve applications, and reduces Ray's errors to one sentence."""

import logging
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray._private import services
from ray.exceptions import RayError
from ray.job_config import JobConfig
from ray.serve.schema import ApplicationStatus

from pipelines.clients.ray_address import is_reachable
from pipelines.reporting.text import TEXT_LIMIT_CHARS, to_one_line
from pipelines.serving.log_config import LOGGING_CONFIG
from services.core.errors import ConfigurationError, SluiceError
from services.core.settings import Settings

_QUIET: Final[dict[str, Any]] = {"logging_level": "ERROR", "log_to_driver": False}
_OBJECT_STORE_BYTES: Final = 200 << 20
"""Images travel inline in calls, so a small store is enough. Ray's default is 30 % of the memory."""
_LOOPBACK: Final = "127.0.0.1"
_POLL_S: Final = 0.25
_PROGRESS_S: Final = 15.0


class _JobConfig(JobConfig):  # type: ignore[misc]
    """Ray lets workers import modules from the present folder of the process that started them. Sluice does not.

    The folder may be somebody else's: its `json.py` would run with the rights of the service.
    """

    def _get_proto_job_config(self) -> Any:
        self._py_driver_sys_path: list[str] = []
        return super()._get_proto_job_config()


def start_local_cluster(*, num_cpus: int | None = None) -> None:
    """Start a cluster on this machine that ends with this process. Default: as many CPUs as the machine has.

    Its ports are on loopback, and only this user can enter its folder, which has Ray's sockets and logs.

    Raises:
        ConfigurationError: another user has made the folder, or can enter it.
    """
    folder = make_private_folder(Path(os.environ.get("RAY_TMPDIR") or "/tmp") / f"sluice-ray-{os.getuid()}")
    token = Path.home() / ".ray" / "auth_token"  # Ray makes it for all users to read
    token.parent.mkdir(mode=0o700, exist_ok=True)
    with _keep_loopback_address():
        ray.init(
            "local",
            num_cpus=num_cpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address=_LOOPBACK,
            # Ray lets everybody write to the folder that it is given, so it gets one inside.
            _temp_dir=str(folder / "ray"),
            job_config=_JobConfig(),
            **_QUIET,
        )
    if token.is_file():
        token.chmod(0o600)


def make_private_folder(folder: Path) -> Path:
    """Make a folder that only this user can enter, or check that it is one.

    Raises:
        ConfigurationError: it is not a folder, belongs to another user, or others can enter it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigurationError(
            f"{folder} is not a folder that only this user can enter; remove it, or set RAY_TMPDIR to another folder"
        )
    return folder


@contextmanager
def _keep_loopback_address() -> Iterator[None]:
    """Let Ray use the loopback address. It replaces it by an outer one, and then listens on all addresses."""
    resolve = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = resolve


def _is_on_loopback_only(address: str) -> bool:
    """Whether a cluster at a loopback address does not answer at the outer address of this machine."""
    host, _, port = address.rpartition(":")
    return host == _LOOPBACK and not is_reachable(f"{services.resolve_ip_for_localhost(host)}:{port}")


def connect_to_cluster(address: str) -> None:
    """Join the cluster at SLUICE_RAY_ADDRESS.

    Raises:
        ConfigurationError: the cluster does not answer, or does not accept this process.
    """
    if not is_reachable(address):
        raise ConfigurationError(
            f"no Ray cluster answers at SLUICE_RAY_ADDRESS ({address}); start it, or unset it to use this machine alone"
        )
    try:
        with discard_stderr():
            if _is_on_loopback_only(address):
                with _keep_loopback_address():
                    ray.init(address, _node_ip_address=_LOOPBACK, job_config=_JobConfig(), **_QUIET)
            else:
                ray.init(address, job_config=_JobConfig(), **_QUIET)
    except Exception as error:  # noqa: BLE001 - Ray's errors have no common class
        raise ConfigurationError(f"the Ray cluster at {address} {explain_join_failure(error)}") from None


def explain_join_failure(error: BaseException) -> str:
    """Why a cluster could not be joined, as the end of a sentence that begins with the cluster."""
    text = f"{error} {error.__cause__ or ''}"
    if "AuthenticationError" in text or "InvalidAuthToken" in text:
        return (
            "refuses this command: run it as the user who started the service, or set RAY_AUTH_MODE and RAY_AUTH_TOKEN "
            "to the service's values"
        )
    return f"cannot be joined: {to_one_line(error)}"


@contextmanager
def discard_stderr() -> Iterator[None]:
    """Discard what Ray's native library writes to stderr. For the main thread, and for short blocks only."""
    sys.stderr.flush()
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def start_serve() -> None:
    """Start Ray Serve on the cluster without an HTTP proxy. Its logger in this process reports errors only."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config=LOGGING_CONFIG)


def deploy(application: serve.Application, name: str) -> None:
    """Deploy an application without a route. `wait_until_running` says when it is ready."""
    target = serve.RunTarget(application, name=name, route_prefix=None, logging_config=LOGGING_CONFIG)
    serve.run_many([target], wait_for_applications_running=False)


def choose_guard_gpus(settings: Settings) -> float:
    """GPUs of a guard replica: SLUICE_GUARD_GPUS, or 1 if the cluster has a GPU, else 0."""
    if settings.guard_gpus is not None:
        return settings.guard_gpus
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def get_last_line(messages: object) -> str:
    """The last line of Ray's messages, which names the cause; at most 300 characters."""
    lines = [line.strip() for line in str(messages).splitlines() if line.strip()]
    return lines[-1][:TEXT_LIMIT_CHARS] if lines else "no reason given"


def find_own_error(error: BaseException | None) -> SluiceError | None:
    """Find Sluice's own error among the causes of an error of Ray."""
    while error is not None:
        # Serve's error is also an instance of its cause's class, but its text is a traceback.
        if isinstance(error, SluiceError) and not isinstance(error, RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def explain_deploy_failure(messages: str) -> str:
    """Reduce messages of Ray Serve to one sentence: Sluice's own error if there is one, else the last line."""
    own = re.findall(r"services\.(?:\w+\.)*errors\.\w+: (.+)", messages)
    if own:
        return str(own[-1])
    folders = f"/tmp/ray or /tmp/sluice-ray-{os.getuid()}/ray"
    return f"{get_last_line(messages)} (Ray's logs: session_latest/logs in {folders})"


def wait_until_running(
    application: str,
    *,
    is_ready: Callable[[], bool] = lambda: True,
    loading: str,
    progress: Callable[[str], None],
    explain: Callable[[str], str],
) -> None:
    """Wait until every replica of a deployed application runs and `is_ready` is true.

    `loading` is reported every 15 s. `explain` makes the text of the error from the messages of Ray Serve.

    Raises:
        ConfigurationError: the application could not be deployed.
    """
    started, next_progress_s = time.monotonic(), 0.0
    while True:
        status = serve.status().applications[application]
        if status.status == ApplicationStatus.RUNNING and is_ready():
            return
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise ConfigurationError(explain("; ".join(d.message for d in status.deployments.values() if d.message)))
        elapsed_s = time.monotonic() - started
        if elapsed_s >= next_progress_s:
            progress(f"{loading} ({elapsed_s:.0f} s)")
            next_progress_s = elapsed_s + _PROGRESS_S
        time.sleep(_POLL_S)
