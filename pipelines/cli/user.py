"""Finds the name of the user, for the history of policies and API keys."""

import getpass
import os


def find_user_name() -> str:
    """Return the name of the user of this process, or `uid N` if the user has no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
