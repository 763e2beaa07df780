"""Reports the progress of a stage of a run: counts, rate and time left."""

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from pipelines.reporting.text import format_duration

_REPORT_INTERVAL_S: Final = 5.0
_WINDOW_S: Final = 120.0


class StageProgress:
    """Counts the finished items of a stage, and reports every few seconds if the count changed. A context manager."""

    def __init__(
        self,
        stage: str,
        total: int | None,
        progress: Callable[[str], None],
        *,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total`: all items, None if unknown; `done`: items that an earlier run finished."""
        self._stage = stage
        self._total = total
        self._progress = progress
        self._clock = clock
        self._done = done
        self._reported = -1
        self._history = deque([(clock(), done)])
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._report_loop, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        self._finished.set()
        self._thread.join()
        if kind is None:
            self._report()

    def add(self, count: int) -> None:
        """Add finished items."""
        with self._lock:
            self._done += count

    def format_line(self) -> str:
        """The progress until now."""
        now = self._clock()
        with self._lock:
            done = self._done
        self._history.append((now, done))
        while len(self._history) > 2 and now - self._history[0][0] > _WINDOW_S:
            self._history.popleft()
        since, before = self._history[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        line = f"{self._stage} {done:,}"
        if self._total is not None:
            line += f" of {self._total:,}"
        if rate > 0:
            line += f", {rate:,.1f}/s"
            if self._total is not None and done < self._total:
                line += f", {format_duration((self._total - done) / rate)} left"
        return line

    def _report_loop(self) -> None:
        while not self._finished.wait(_REPORT_INTERVAL_S):
            self._report()

    def _report(self) -> None:
        line = self.format_line()
        if self._done not in (self._reported, 0):
            self._reported = self._done
            self._progress(line)
