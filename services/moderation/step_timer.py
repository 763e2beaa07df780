"""How long one image spends in each step."""

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
    """Milliseconds by step, of one submission."""

    submitted_at: datetime
    started_at: datetime
    ms: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls, submitted_at: datetime | None = None) -> Self:
        """A timer that starts now, for an image that was submitted then, or now."""
        now = datetime.now(UTC)
        return cls(submitted_at or now, now)

    async def time(self, step: str, work: Awaitable[T]) -> T:
        """The result of `work`, whose duration is recorded as `step`."""
        started = time.perf_counter()
        result = await work
        self._record(step, time.perf_counter() - started)
        return result

    def finish(self, judged_at: datetime) -> Timings:
        """All steps, with the time in the queue and the total."""
        self._record("queued", (self.started_at - self.submitted_at).total_seconds())
        self._record("total", (judged_at - self.submitted_at).total_seconds())
        return Timings(**self.ms)

    def _record(self, step: str, seconds: float) -> None:
        seconds = max(0.0, seconds)  # the producer's clock may be ahead of ours
        telemetry.STEP_SECONDS.observe(seconds, {"step": step})
        self.ms[step] = round(seconds * 1000)
