"""The log of a process."""

import logging
from pathlib import Path


def configure_logging(file: Path | None) -> None:
    """Write the log of this process to stderr, where Ray collects it, and to `file`. Each record is one line."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers.append(logging.FileHandler(file))
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
    )
    for package in ("services", "pipelines"):
        logging.getLogger(package).setLevel(logging.INFO)
