"""Prints results on stdout and progress on stderr, and writes files of results.

All output of commands passes through here, because most of it contains untrusted text: keys of objects, ids, reasons.
"""

from collections.abc import Iterable
from pathlib import Path

import typer

from services.core.errors import ConfigurationError
from services.core.text import escape_control_chars, escape_lines


def print_line(line: str) -> None:
    """Print a result for people as one line on stdout."""
    typer.echo(escape_control_chars(line))


def print_lines(lines: Iterable[str]) -> None:
    """Print a result for people on stdout."""
    for line in lines:
        print_line(line)


def print_json(document: str) -> None:
    """Print JSON as one line on stdout. Unprintable characters in texts become JSON's escapes."""
    if not document.isprintable():
        document = "".join(c if c.isprintable() else " " if c in "\t\n\r" else _escape_json(c) for c in document)
    typer.echo(document)


def print_yaml(document: str) -> None:
    """Print YAML on stdout, if all unprintable characters except line breaks are in double quotes."""
    shown = (c if c.isprintable() or c == "\n" else f"\\U{ord(c):08X}" for c in document)
    typer.echo("".join(shown), nl=False)


def print_progress(line: str) -> None:
    """Print progress or an error on stderr."""
    typer.echo(escape_lines(line), err=True)


def write_file(file: Path, text: str) -> None:
    """Write a file that an option names.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror}") from None


def _escape_json(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
