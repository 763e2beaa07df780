"""Prints progress on stderr, so that stdout holds results only, and writes files of results."""

from pathlib import Path

import typer

from services.core.errors import ConfigurationError


def print_progress(line: str) -> None:
    """Print a line on stderr."""
    typer.echo(line, err=True)


def write_file(file: Path, text: str) -> None:
    """Write a file that an option names.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror}") from None
