"""The engine: an SGLang server that is started, watched, restarted, and ended with its owner."""

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from services.core.errors import GuardUnavailable
from services.core.settings import Settings
from services.core.tasks import cancel_and_wait
from services.guard.checkpoint_staging import StagedCheckpoint, stage
from services.guard.checkpoints import Checkpoint, order_image, resolve_checkpoint
from services.guard.gpus import plan_gpus
from services.guard.safetensors import read_json
from services.guard.sglang_command import LaunchConfig
from services.guard.sglang_server import POLL_S, PortTaken, SglangServer

logger = logging.getLogger(__name__)

EngineState = Literal["starting", "ready", "restarting", "stopped"]

_PORT_ATTEMPTS: Final = 3
"""A start tries this many ports, if other processes take them first."""
_FIRST_RESTART_PAUSE_S: Final = 1.0
"""The pause before a restart. It doubles with each restart, up to the limit."""
_RESTART_PAUSE_LIMIT_S: Final = 60.0
"""A server that was ready for longer than this resets the pause."""
_LAST_PROBE_S: Final = 3.0
"""Deadline of the last probe before a server counts as hung."""
_HEALTH_CHECK_S: Final = 5.0
"""Deadline of the health check that other parts call."""


class Engine:
    """One SGLang server at a time with one checkpoint, reachable only through this object.

    `start` returns when the server has judged an image. Then a task watches the server. A server that has ended, or
    that generates no token for `hang_s`, is killed with all its processes and replaced, after pauses that double up to
    a minute. While no server is ready every call raises GuardUnavailable. The server ends with the owning process, even
    if that process is killed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        state_dir: Path,
        revisions: Mapping[str, str] | None = None,
        in_flight: int | None = None,
        deadline_s: float = 60,
        start_s: float = 900,
        probe_every_s: float = 5,
        hang_s: float = 30,
        gpus: float | None = None,
        engine_flags: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            in_flight: concurrent calls; None: as many as the checkpoint and the GPU need.
            deadline_s: of each call.
            start_s: until a server must be ready.
            probe_every_s: between two probes of a server that is ready.
            hang_s: a server that generates no token for so long is replaced.
            gpus: GPUs of the server; below 1: the share of one GPU's memory that it may use; 0: it runs on the CPU;
                None: those that there are.
            engine_flags: further flags of SGLang.
        """
        self.checkpoint = checkpoint
        self._state_dir = state_dir.expanduser()
        self._revisions = revisions or {}
        self._in_flight = in_flight
        self._deadline_s = deadline_s
        self._start_s = start_s
        self._probe_every_s = probe_every_s
        self._hang_s = hang_s
        self._gpus = gpus
        self._engine_flags = engine_flags
        self._state: EngineState = "stopped"
        self._down_since = time.monotonic()
        self._staged: StagedCheckpoint | None = None
        self._launch_config: LaunchConfig | None = None
        self._server: SglangServer | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._last_answer = 0.0
        self._launches = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """
        Raises:
            ConfigurationError: SLUICE_MODEL names no checkpoint, or SLUICE_IMAGE_ORDER does not apply to it.
        """
        return cls(
            order_image(resolve_checkpoint(settings.model), settings.image_order),
            state_dir=settings.state_dir,
            revisions={name: commit for name, _, commit in (pair.partition("@") for pair in settings.model_revisions)},
            in_flight=settings.guard_in_flight,
            deadline_s=settings.guard_deadline_s,
            start_s=settings.guard_start_s,
            gpus=settings.guard_gpus,
            engine_flags=settings.engine_flags,
        )

    @property
    def in_flight(self) -> int:
        """Concurrent calls. Before the start it is not known how many the GPU holds."""
        if self._launch_config is not None:
            return self._launch_config.in_flight
        return self._in_flight or self.checkpoint.in_flight

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def down_s(self) -> float:
        """Seconds since the engine was last ready, or created; 0 while it is ready."""
        return 0.0 if self._state == "ready" else time.monotonic() - self._down_since

    @property
    def pid(self) -> int | None:
        """The process group of the server; None while there is no server."""
        return self._server.pid if self._server else None

    @property
    def revision(self) -> str:
        """Identifies the weights.

        Raises:
            GuardUnavailable: the engine was not started yet.
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
            ConfigurationError: the checkpoint does not fit on this machine, or cannot be staged.
            GuardUnavailable: the server ended, or was not ready within `start_s`. The log has its last lines.
        """
        if self._state != "stopped":
            raise RuntimeError("the engine is already started")
        self._set_state("starting")
        try:
            # First, because staging may download gigabytes.
            plan = await asyncio.to_thread(plan_gpus, self.checkpoint, self._gpus, self._in_flight)
            self._staged = await asyncio.to_thread(stage, self.checkpoint, self._state_dir, self._revisions)
            self._launch_config = LaunchConfig(
                checkpoint=self.checkpoint,
                folder=self._staged.folder,
                plan=plan,
                in_flight=plan.in_flight if plan else self._in_flight or self.checkpoint.in_flight,
                deadline_s=self._deadline_s,
                tokenizer=self._staged.tokenizer,
                engine_flags=self._engine_flags,
            )
            await self._launch(self._launch_config)
        except BaseException:
            self._set_state("stopped")
            await asyncio.shield(self._discard())
            raise
        self._supervisor = asyncio.create_task(self._supervise(self._launch_config), name="guard-engine-supervisor")

    async def stop(self) -> None:
        """Kill the server with all its processes. Calls in flight raise GuardUnavailable. Safe to repeat."""
        self._set_state("stopped")
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            await cancel_and_wait(supervisor)
        await self._discard()

    async def generate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Call SGLang's native `/generate`.

        Raises:
            GuardFailed: the engine rejects the request; the error has its reason.
            EngineFailed: the engine failed during this call.
            GuardUnavailable: the engine is not ready, or full.
        """
        answer: dict[str, Any] = await self.call("/generate", request)
        self._last_answer = time.monotonic()
        return answer

    async def health_check(self) -> None:
        """
        Raises:
            GuardUnavailable: the engine is not ready, or does not generate a token in time.
        """
        if self._state != "ready" or self._server is None:
            raise GuardUnavailable(f"The engine is {self._state}.")
        if not await self._server.can_generate(_HEALTH_CHECK_S):
            raise GuardUnavailable("The engine failed its health check: it generated no token.")

    def read_config(self) -> dict[str, Any]:
        """The config.json that the server loads. Blocks.

        Raises:
            GuardUnavailable: the engine was not started yet.
            ConfigurationError: the file cannot be read.
        """
        if self._staged is None:
            raise GuardUnavailable("The engine was not started yet.")
        return read_json(self._staged.folder / "config.json")

    async def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, without added special tokens. Raises as `generate` does."""
        document = await self.call("/v1/tokenize", {"prompt": text, "add_special_tokens": False})
        return [int(token) for token in document["tokens"]]

    async def call(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST to the server. Raises as `generate` does."""
        if self._state != "ready" or self._server is None:
            raise GuardUnavailable(f"The engine is {self._state}.")
        return await self._server.call(path, body)

    def _set_state(self, state: EngineState) -> None:
        if state == self._state:
            return
        if self._state == "ready":
            self._down_since = time.monotonic()
        self._state = state
        logger.info("engine %s", state)

    async def _supervise(self, launch_config: LaunchConfig) -> None:
        """Replace the server each time it fails, until cancelled."""
        pause_s = _FIRST_RESTART_PAUSE_S
        while self._server is not None:
            ready_at = time.monotonic()
            try:
                failure = await self._wait_for_failure(self._server)
            except Exception as error:  # noqa: BLE001  # the supervisor must not end: only it restarts the engine
                failure = f"cannot be watched ({error})"
            if time.monotonic() - ready_at > _RESTART_PAUSE_LIMIT_S:
                pause_s = _FIRST_RESTART_PAUSE_S
            while failure:
                logger.error("the engine %s; restarting it", failure)
                self._set_state("restarting")
                try:
                    await self._discard()
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _RESTART_PAUSE_LIMIT_S)
                    await self._launch(launch_config)
                    failure = ""
                except Exception as error:  # noqa: BLE001  # as above
                    failure = f"did not restart ({error})"

    async def _wait_for_failure(self, server: SglangServer) -> str:
        """Return how the server failed, when it does."""
        watches = [asyncio.create_task(self._wait_for_exit(server)), asyncio.create_task(self._wait_for_hang(server))]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    async def _wait_for_exit(self, server: SglangServer) -> str:
        while server.returncode is None:  # noqa: ASYNC110  # there is no event for the end of a process
            await asyncio.sleep(POLL_S)
        return f"ended with status {server.returncode}, {await server.log_tail()}"

    async def _wait_for_hang(self, server: SglangServer) -> str:
        while True:
            await asyncio.sleep(self._probe_every_s)
            began = time.monotonic()
            left = self._hang_s
            # Any answer proves that the server runs: the probe itself may wait behind long prompts.
            while not await server.can_generate(within_s=left) and self._last_answer < began:
                left = began + self._hang_s - time.monotonic()
                # Probe once more, because this process itself may have been suspended.
                if left <= 0 and not await server.can_generate(within_s=_LAST_PROBE_S):
                    return f"generated no token for {self._hang_s:.0f} s"
                await asyncio.sleep(POLL_S)

    async def _launch(self, launch_config: LaunchConfig) -> None:
        """Start a server and wait until it has judged an image.

        Raises:
            GuardUnavailable: the server ended, or was not ready in time.
        """
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self._launches += 1
            log = self._state_dir / "logs" / f"engine-{os.getpid()}-{id(self):x}-{self._launches}.log"
            plan = launch_config.plan
            device = f"{plan.gpus} GPU(s) for {plan.in_flight} calls at a time" if plan else "the CPU"
            logger.info("starting SGLang with %s on %s; its log is %s", self.checkpoint.name, device, log)
            try:
                async with asyncio.timeout(self._start_s):
                    self._server = server = await SglangServer.spawn(launch_config, log)
                    await server.wait_until_ready(launch_config)
            except PortTaken:
                logger.warning("another process took the engine's port; choosing another port (attempt %d)", attempt)
                await self._discard()
                continue
            except TimeoutError:
                words = await self._server.log_tail() if self._server else "no server was started"
                raise GuardUnavailable(
                    f"The engine was not ready after {self._start_s:.0f} s (SLUICE_GUARD_START_S); {words}"
                ) from None
            if self._state == "stopped":
                raise GuardUnavailable("The engine was stopped while it started.")
            self._set_state("ready")
            return
        raise GuardUnavailable(f"The engine's port was taken {_PORT_ATTEMPTS} times in a row.")

    async def _discard(self) -> None:
        """Kill the server if there is one."""
        server, self._server = self._server, None
        if server is not None:
            await server.kill()
