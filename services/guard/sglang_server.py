"""One SGLang server: a child process, its scratch folder, and the only connection to it."""

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import httpx

from services.core.errors import EngineFailed, GuardFailed, GuardUnavailable
from services.core.processes import SupervisedProcess, can_confine, find_free_port
from services.guard.sglang_command import LaunchConfig, write_secrets
from services.guard.warm_up import Request, build_first_verdict, build_large_images, build_probe

logger = logging.getLogger(__name__)

POLL_S: Final = 0.25
_PROGRESS_S: Final = 10.0
_DETAIL_LIMIT: Final = 300
_KEPT_LOGS: Final = 8
_TAIL_LINES: Final = 400
"""Lines at the end of a log in which the error is looked for: one traceback of each GPU, and its frames."""
_LOGGED_LINES: Final = 40
_SCRATCH: Final = "sluice-engine-"
_LARGE_IMAGES: Final = 4
"""The limit of large images at a time at the start: small models have room for many."""
_ERROR_LINE: Final = re.compile(r"^\s*[\w.]*(?:Error|Exception)\b|OutOfMemory|no kernel image|CUDA error")
"""The last line of a Python traceback, or a message of CUDA."""


class PortTaken(Exception):
    """Another process took the port between its choice and its use."""


class SglangServer:
    """A running `sglang.launch_server`. It ends with this process, even if this process is killed."""

    def __init__(self, child: SupervisedProcess, client: httpx.AsyncClient, scratch: Path, probe: Request) -> None:
        """`probe` is the request that `can_generate` sends."""
        self._probe = probe
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
            return SglangServer(child, client, scratch, build_probe(launch_config.checkpoint))

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
        """Return when the server has judged images: a small one, and on a GPU some of the largest size together.

        Raises:
            PortTaken: another process has the port. Start a new server.
            GuardUnavailable: the server ended, or cannot judge. The log has its last lines.
        """
        began = reported = time.monotonic()
        while not await self._is_listening():
            if self.returncode is not None:
                tail = await asyncio.to_thread(self._child.tail, _TAIL_LINES)
                if "address already in use" in tail.lower():
                    raise PortTaken
                logger.error("the engine's last lines:\n%s", "\n".join(tail.splitlines()[-_LOGGED_LINES:]))
                raise GuardUnavailable(
                    f"The engine ended with status {self.returncode} during the start; {await self.log_tail()}"
                )
            if time.monotonic() - reported >= _PROGRESS_S:
                reported = time.monotonic()
                logger.info("the engine has been loading for %.0f s", reported - began)
            await asyncio.sleep(POLL_S)
        logger.info("the engine listens after %.0f s; judging a first image", time.monotonic() - began)
        checkpoint = launch_config.checkpoint
        await self._judge_first([self._probe], "an image")
        await self._judge_first([build_first_verdict(checkpoint)], "an image with a grammar and log probabilities")
        if plan := launch_config.plan:
            # As many as a prefill batch holds, which needs the most working space.
            large = build_large_images(
                checkpoint, min(plan.prefill_tokens // checkpoint.size.image_tokens + 1, _LARGE_IMAGES, plan.in_flight)
            )
            await self._judge_first(large, f"{len(large)} images of {checkpoint.max_side_px} px at a time")
        logger.info("the engine is ready after %.0f s", time.monotonic() - began)

    async def _judge_first(self, requests: Sequence[Request], what: str) -> None:
        """Judge images together. Raises GuardUnavailable with the log's last error if the server cannot."""
        results = await asyncio.gather(
            *(self.call("/generate", request) for request in requests), return_exceptions=True
        )
        for error in results:
            if isinstance(error, GuardFailed | GuardUnavailable):
                reason = str(error).rstrip(".")
                raise GuardUnavailable(f"The engine cannot judge {what}: {reason}; {await self.log_tail()}") from None
            if isinstance(error, BaseException):
                raise error

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
        """Whether the server generates one token about a small image in time."""
        try:
            async with asyncio.timeout(within_s):
                await self.call("/generate", self._probe)
        except (TimeoutError, GuardUnavailable, GuardFailed):
            return False
        return True

    async def log_tail(self) -> str:
        """The path of the log and its last error, for the end of a sentence; without an error, its last line."""
        try:
            tail = await asyncio.to_thread(self._child.tail, _TAIL_LINES)
        except OSError as error:
            return f"its log {self._child.log} cannot be read ({error.strerror})"
        return f"its log {self._child.log} ends with: {find_last_error(tail)[:_DETAIL_LIMIT] or '(nothing)'}"

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


def find_last_error(log: str) -> str:
    """The last line of a log that names an error; without one, the last line.

    When SGLang's scheduler fails, the last line only says that a child process ended.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if _ERROR_LINE.search(line)), lines[-1] if lines else "")


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
