"""Untrusted text on one line."""

import pytest

from services.core.text import escape_control_chars, escape_lines, require_one_line


def test_escape_control_chars_replaces_invisible_characters_only() -> None:
    escaped = escape_control_chars("a\x1b[2J\n\u202e\ud800 ä")
    assert escaped == "a\ufffd[2J\ufffd\ufffd\ufffd ä"


def test_later_lines_are_indented() -> None:
    assert escape_lines("it failed:\n12:00:00 ERROR \x1b[41mx\r\n") == (
        "it failed:\n  12:00:00 ERROR \ufffd[41mx\ufffd\n  "
    )


@pytest.mark.parametrize(
    "bad", ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066", "\ud800"]
)
def test_control_character_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=rf"U\+{ord(bad):04X}"):
        require_one_line(f"a{bad}b")


@pytest.mark.parametrize("text", ["", "Do not show 火.", "a\u00a0b", "\U0001f469\u200d\U0001f4bb", "نمی\u200cشود", "é"])
def test_text_of_any_language_is_accepted(text: str) -> None:
    assert require_one_line(text) == text
