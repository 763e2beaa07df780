"""Untrusted text on one line: escaped where it is shown, refused where it is written."""

import re
from typing import Final

_CONTROL_PATTERN: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, surrogates, and characters that reorder the text beside them."""


def escape_control_chars(text: str) -> str:
    """Replace each unprintable character (control, bidi, surrogate, line break) by U+FFFD.

    Untrusted text could otherwise move the cursor, change colours, or look like lines of Sluice.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def escape_lines(text: str) -> str:
    """Escape each line. Lines after the first one are indented, so that they cannot pass for lines of their own."""
    return "\n  ".join(escape_control_chars(line) for line in text.split("\n"))


def require_one_line(text: str) -> str:
    """Return the text.

    Raises:
        ValueError: it has a control character, a line break, or a character that reorders the text beside it.
    """
    if found := _CONTROL_PATTERN.search(text):
        raise ValueError(f"has the control character U+{ord(found[0]):04X}; write one line of plain text")
    return text
