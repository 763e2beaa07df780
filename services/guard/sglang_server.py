"""One SGLang server: a child process, its scratch folder, and the only connection to it."""

import asyncio
import base64
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from services.core.errors import EngineFailed, GuardFailed, GuardUnavailable
from services.core.probe_image import draw_probe_image
from services.core.processes import SupervisedProcess, can_confine, find_free_port
from services.guard.sglang_command import LaunchConfig, write_secrets

logger = logging.getLogger(__name__)

POLL_S: Final = 0.25
_PROGRESS_S: Final = 10.0
_PROBE_PRIORITY: Final = 3
_DETAIL_LIMIT: Final = 300
_KEPT_LOGS: Final = 8
_SCRATCH: Final = "sluice-engine-"


class PortTaken(Exception):
    """Another process took the port between its choice and its use."""


class SglangServer:
    """A running `sglang.launch_server`. It ends with this process, even if this process is killed."""

    def __init__(self, child: SupervisedProcess, client: httpx.AsyncClient, scratch: Path) -> None:
        self._child = child
        self._client = client
        self._scratch = scratch

    @staticmethod
    async def spawn(launch_config: LaunchConfig, log: Path) -> "SglangServer":
        """Start the process. It answers only after it has loaded the weights."""
        # Hexadecimal: SGLang reads a key that begins with a hyphen as another flag.
        port, key = find_free_port(), secrets.token_hex(32)

        client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
            timeout=None,  # Each call has its own deadline.
            limits=httpx.Limits(
                max_connections=launch_config.in_flight + 4, max_keepalive_connections=launch_config.in_flight + 4
            ),
        )

        def spawn() -> SglangServer:
            # Its sockets and temporary files are in one folder, which can be deleted.
            scratch = Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-"))
            if not can_confine():
                logger.warning(
                    "the kernel has no Landlock, so the engine can read the memory and the environment of other "
                    "processes of this user; run the guard as a user of its own, or on a kernel with Landlock"
                )
            write_secrets(scratch / "flags.yaml", api_key=key)
            argv = launch_config.command(port=port, secrets=scratch / "flags.yaml")
            env = launch_config.environment(os.environ, port=port, scratch=scratch)
            child = SupervisedProcess(argv, log=log, env=env, confined=True)
            _delete_old_logs(log.parent)
            _delete_orphaned_scratch(scratch.parent)
            return SglangServer(child, client, scratch)

        spawning = asyncio.ensure_future(asyncio.to_thread(spawn))
        try:
            return await asyncio.shield(spawning)
        except asyncio.CancelledError:

            async def end() -> None:
                await (await spawning).kill()

            await asyncio.shield(asyncio.create_task(end()))  # a second cancellation must not leave the process running
            raise

    @property
    def pid(self) -> int:
        """The process group's id."""
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._child.returncode

    async def wait_until_ready(self, launch_config: LaunchConfig) -> None:
        """Return when the server has judged an image.

        Raises:
            PortTaken: another process has the port. Start a new server.
            GuardUnavailable: the server ended, or cannot judge. The log has its last lines.
        """
        began = reported = time.monotonic()
        while not await self._is_listening():
            if self.returncode is not None:
                tail = await asyncio.to_thread(self._child.tail, 40)
                if "address already in use" in tail.lower():
                    raise PortTaken
                logger.error("the engine's last lines:\n%s", tail)
                raise GuardUnavailable(
                    f"The engine ended with status {self.returncode} during the start; {await self.log_tail()}"
                )
            if time.monotonic() - reported >= _PROGRESS_S:
                reported = time.monotonic()
                logger.info("the engine has been loading for %.0f s", reported - began)
            await asyncio.sleep(POLL_S)
        logger.info("the engine listens after %.0f s; judging a first image", time.monotonic() - began)
        first = {
            "text": launch_config.checkpoint.family.build_example(),
            "image_data": f"data:image/jpeg;base64,{base64.b64encode(draw_probe_image()).decode()}",
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        }
        try:
            await self.call("/generate", first)
        except (GuardFailed, GuardUnavailable) as error:
            raise GuardUnavailable(f"The engine cannot judge an image: {error} And {await self.log_tail()}") from None
        logger.info("the engine is ready after %.0f s", time.monotonic() - began)

    async def call(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST a JSON body and return the JSON answer.

        Raises:
            GuardFailed: the server rejects the request; the error has its reason.
            EngineFailed: the server failed during this call.
            GuardUnavailable: the server is full.
        """
        try:
            response = await self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise EngineFailed(f"The connection to the engine broke ({type(error).__name__}).") from None
        except RuntimeError:
            if not self._client.is_closed:
                raise
            raise EngineFailed("The engine was stopped during the call.") from None
        if response.status_code == httpx.codes.OK:
            try:
                return response.json()
            except ValueError:
                raise GuardUnavailable("The engine's answer is not JSON.") from None
        detail = _detail(response)
        if response.status_code in {httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY}:
            raise GuardFailed(f"The engine rejects the request: {detail}")
        if response.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
            raise EngineFailed(f"The engine failed: {detail}")
        raise GuardUnavailable(f"The engine answers {response.status_code}: {detail}")

    async def can_generate(self, within_s: float) -> bool:
        """Whether the server generates one token of text in time."""
        request = {
            "text": "Safe",
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "priority": _PROBE_PRIORITY,
        }
        try:
            async with asyncio.timeout(within_s):
                await self.call("/generate", request)
        except (TimeoutError, GuardUnavailable, GuardFailed):
            return False
        return True

    async def log_tail(self) -> str:
        """The path and the last line of the log, for the end of a sentence."""
        try:
            tail = await asyncio.to_thread(self._child.tail)
        except OSError as error:
            return f"its log {self._child.log} cannot be read ({error.strerror})"
        lines = [line.strip() for line in tail.splitlines() if line.strip()]
        return f"its log {self._child.log} ends with: {lines[-1][:_DETAIL_LIMIT] if lines else '(nothing)'}"

    async def kill(self) -> None:
        """Kill the process with all its child processes. Calls in flight raise GuardUnavailable."""
        await asyncio.to_thread(self._child.kill)
        await self._client.aclose()
        await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)

    async def _is_listening(self) -> bool:
        try:
            response = await self._client.get("/ready", timeout=5)
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK


def _detail(response: httpx.Response) -> str:
    """The server's reason for an error, in one line of limited length."""
    try:
        document = response.json()
        error = document.get("error", document.get("detail", document)) if isinstance(document, dict) else document
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = response.text
    return " ".join(str(text).split())[:_DETAIL_LIMIT]


def _delete_old_logs(logs: Path) -> None:
    """Delete all logs but the newest, and but those of other running processes."""
    with contextlib.suppress(OSError):  # Another process deletes logs in the same folder.
        for log in sorted(logs.glob("engine-*.log"), key=lambda log: log.stat().st_mtime)[:-_KEPT_LOGS]:
            owner = log.name.split("-")[1]
            if owner == str(os.getpid()) or not Path(f"/proc/{owner}").exists():
                log.unlink(missing_ok=True)


def _delete_orphaned_scratch(folder: Path) -> None:
    """Delete the scratch folders of killed owners."""
    for scratch in folder.glob(f"{_SCRATCH}*-*"):
        owner = scratch.name.removeprefix(_SCRATCH).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(scratch, ignore_errors=True)
