"""Limits the rate of requests that will be refused: those without a valid API key, and those of a key over its rate.

Refusing a request takes about a tenth of the CPU time of judging an image. So a flood of such requests would take the
gateway's event loop from everyone. Over the limit, the gateway reads the next request of a connection only if it has a
valid API key that is within its rate, or asks for the health. Other requests wait, and are not parsed meanwhile.
"""

import logging
import re
import time
from collections.abc import Callable
from typing import Final

REFUSED_PER_S: Final = 100
"""So many requests a second may be refused. The others wait."""
BURST: Final = 100
"""So many more may be refused at once."""
_HEALTH_PER_S: Final = 50
"""So many requests a second for the health do not wait, so that a flood does not make the gateway look dead."""
_WARNING_PERIOD_S: Final = 10.0
_TOKEN: Final = re.compile(rb"\r\nauthorization: *bearer +([\x21-\x7e]+)", re.IGNORECASE)
_HEALTH: Final = (b"GET /healthz ", b"GET /readyz ")

log = logging.getLogger(__name__)


class FloodGate:
    """The requests of one server. Not thread-safe."""

    def __init__(self, is_welcome: Callable[[str], bool], clock: Callable[[], float] = time.monotonic) -> None:
        """`is_welcome` says whether an API key is valid and within its rate, without a look-up."""
        self._is_welcome = is_welcome
        self._clock = clock
        self._left = float(BURST)
        self._updated_at = clock()
        self._next_health_at = float("-inf")
        self._warned_at = float("-inf")

    def count_refused(self) -> None:
        """Count a request that was refused for its API key."""
        self._update()
        self._left = max(-BURST, self._left - 1)

    @property
    def is_open(self) -> bool:
        """Whether any request may be read now."""
        if self._left < BURST:
            self._update()
        return self._left > 0

    def admits(self, start: bytes) -> bool:
        """Return whether the request that begins with `start` may be read now."""
        if self.is_open or self._is_health_check(start):
            return True
        token = _TOKEN.search(start)
        if token and self._is_welcome(token[1].decode()):
            return True
        if self._clock() - self._warned_at >= _WARNING_PERIOD_S:
            self._warned_at = self._clock()
            log.warning(
                "delaying requests that have no valid API key or are over the rate of their key: more than %d a second "
                "arrive",
                REFUSED_PER_S,
            )
        return False

    def _is_health_check(self, start: bytes) -> bool:
        now = self._clock()
        if not start.startswith(_HEALTH) or now < self._next_health_at:
            return False
        self._next_health_at = now + 1 / _HEALTH_PER_S
        return True

    def _update(self) -> None:
        now = self._clock()
        self._left = min(BURST, self._left + (now - self._updated_at) * REFUSED_PER_S)
        self._updated_at = now
