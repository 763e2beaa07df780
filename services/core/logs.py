"""The log of a process."""

import logging
from pathlib import Path
from typing import Final

from services.core.text import escape_control_chars, escape_lines


class OneLineFormatter(logging.Formatter):
    """Writes a record as one line, and a traceback as indented lines.

    Untrusted text in a record, such as the key of an object, can neither begin a line nor control a terminal.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name in `logging`
        return escape_control_chars(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return escape_lines(super().format(record))


FORMATTER: Final = OneLineFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")


def configure_logging(file: Path | None) -> None:
    """Write the log of this process to stderr, where Ray collects it, and to `file`. Each record is one line."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(FORMATTER)
    logging.basicConfig(level=logging.WARNING, handlers=handlers)
    for package in ("services", "pipelines"):
        logging.getLogger(package).setLevel(logging.INFO)


def escape_unconfigured_log() -> None:
    """Escape the warnings that `logging` writes to stderr in a process without handlers, as in most commands."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(OneLineFormatter())
