"""Text of others in a terminal, which must not move the cursor, change colours, or pass for lines of Sluice; and who
sits there."""

import getpass
import os


def escape_control_chars(text: str) -> str:
    """The same text on one line; what is not a visible character (control, bidi, surrogate) becomes U+FFFD."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def user() -> str:
    """The name of who runs this process, or the number of one who has none, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
