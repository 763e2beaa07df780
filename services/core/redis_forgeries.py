"""Reports of entries in Redis that Sluice did not write."""

import logging
import time
from typing import Final

from services.core import telemetry

_LOG_INTERVAL_S: Final = 10.0

log = logging.getLogger(__name__)


class ForgeryReporter:
    """Counts and logs entries of Redis that Sluice did not write. A flood of them is logged now and then."""

    def __init__(self) -> None:
        self._logged_at: dict[str, float] = {}

    def report(self, kind: str, sentence: str) -> None:
        """Count an entry of a kind (see `telemetry.REDIS_FORGERIES`), and log a sentence about it."""
        telemetry.REDIS_FORGERIES.inc(1, {"kind": kind})
        now_s = time.monotonic()
        if now_s - self._logged_at.get(kind, float("-inf")) < _LOG_INTERVAL_S:
            return
        self._logged_at[kind] = now_s
        log.error("FORGERY IN REDIS: %s", sentence)
