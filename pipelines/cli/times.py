"""Points in time as people type them."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from services.core.errors import ConfigurationError

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION: Final = re.compile(r"(?:\d{1,9}[smhdw])+")


def parse_time(text: str, now: datetime) -> datetime:
    """A duration before `now` (`90s`, `15m`, `1h30m`, `7d`, `2w`), or an ISO 8601 time; UTC where it names no zone.

    Raises:
        ConfigurationError: it is neither.
    """
    try:
        if _DURATION.fullmatch(text):
            parts = re.findall(r"(\d+)([smhdw])", text)
            return now - sum((timedelta(**{_UNITS[unit]: int(number)}) for number, unit in parts), timedelta())
        parsed = datetime.fromisoformat(text)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigurationError(
            f"{text!r} is neither a duration, such as 90s, 15m, 2h or 7d, nor a time, such as 2026-11-21T10:00:00Z"
        ) from None
