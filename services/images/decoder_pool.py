"""Prepares images in separate processes: a decoder that crashes, hangs or uses too much memory fails only its image.

The processes are plain children of this process, started by `exec`. They inherit nothing of a Ray actor (threads, event
loop, locks, credentials in the environment), and its `__main__` is never imported.

The kernel limits the memory of each of the `decode_workers` processes (1 GiB and 16 bytes for each pixel of
`image_limit_px`, and all of them together at most half of the container's memory). Most images need far less: 4 bytes a
pixel, 8 while the mode changes, and a JPEG is decoded near its final size.
"""

import asyncio
import hashlib
import logging
import os
import queue
import signal
import socket
import threading
import time
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

from services.core import telemetry
from services.core.errors import DecoderOutOfMemory, NotAnImage, TooLarge, Unavailable
from services.core.processes import start_helper
from services.core.settings import Settings
from services.core.tenant_context import current_tenant
from services.core.values import PreparedImage
from services.images.decoder_limits import decoder_memory_bytes, find_memory_bytes
from services.images.decoder_protocol import (
    Channel,
    ConnectionClosedError,
    ProtocolError,
    from_fields,
    read_detail,
    to_fields,
)
from services.images.decoder_sandbox import MEASURES
from services.images.fair_slots import FairSlots
from services.images.thread_watch import ThreadWatch

_log = logging.getLogger(__name__)

FIRST_LOOK_PX: Final = 384
"""LlavaGuard sees an image with this side as one tile, with a fifth of the tokens of a larger image."""

_START_S: Final = 60.0
_IMAGES_PER_PROCESS: Final = 2000
"""After this many images a process is replaced, so that a memory leak stays small."""
_ATTEMPTS: Final = 2
_STOPPED_FROM_OUTSIDE: Final = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
"""The image is not to blame."""
_KILLS_LIMIT: Final = 3
"""The kernel sends SIGKILL when memory is short. After this many kills an image is rejected."""
_REMEMBERED_IMAGES: Final = 1024
"""Images whose decoder was killed. The oldest is forgotten first."""
_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")


class DecoderPool:
    """A pool of a limited number of decoder processes, which tenants use in turn.

    Use it from one event loop, and close it afterwards.
    """

    def __init__(self, settings: Settings, side_px: int) -> None:
        """`side_px`: the longest side, in pixels, that the model can use.

        The first images start the processes. Reads `decode_workers`, `decode_deadline_s`, `image_limit_px`.
        """
        self._deadline_s = settings.decode_deadline_s
        memory_bytes = decoder_memory_bytes(settings.image_limit_px, settings.decode_workers, find_memory_bytes())
        self._arguments = (settings.image_limit_px, side_px, memory_bytes, settings.decode_deadline_s)
        self._answer_limit_bytes = max(settings.image_limit_bytes, 8 * side_px * side_px + (1 << 20))
        self._threads = ThreadPoolExecutor(settings.decode_workers, thread_name_prefix="decode")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._kills = _KillCounts()
        self._slots = FairSlots(settings.decode_workers)
        self._measures: frozenset[str] | None = None
        self._thread_watch: ThreadWatch | None = None

    async def prepare(self, data: bytes) -> PreparedImage:
        """Decode, orient, downscale, as `services.images.decode.prepare` says.

        Raises:
            NotAnImage: an unknown format, truncated, corrupt, or its decoder crashed twice or missed the deadline.
            TooLarge: the image has too many pixels or scans, needs too much memory, or its decoder got SIGKILL three
                times.
            Unavailable: no decoder process can be started, the decoder was killed from outside, or the pool is closed.
        """
        return await self._run(None, data)

    async def prepare_first_look(self, image: PreparedImage) -> PreparedImage:
        """The same image with the longer side at most `FIRST_LOOK_PX`. Raises what `prepare` raises."""
        return await self.downscale(image, FIRST_LOOK_PX)

    async def downscale(self, image: PreparedImage, side_px: int) -> PreparedImage:
        """The same image with the longer side at most `side_px`. Raises what `prepare` raises."""
        if max(image.width, image.height) <= side_px:
            return image
        request = {"side_px": side_px, "image": to_fields(image)}
        return await self._run(request, image.data)

    def close(self) -> None:
        """Kill the processes. Running calls raise Unavailable. Safe to repeat; does not wait."""
        with self._lock:
            self._closed = True
            workers = tuple(self._workers)
            if self._thread_watch:
                self._thread_watch.stop()
        for worker in workers:
            worker.kill()
        with suppress(RuntimeError):  # already closed
            self._threads.submit(self._discard_idle)
        self._threads.shutdown(wait=False)  # queued calls end at once, with Unavailable

    async def _run(self, request: dict[str, Any] | None, data: bytes) -> PreparedImage:
        if self._closed:
            raise Unavailable("the image decoders are stopped")
        await self._slots.acquire(current_tenant())
        try:
            decoding = self._threads.submit(self._try, request, data)
        except RuntimeError:
            self._slots.release()
            raise Unavailable("the image decoders are stopped") from None
        loop = asyncio.get_running_loop()
        prepared: asyncio.Future[PreparedImage] = loop.create_future()

        def finish() -> None:
            self._slots.release()  # also if this task was cancelled while the thread decoded
            if not prepared.done():
                _copy_result(decoding, prepared)

        def notify(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(finish)

        decoding.add_done_callback(notify)
        try:
            return await prepared
        except asyncio.CancelledError:
            decoding.cancel()  # if it has not begun
            raise

    def _try(self, request: dict[str, Any] | None, data: bytes) -> PreparedImage:
        request = request or {"sha256": hashlib.sha256(data).hexdigest()}
        wants_new = False
        for attempt in range(_ATTEMPTS):
            worker = self._start() if wants_new else self._acquire()
            try:
                image = worker.ask(request, data)
            except (NotAnImage, TooLarge) as error:
                if isinstance(error, DecoderOutOfMemory) and worker.images > 1 and attempt + 1 < _ATTEMPTS:
                    self._discard(worker)
                    wants_new = True  # earlier images may have left memory in this one
                    continue
                self._release(worker)
                raise
            except TimeoutError:
                self._discard(worker)
                raise NotAnImage(f"decoding took longer than {self._deadline_s:g} s") from None
            except Exception as error:  # noqa: BLE001 - a taken decoder may answer anything
                status = self._discard(worker)
                if self._closed:
                    raise Unavailable("the image decoders are being stopped") from None
                if self._thread_watch and self._thread_watch.has_killed(worker.pid):
                    continue  # as a crash
                if not isinstance(error, (ConnectionClosedError, OSError)):
                    known = isinstance(error, ProtocolError)
                    _log.warning(
                        "an image decoder broke its protocol and is replaced; it may have been taken over: %s",
                        error if known else type(error).__name__,
                        exc_info=None if known else error,
                    )
                    continue  # as a crash: this process killed the decoder, so its exit status says nothing
                if status == -signal.SIGKILL:
                    self._blame(data)
                if status in _STOPPED_FROM_OUTSIDE:
                    raise Unavailable(f"an image decoder was stopped from outside (signal {-status})") from None
            else:
                self._release(worker)
                self._kills.forget(data)
                return image
        raise NotAnImage(f"the decoder of the image crashed {_ATTEMPTS} times")

    def _blame(self, data: bytes) -> None:
        """Count a SIGKILL as a try of the image, and raise: Unavailable, or TooLarge after `_KILLS_LIMIT` of them."""
        kills = self._kills.add(data)
        if kills >= _KILLS_LIMIT:
            raise TooLarge(
                f"the decoder of the image was killed {kills} times; the image needs more memory than the machine has"
            ) from None
        raise Unavailable(
            f"an image decoder was killed (SIGKILL {kills} of {_KILLS_LIMIT} for this image); "
            "the machine may be out of memory"
        ) from None

    def _acquire(self) -> "_Worker":
        with suppress(queue.Empty):
            while True:
                worker = self._idle.get_nowait()
                if worker.is_alive():
                    return worker
                self._discard(worker)  # it was killed between two images
        return self._start()

    def _start(self) -> "_Worker":
        try:
            worker = _Worker(self._arguments, self._answer_limit_bytes)
        except OSError as error:
            raise Unavailable(f"no image decoder can be started: {error}") from None
        with self._lock:
            self._workers.add(worker)
            if self._thread_watch is None:
                self._thread_watch = ThreadWatch(self._copy_workers)
            if self._closed:
                self._thread_watch.stop()
                worker.kill()  # `close` has not killed it
        try:
            self._report(worker.await_ready())
        except Exception as error:  # noqa: BLE001 - as for an image
            status = self._discard(worker)
            raise Unavailable(f"an image decoder did not start (status {status}): {error}") from None
        return worker

    def _report(self, in_force: frozenset[str]) -> None:
        """Say in the log and in a metric what the kernel keeps decoders from; in the log only when it changes."""
        for measure in MEASURES:
            telemetry.DECODER_SANDBOX.set(measure in in_force, {"measure": measure})
        with self._lock:
            changed, self._measures = in_force != self._measures, in_force
        if not changed:
            return
        missing = [measure for measure in MEASURES if measure not in in_force]
        _log.log(
            logging.WARNING if missing else logging.INFO,
            "sandbox of the image decoders: in force %s; missing %s",
            ", ".join(measure for measure in MEASURES if measure in in_force) or "nothing",
            ", ".join(missing) or "nothing",
        )

    def _copy_workers(self) -> "tuple[_Worker, ...]":
        with self._lock:
            return tuple(self._workers)

    def _release(self, worker: "_Worker") -> None:
        if self._closed or worker.images >= _IMAGES_PER_PROCESS:
            self._discard(worker)
        else:
            self._idle.put(worker)

    def _discard_idle(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._discard(self._idle.get_nowait())

    def _discard(self, worker: "_Worker") -> int:
        worker.kill()
        with self._lock:
            self._workers.discard(worker)
        return worker.wait()


def _copy_result(source: "futures.Future[PreparedImage]", target: "asyncio.Future[PreparedImage]") -> None:
    if source.cancelled():
        target.cancel()
    elif error := source.exception():
        target.set_exception(error)
    else:
        target.set_result(source.result())


class _KillCounts:
    """How often the decoder of an image was killed, by the digest of the image. Any thread may use it."""

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def add(self, data: bytes) -> int:
        """Count one kill. Returns the kills of this image so far; an image at the limit starts anew."""
        key = hashlib.sha256(data).digest()
        with self._lock:
            kills = self._counts.pop(key, 0) + 1
            if kills < _KILLS_LIMIT:
                self._counts[key] = kills  # at the end: the newest
            if len(self._counts) > _REMEMBERED_IMAGES:
                del self._counts[next(iter(self._counts))]
        return kills

    def forget(self, data: bytes) -> None:
        """Remove the count of an image that was decoded."""
        with self._lock:
            if not self._counts:
                return  # usually, so no digest is computed
        key = hashlib.sha256(data).digest()
        with self._lock:
            self._counts.pop(key, None)


class _Worker:
    """One decoder process, used by one thread at a time."""

    def __init__(self, arguments: tuple[float, ...], answer_limit_bytes: int) -> None:
        self.images = 0
        self._image_px, self._side_px, _, self._deadline_s = arguments
        self._answer_limit_bytes = answer_limit_bytes
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        try:
            with theirs:
                self._process = start_helper(
                    "services.images.decoder_process",
                    *map(str, arguments),
                    env=_make_environment(),
                    stdin=theirs.fileno(),
                )
        except BaseException:
            ours.close()
            raise

    def await_ready(self) -> frozenset[str]:
        """Wait for the start. Returns the measures of the sandbox in force. Raises ProtocolError, TimeoutError."""
        self._channel.deadline = time.monotonic() + _START_S
        head, _ = self._channel.receive(0)
        measures = head.get("measures")
        if not isinstance(measures, list):
            raise ProtocolError("the decoder does not say which measures are in force")
        return frozenset(measure for measure in MEASURES if measure in measures)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], data: bytes) -> PreparedImage:
        """Decode one image in this process.

        Raises:
            NotAnImage, TooLarge: the decoder rejects the image.
            ProtocolError: its answer is wrong; ConnectionClosedError: the process died.
            OSError: the process died.
            TimeoutError: the deadline passed.
        """
        self.images += 1
        self._channel.deadline = time.monotonic() + self._deadline_s
        self._channel.send(request, data)
        answer, content = self._channel.receive(self._answer_limit_bytes)
        reason = answer.get("reason")
        if reason == TooLarge.reason:
            raise (DecoderOutOfMemory if answer.get("out_of_memory") is True else TooLarge)(read_detail(answer))
        if reason == NotAnImage.reason:
            raise NotAnImage(read_detail(answer))
        image = from_fields(answer, content)
        self._check(image, request)
        return image

    def _check(self, image: PreparedImage, request: dict[str, Any]) -> None:
        """Raise ProtocolError if the answer does not belong to the request."""
        known = request.get("image")
        side_px = request["side_px"] if known else self._side_px
        if max(image.width, image.height) > side_px:
            raise ProtocolError(f"an answer has {image.width} x {image.height} pixels; the limit is {side_px} a side")
        if image.sha256 != (known or request)["sha256"]:
            raise ProtocolError("an answer has the digest of another image")
        if known and image.facts.model_dump() != known["facts"]:
            raise ProtocolError("an answer has the facts of another image")
        if not known and image.facts.width * image.facts.height > self._image_px:
            raise ProtocolError(f"an answer has an image of more than {self._image_px} pixels")

    def kill(self) -> None:
        """Kill the process. Any thread may call it; safe to repeat."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def wait(self) -> int:
        """Release all resources. Returns the exit status, negative for a signal."""
        status = self._process.wait()
        self._channel.close()
        return status


def _make_environment() -> dict[str, str]:
    """The variables that a decoder needs. It gets no credentials and no settings."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    # Each malloc arena reserves 64 MiB of address space, which RLIMIT_AS counts. Without the thresholds, it depends on
    # the layout of the heap whether malloc returns the memory of each image to the kernel and asks for it again.
    return inherited | {
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
        "OMP_NUM_THREADS": "1",
    }
