"""The SGLang server as a child process: started, watched, restarted, and never left behind."""

import asyncio
import base64
import contextlib
import io
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import httpx

from services.children import Child
from services.errors import GuardFailed, GuardUnavailable
from services.guard import launch
from services.guard.answer import question
from services.guard.checkpoints import Checkpoint, StagedCheckpoint, resolve, stage
from services.settings import Settings

logger = logging.getLogger(__name__)

EngineState = Literal["starting", "ready", "restarting", "stopped"]

_POLL_S: Final = 0.25
_PROGRESS_S: Final = 10.0
_PORT_TRIES: Final = 3
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_PROBE_PRIORITY: Final = 2
_DETAIL_LIMIT: Final = 300
_KEPT_LOGS: Final = 8


class _PortTaken(Exception):
    """Another process took the port between its choice and its use."""


class Engine:
    """One SGLang server with one checkpoint, reachable only through this object.

    `start` returns when an image has been judged. From then on a task watches the server; one that ended, or gives no
    token for `hang_s`, is killed with everything it started and replaced, after pauses that double up to a minute.
    While no server is ready every call raises GuardUnavailable. When the owning process ends, however it ends, the
    server ends too.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        state_dir: Path,
        in_flight: int = 16,
        deadline_s: float = 60,
        start_s: float = 900,
        probe_every_s: float = 5,
        hang_s: float = 30,
    ) -> None:
        """`in_flight` and `deadline_s` are what callers will ask of the server: calls at a time, seconds for each."""
        self.checkpoint = checkpoint
        self._state_dir = state_dir.expanduser()
        self._in_flight = in_flight
        self._deadline_s = deadline_s
        self._start_s = start_s
        self._probe_every_s = probe_every_s
        self._hang_s = hang_s
        self._state: EngineState = "stopped"
        self._since = time.monotonic()
        self._staged: StagedCheckpoint | None = None
        self._cuda = False
        self._child: Child | None = None
        self._client: httpx.AsyncClient | None = None
        self._scratch: Path | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._last_answer = 0.0
        self._launches = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """
        Raises:
            ConfigurationError: SLUICE_MODEL names no checkpoint.
        """
        return cls(
            resolve(settings.model),
            state_dir=settings.state_dir,
            in_flight=settings.guard_in_flight,
            deadline_s=settings.guard_deadline_s,
            start_s=settings.guard_start_s,
        )

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def down_s(self) -> float:
        """Seconds since the engine was last ready; 0 while it is."""
        return 0.0 if self._state == "ready" else time.monotonic() - self._since

    @property
    def pid(self) -> int | None:
        """The process group of the server, or None while there is none."""
        return self._child.pid if self._child else None

    @property
    def revision(self) -> str:
        """What identifies the weights.

        Raises:
            GuardUnavailable: the engine was never started.
        """
        if self._staged is None:
            raise GuardUnavailable("The engine was not started yet.")
        return self._staged.revision

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Stage the checkpoint, start the server, and return when it has judged an image.

        Raises:
            ConfigurationError: the checkpoint cannot be staged.
            GuardUnavailable: the server ended or was not ready within `start_s`; its last lines are in the log.
        """
        if self._state != "stopped":
            raise RuntimeError("the engine was started already")
        self._enter("starting")
        try:
            self._staged = await asyncio.to_thread(stage, self.checkpoint, self._state_dir)
            self._cuda = await asyncio.to_thread(launch.cuda_available)
            await self._launch()
        except BaseException:
            self._enter("stopped")
            await asyncio.shield(self._discard())
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="guard-engine-supervisor")

    async def stop(self) -> None:
        """Kill the server and everything it started. Calls in flight raise GuardUnavailable. May be called again."""
        self._enter("stopped")
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        await self._discard()

    async def generate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One call of SGLang's native `/generate`.

        Raises:
            GuardFailed: the engine refuses the request, with its reason.
            GuardUnavailable: the engine is not ready, is full, or went away meanwhile.
        """
        document = await self._call(self._ready_client(), "/generate", request)
        self._last_answer = time.monotonic()
        if not isinstance(document, dict):
            raise GuardUnavailable("The engine's answer has an unexpected form.")
        return document

    async def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, without added special tokens. Raises as `generate` does."""
        body = {"prompt": text, "add_special_tokens": False}
        document = await self._call(self._ready_client(), "/v1/tokenize", body)
        return [int(token) for token in document["tokens"]]

    def _ready_client(self) -> httpx.AsyncClient:
        if self._state != "ready" or self._client is None:
            raise GuardUnavailable(f"The engine is {self._state}.")
        return self._client

    async def _call(self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Any:
        try:
            response = await client.post(path, json=body)
        except httpx.HTTPError as error:
            raise GuardUnavailable(f"The engine went away ({type(error).__name__}).") from None
        except RuntimeError as error:
            if client.is_closed:
                raise GuardUnavailable("The engine went away.") from None
            raise error
        if response.status_code == httpx.codes.OK:
            return response.json()
        detail = _detail(response)
        if response.status_code in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
            raise GuardFailed(f"The engine refuses it: {detail}")
        raise GuardUnavailable(f"The engine answers {response.status_code}: {detail}")

    def _enter(self, state: EngineState) -> None:
        if state != self._state:
            if self._state == "ready" or state == "ready" or state == "starting":
                self._since = time.monotonic()
            self._state = state
            logger.info("engine %s", state)

    async def _supervise(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            ready_at = time.monotonic()
            reason = await self._until_trouble()
            logger.error("the engine %s; restarting it", reason)
            self._enter("restarting")
            await self._discard()
            if time.monotonic() - ready_at > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            while True:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                try:
                    await self._launch()
                    break
                except Exception as error:  # Whatever it is, the next try may do better; the state stays visible.
                    logger.error("the engine did not come back: %s", error)
                    await self._discard()

    async def _until_trouble(self) -> str:
        watches = [asyncio.create_task(self._until_exit()), asyncio.create_task(self._until_hang())]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    async def _until_exit(self) -> str:
        child = self._child
        assert child is not None
        while child.returncode is None:  # noqa: ASYNC110  # a process has no event to wait for
            await asyncio.sleep(_POLL_S)
        return f"ended with status {child.returncode}: {_last_line(await asyncio.to_thread(child.tail))}"

    async def _until_hang(self) -> str:
        while True:
            await asyncio.sleep(self._probe_every_s)
            began = time.monotonic()
            # Any answer is a sign of life: a probe may wait its turn behind long prompts.
            while not await self._probe(began + self._hang_s) and self._last_answer < began:
                if time.monotonic() - began > self._hang_s:
                    return f"gave no token for {self._hang_s:.0f} s"
                await asyncio.sleep(_POLL_S)

    async def _probe(self, deadline: float) -> bool:
        """Whether the server gives one token of text before `deadline` (monotonic)."""
        assert self._client is not None
        sampling = {"temperature": 0, "max_new_tokens": 1}
        request = {"text": "Safe", "sampling_params": sampling, "priority": _PROBE_PRIORITY}
        try:
            async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                await self._call(self._client, "/generate", request)
        except (TimeoutError, GuardUnavailable, GuardFailed):
            return False
        return True

    async def _launch(self) -> None:
        """Start a server and wait until it has judged an image."""
        for attempt in range(1, _PORT_TRIES + 1):
            try:
                async with asyncio.timeout(self._start_s):
                    await self._spawn()
                    await self._until_ready()
                return
            except _PortTaken:
                await self._discard()
                logger.warning("the engine's port was taken meanwhile; trying another (%d)", attempt)
            except TimeoutError:
                raise GuardUnavailable(
                    f"The engine was not ready after {self._start_s:.0f} s (SLUICE_GUARD_START_S); {self._evidence()}"
                ) from None
        raise GuardUnavailable(f"The engine found no free port in {_PORT_TRIES} tries.")

    async def _spawn(self) -> None:
        assert self._staged is not None
        self._launches += 1
        port, key = launch.free_port(), secrets.token_urlsafe(32)
        logs = self._state_dir / "logs"
        # Its sockets and temporary files go where they can be removed together.
        self._scratch = Path(tempfile.mkdtemp(prefix="sluice-engine-"))
        launch.write_secrets(self._scratch / "flags.yaml", api_key=key)
        argv = launch.command(
            self.checkpoint,
            self._staged.folder,
            port=port,
            secrets=self._scratch / "flags.yaml",
            cuda=self._cuda,
            in_flight=self._in_flight,
        )
        env = launch.environment(
            os.environ,
            scratch=self._scratch,
            cuda=self._cuda,
            in_flight=self._in_flight,
            deadline_s=self._deadline_s,
        )
        log = logs / f"engine-{os.getpid()}-{id(self):x}-{self._launches}.log"
        logger.info(
            "starting SGLang with %s on the %s, log %s", self.checkpoint.name, "GPU" if self._cuda else "CPU", log
        )

        def spawn() -> Child:
            child = Child(argv, log=log, env=env)
            _prune(logs)
            return child

        spawning = asyncio.ensure_future(asyncio.to_thread(spawn))
        try:
            self._child = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            self._child = await spawning
            raise
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
            timeout=None,  # Every call has a deadline of its own.
            limits=httpx.Limits(max_connections=self._in_flight + 4, max_keepalive_connections=self._in_flight + 4),
        )

    async def _until_ready(self) -> None:
        assert self._child is not None and self._client is not None
        began = reported = time.monotonic()
        while not await self._listening():
            if self._child.returncode is not None:
                tail = await asyncio.to_thread(self._child.tail, 40)
                if "address already in use" in tail.lower():
                    raise _PortTaken
                logger.error("the engine's last lines:\n%s", tail)
                raise GuardUnavailable(
                    f"The engine ended with status {self._child.returncode} while starting; {self._evidence()}"
                )
            if time.monotonic() - reported >= _PROGRESS_S:
                reported = time.monotonic()
                logger.info("the engine has been loading for %.0f s", reported - began)
            await asyncio.sleep(_POLL_S)
        logger.info("the engine is up after %.0f s; judging a first image", time.monotonic() - began)
        try:
            await self._call(self._client, "/generate", self._first_question())
        except GuardFailed as error:
            raise GuardUnavailable(f"The engine cannot judge an image: {error} {self._evidence()}") from None
        except GuardUnavailable as error:
            raise GuardUnavailable(f"{error} {self._evidence()}") from None
        self._enter("ready")
        logger.info("the engine is ready after %.0f s", time.monotonic() - began)

    async def _listening(self) -> bool:
        assert self._client is not None
        try:
            response = await self._client.get("/ready", timeout=5)
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK

    def _first_question(self) -> dict[str, Any]:
        return {
            "text": question(self.checkpoint.layout, "Is this image safe?"),
            "image_data": _drawn_image(),
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        }

    def _evidence(self) -> str:
        if self._child is None:
            return "it never ran."
        return f"its log {self._child.log} ends with: {_last_line(self._child.tail())}"

    async def _discard(self) -> None:
        """Kill the server, if there is one, and forget it."""
        child, client, scratch = self._child, self._client, self._scratch
        self._child = self._client = self._scratch = None
        if child is not None:
            await asyncio.to_thread(child.kill)
        if client is not None:
            await client.aclose()
        if scratch is not None:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)


def _detail(response: httpx.Response) -> str:
    """What the server says about a refusal, in one bounded line."""
    try:
        document = response.json()
        error = document.get("error", document.get("detail", document)) if isinstance(document, dict) else document
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = response.text
    return " ".join(str(text).split())[:_DETAIL_LIMIT]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_DETAIL_LIMIT] if lines else "(nothing)"


def _drawn_image() -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _prune(logs: Path) -> None:
    """Keep the newest logs, and those of other processes that still run."""
    with contextlib.suppress(OSError):  # Another process prunes the same folder.
        for log in sorted(logs.glob("engine-*.log"), key=lambda log: log.stat().st_mtime)[:-_KEPT_LOGS]:
            owner = log.name.split("-")[1]
            if owner == str(os.getpid()) or not Path(f"/proc/{owner}").exists():
                log.unlink(missing_ok=True)
