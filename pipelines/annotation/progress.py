"""How far a stage is: on stderr, with its rate and the time left."""

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

_REPORT_INTERVAL_S: Final = 5.0
_WINDOW_S: Final = 120.0


class StageProgress:
    """Counts what is done of a stage, and says so every few seconds where it has changed. A context manager."""

    def __init__(self, what: str, total: int | None, progress: Callable[[str], None], *, done: int = 0) -> None:
        """`total`: how many there are, where that is known; `done`: how many were done before."""
        self._what = what
        self._total = total
        self._progress = progress
        self._done = done
        self._reported = -1
        self._seen = deque([(time.monotonic(), done)])
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report_loop, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._report()

    def add(self, count: int) -> None:
        """So many more are done."""
        with self._lock:
            self._done += count

    def line(self, now: float) -> str:
        """How far it is at a moment of the monotonic clock."""
        with self._lock:
            done = self._done
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()
        since, before = self._seen[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        line = f"{self._what} {done:,}"
        if self._total is not None:
            line += f" of {self._total:,}"
        if rate > 0:
            line += f", {rate:,.1f}/s"
            if self._total is not None and done < self._total:
                line += f", {_span((self._total - done) / rate)} left"
        return line

    def _report_loop(self) -> None:
        while not self._ended.wait(_REPORT_INTERVAL_S):
            self._report()

    def _report(self) -> None:
        line = self.line(time.monotonic())
        if self._done not in (self._reported, 0):
            self._reported = self._done
            self._progress(line)


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
