"""Text for terminals: untrusted text without control characters, errors on one line, and durations."""

from typing import Final

TEXT_LIMIT_CHARS: Final = 300
"""The text of an error of a library is cut to this length."""


def escape_control_chars(text: str) -> str:
    """Replace each unprintable character (control, bidi, surrogate, line break) by U+FFFD.

    Untrusted text could otherwise move the cursor, change colours, or look like lines of Sluice.
    """
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def to_one_line(error: BaseException) -> str:
    """Return the text of an error on one line, at most 300 characters long."""
    return " ".join(str(error).split())[:TEXT_LIMIT_CHARS]


def format_duration(seconds: float) -> str:
    """Return for example `7 s`, `5 min 3 s` or `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
