"""Text for terminals: errors on one line, and durations."""

from typing import Final

TEXT_LIMIT_CHARS: Final = 300
"""The text of an error of a library is cut to this length."""


def to_one_line(error: BaseException) -> str:
    """Return the text of an error on one line, at most 300 characters long."""
    return " ".join(str(error).split())[:TEXT_LIMIT_CHARS]


def format_duration(seconds: float) -> str:
    """Return for example `7 s`, `5 min 3 s` or `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
