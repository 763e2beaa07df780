"""Measures how long one image spends in each step."""

import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self, TypeVar

from services.core import telemetry
from services.core.messages import Timings

T = TypeVar("T")


@dataclass(slots=True)
class StepTimer:
    """The milliseconds of each step of one submission.

    The steps are `queued`, `fetch`, `prepare` (decode and downscale), `guard` (with the first look) and `total`.
    """

    submitted_at: datetime
    started_at: datetime
    ms: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls, submitted_at: datetime | None = None) -> Self:
        """Start a timer now. `submitted_at` is by default now, too."""
        now = datetime.now(UTC)
        return cls(submitted_at or now, now)

    async def time(self, step: str, work: Awaitable[T]) -> T:
        """Await `work`, record its duration as `step`, and return its result."""
        started = time.perf_counter()
        result = await work
        self._record(step, time.perf_counter() - started)
        return result

    def finish(self, judged_at: datetime) -> Timings:
        """Return all steps, with the time in the queue and the total."""
        self._record("queued", (self.started_at - self.submitted_at).total_seconds())
        self._record("total", (judged_at - self.submitted_at).total_seconds())
        return Timings(**self.ms)

    def _record(self, step: str, seconds: float) -> None:
        seconds = max(0.0, seconds)  # `submitted_at` comes from the producer, whose clock may be ahead
        telemetry.STEP_SECONDS.observe(seconds, {"step": step})
        self.ms[step] = round(seconds * 1000)
