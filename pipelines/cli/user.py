"""Who changes something, and why: for the history of policies and API keys."""

import getpass
import os

from services.core.errors import ConfigurationError
from services.core.text import require_one_line


def find_user_name() -> str:
    """Return the name of the user of this process, or `uid N` if the user has no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def check_reason(why: str) -> None:
    """Check the reason of a change before the work for the change begins.

    Raises:
        ConfigurationError: the reason is not one line of plain text.
    """
    try:
        require_one_line(why)
    except ValueError as error:
        raise ConfigurationError(f"--why {error}") from None
